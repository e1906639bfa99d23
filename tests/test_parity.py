from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from scipy.stats import spearmanr

import onnx_models
from diffense import names
from diffense.errors import ParityError
from diffense.graphs import cut_graph, load_model, save_graph
from diffense.guard import Guard
from diffense.target import TensorSpec
from diffense_export.parity import Exported, check_parity, correlate_ranks, draw_smooth_noise
from diffense_export.whole import build_features, build_whole


def test_a_graph_that_differs_from_its_source_is_not_installed(guard, small_target, clean_images, tmp_path):
    model = onnx.load(guard.tapped_path)
    weight = max(model.graph.initializer, key=lambda entry: len(entry.raw_data))
    array = numpy_helper.to_array(weight) * np.float32(1.01)
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    changed = onnx_models.save(model, tmp_path / "changed.onnx")
    model.graph.input.append(helper.make_tensor_value_info(names.RAW_LOGITS, TensorProto.FLOAT, ["n", guard.manifest.classes]))
    for path, shared in ((onnx_models.save(model, tmp_path / "features.onnx"), False), (changed, True)):
        with pytest.raises(ParityError, match=r"nothing was installed|changes the predicted class"):
            check_parity(
                guard,
                Exported(small_target, path, shared, guard.denoiser_path, None, scored=False, judged=False),
                clean_images[:32],
            )


@pytest.mark.parametrize("shared", [True, False])
def test_a_verdict_of_another_alpha_or_other_logits_are_not_installed(guard, small_target, clean_images, tmp_path, shared):
    other = Guard(guard.directory, guard.manifest, replace(guard.scorer, alpha=0.9))
    given = TensorSpec(names.RAW_LOGITS, "float32", (None, guard.manifest.classes))
    graphs = {"right": guard, "wrong": other}
    for name, source in graphs.items():
        graph = build_whole(source, judged=True) if shared else build_features(source, given, scored=True, judged=True)
        save_graph(graph, tmp_path / f"{name}.onnx")
    served = Exported(small_target, tmp_path / "right.onnx", shared, None, None, scored=True, judged=True)
    assert check_parity(guard, served, clean_images[:64]).neutrality.verdict_flips == 0
    with pytest.raises(ParityError, match=f"{names.FLAGGED} of the exported graph .verdict. differs from calibration"):
        check_parity(guard, replace(served, latents=tmp_path / "wrong.onnx"), clean_images[:64])
    if not shared:
        model = onnx.load(tmp_path / "right.onnx")
        (passed,) = (node for node in model.graph.node if names.PASSED_LOGITS in node.output)
        passed.op_type = "Neg"
        with pytest.raises(ParityError, match=f"{names.PASSED_LOGITS} of the exported graph"):
            check_parity(guard, replace(served, latents=onnx_models.save(model, tmp_path / "lost.onnx")), clean_images[:64])


def test_the_cut_graph_computes_the_latents_and_nothing_else(guard, tmp_path):
    save_graph(cut_graph(load_model(guard.tapped_path), guard.manifest.input.name, [names.LATENTS]), tmp_path / "features.onnx")
    cut, whole = onnx.load(tmp_path / "features.onnx"), onnx.load(guard.tapped_path)
    assert [output.name for output in cut.graph.output] == [names.LATENTS]
    assert len(cut.graph.node) < len(whole.graph.node)


@given(st.lists(st.integers(-3, 3), min_size=3, max_size=30), st.data())
def test_rank_correlation_is_spearmans(left, data):
    right = data.draw(st.lists(st.integers(-3, 3), min_size=len(left), max_size=len(left)))
    ours = correlate_ranks(np.array(left, np.float32), np.array(right, np.float32))
    if len(set(left)) == 1 or len(set(right)) == 1:
        assert ours == 1.0
    else:
        assert ours == pytest.approx(spearmanr(left, right).statistic)


@settings(max_examples=20)
@given(st.integers(1, 5), st.tuples(st.integers(1, 40), st.integers(1, 40)), st.sampled_from([1, 3]))
def test_smooth_noise_is_smooth_seeded_and_in_range(count, size, channels):
    images = draw_smooth_noise(count, size, channels)
    assert images.shape == (count, *size, channels)
    assert images.dtype == np.uint8
    assert np.array_equal(images, draw_smooth_noise(count, size, channels))
    for axis, length in ((1, size[0]), (2, size[1])):
        steps = np.abs(np.diff(images.astype(int), axis=axis))
        assert steps.max(initial=0) <= 255 * 3 / max(1, length - 1) + 1

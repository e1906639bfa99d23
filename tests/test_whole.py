import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

import onnx_models
from diffense import names
from diffense.errors import ExportError
from diffense.fit import fit_guard
from diffense.graphs import load_model, open_session
from diffense.settings import FitSettings
from diffense.target import Target, TensorSpec
from diffense_export.repository import export_guard
from diffense_export.whole import build_features, build_whole
from shapes import draw_shapes


def run(guard, images):
    session = open_session(build_whole(guard))
    wanted = [guard.manifest.logits, names.LATENTS, names.RAW_SCORE]
    return session.run(wanted, {guard.manifest.input.name: images})


@pytest.mark.parametrize("network", ["on", "off"])
@pytest.mark.parametrize("opset", [17, 20])
def test_the_graph_gives_outputs_latents_and_score(small_target, clean_images, tmp_path, network, opset):
    target = small_target if opset == 17 else raise_opset(small_target, tmp_path / "target.onnx", opset)
    settings = FitSettings(alpha=0.05, training_steps=50, network=network)
    guard = fit_guard(Target.open(target), clean_images[:400], tmp_path / "guard", settings=settings)
    pixels = draw_shapes(40, seed=5)[0]
    logits, latents, scores = run(guard, guard.preprocessing.apply(pixels))
    known_logits, known_latents = guard.run(pixels)
    np.testing.assert_allclose(logits, known_logits, atol=1e-5)
    np.testing.assert_allclose(latents, known_latents, atol=1e-4)
    assert scores.shape == (40, 1) and scores.dtype == np.float32
    np.testing.assert_allclose(scores[:, 0], guard.score(pixels).scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
def test_a_broken_image_breaks_its_own_score_alone(guard, clean_images, value):
    images = guard.preprocessing.apply(clean_images[:3])
    expected = run(guard, images)[2]
    images[1, 0] = value
    scores = run(guard, images)[2]
    assert not np.isfinite(scores[1])
    np.testing.assert_allclose(scores[[0, 2]], expected[[0, 2]], rtol=1e-5)


@pytest.mark.parametrize(("placement", "graph"), [("shared", "m_tapped"), ("separate", "m_features")])
def test_the_score_needs_no_further_graph(guard, small_target, tmp_path, placement, graph):
    report = export_guard(guard, small_target, tmp_path / "r", "m", loop="whole", placement=placement, gateway=False)
    assert report.models == ("m", graph, "m_guard", "m_guarded")
    assert report.manifest.parity.neutrality.verdict_flips == 0


@pytest.mark.parametrize(("placement", "graph"), [("shared", "m_tapped"), ("separate", "m_features")])
def test_the_verdict_needs_no_model_of_python(guard, small_target, tmp_path, placement, graph):
    report = export_guard(guard, small_target, tmp_path / "r", "m", loop="direct", placement=placement, gateway=False)
    assert report.models == ("m", graph, "m_guarded")
    assert report.manifest.parity.neutrality.verdict_flips == 0
    stated = {c.tensor: c.identical for c in report.manifest.parity.comparisons if c.tolerance == 0}
    passed = [names.PASSED_LOGITS] if placement == "separate" else []
    assert stated == dict.fromkeys([names.P_VALUE, names.FLAGGED, *passed], True)


@pytest.mark.parametrize("name", [names.SCORE, names.FLAGGED, names.PASSED_LOGITS])
def test_a_target_that_uses_a_name_of_the_verdict_is_told(clean_images, tmp_path, name):
    model = onnx_models.plain_cnn(opset=17)
    inner = model.graph.node[0].output[0]
    for node in model.graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [name if tensor == inner else tensor for tensor in tensors]
    target = onnx_models.save(model, tmp_path / "target.onnx")
    guard = fit_guard(
        Target.open(target), clean_images[:400], tmp_path / "guard", settings=FitSettings(alpha=0.05, network="off")
    )
    placement = "separate" if name == names.PASSED_LOGITS else "shared"
    with pytest.raises(ExportError, match=f"a tensor called {name}, which the guard needs"):
        export_guard(guard, target, tmp_path / "r", "m", loop="direct", placement=placement)
    assert not (tmp_path / "r" / "m_guarded").exists()


@pytest.mark.parametrize("scored", [False, True])
def test_a_features_graph_is_given_the_logits_and_reads_them_for_the_score_alone(guard, clean_images, scored):
    given = TensorSpec(names.RAW_LOGITS, "float32", (None, guard.manifest.classes))
    session = open_session(build_features(guard, given, scored=scored))
    wanted = [names.LATENTS, names.RAW_SCORE] if scored else [names.LATENTS]
    assert [output.name for output in session.get_outputs()] == wanted
    pixels = clean_images[:8]
    image = guard.preprocessing.apply(pixels)
    logits, latents = guard.run(pixels)
    found = session.run(None, {"image": image, names.RAW_LOGITS: logits.astype(np.float32)})
    np.testing.assert_allclose(found[0], latents, atol=1e-4)
    others = session.run(None, {"image": image, names.RAW_LOGITS: np.roll(logits, 1, axis=1).astype(np.float32)})
    assert np.array_equal(found[0], others[0])
    if scored:
        np.testing.assert_allclose(found[1][:, 0], guard.score(pixels).scores, atol=1e-4, rtol=1e-4)
        assert (np.abs(found[1] - others[1]) > 0.1).all()  # another label, another score


def test_a_target_that_uses_the_name_of_the_logits_input_is_told(guard):
    with pytest.raises(ExportError, match="a tensor called image, which the guard needs; rename it"):
        build_features(guard, TensorSpec("image", "float32", (None, guard.manifest.classes)), scored=False)


@pytest.mark.parametrize("kind", ["tapped", "whole", "direct"])
def test_onnxruntime_pools_each_tap_before_it_runs_the_rest_of_the_target(guard, clean_images, tmp_path, kind):
    model = load_model(guard.tapped_path) if kind == "tapped" else build_whole(guard, judged=kind == "direct")
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    session.run(None, {guard.manifest.input.name: guard.preprocessing.apply(clean_images[:1])})
    events = json.loads(Path(session.end_profiling()).read_text())
    ran = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    names_in_order = [event["name"] for event in sorted(ran, key=lambda event: event["ts"])]
    kinds = "".join("p" if n.startswith("diffense/") else "s" if n.startswith("diffense_") else "t" for n in names_in_order)
    target_first, _, behind = kinds.partition("s")
    assert max(map(len, re.findall("t+", target_first))) <= 3  # a tap's layer, what follows it, the next; 10 without the order
    assert "p" not in behind


def test_an_older_opset_is_refused(clean_images, tmp_path):
    target = onnx_models.save(onnx_models.plain_cnn(opset=13), tmp_path / "target.onnx")
    settings = FitSettings(alpha=0.05, network="off", guide="logits")
    guard = fit_guard(Target.open(target), clean_images[:400], tmp_path / "guard", settings=settings)
    with pytest.raises(ExportError, match="opset 13"):
        build_whole(guard)


def raise_opset(source, path, opset):
    onnx.save(onnx.version_converter.convert_version(onnx.load(source), opset), path)
    return path

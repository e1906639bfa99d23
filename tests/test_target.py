import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

import onnx_models as models
from diffense.errors import TargetError
from diffense.target import Target, TensorSpec, hash_target, open_session, run_batched

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"


def open_model(model: onnx.ModelProto, folder: Path, **options: object) -> Target:
    return Target.open(models.save(model, folder / "target.onnx"), **options)  # type: ignore[arg-type]


def pixels(rows: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(5).random((rows, *shape), np.float32)


def test_open_describes_a_float_nchw_classifier(tmp_path: Path) -> None:
    target = open_model(models.plain_cnn(), tmp_path)
    assert target.input == TensorSpec("image", "float32", (None, 3, 16, 16))
    assert target.outputs == (TensorSpec("logits", "float32", (None, models.CLASSES)),)
    assert (target.logits, target.classes, target.probabilities) == ("logits", models.CLASSES, False)
    assert (target.layout, target.channels, target.size, target.batch, target.opset) == ("NCHW", 3, (16, 16), None, 17)
    assert target.sha256 == hashlib.sha256(target.path.read_bytes()).hexdigest() == hash_target(target.path)


@pytest.mark.parametrize("opset", range(11, 22))
def test_every_opset_opens_and_has_taps(opset: int, tmp_path: Path) -> None:
    target = open_model(models.plain_cnn(opset), tmp_path)
    assert (target.opset, len(target.choose_taps())) == (opset, 7)


def test_uint8_input(tmp_path: Path) -> None:
    target = open_model(models.uint8_input(), tmp_path)
    assert (target.input.dtype, target.layout, target.channels) == ("uint8", "NCHW", 3)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.UINT8])
def test_nhwc_input(dtype: int, tmp_path: Path) -> None:
    target = open_model(models.nhwc_input(dtype=dtype), tmp_path)
    assert (target.layout, target.channels, target.size) == ("NHWC", 3, (16, 16))
    assert {tap.kind for tap in target.list_taps()} == {"map", "vector"}


def test_layout_comes_from_the_graph_where_both_axes_could_hold_channels(tmp_path: Path) -> None:
    assert open_model(models.nhwc_input(size=3), tmp_path).layout == "NHWC"
    assert open_model(models.plain_cnn(size=3), tmp_path).layout == "NCHW"


def test_layout_and_channels_come_from_the_convolution_when_all_axes_are_open(tmp_path: Path) -> None:
    target = open_model(models.nhwc_input("S", "C"), tmp_path, size=(16, 12))
    assert (target.layout, target.channels, target.size) == ("NHWC", 3, (16, 12))


def test_layout_comes_from_the_shape_without_convolution_or_transpose(tmp_path: Path) -> None:
    assert open_model(models.patchify_mixer(), tmp_path).layout == "NCHW"


def test_ambiguous_layout_is_asked_for(tmp_path: Path) -> None:
    model = flat_model((5, 3, 4, 3))
    with pytest.raises(TargetError, match=r"'image' is \(5, 3, 4, 3\).*--layout"):
        open_model(model, tmp_path)
    assert open_model(model, tmp_path, layout="NHWC").size == (3, 4)
    assert open_model(model, tmp_path, layout="NCHW").size == (4, 3)


def test_open_sides_need_a_size(tmp_path: Path) -> None:
    model = models.plain_cnn(size="S")
    with pytest.raises(TargetError, match="--size"):
        open_model(model, tmp_path)
    assert open_model(model, tmp_path, size=(20, 12)).size == (20, 12)


def test_size_must_be_that_of_the_graph(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="does not take images of 32x16"):
        open_model(models.plain_cnn(), tmp_path, size=(32, 16))


def test_fixed_batch(tmp_path: Path) -> None:
    target = open_model(models.plain_cnn(batch=4), tmp_path)
    assert target.batch == 4
    session, images = open_session(target.path), pixels(6, 3, 16, 16)
    (logits,) = run_batched(session, images, None, target.batch)
    assert logits.shape == (6, models.CLASSES)
    (dynamic,) = run_batched(open_session(models.plain_cnn().SerializeToString()), images, ["logits"], None)
    np.testing.assert_allclose(logits, dynamic, atol=1e-5)


def test_batch_that_is_dynamic_by_name_only_is_run_one_by_one(tmp_path: Path) -> None:
    b = models.Builder()
    flat = b.node("Reshape", b.conv("image", 3, 4), b.ints(1, 64))
    b.head(flat, 64)
    assert open_model(b.model(("N", 3, 4, 4), models.scores()), tmp_path).batch == 1


@pytest.mark.parametrize(("end", "probabilities"), [("", False), ("Softmax", True), ("LogSoftmax", False)])
def test_only_a_softmax_gives_probabilities(end: str, probabilities: bool, tmp_path: Path) -> None:
    assert open_model(models.plain_cnn(end=end), tmp_path).probabilities is probabilities


def test_scores_that_sum_to_one_with_negative_ones_are_no_probabilities(tmp_path: Path) -> None:
    b = models.Builder()
    flat = b.node("Flatten", b.node("Relu", b.conv("image", 3, 4)))
    probabilities = b.node("Softmax", b.head(flat, 64, name="inner"), axis=1)
    b.node("Sub", b.node("Mul", probabilities, b.constant(np.float32(8))), b.constant(np.float32(1)), name="logits")
    target = open_model(b.model(("N", 3, 4, 4), models.scores()), tmp_path)
    (scores,) = run_batched(open_session(target.path), pixels(3, 3, 4, 4), None, None)
    np.testing.assert_allclose(scores.sum(axis=1), 1, atol=1e-5)
    assert not target.probabilities


@pytest.mark.parametrize("extra", ["features", "softmax"])
def test_logits_are_found_beside_features_or_their_softmax(extra: str, tmp_path: Path) -> None:
    target = open_model(models.with_features(extra), tmp_path)
    assert (target.logits, target.classes, target.probabilities) == ("logits", models.CLASSES, False)
    assert [spec.name for spec in target.outputs] == [extra, "logits"]


def test_two_heads_need_a_name(tmp_path: Path) -> None:
    model = models.with_features("aux")
    with pytest.raises(TargetError, match=r"'aux' .*'logits' .*--logits"):
        open_model(model, tmp_path)
    assert open_model(model, tmp_path, logits="aux").logits == "aux"
    with pytest.raises(TargetError, match=r"there is no output 'nothing'; the outputs are 'aux' \(5, 7\), 'logits' \(5, 7\)"):
        open_model(model, tmp_path, logits="nothing")
    with pytest.raises(TargetError, match=r"output 'label' is not float \(N, classes\) with at least 2 classes"):
        open_model(models.add_outputs(models.plain_cnn(), "N"), tmp_path, logits="label")


def test_named_softmax_is_taken(tmp_path: Path) -> None:
    target = open_model(models.with_features("softmax"), tmp_path, logits="softmax")
    assert target.probabilities
    assert target.choose_taps()[-1].name == "features"


def flat_model(shape: tuple[int | str, ...], classes: int = 4, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    b = models.Builder()
    side = int(np.prod([s for s in shape[1:] if isinstance(s, int)]))
    x = b.node("Cast", "image", to=TensorProto.FLOAT) if dtype != TensorProto.FLOAT else "image"
    hidden = b.node("Relu", b.linear(b.node("Reshape", x, b.ints(-1, side)), side, 8))
    b.head(b.node("Relu", b.linear(hidden, 8, 8)), 8, classes)
    return b.model(shape, {"logits": ("N", "classes")}, dtype=dtype)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (flat_model(("N", 12)), "no batch of images"),
        (flat_model(("N", 3, 4, 4), dtype=TensorProto.INT64), "'image' int64 .*float32 or uint8"),
        (flat_model(("N", 4, 4, 5)), "no axis 1 or 3 long"),
        (flat_model(("N", 3, 4, 4), classes=1), "at least 2 classes"),
    ],
)
def test_what_is_no_image_classifier_is_refused(model: onnx.ModelProto, message: str, tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=message):
        open_model(model, tmp_path)


def test_two_inputs_are_refused(tmp_path: Path) -> None:
    model = models.plain_cnn()
    model.graph.input.append(helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["N", 1]))
    with pytest.raises(TargetError, match=r"has 2: 'image' .*'mask'"):
        open_model(model, tmp_path)


def test_output_that_does_not_depend_on_the_image_has_no_taps(tmp_path: Path) -> None:
    b = models.Builder()
    count = b.node("Gather", b.node("Shape", "image"), b.ints(0), axis=0)
    b.node("Expand", b.random(1, 4), b.node("Concat", count, b.ints(4), axis=0), name="logits")
    target = open_model(b.model(("N", 3, 4, 4), models.scores(4)), tmp_path)
    with pytest.raises(TargetError, match="'logits' does not depend on the input"):
        target.list_taps()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "an empty file; export it again"),
        (b"garbage", "not an ONNX file"),
        (b"\x08\x07", "no graph in it; export it again"),
        (b"PK\x03\x04" + bytes(64), "not an ONNX file"),
    ],
)
def test_what_is_no_onnx_file_is_refused(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(TargetError, match=rf"broken\.onnx: {told}"):
        Target.open(path)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.999))
def test_truncated_files_are_refused(share: float, tmp_path: Path) -> None:
    content = models.two_layers().SerializeToString()
    path = tmp_path / "cut.onnx"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(TargetError, match=r"cut\.onnx"):
        Target.open(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "nowhere.onnx", "there is no such file"), (tmp_path, "this is a folder")):
        with pytest.raises(TargetError, match=message):
            Target.open(path)


def test_unknown_operators_are_refused(tmp_path: Path) -> None:
    b = models.Builder()
    b.head(b.pool(b.node("Secret", "image", domain="com.example")), 3)
    with pytest.raises(TargetError, match="Secret"):
        open_model(b.model(("N", 3, 4, 4), models.scores(), domains=("com.example",)), tmp_path)


def test_operators_of_the_runtime_and_local_functions_are_taken(tmp_path: Path) -> None:
    b = models.Builder()
    x = b.node("Gelu", b.conv("image", 3, 8), domain="com.microsoft")
    x = b.node("Block", b.conv(x, 8, 8), domain="local")
    b.head(b.pool(x), 8)
    model = b.model(("N", 3, 8, 8), models.scores(), domains=("com.microsoft", "local"))
    body = [helper.make_node("Relu", ["a"], ["inner"]), helper.make_node("Neg", ["inner"], ["b"])]
    model.functions.append(helper.make_function("local", "Block", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    target = open_model(model, tmp_path)
    assert [tap.shape for tap in target.list_taps()] == [(8, 8, 8), (8, 8, 8), (8,)]
    assert not target.load_graph().functions


@pytest.mark.parametrize("name", ["squeezenet", "shufflenet"])
def test_graphs_of_the_oldest_ir_keep_their_results(name: str) -> None:
    target = Target.open(LIGHT / f"light_{name}.onnx")
    images = pixels(1, 3, 224, 224)
    before = run_batched(open_session(target.path, threads=1), images, None, 1)
    graph = target.load_graph()
    assert len(graph.graph.inputs) == 1
    assert np.array_equal(before[0], run_batched(open_session(graph, threads=1), images, None, 1)[0])


@given(rows=st.integers(0, 9), batch=st.one_of(st.none(), st.just(4)), batch_size=st.integers(1, 5))
@settings(max_examples=20, deadline=None)
def test_run_batched_gives_every_row_its_own_result(rows: int, batch: int | None, batch_size: int) -> None:
    session = open_session(models.two_layers(batch).SerializeToString(), threads=1)
    images = pixels(rows, 1, 12, 12)
    (logits,) = run_batched(session, images, ["logits"], batch, batch_size)
    assert logits.shape == (rows, models.CLASSES)
    single = open_session(models.two_layers().SerializeToString(), threads=1)
    for row, image in zip(logits, images, strict=True):
        np.testing.assert_allclose(row, single.run(None, {"image": image[None]})[0][0], atol=1e-5)


def test_a_session_has_no_more_threads_than_the_process_has_cores() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert open_session(models.two_layers().SerializeToString()).get_session_options().intra_op_num_threads == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_run_batched_names_the_input_that_fails() -> None:
    session = open_session(models.two_layers().SerializeToString())
    with pytest.raises(TargetError, match=r"\(2, 3, 12, 12\) and type float32"):
        run_batched(session, pixels(2, 3, 12, 12), None, None)


def test_opening_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = Target.open(LIGHT / "light_squeezenet.onnx")
    target.choose_taps()
    with pytest.raises(TargetError):
        Target.open(models.save(flat_model(("N", 12)), tmp_path / "flat.onnx"))
    assert capfd.readouterr() == ("", "")

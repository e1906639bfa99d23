"""Work that is counted, forms that are timed and a cascade that is tried: numbers by hand."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.cascade import FAR, run_cascade
from benchmarks.inspection import inspect_images, score_inspected
from benchmarks.serving import floor, peers_cost, session_settings
from benchmarks.serving.work import count_work
from diffense import names


@pytest.fixture
def graph(tmp_path):
    """Convolution 3 -> 4 (3 x 3, stride 2, padded), mean, product 4 -> 5, Einstein product 5 -> 6."""
    weights = {"k": np.zeros((4, 3, 3, 3), np.float32), "m": np.zeros((4, 5), np.float32), "e": np.zeros((5, 6), np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("ReduceMean", ["c"], ["p"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["p", "m"], ["v"]),
        helper.make_node("Einsum", ["v", "e"], ["y"], equation="nd,df->nf"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, "h", "w"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6])
    made = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(a, n) for n, a in weights.items()])
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_work_is_that_of_the_products_and_of_every_tensor(graph, batch):
    work = count_work(graph, batch, 8)
    assert work.flops == 2 * batch * (4 * 4 * 4 * 27 + 4 * 5 + 5 * 6)
    assert work.bytes == 4 * (108 + 20 + 30 + batch * (3 * 8 * 8 + 4 * 4 * 4 + 4 + 5 + 6))


def test_every_form_runs_and_gives_the_guards_scores(guard, small_target, clean_images, tmp_path):
    graphs = floor.write_graphs(guard, small_target, tmp_path)
    sessions = {name: floor.open_session(path, 1) for name, path in graphs.items()}
    inputs = guard.preprocessing.apply(clean_images[:4])
    times = floor.time_in_turns(floor.list_forms(guard, sessions, inputs), 2)
    placed = {f"{placement} {loop}" for placement in ("shared", "separate", "scoring") for loop in ("bls", "fused")}
    placed |= {f"{placement} {loop}" for placement in ("shared", "separate") for loop in ("whole", "direct")}
    assert set(times) == placed | {"production"} and min(times.values()) > 0
    (logits,) = sessions["production"].run(["logits"], {"image": inputs})
    for name, given in (("whole", {}), ("scored features", {names.RAW_LOGITS: logits})):
        (scores,) = sessions[name].run([names.RAW_SCORE], {"image": inputs, **given})
        np.testing.assert_allclose(scores[:, 0], guard.score(clean_images[:4]).scores, rtol=1e-4)


def test_every_setting_of_a_session_gives_the_same_score(guard, small_target, clean_images, tmp_path):
    graph = floor.write_graphs(guard, small_target, tmp_path)["whole"]
    image = {"image": guard.preprocessing.apply(clean_images[:4])}
    forms = session_settings.list_forms(graph, image)
    assert set(forms) == {*session_settings.CHANGES, "I/O binding"}
    outputs = [output.name for output in floor.open_session(graph, 1).get_outputs()]
    for form in forms.values():
        found = form()
        arrays = found if isinstance(found, dict) else dict(zip(outputs, found, strict=True))
        np.testing.assert_allclose(arrays["diffense_raw_score"][:, 0], guard.score(clean_images[:4]).scores, rtol=1e-3)


def test_cleared_inputs_rank_below_all_others_in_their_own_order(guard, clean_images):
    view = inspect_images(guard, clean_images[:60])
    first = score_inspected(guard, view)
    whole = np.linspace(0, 1, 60)
    scores, cleared = run_cascade(guard, view, whole, 0.5)
    assert np.array_equal(cleared, guard.scorer.judge(first)[0] > 0.5) and 10 < cleared.sum() < 50
    assert scores[cleared].max() < scores[~cleared].min() - FAR / 2
    assert np.array_equal(scores[~cleared], whole[~cleared])
    assert np.array_equal(np.argsort(scores[cleared]), np.argsort(first[cleared]))
    assert not run_cascade(guard, view, whole, None)[1].any()


def test_the_tables_divide_by_what_stands_beside():
    times = {"production": 10.0, "shared bls": 12.0, "scoring bls": 1.0, "shared whole": 11.0}
    work = {"production": 1e9, "shared": 1.1e9}
    moved = {"production": 2e8, "shared": 2.1e8}
    served = {
        "target": "t", "placement": "shared", "loop": "bls", "batch": 1, "protocol": "grpc", "concurrency": 1,
        "shared_memory": False, "gateway": False, "model": "m", "machine": "a", "guarded": {"p50_ms": 18.0},
        "time_ms": {"m_guard": {"compute_infer": 1.5}},
    }  # fmt: skip
    floors = [
        {"target": "t", "batch": 1, "ms": times, "flops": work, "bytes": moved, "machine": "a"},
        {"target": "t", "batch": 1, "ms": dict.fromkeys(times, 1.0), "flops": work, "bytes": moved, "machine": "b"},
        {"target": "t", "batch": 2, "ms": times, "flops": work, "bytes": moved, "machine": "b"},
    ]
    lines = floor.render_table(floors, [served, {**served, "concurrency": 4}, {**served, "batch": 2}])
    assert lines[2:] == ["| t | shared | bls | 1 | 1.1 | 1.100 | 210 | 1.050 | 10 | 12 | 1.20 | 18 | 1.50 | 1.5 | 1.50 |"]
    (whole,) = floor.render_table(floors, [{**served, "loop": "whole"}])[2:]
    assert whole == "| t | shared | whole | 1 | 1.1 | 1.100 | 210 | 1.050 | 10 | 11 | 1.10 | 18 | 1.64 | 1.5 | – |"
    row = {"dataset": "d", "attack": "a", "peer": "strip", "forwards": 64.0, "ms": 20.0, "forward_ms": 0.4}
    dear, cheap = row, {**row, "peer": "guard", "ms": 0.1}
    lines = peers_cost.render_table([dear, cheap])
    assert lines[2].startswith("| d a | guard") and lines[3] == "| d a | strip | 64.0 | 20 | 0.4 | 50.00 |"

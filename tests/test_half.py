"""Half precision, emulated on the CPU: what stays in float32, and what float16 does to latents, scores and their order."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from sklearn.metrics import roc_auc_score

import onnx_models
import shapes
from benchmarks.half import emulate
from diffense import names
from diffense.denoiser import build_denoiser, init_weights
from diffense.errors import ExportError
from diffense.graphs import cut_graph, load_model, open_session, save_graph
from diffense.onnx_arrays import PRODUCER
from diffense_export.half import LAYERS, OWN, convert_half, drop_twins
from diffense_export.scorer import build_scorer
from diffense_export.whole import build_whole
from onnx_builder import Builder, scores

KINDS = ("tapped", "features", "whole", "denoiser", "scorer")
STYLES = (
    "plain_cnn", "preact_resnet", "vit", "vit_sequence_first", "convnext", "densenet", "two_towers", "uint8_input",
    "nhwc_input", "patchify_mixer", "half_precision",
)  # fmt: skip


def run(model, **inputs):
    session = open_session(emulate(model), optimize=False)
    wanted = [output.name for output in session.get_outputs()]
    return dict(zip(wanted, session.run(wanted, inputs), strict=True))


def list_halved(model):
    """Nodes that compute in float16, by the types that ONNX itself infers."""
    typed = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True))
    return [node for node in typed.graph if node.op_type != "Cast" and node.inputs[0].dtype == ir.DataType.FLOAT16]


def describe(model):
    tensors = (*model.graph.inputs, *model.graph.outputs)
    return [(value.name, value.dtype, tuple(str(size) for size in value.shape)) for value in tensors]


@pytest.fixture(scope="module")
def graphs(guard):
    """Each exported graph of a real guard, and the same in half precision."""
    tapped = load_model(guard.tapped_path)
    whole = {
        "tapped": tapped,
        "features": cut_graph(tapped, guard.manifest.input.name, [names.LATENTS]),
        "whole": build_whole(guard),
        "denoiser": load_model(guard.denoiser_path),
        "scorer": build_scorer(guard),
    }
    return {kind: (model, convert_half(model)) for kind, model in whole.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_outputs_keep_names_types_and_shapes(graphs, kind):
    whole, half = graphs[kind]
    assert describe(half) == describe(whole)
    onnx.checker.check_model(ir.to_proto(half), full_check=True)


@pytest.mark.parametrize("kind", ["tapped", "features", "whole"])
def test_every_layer_of_the_target_is_half_and_nothing_that_pools_or_whitens(graphs, kind):
    half = graphs[kind][1]
    halved = {node.name for node in list_halved(half)}
    layers = {node.name for node in half.graph if node.op_type in LAYERS and not node.name.startswith(OWN)}
    assert layers and layers <= halved
    assert not any(name.startswith(OWN) for name in halved)


@pytest.mark.parametrize("kind", ["denoiser", "scorer"])
def test_of_the_guards_own_graphs_only_products_with_the_networks_weights_are_half(graphs, kind):
    whole, half = graphs[kind]
    assert whole.producer_name == PRODUCER
    assert {node.op_type for node in list_halved(half)} <= {"Einsum", "MatMul"}
    products = sum(any("weight/" in str(v.name) for v in n.inputs) for n in whole.graph if n.op_type in LAYERS)
    assert len(list_halved(half)) == products > 0


def test_the_conversion_changes_no_source_and_gives_the_same_bytes_again(graphs, tmp_path):
    whole, half = graphs["tapped"]
    save_graph(half, tmp_path / "first.onnx")
    save_graph(convert_half(whole), tmp_path / "second.onnx")
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()
    assert not list_halved(whole)


def test_latents_scores_and_their_order_survive(guard, graphs):
    clean, _ = shapes.draw_shapes(150, seed=41)
    strange = np.clip(clean.astype(int) + np.random.default_rng(5).integers(-40, 41, clean.shape), 0, 255).astype(np.uint8)
    image = guard.preprocessing.apply(np.concatenate([clean, strange]))
    found = []
    for place in (0, 1):
        seen = run(graphs["tapped"][place], **{guard.manifest.input.name: image})
        latents, logits = seen[names.LATENTS], seen[guard.manifest.logits]
        cut = run(graphs["features"][place], **{guard.manifest.input.name: image})[names.LATENTS]
        assert np.abs(cut - latents).max() < 0.05  # the truncated graph ends earlier, so its last sums are float32
        scored = run(graphs["scorer"][place], **{names.LATENTS: latents, names.LOGITS: logits.reshape(len(image), -1)})
        found.append((latents, logits, scored[names.SCORE][:, 0]))
    (latents, logits, score), (half_latents, half_logits, half_score) = found
    assert 0 < np.abs(half_latents - latents).max() < 0.1  # of unit variance
    assert np.sqrt(np.mean((half_latents - latents) ** 2)) < 0.01
    assert np.abs(half_logits - logits).max() < 0.01 * np.abs(logits).max()
    alike = half_logits.reshape(len(image), -1).argmax(1) == logits.reshape(len(image), -1).argmax(1)
    best = np.sort(logits.reshape(len(image), -1), axis=1)
    moved = np.abs(half_logits - logits).reshape(len(image), -1).max(axis=1)
    assert alike.mean() >= 0.99 and (best[:, -1] - best[:, -2] <= 2 * moved)[~alike].all(), (
        "only where two are as good as equal"
    )
    assert np.abs(half_score - score)[alike].max() < 0.1
    truth = np.repeat([0, 1], len(clean))
    before, after = roc_auc_score(truth, score), roc_auc_score(truth, half_score)
    assert 0.6 < before < 1.0, "a set on which nothing can get worse proves nothing"
    assert abs(after - before) < 0.002


def test_a_guided_step_is_the_same_to_three_digits():
    rows, taps, width, guide = 4, 3, 16, 5
    generator = np.random.default_rng(6)
    weights = init_weights(taps, width, guide, generator)
    weights["out"] = generator.standard_normal(weights["out"].shape).astype(np.float32) / 10
    model = build_denoiser(weights, (rows, taps, width), label_guidance=1.0)
    inputs = {
        names.NOISED: generator.standard_normal((4, rows, taps * width)).astype(np.float32),
        names.SIGMA: np.full((4, rows, taps), 0.7, np.float32),
        names.GUIDE: generator.standard_normal((4, guide)).astype(np.float32),
    }
    before, after = (run(graph, **inputs)[names.SAMPLE] for graph in (model, convert_half(model)))
    assert 0 < np.abs(after - before).max() < 0.003 * np.abs(before).max()


@pytest.mark.parametrize("style", STYLES)
def test_classifiers_of_every_style_keep_their_answers(tmp_path, style):
    path = onnx_models.save(getattr(onnx_models, style)(), tmp_path / "target.onnx")
    half = convert_half(load_model(path))
    assert list_halved(half)
    session = open_session(path)
    entry = session.get_inputs()[0]
    image = np.random.default_rng(7).random([4, *entry.shape[1:]]).astype(np.float32)
    image = image if entry.type == "tensor(float)" else (image * 255).astype(np.uint8)
    before = session.run(["logits"], {entry.name: image})[0]
    assert np.abs(run(half, **{entry.name: image})["logits"] - before).max() < 0.01 * np.abs(before).max()


def test_normalisation_in_the_graph_sees_the_input_in_full(tmp_path):
    b = Builder(21)
    x = b.node("Sub", "image", b.node("Constant", value_float=4096.3))  # float16 knows every fourth number up there
    for cin in (3, 8):
        x = b.node("Relu", b.conv(x, cin, 8, stride=2))
    b.head(b.pool(x), 8)
    model = load_model(onnx_models.save(b.model(("N", 3, 16, 16), scores()), tmp_path / "target.onnx"))
    image = 4096 + np.random.default_rng(8).random((4, 3, 16, 16)).astype(np.float32)
    before, after = run(model, image=image)["logits"], run(convert_half(model), image=image)["logits"]
    assert np.abs(after - before).max() < 0.01 * np.abs(before).max()


def test_variances_beyond_what_float16_holds_are_summed_in_float32(tmp_path):
    b = Builder(22, opset=13)
    patches = b.node("Reshape", b.node("Conv", "image", b.random(16, 3, 4, 4), strides=[4, 4]), b.ints(0, 16, 16))
    x = b.node("Mul", b.linear(b.node("Transpose", patches, perm=[0, 2, 1]), 16, 16), b.constant(np.float32(5000)))
    b.head(b.node("ReduceMean", b.linear(b.layer_norm(x, 16), 16, 16), axes=[1], keepdims=0), 16)
    model = load_model(onnx_models.save(b.model(("N", 3, 16, 16), scores()), tmp_path / "target.onnx"))
    image = np.random.default_rng(10).random((4, 3, 16, 16)).astype(np.float32)
    before, after = run(model, image=image)["logits"], run(convert_half(model), image=image)["logits"]
    assert np.abs(after - before).max() < 0.01 * np.abs(before).max()


def test_an_output_behind_a_softmax_is_rounded_once_not_thrice(tmp_path):
    model = load_model(onnx_models.save(onnx_models.with_features("softmax"), tmp_path / "target.onnx"))
    image = np.random.default_rng(9).random((8, 3, 16, 16)).astype(np.float32)
    answer = run(convert_half(model), image=image)
    assert np.allclose(answer["softmax"].sum(axis=1), 1, atol=1e-6)
    assert answer["softmax"].dtype == answer["logits"].dtype == np.float32


def test_casts_that_give_one_value_twice_become_one():
    nodes = [helper.make_node("Cast", ["a"], ["a32"], to=1), helper.make_node("Cast", ["a"], ["a32"], to=1)]
    nodes += [helper.make_node("Exp", ["a32"], ["b"]), helper.make_node("Cast", ["a"], ["c"], to=1)]
    graph = helper.make_graph(nodes, "g", [], [])
    drop_twins(graph)
    assert [list(node.output) for node in graph.node] == [["a32"], ["b"], ["c"]]


def test_graphs_with_branches_are_refused(tmp_path):
    model = load_model(onnx_models.save(onnx_models.branching(), tmp_path / "target.onnx"))
    with pytest.raises(ExportError, match="use float32"):
        convert_half(model)

"""The score, and the verdict, in the graph that gives the latents, with the target's outputs or without them."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from diffense.errors import ExportError
from diffense.graphs import cut_graph, load_model
from diffense.guard import Guard
from diffense.names import LATENTS, LOGITS, PASSED_LOGITS, RAW_SCORE, SCORE, VERDICT_TENSORS
from diffense.onnx_arrays import OPSET
from diffense.target import TensorSpec
from diffense_export.scorer import build_scorer
from diffense_export.verdict import NOTHING, build_verdict

PREFIX = "diffense_scorer/"
VERDICT_PREFIX = "diffense_verdict/"


def build_whole(guard: Guard, *, judged: bool = False) -> ir.Model:
    """The tapped graph with the scorer behind it: the target's outputs, the latents, and ``diffense_raw_score`` (N, 1) float32.

    Args:
        guard: whose target and latents it is.
        judged: whether the verdict stands behind the score, three outputs in its place (`build_verdict`).

    Raises:
        ExportError: the target has tensors of those names, or its opset is older than the scorer's operators.
    """
    model = load_model(guard.tapped_path)
    logits = next(value for value in model.graph.outputs if value.name == guard.manifest.logits)
    append_score(model, guard, logits, judged=judged)
    return model


def build_features(guard: Guard, logits: TensorSpec, *, scored: bool, judged: bool = False) -> ir.Model:
    """The truncated target: the latents (N, K d) float32, and ``diffense_raw_score`` (N, 1) float32 where it is wanted.

    The logits are an input in any case, so that an ensemble runs this graph when the target has run and not beside it, on the
    same cores (docs/decisions/0024).

    Args:
        guard: whose target and latents it is.
        logits: name, dtype and shape, (N, C) or (N, C, 1, ...), of that input.
        scored: whether the scorer stands behind the latents.
        judged: whether the verdict stands behind the score, three outputs in its place (`build_verdict`), and the logits come
            out as they went in, ``diffense_passed_logits``: an ensemble cannot show a tensor that a later step reads.

    Raises:
        ExportError: a tensor of the target has that name, or its opset is older than the scorer's operators.
    """
    model = cut_graph(load_model(guard.tapped_path), guard.manifest.input.name, [LATENTS])
    batch, *sizes = logits.shape
    shape = ir.Shape(["batch" if batch is None else batch, *sizes])
    _check_names(model.graph, [logits.name, *([PASSED_LOGITS] if judged else [])])
    dtype = ir.DataType.from_numpy(np.dtype(logits.dtype))
    given = ir.val(logits.name, dtype, shape)
    model.graph.inputs.append(given)
    if scored:
        append_score(model, guard, given, judged=judged)
    if judged:
        passed = ir.node("Identity", [given], name=VERDICT_PREFIX + "passed")
        model.graph.append(passed)
        value = passed.outputs[0]
        value.name, value.dtype, value.shape = PASSED_LOGITS, dtype, shape
        model.graph.outputs.append(value)
    return model


def append_score(model: ir.Model, guard: Guard, logits: ir.Value, *, judged: bool = False) -> None:
    """Put the scorer behind the (N, K d) latents of a graph that gives or is given these logits, (N, C) or (N, C, 1, ...).

    Raises:
        ExportError: the target has a tensor of a name that is given here, or its opset is older than the scorer's operators.
    """
    opset = model.opset_imports[""]
    if opset < OPSET:
        raise ExportError(f"the target has opset {opset}, the score needs {OPSET}; export it anew or use another loop")
    graph = model.graph
    _check_names(graph, [RAW_SCORE, *(VERDICT_TENSORS if judged else ())])
    latents = next(value for value in graph.outputs if value.name == LATENTS)
    flat, nothing = _read_logits(graph, logits, guard.manifest.classes)
    scored = _graft(model, build_scorer(guard), {LATENTS: latents, LOGITS: flat}, PREFIX)
    raw = _spoil(graph, scored[SCORE], latents, guard.manifest.latent_dim)
    if not judged:
        graph.outputs.append(raw)
    else:
        verdict = _graft(model, build_verdict(guard), {RAW_SCORE: raw, NOTHING: nothing}, VERDICT_PREFIX)
        for name, value in verdict.items():
            value.name = name
            graph.outputs.append(value)
    passes.RemoveUnusedNodesPass()(model)  # the scorer's p-value, and what only a verdict reads


def _check_names(graph: ir.Graph, wanted: Sequence[str]) -> None:
    taken = ir.convenience.create_value_mapping(graph)
    for name in wanted:
        if name in taken:
            raise ExportError(f"the target has a tensor called {name}, which the guard needs; rename it")


def _graft(model: ir.Model, part: ir.Model, given: Mapping[str, ir.Value], prefix: str) -> dict[str, ir.Value]:
    """Move a graph of ours, with these values as its inputs, into a model; gives its outputs by name."""
    moved, graph = _raise_opset(part, model.opset_imports[""]).graph, model.graph
    for value in list(moved.inputs):
        ir.convenience.replace_all_uses_with(value, given[str(value.name)])
    outputs = {str(value.name): value for value in moved.outputs}
    moved.outputs.clear()
    for name, value in list(moved.initializers.items()):
        del moved.initializers[name]
        value.name = prefix + name
        graph.initializers.add(value)
    for node in list(moved):
        moved.remove(node)
        node.name = prefix + str(node.name)
        for value in node.outputs:
            value.name = prefix + str(value.name)
        graph.append(node)
    return outputs


def _raise_opset(part: ir.Model, opset: int) -> ir.Model:
    if opset == OPSET:
        return part
    return ir.from_proto(onnx.version_converter.convert_version(ir.to_proto(part), opset))


def _spoil(graph: ir.Graph, score: ir.Value, latents: ir.Value, width: int) -> ir.Value:
    """The score, NaN where a latent is no number: comparisons inside the scorer hide it, and the guard sees the score alone."""
    nothing = _cancel(graph, latents, width, PREFIX)
    # A difference: onnxruntime would join product and sum to one node, and run the scorer's part for the logits first.
    spoiled = ir.node("Sub", [score, nothing.outputs[0]], name=PREFIX + "spoiled")
    graph.extend([nothing, spoiled])
    result = spoiled.outputs[0]
    result.name, result.dtype, result.shape = RAW_SCORE, ir.DataType.FLOAT, score.shape
    return result


def _read_logits(graph: ir.Graph, logits: ir.Value, classes: int) -> tuple[ir.Value, ir.Value]:
    """Logits of any float type and shape as (N, C) float32, which the scorer takes, and `NOTHING` of them.

    Their nodes stand before the pooling, or onnxruntime would run the whole target for them first (`diffense.latent`).
    """
    shape = ir.Value(name=PREFIX + "rows", const_value=ir.tensor([-1, classes], ir.DataType.INT64))
    graph.initializers.add(shape)
    wide = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT.value}, name=PREFIX + "cast")
    flat = ir.node("Reshape", [wide.outputs[0], shape], name=PREFIX + "flatten")
    for node, name in ((wide, "wide"), (flat, "flat")):
        node.outputs[0].name = PREFIX + name
    nothing = _cancel(graph, flat.outputs[0], classes, VERDICT_PREFIX)
    maker, nodes = logits.producer(), [wide, flat, nothing]
    if maker is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(maker, nodes)
    return flat.outputs[0], nothing.outputs[0]


def _cancel(graph: ir.Graph, value: ir.Value, width: int, prefix: str) -> ir.Node:
    """A node that makes of (N, width) an (N, 1) of zeros, NaN where a row holds what is no finite number.

    A product with zeros, since TensorRT's compiler fails on the same written as a product and a sum.
    """
    zeros = ir.Value(name=prefix + "zeros", const_value=ir.tensor(np.zeros((width, 1), np.float32)))
    graph.initializers.add(zeros)
    node = ir.node("MatMul", [value, zeros], name=prefix + "nothing")
    node.outputs[0].name = node.name
    return node

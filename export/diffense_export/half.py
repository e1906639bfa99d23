"""Half precision: the layers of an exported graph in float16, what normalises, whitens and scores in float32.

The precision is part of the graph, as strongly typed TensorRT networks want it; inputs and outputs keep their types. The
conversion is onnxruntime's; around it this module chooses the nodes and takes away the casts that would round for nothing.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Final

import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes
from onnxruntime.transformers import float16

from diffense.errors import ExportError
from diffense.graphs import first_line
from diffense.onnx_arrays import PRODUCER, WEIGHT_PREFIX
from diffense_export.whole import PREFIX, VERDICT_PREFIX

LAYERS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"})
# Sums over many values and what overflows or underflows at 65504 and 6e-5: variances, their epsilons, exponentials.
DELICATE: Final = frozenset({
    "Exp", "GroupNormalization", "InstanceNormalization", "LayerNormalization", "Log", "LogSoftmax", "LpNormalization", "Pow",
    "ReduceL2", "ReduceMean", "ReduceSum", "ReduceSumSquare", "Softmax", "Sqrt", *float16.DEFAULT_OP_BLOCK_LIST,
})  # fmt: skip
OWN: Final = ("diffense/", PREFIX, VERDICT_PREFIX)  # nodes that pool, whiten, score and judge
NARROWED: Final = ("graph_input_cast", "_cast_to_fp16_node")  # how onnxruntime calls the casts that it adds
WIDENED: Final = ("graph_output_cast", "_cast_to_fp32_node")


def convert_half(model: ir.Model) -> ir.Model:
    """Give the same graph with its layers in float16; the model is left unchanged.

    Of a classifier that is everything from the first to the last layer, so input normalisation, pooling, whitening and
    softmax stay in float32; of a denoiser or scorer the products with the network's weights alone. Sums, roots and powers
    stay in float32 everywhere. A graph without layers comes back as it is.

    Args:
        model: a features, tapped, whole, denoiser or scorer graph, or a classifier.

    Raises:
        ExportError: the graph has branches or loops, or onnxruntime cannot convert it.
    """
    model = model.clone()
    if any(_is_graph(attribute) for node in model.graph for attribute in node.attributes.values()):
        raise ExportError("the graph has branches or loops, which cannot be converted to float16; use float32")
    try:
        ir.external_data.load_to_model(model)
        passes.LiftConstantsToInitializersPass(lift_all_constants=True)(model)
        for index, node in enumerate(model.graph):
            node.name = f"{node.name or node.op_type}/{index}"  # the converter knows nodes by their names
        halved = find_halved(model)
        if not halved:
            return model
        kept = [str(node.name) for node in model.graph if node not in halved]
        logging.getLogger(float16.__name__).setLevel(logging.ERROR)
        proto = ir.to_proto(model)
        del proto.graph.value_info[:]  # onnx_ir lists the weights there, which the converter would take for computed values
        proto = float16.convert_float_to_float16(proto, keep_io_types=True, op_block_list=[], node_block_list=kept)
        drop_twins(proto.graph)
        converted: ir.Model = ir.from_proto(proto)
    except (ValueError, RuntimeError, OSError, AssertionError) as error:
        raise ExportError(f"the graph cannot be converted to float16 ({first_line(error)}); use float32") from error
    join_casts(converted)
    passes.RemoveUnusedNodesPass()(converted)
    converted.graph.sort()
    return converted


def drop_twins(graph: onnx.GraphProto) -> None:
    """Keep one of the nodes that give the same values: onnxruntime before 1.32 adds a cast for each node that reads one."""
    kept = list({tuple(node.output): node for node in graph.node}.values())
    del graph.node[:]
    graph.node.extend(kept)


def find_halved(model: ir.Model) -> set[ir.Node]:
    """The nodes that are to compute in float16."""
    if model.producer_name == PRODUCER:
        return {node for node in model.graph if node.op_type in LAYERS and _has_weight(node)}
    layers = [node for node in model.graph if node.op_type in LAYERS and not str(node.name).startswith(OWN)]
    behind, before = _reach(layers, _list_users), _reach(layers, _list_makers)
    halved = {node for node in behind & before if node.op_type not in DELICATE}
    # What stands between delicate nodes alone, as the epsilon between a variance and its root, would round in vain.
    return {node for node in halved if node in layers or not halved.isdisjoint((*_list_makers(node), *_list_users(node)))}


def join_casts(model: ir.Model) -> None:
    """Let float32 pass from one float32 node to the next, where the converter made it float16 on the way."""
    for node in list(model.graph):
        source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if not (_is_added(node, WIDENED) and source is not None and _is_added(source, NARROWED)):
            continue
        value, shown = source.inputs[0], node.outputs[0]
        if value is None:
            continue
        if shown.is_graph_output():
            if value.is_graph_input() or value.is_graph_output():
                continue
            name, places = shown.name, [i for i, output in enumerate(model.graph.outputs) if output is shown]
            shown.name, value.name = f"{name}/unused", name
            value.type, value.shape = shown.type, shown.shape
            for place in places:
                model.graph.outputs[place] = value
        ir.convenience.replace_all_uses_with(shown, value)


def _list_users(node: ir.Node) -> list[ir.Node]:
    return [user for output in node.outputs for user, _ in output.uses()]


def _list_makers(node: ir.Node) -> list[ir.Node]:
    makers = (value.producer() for value in node.inputs if value is not None)
    return [maker for maker in makers if maker is not None]


def _reach(starts: Iterable[ir.Node], follow: Callable[[ir.Node], list[ir.Node]]) -> set[ir.Node]:
    found, queue = set(starts), list(starts)
    while queue:
        new = {node for node in follow(queue.pop()) if node not in found}
        found |= new
        queue.extend(new)
    return found


def _has_weight(node: ir.Node) -> bool:
    return any(value is not None and str(value.name).startswith(WEIGHT_PREFIX) for value in node.inputs)


def _is_added(node: ir.Node, marks: tuple[str, str]) -> bool:
    name = str(node.name)
    return node.op_type == "Cast" and (name.startswith(marks[0]) or name.endswith(marks[1]))


def _is_graph(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)

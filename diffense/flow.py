"""How an image flows through a graph: what lies on a path to the logits, which tensors cut it, what their axes mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

SHAPE_ONLY: Final = frozenset({"Shape", "Size"})  # their result tells nothing of the pixels
MOVEMENT: Final = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Dropout", "Cast"})
CHANNEL_SECOND: Final = frozenset(
    {
        "Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool",
        "GlobalMaxPool", "GlobalLpPool", "BatchNormalization", "InstanceNormalization", "GroupNormalization", "LRN",
        "DepthToSpace", "SpaceToDepth",
    }
)  # fmt: skip
RESHAPED: Final = {("NCHW", 3): "NCT", ("NHWC", 3): "NTC", ("NCT", 4): "NCHW", ("NTC", 4): "NHWC"}


@dataclass(frozen=True)
class Flow:
    """The part of a graph that lies on a path from the image to the logits.

    Attributes:
        nodes: in an order in which they can run.
        tensors: the image, then what these nodes hand on along such paths, in the same order; the last is the logits.
        cuts: the tensors that every path passes, in order; the first is the image, the last the logits.
        reads: which of the tensors each node reads, also from within its subgraphs; twice when it reads one twice.
    """

    nodes: tuple[ir.Node, ...]
    tensors: tuple[ir.Value, ...]
    cuts: tuple[ir.Value, ...]
    reads: Mapping[ir.Node, tuple[ir.Value, ...]]


def trace_flow(graph: ir.Graph, image: ir.Value, logits: ir.Value) -> Flow:
    """Follow the image to the logits; shape arithmetic and constants are no part of the flow.

    A tensor cuts the flow when the number of paths through it is the number of all paths (counted exactly). When no
    path leads from the image to the logits, the flow has no nodes and no cuts.
    """
    mentioned = {node: _read_values(node) for node in graph}
    carried = {image}
    for node in graph:
        if node.op_type not in SHAPE_ONLY and not carried.isdisjoint(mentioned[node]):
            carried.update(node.outputs)
    live = {logits} & carried
    for node in reversed(graph):
        if not live.isdisjoint(node.outputs):
            live.update(value for value in mentioned[node] if value in carried)
    if image not in live:
        return Flow((), (), (), {})
    behind = live - {image}
    nodes = tuple(node for node in graph if not behind.isdisjoint(node.outputs))
    tensors = (image, *(value for node in nodes for value in node.outputs if value in live))
    reads = {node: tuple(value for value in mentioned[node] if value in live) for node in nodes}
    to_here = {image: 1}
    for node in nodes:
        paths = sum(to_here[value] for value in reads[node])
        to_here.update((value, paths) for value in node.outputs if value in live)
    from_here = dict.fromkeys(tensors, 0) | {logits: 1}
    for node in reversed(nodes):
        paths = sum(from_here[value] for value in node.outputs if value in live)
        for value in reads[node]:
            from_here[value] += paths
    cuts = tuple(value for value in tensors if to_here[value] * from_here[value] == to_here[logits])
    return Flow(nodes, tensors, cuts, reads)


def name_axes(flow: Flow, shapes: Mapping[str, Sequence[int]], layout: str) -> dict[str, str]:
    """What the axes of each tensor mean: ``NCHW``, ``NHWC``, ``NTC`` or ``TNC`` (tokens), ``NC`` (vectors), or another order.

    Tensors whose axes cannot be named (five axes, heads of an attention) are left out.

    Args:
        flow: of the graph.
        shapes: measured, by tensor name.
        layout: of the image.
    """
    axes = {str(flow.tensors[0].name): layout}
    batch = shapes[str(flow.tensors[0].name)][0]
    for node in flow.nodes:
        for value in node.outputs:
            name = str(value.name)
            named = _name_output(node, flow.reads[node], shapes, axes, shapes[name], batch) if name in shapes else None
            if named is not None:
                axes[name] = named
    return axes


def _name_output(
    node: ir.Node,
    read: Sequence[ir.Value],
    shapes: Mapping[str, Sequence[int]],
    axes: Mapping[str, str],
    shape: Sequence[int],
    batch: int,
) -> str | None:
    rank = len(shape)
    if node.op_type in CHANNEL_SECOND:
        return {3: "NCT", 4: "NCHW"}.get(rank)
    sources = [str(value.name) for value in read if value.name in shapes]
    known = [axes[name] for name in sources if name in axes]
    if node.op_type == "Transpose" and sources:
        order = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(rank)[::-1]
        return "".join(known[0][axis] for axis in order) if known else None
    if node.op_type == "Reshape" and known and sources:
        before = shapes[sources[0]]
        if tuple(before) == tuple(shape):
            return known[0]
        named = RESHAPED.get((known[0], rank))
        same_channels = named is not None and shape[named.index("C")] == before[known[0].index("C")]
        return named if same_channels else _guess(shape, batch)
    return next((name for name in known if len(name) == rank), _guess(shape, batch))


def _guess(shape: Sequence[int], batch: int) -> str | None:
    tokens = "TNC" if len(shape) == 3 and shape[0] != batch == shape[1] else "NTC"
    return {2: "NC", 3: tokens}.get(len(shape))


def _read_values(node: ir.Node) -> list[ir.Value]:
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            bodies: Sequence[ir.Graph] = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies = attribute.as_graphs()
        else:
            continue
        for body in bodies:
            values.extend(iter(body.outputs))
            values.extend(value for inner in body.all_nodes() for value in inner.inputs if value is not None)
    return values

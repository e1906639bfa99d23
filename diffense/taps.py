"""Taps: inner tensors of a classifier from which the guard reads, found and chosen from the graph and one run of it."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Final, Literal

import onnx_ir as ir

from diffense.errors import TargetError
from diffense.flow import MOVEMENT, Flow

Kind = Literal["map", "map_nhwc", "tokens", "vector"]

MOST_TAPS: Final = 10
USUAL_TAPS: Final = 8
ENOUGH_CUTS: Final = 6  # with fewer, block ends that do not cut the graph are taken as well
FEWEST_TAPS: Final = 2  # one tap has no shallower one to be explained from
LAST_THIRD: Final = 2 / 3  # of the depth; there a triggered input goes over from its own class to the attacker's
STEM: Final = 0.02  # of the depth: stage ends this close (convolution, then pooling) count as one
KINDS: Final[dict[str, Kind]] = {"NCHW": "map", "NHWC": "map_nhwc", "NTC": "tokens", "TNC": "tokens", "NC": "vector"}
FLOATS: Final = frozenset({"float16", "float32", "float64"})
WEIGHTED: Final = frozenset(
    {
        "Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv", "DeformConv", "Gemm", "FusedGemm", "QGemm",
        "MatMul", "FusedMatMul", "MatMulInteger", "MatMulNBits", "QLinearMatMul", "Einsum", "Attention",
        "MultiHeadAttention", "GroupQueryAttention", "LSTM", "GRU", "RNN",
    }
)  # fmt: skip
POOLING: Final = frozenset(
    {"MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool", "Resize", "Upsample"}
)
JOINS: Final = frozenset({"Add", "Sum", "Concat", "Mul"})
ACTIVATIONS: Final = frozenset(
    {
        "Relu", "LeakyRelu", "PRelu", "Clip", "Elu", "Celu", "Selu", "Gelu", "HardSwish", "Mish", "Softplus", "Swish",
        "QuickGelu", "Tanh",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Tap:
    """A tensor of the target that the guard reads.

    Attributes:
        name: of the tensor.
        kind: ``map`` is (N, C, H, W), ``map_nhwc`` (N, H, W, C), ``tokens`` (N, T, D), ``vector`` (N, D).
        shape: without the batch, measured; a map of one position keeps its axes, (C, 1, 1).
        depth: share of the graph's compute nodes that it depends on, above 0 and below 1.
        dtype: of the tensor, float16 inside graphs of half precision.
        batch_axis: 1 for tokens of a graph that has them as (T, N, D), as PyTorch's transformers do by default.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    depth: float
    dtype: str = "float32"
    batch_axis: int = 0

    @property
    def positions(self) -> int:
        """How many places of the image (pixels of a map, tokens) it has a value for; 1 for a vector."""
        return _count_positions(self.kind, self.shape)


@dataclass(frozen=True)
class Measured:
    """A flow whose tensors were measured by running the graph once: shapes with the batch, types, names of the axes."""

    flow: Flow
    batch: int
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    axes: dict[str, str]

    def describe(self, value: ir.Value, depth: float) -> Tap | None:
        """The tap that this tensor would be; None where it is no map, tokens or vector of each image."""
        name = str(value.name)
        shape, dtype = self.shapes.get(name, ()), self.dtypes.get(name, "")
        axes = self.axes.get(name, "")
        if axes not in KINDS or dtype not in FLOATS or 0 in shape:
            return None
        place = axes.index("N")
        if shape[place] != self.batch:
            return None
        return Tap(name, KINDS[axes], (*shape[:place], *shape[place + 1 :]), depth, dtype, place)


def find_taps(measured: Measured) -> list[Tap]:
    """All tensors worth tapping, shallow to deep, from behind the first layer to in front of the last.

    They are the tensors that every path from image to logits passes, one for each run of operators that a runtime
    may fuse (convolution, normalisation, activation): the last of the run. Where fewer than six are found, joins and
    activations that a path bypasses are listed too.
    """
    flow = measured.flow
    regions = _split_regions(flow)
    head = max((i for i, region in enumerate(regions) if any(n.op_type in WEIGHTED for n in region)), default=0)
    depths = _measure_depths(flow)
    runs = [run for run in _group_runs(measured, regions)[1:] if run[0] <= head]
    found = [tap for run in runs if (tap := _represent(measured, regions, run, depths)) is not None]
    if len(found) < ENOUGH_CUTS:
        inner = [node for region in regions[_first_heavy(measured, regions) : head] for node in region]
        found += [tap for node in inner if (tap := _block_end(measured, node, depths)) is not None]
    return sorted(found, key=lambda tap: tap.depth)


def choose_taps(candidates: Sequence[Tap]) -> list[Tap]:
    """Eight taps (up to ten where there are more stages), or all where there are no more than eight; shallow to deep.

    The penultimate representation and the ends of the stages (the last tensor of each resolution) come first; then the
    widest gaps in depth are filled. In the last third of the depth taps stand at least as close as eight evenly spread ones
    would, as far as there are candidates and no more than ten taps (docs/decisions/0015).

    Raises:
        TargetError: fewer than two candidates.
    """
    if len(candidates) < FEWEST_TAPS:
        raise TargetError(
            f"the graph has {len(candidates)} tensors that can be tapped, and a guard needs {FEWEST_TAPS}; "
            "name others with --taps if the classifier has inner layers"
        )
    if len(candidates) <= USUAL_TAPS:
        return list(candidates)
    ends = [i for i, (tap, deeper) in enumerate(pairwise(candidates)) if tap.positions != deeper.positions]
    ends = [i for i, j in pairwise([*ends, len(candidates)]) if _is_apart(candidates, i, j)]
    if len(ends) >= MOST_TAPS:
        ends = [ends[round(i * (len(ends) - 1) / (USUAL_TAPS - 2))] for i in range(USUAL_TAPS - 1)]
    chosen = {len(candidates) - 1, *ends}
    while len(chosen) < USUAL_TAPS:
        gaps = {
            i: min(abs(tap.depth - candidates[j].depth) for j in chosen) for i, tap in enumerate(candidates) if i not in chosen
        }
        chosen.add(max(gaps, key=lambda i: (gaps[i], i)))
    return [candidates[i] for i in sorted(_close_gaps(candidates, chosen))]


def named_taps(measured: Measured, names: Sequence[str]) -> list[Tap]:
    """The taps with these names, shallow to deep, whatever the order of the names.

    Raises:
        TargetError: a name twice, none at all, not between image and logits, or no map, tokens or vector of each image.
    """
    if not names or len(set(names)) < len(names):
        raise TargetError("name each tap once, and at least one")
    depths = _measure_depths(measured.flow)
    inner = {str(value.name): value for value in measured.flow.tensors[1:-1]}
    taps = []
    for name in names:
        if name not in inner:
            near = difflib.get_close_matches(name, inner, n=3, cutoff=0.3)
            hint = f"; near it are {', '.join(near)}" if near else ""
            raise TargetError(f"tap {name!r} is no tensor between the image and the logits{hint}")
        tap = measured.describe(inner[name], depths[inner[name]])
        if tap is None:
            raise TargetError(
                f"tap {name!r} has shape {measured.shapes.get(name)} and type {measured.dtypes.get(name)}: "
                "it must be a float map or a vector with the batch first, or tokens, (N,T,D) or (T,N,D)"
            )
        taps.append(tap)
    return sorted(taps, key=lambda tap: tap.depth)


def _close_gaps(candidates: Sequence[Tap], chosen: set[int]) -> set[int]:
    """With the candidates that divide wide gaps of the last third evenly, the widest gap first."""
    depth = [tap.depth for tap in candidates]
    usual = 1.0 / (USUAL_TAPS - 1)
    late = [pair for pair in pairwise(sorted(chosen)) if depth[pair[0]] >= LAST_THIRD]
    closed = set(chosen)
    for low, high in sorted(late, key=lambda pair: depth[pair[0]] - depth[pair[1]]):
        pieces = math.ceil((depth[high] - depth[low]) / usual)
        places = [depth[low] + (depth[high] - depth[low]) * k / pieces for k in range(1, pieces)]
        between = range(low + 1, high)
        for place in places if between else ():
            if len(closed) < MOST_TAPS:
                closed.add(min(between, key=lambda i: abs(depth[i] - place)))
    return closed


def _is_apart(candidates: Sequence[Tap], index: int, deeper: int) -> bool:
    return deeper == len(candidates) or candidates[deeper].depth - candidates[index].depth > STEM


def _count_positions(kind: Kind, shape: Sequence[int]) -> int:
    sides = {"map": shape[1:], "map_nhwc": shape[:-1], "tokens": shape[:-1], "vector": ()}[kind]
    return prod(sides)


def _measure_depths(flow: Flow) -> dict[ir.Value, float]:
    """For each tensor the share of compute nodes among its ancestors; sets of nodes are the bits of an integer."""
    before: dict[ir.Value, int] = {flow.tensors[0]: 0}
    for i, node in enumerate(flow.nodes):
        bits = 0 if node.op_type in MOVEMENT else 1 << i
        for value in flow.reads[node]:
            bits |= before[value]
        before.update(dict.fromkeys(node.outputs, bits))
    total = sum(node.op_type not in MOVEMENT for node in flow.nodes)
    return {value: bits.bit_count() / max(total, 1) for value, bits in before.items()}


def _split_regions(flow: Flow) -> list[list[ir.Node]]:
    """The nodes between each cut and the next."""
    cut_index = {value: i for i, value in enumerate(flow.cuts)}
    level: dict[ir.Value, int] = {flow.cuts[0]: 0}
    regions: list[list[ir.Node]] = [[] for _ in flow.cuts[1:]]
    for node in flow.nodes:
        index = max(level[value] for value in flow.reads[node])
        regions[index].append(node)
        level.update((value, cut_index.get(value, index)) for value in node.outputs)
    return regions


def _is_heavy(measured: Measured, regions: list[list[ir.Node]], index: int) -> bool:
    """Whether a runtime would not fuse this region into what stands before it."""
    if any(node.op_type in WEIGHTED or node.op_type in POOLING for node in regions[index]):
        return True
    before, after = (measured.shapes.get(str(measured.flow.cuts[i].name), ()) for i in (index, index + 1))
    return prod(before) != prod(after)


def _first_heavy(measured: Measured, regions: list[list[ir.Node]]) -> int:
    return next((i for i in range(len(regions)) if _is_heavy(measured, regions, i)), len(regions))


def _group_runs(measured: Measured, regions: list[list[ir.Node]]) -> list[list[int]]:
    """Indices of the cuts, in runs without a heavy region inside."""
    runs = [[0]]
    for index in range(len(regions)):
        if _is_heavy(measured, regions, index):
            runs.append([])
        runs[-1].append(index + 1)
    return runs


def _represent(measured: Measured, regions: list[list[ir.Node]], run: list[int], depths: dict[ir.Value, float]) -> Tap | None:
    """The tap of a run: behind its last arithmetic, before data is only moved; rather a vector than a one-pixel map."""
    arithmetic = max(
        (k for k, cut in enumerate(run) if any(node.op_type not in MOVEMENT for node in regions[cut - 1])), default=0
    )
    order = [*run[arithmetic:], *reversed(run[:arithmetic])]
    cuts = [measured.flow.cuts[i] for i in order if not _is_padded(measured.flow.cuts[i])]
    taps = [tap for cut in cuts if (tap := measured.describe(cut, depths[cut])) is not None]
    if not taps:
        return None
    vector = next((tap for tap in taps if tap.kind == "vector"), taps[0])
    return vector if taps[0].positions == 1 else taps[0]


def _is_padded(value: ir.Value) -> bool:
    """Whether padding made it, which a runtime fuses into the convolution behind."""
    producer = value.producer()
    return producer is not None and producer.op_type == "Pad"


def _block_end(measured: Measured, node: ir.Node, depths: dict[ir.Value, float]) -> Tap | None:
    """The output of a join or activation as a tap, where it is no cut and not among operators that are fused."""
    value = node.outputs[0]
    joins = node.op_type in JOINS and len(measured.flow.reads[node]) > 1
    if value not in depths or value in measured.flow.cuts or not (joins or node.op_type in ACTIVATIONS):
        return None
    readers = [reader for reader in measured.flow.nodes if value in measured.flow.reads[reader]]
    if len(readers) == 1 and readers[0].op_type not in WEIGHTED | POOLING:
        return None
    tap = measured.describe(value, depths[value])
    return tap if tap is not None and tap.positions > 1 else None

"""What a classifier takes and gives: its image input, layout, size, batch, and which output holds the logits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from diffense.errors import TargetError
from diffense.flow import trace_flow
from diffense.graphs import first_line

Layout = Literal["NCHW", "NHWC"]

COLOURS: Final = (3, 1)  # channel counts of images, the likelier first
IMAGE_DTYPES: Final = ("float32", "uint8")
PROBE_BATCH: Final = 5  # unlike the sizes that other axes have, so that the batch axis is known by it
TYPES: Final = {
    "float": "float32", "double": "float64", "float16": "float16", "bfloat16": "bfloat16", "bool": "bool",
    "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64",
    "uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64",
}  # fmt: skip
FLOATS: Final = frozenset({"float16", "float32", "float64"})
CHANNEL_KEEPING: Final = frozenset(
    {
        "Cast", "Sub", "Div", "Mul", "Add", "Identity", "Clip", "QuantizeLinear", "DequantizeLinear", "Pad", "Resize",
        "Split", "Concat", "Slice",
    }
)  # fmt: skip
CHANNEL_SECOND: Final = frozenset({"Conv", "QLinearConv", "MaxPool", "AveragePool", "BatchNormalization", "LRN"})
TRANSPOSED: Final[dict[tuple[int, ...], Layout]] = {(0, 3, 1, 2): "NHWC", (0, 2, 3, 1): "NCHW"}
SOFTMAX_LIKE: Final = frozenset({"Softmax", "LogSoftmax", "Sigmoid", "Identity", "Cast", "Reshape", "Flatten", "Squeeze"})


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: name, numpy dtype (the runtime's words for what is no tensor), shape with None = dynamic."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class ProbeRun:
    """One run on random pixels.

    Attributes:
        batch: the batch that the graph must be run with; None when any will do.
        channels: that it took.
        pixels: what was run, in the dtype and layout of the input.
        results: every output by name.
    """

    batch: int | None
    channels: int
    pixels: NDArray[Any]
    results: dict[str, NDArray[Any]]


def describe_tensor(node: onnxruntime.NodeArg) -> TensorSpec:
    """The specification of an input or output of a session."""
    inner = node.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(side if isinstance(side, int) and side > 0 else None for side in node.shape)
    return TensorSpec(node.name, TYPES.get(inner, node.type), shape)


def check_input(path: Path, session: onnxruntime.InferenceSession) -> TensorSpec:
    """The one image input of a session.

    Raises:
        TargetError: several inputs, not four axes, or neither float32 nor uint8.
    """
    inputs = [describe_tensor(node) for node in session.get_inputs()]
    listed = ", ".join(f"{spec.name!r} {spec.dtype} {_show(spec.shape)}" for spec in inputs) or "none"
    if len(inputs) != 1:
        raise TargetError(f"{path}: an image classifier has one input, this graph has {len(inputs)}: {listed}")
    if len(inputs[0].shape) != 4 or inputs[0].dtype not in IMAGE_DTYPES:
        raise TargetError(
            f"{path}: input {listed} is no batch of images; it must be float32 or uint8 with four axes, (N,C,H,W) or (N,H,W,C)"
        )
    return inputs[0]


def find_layout(path: Path, graph: ir.Graph, image: TensorSpec, layout: Layout | None) -> tuple[Layout, tuple[int, ...]]:
    """The layout of the input and the channel counts to try, likeliest first.

    What the graph does to the image decides (a transpose, a convolution), then which axis is 1 or 3 long.

    Raises:
        TargetError: no axis can hold the channels, both can and nothing tells which, or the graph contradicts `layout`.
    """
    possible: list[Layout] = [name for name in ("NCHW", "NHWC") if _channels_at(image, name) in (None, *COLOURS)]
    what = f"{path}: input {image.name!r} is {_show(image.shape)}"
    if not possible:
        raise TargetError(f"{what}: no axis 1 or 3 long for the channels; only grey and colour images can be guarded")
    traced, weights_take = _trace_layout(graph, image.name)
    if layout is not None:
        if layout not in possible:
            raise TargetError(f"{what}: --layout {layout} would mean {_channels_at(image, layout)} channels, not 1 or 3")
        found = layout
    elif traced is not None:
        if traced not in possible:
            raise TargetError(f"{what} and used as {traced}: {_channels_at(image, traced)} channels, not 1 or 3")
        found = traced
    else:
        certain = [name for name in possible if _channels_at(image, name) is not None]
        if len(certain) != 1:
            raise TargetError(f"{what}: the axis of the channels cannot be told; give --layout NCHW or --layout NHWC")
        found = certain[0]
    known = _channels_at(image, found) or weights_take
    if known is not None and known not in COLOURS:
        raise TargetError(f"{what} and its first convolution takes {known} channels; only 1 and 3 can be guarded")
    return found, (known,) if known else COLOURS


def find_size(path: Path, image: TensorSpec, layout: Layout, size: tuple[int, int] | None) -> tuple[int, int]:
    """Height and width of the input.

    Raises:
        TargetError: they are dynamic and not given, or given and not those of the graph.
    """
    sides = image.shape[2:] if layout == "NCHW" else image.shape[1:3]
    what = f"{path}: input {image.name!r} is {_show(image.shape)}"
    if size is None:
        height, width = sides
        if height is None or width is None:
            raise TargetError(f"{what}: height and width are open; give them with --size")
        return height, width
    if min(size) < 1 or any(side not in (None, given) for side, given in zip(sides, size, strict=True)):
        raise TargetError(f"{what} in layout {layout}, which does not take images of {size[0]}x{size[1]}")
    return size


def try_run(
    path: Path,
    session: onnxruntime.InferenceSession,
    image: TensorSpec,
    layout: Layout,
    channels: Sequence[int],
    size: tuple[int, int],
) -> ProbeRun:
    """Run the graph on random pixels: a few images where the batch is dynamic, else its fixed batch.

    A graph that declares a dynamic batch and holds a fixed one inside is run with one image at a time.

    Raises:
        TargetError: it runs in no way.
    """
    failures = []
    fixed = image.shape[0]
    attempts: tuple[tuple[int | None, int], ...] = ((fixed, fixed),) if fixed else ((None, PROBE_BATCH), (1, 1))
    for batch, rows in attempts:
        for count in channels:
            pixels = draw_pixels(image.dtype, layout, count, size, rows)
            try:
                arrays = session.run(None, {image.name: pixels})
            except Exception as error:  # onnxruntime's exceptions share no base class
                failures.append(f"{pixels.shape}: {first_line(error)}")
                continue
            results = {node.name: result for node, result in zip(session.get_outputs(), arrays, strict=True)}
            if any(_has_rows(result, rows) for result in results.values()):
                return ProbeRun(batch, count, pixels, results)
            failures.append(f"{pixels.shape}: no output has {rows} rows")
    raise TargetError(f"{path}: the graph does not run on images ({failures[0]}); check --size and --layout")


def draw_pixels(dtype: str, layout: Layout, channels: int, size: tuple[int, int], rows: int) -> NDArray[Any]:
    """Random images, always the same: 0 to 255 as uint8, 0 to 1 as float32."""
    shape = (rows, channels, *size) if layout == "NCHW" else (rows, *size, channels)
    levels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    return levels if dtype == "uint8" else levels.astype(np.float32) / np.float32(255)


def find_logits(
    path: Path,
    graph: ir.Graph,
    image: str,
    results: Mapping[str, NDArray[Any]],
    rows: int,
    wanted: str | None,
) -> str:
    """The output with a number for each class.

    Of the outputs that are (N, classes), those that lead to another of them are features; of logits and their softmax,
    the logits count.

    Args:
        path: named in errors.
        graph: of the classifier.
        image: name of the input.
        results: every output of a run.
        rows: of that run.
        wanted: the name that the user gave.

    Raises:
        TargetError: there is no such output, it holds no class scores, or several could be the logits.
    """
    shapes = ", ".join(f"{name!r} {np.shape(result)}" for name, result in results.items())
    if wanted is not None and wanted not in results:
        raise TargetError(f"{path}: there is no output {wanted!r}; the outputs are {shapes}")
    fitting = [name for name, result in results.items() if _is_scores(result, rows)]
    if not fitting or (wanted is not None and wanted not in fitting):
        subject = "no output is" if wanted is None else f"output {wanted!r} is not"
        raise TargetError(
            f"{path}: {subject} float (N, classes) with at least 2 classes; for {rows} images the outputs are {shapes}"
        )
    if wanted is not None:
        return wanted
    values = {str(value.name): value for value in graph.outputs}
    ends = set(fitting)
    for earlier in fitting:
        for later in fitting:
            nodes = trace_flow(graph, values[earlier], values[later]).nodes if earlier != later else ()
            if nodes:
                ends.discard(later if all(node.op_type in SOFTMAX_LIKE for node in nodes) else earlier)
    candidates = [name for name in fitting if name in ends]
    if len(candidates) != 1:
        listed = ", ".join(f"{name!r} {np.shape(results[name])}" for name in candidates)
        raise TargetError(f"{path}: several outputs could be the logits: {listed}; name one with --logits")
    return candidates[0]


def _channels_at(image: TensorSpec, layout: Layout) -> int | None:
    return image.shape[layout.index("C")]


def _trace_layout(graph: ir.Graph, image: str) -> tuple[Layout | None, int | None]:
    """Layout and channel count as the first transpose and the first convolution behind the image tell them."""
    layout: Layout | None = None
    waiting = [next(value for value in graph.inputs if value.name == image)]
    for value in waiting:
        for node in value.consumers():
            if node.op_type == "Transpose" and layout is None and "perm" in node.attributes:
                layout = TRANSPOSED.get(tuple(node.attributes["perm"].as_ints()))
                waiting += node.outputs if layout == "NHWC" else ()
            elif node.op_type in CHANNEL_SECOND:
                kernel = node.inputs[1].shape if node.op_type == "Conv" and node.inputs[1] is not None else None
                groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
                taken = kernel[1] if kernel is not None else None
                return layout or "NCHW", taken * groups if isinstance(taken, int) else None
            elif node.op_type in CHANNEL_KEEPING:
                waiting += (output for output in node.outputs if output not in waiting)
    return layout, None


def _has_rows(result: Any, rows: int) -> bool:
    return isinstance(result, np.ndarray) and result.ndim > 0 and len(result) == rows


def _is_scores(result: Any, rows: int) -> bool:
    return (
        _has_rows(result, rows)
        and result.dtype.name in FLOATS
        and result.ndim >= 2
        and result.shape[1] >= 2
        and result.size == rows * result.shape[1]
    )


def _show(shape: Sequence[int | None]) -> str:
    return f"({', '.join('?' if side is None else str(side) for side in shape)})"

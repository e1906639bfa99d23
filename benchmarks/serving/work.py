"""The work of an ONNX graph by counting: floating-point operations of its products, bytes of its weights and activations."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

IMAGE_DIMS: Final = 4

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Work:
    """Work of one run.

    Attributes:
        flops: two for each multiplication with its addition, in convolutions, matrix and Einstein products; no others.
        bytes: of all weights, read once, and all activations, written once, before any fusion.
    """

    flops: float
    bytes: float

    def __add__(self, other: Self) -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


def count_work(path: Path, batch: int, side: int) -> Work:
    """Count one run of a graph on so many images, or on so many rows where it takes vectors.

    The shapes are those of real runs at batch 1 and 2, and all work is linear in the batch beyond a constant.

    Args:
        path: of the ONNX file.
        batch: first size of every input.
        side: height and width of images.
    """
    one, two = (count_run(onnx.load(path), size, side) for size in (1, 2))
    more = batch - 1
    return Work(one.flops + more * (two.flops - one.flops), one.bytes + more * (two.bytes - one.bytes))


def count_run(model: onnx.ModelProto, batch: int, side: int) -> Work:
    """Run a graph with every tensor between its nodes as an output, and add up."""
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    known = {value.name for value in model.graph.output}
    made = [name for node in model.graph.node for name in node.output if name]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in known)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    fed = {node.name: fill(node.shape, batch, side) for node in session.get_inputs()}
    tensors = weights | fed | dict(zip(made, session.run(made, fed), strict=True))
    shapes = {name: array.shape for name, array in tensors.items()}
    flops = sum(count_products(node, shapes) for node in model.graph.node)
    return Work(flops, sum(array.nbytes for array in tensors.values()))


def fill(shape: list[Any], batch: int, side: int) -> NDArray[np.float32]:
    """Zeros of an input's shape, its open sizes closed."""
    closed = [size if isinstance(size, int) else side for size in shape]
    return np.zeros([batch, *(closed[1:] if len(shape) == IMAGE_DIMS else shape[1:])], np.float32)


def count_products(node: onnx.NodeProto, shapes: Shapes) -> float:
    """Floating-point operations of one node; 0 where it is no product."""
    if node.op_type == "Einsum":
        return count_einsum(node, shapes)
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return 0.0
    left, right, result = shapes[node.input[0]], shapes[node.input[1]], shapes[node.output[0]]
    if node.op_type == "Conv":
        inner = float(np.prod(right[1:]))
    else:
        turned = any(a.name == "transA" and a.i for a in node.attribute)
        inner = float(left[0 if turned else -1])
    return 2.0 * float(np.prod(result)) * inner


def count_einsum(node: onnx.NodeProto, shapes: Shapes) -> float:
    """Two for every combination of all its indices."""
    equation = next(a.s for a in node.attribute if a.name == "equation").decode()
    sizes: dict[str, int] = {}
    for letters, name in zip(equation.replace(" ", "").split("->")[0].split(","), node.input, strict=True):
        sizes |= dict(zip(letters, shapes[name], strict=True))
    return 2.0 * float(np.prod(list(sizes.values())))

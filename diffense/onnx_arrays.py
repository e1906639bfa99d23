"""Arrays that record ONNX nodes instead of computing, so that a formula written once also becomes a graph.

The arithmetic of the guard (`precond`, `denoiser`, `sampling`, `scoring`) is written against a small part of the array API
and takes its namespace ``xp`` as an argument: ``numpy`` at run time, ``torch`` in training, `OnnxNamespace` for export.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import tape

OPSET: Final = 17  # known to every Triton container since 2022 and to TensorRT 8.6 and later
IR_VERSION: Final = 8
PRODUCER: Final = "diffense"
WEIGHT_PREFIX: Final = "weight/"


class OnnxArray:
    """One tensor of a graph under construction; operators append float32 nodes to the tape of its namespace."""

    __array_ufunc__ = None  # so that `numpy_array @ onnx_array` lands in our reflected operators

    def __init__(self, namespace: OnnxNamespace, value: ir.Value) -> None:
        self.namespace, self.value = namespace, value

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a stored weight; what is computed has no shape here."""
        if self.value.const_value is None:
            raise TypeError(f"{self.value.name} has no fixed shape")
        return tuple(self.value.const_value.shape.numpy())

    def _binary(self, op: str, left: Any, right: Any) -> OnnxArray:
        return self.namespace.record(op, left, right)

    def __add__(self, other: Any) -> OnnxArray:
        return self._binary("Add", self, other)

    def __radd__(self, other: Any) -> OnnxArray:
        return self._binary("Add", other, self)

    def __sub__(self, other: Any) -> OnnxArray:
        return self._binary("Sub", self, other)

    def __rsub__(self, other: Any) -> OnnxArray:
        return self._binary("Sub", other, self)

    def __mul__(self, other: Any) -> OnnxArray:
        return self._binary("Mul", self, other)

    def __rmul__(self, other: Any) -> OnnxArray:
        return self._binary("Mul", other, self)

    def __truediv__(self, other: Any) -> OnnxArray:
        return self._binary("Div", self, other)

    def __rtruediv__(self, other: Any) -> OnnxArray:
        return self._binary("Div", other, self)

    def __matmul__(self, other: Any) -> OnnxArray:
        return self._binary("MatMul", self, other)

    def __rmatmul__(self, other: Any) -> OnnxArray:
        return self._binary("MatMul", other, self)


class OnnxNamespace:
    """The part of the array API that the guard's formulas use, recorded as ONNX nodes (opset 17)."""

    def __init__(self) -> None:
        self.tape = tape.Tape()

    def input(self, name: str, shape: Sequence[str | int]) -> OnnxArray:
        """Declare a float32 graph input."""
        return OnnxArray(self, ir.val(name, dtype=ir.DataType.FLOAT, shape=shape))

    def constant(self, array: Any, dtype: type[np.generic] = np.float32) -> ir.Value:
        """Store an array as an initializer."""
        name = f"constant_{len(self.tape.initializers)}"
        return self.tape.initializer(ir.tensor(np.ascontiguousarray(array, dtype=dtype), name=name))

    def weight(self, name: str, array: NDArray[np.float32]) -> OnnxArray:
        """Store a named array once; it can be read back by its name."""
        return OnnxArray(self, self.tape.initializer(ir.tensor(np.ascontiguousarray(array), name=WEIGHT_PREFIX + name)))

    def record(self, op: str, *operands: Any, **attributes: Any) -> OnnxArray:
        """Append one node; operands that are no `OnnxArray` become float32 initializers."""
        values = [o.value if isinstance(o, OnnxArray) else self.constant(o) for o in operands]
        return self._append(op, values, attributes)

    def _append(self, op: str, values: Sequence[ir.Value], attributes: dict[str, Any] | None = None) -> OnnxArray:
        output = self.tape.op(op, values, attributes or None)
        output.name = f"value_{len(self.tape.nodes)}"
        return OnnxArray(self, output)

    def asarray(self, array: Any) -> Any:
        """Numbers stay numbers until a node takes them in as a float32 initializer."""
        return array

    def log(self, x: OnnxArray) -> OnnxArray:
        """Natural logarithm."""
        return self.record("Log", x)

    def sqrt(self, x: OnnxArray) -> OnnxArray:
        """Square root."""
        return self.record("Sqrt", x)

    def tanh(self, x: OnnxArray) -> OnnxArray:
        """Hyperbolic tangent."""
        return self.record("Tanh", x)

    def sigmoid(self, x: OnnxArray) -> OnnxArray:
        """``1 / (1 + exp(-x))``."""
        return self.record("Sigmoid", x)

    def maximum(self, x: OnnxArray, y: Any) -> OnnxArray:
        """Elementwise maximum."""
        return self.record("Max", x, y)

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        """Reshape; one dimension may be -1; numbers stay numbers."""
        if not isinstance(x, OnnxArray):
            return np.reshape(x, shape)
        return self._append("Reshape", [x.value, self.constant(shape, np.int64)])

    def concatenate(self, arrays: Sequence[OnnxArray], axis: int) -> OnnxArray:
        """Join arrays along one axis."""
        return self.record("Concat", *arrays, axis=axis)

    def einsum(self, equation: str, x: Any) -> Any:
        """Einstein sum of one array that moves its axes and sums none; numbers stay numbers."""
        if not isinstance(x, OnnxArray):
            return np.einsum(equation, x)
        before, after = equation.split("->")
        return self.record("Transpose", x, perm=[before.index(axis) for axis in after])

    def sum(self, x: OnnxArray, axis: int) -> OnnxArray:
        """Sum over one axis."""
        return self._append("ReduceSum", [x.value, self.constant([axis], np.int64)], {"keepdims": 0})

    def mean(self, x: OnnxArray, axis: int) -> OnnxArray:
        """Mean over one axis."""
        return self.record("ReduceMean", x, axes=[axis], keepdims=0)

    def amin(self, x: OnnxArray, axis: int) -> OnnxArray:
        """Minimum over one axis."""
        return self.record("ReduceMin", x, axes=[axis], keepdims=0)

    def amax(self, x: OnnxArray, axis: int) -> OnnxArray:
        """Maximum over one axis."""
        return self.record("ReduceMax", x, axes=[axis], keepdims=0)

    def exp(self, x: OnnxArray) -> OnnxArray:
        """Exponential."""
        return self.record("Exp", x)

    def abs(self, x: OnnxArray) -> OnnxArray:
        """Absolute value."""
        return self.record("Abs", x)

    def where(self, condition: OnnxArray, x: Any, y: Any) -> OnnxArray:
        """``x`` where the condition holds, else ``y``."""
        return self.record("Where", condition, x, y)

    def is_at_most(self, x: OnnxArray, limit: Any) -> OnnxArray:
        """Whether ``x <= limit``, booleans; false for NaN."""
        return self.record("LessOrEqual", x, limit)

    def to_uint8(self, x: OnnxArray) -> OnnxArray:
        """Whole numbers from 0 to 255 as uint8, for an output."""
        cast = self.record("Cast", x, to=int(ir.DataType.UINT8))
        cast.value.dtype = ir.DataType.UINT8
        return cast

    def one_hot_argmax(self, x: OnnxArray, classes: int) -> OnnxArray:
        """(N, classes) -> (N, classes), one at the first largest entry of each row."""
        index = self.record("ArgMax", x, axis=1, keepdims=0)
        depth, values = self.constant([classes], np.int64), self.constant([0, 1])
        return self._append("OneHot", [index.value, depth, values], {"axis": 1})

    def count_at_least(self, sorted_values: NDArray[np.float32], x: OnnxArray) -> OnnxArray:
        """(N,) -> (N,) float32: how many of the values are >= x."""
        column = self.reshape(x, (-1, 1))
        at_least = self.record("GreaterOrEqual", np.asarray(sorted_values, dtype=np.float32)[None, :], column)
        return self.sum(self.record("Cast", at_least, to=int(ir.DataType.FLOAT)), axis=1)

    def build(self, inputs: Sequence[OnnxArray], outputs: dict[str, tuple[OnnxArray, Sequence[str | int]]]) -> ir.Model:
        """Close the graph; outputs are name -> (array, shape), float32 but for those of `to_uint8`."""
        for name, (array, shape) in outputs.items():
            array.value.name = name
            array.value.shape = ir.Shape(shape)
            array.value.dtype = array.value.dtype or ir.DataType.FLOAT
        graph = ir.Graph(
            [array.value for array in inputs],
            [array.value for array, _ in outputs.values()],
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports={"": OPSET},
            name="diffense",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name=PRODUCER)

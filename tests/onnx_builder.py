"""Builds small ONNX graphs node by node, in the forms that exporters write."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

CLASSES = 7
OPSET = 17


class Builder:
    """Appends nodes to a graph; every method takes and gives tensor names."""

    def __init__(self, seed: int = 0, opset: int = OPSET) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def constant(self, array: NDArray[Any]) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def random(self, *shape: int) -> str:
        fan_in = int(np.prod(shape[1:])) if len(shape) > 2 else shape[0]
        return self.constant(self.rng.normal(0, (1.5 / fan_in) ** 0.5, shape).astype(np.float32))

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def node(self, op: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        output = name or f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], domain=domain, **attributes))
        return output

    def conv(self, x: str, cin: int, cout: int, kernel: int = 3, stride: int = 1, group: int = 1) -> str:
        weight, bias = self.random(cout, cin // group, kernel, kernel), self.constant(np.zeros(cout, np.float32))
        return self.node("Conv", x, weight, bias, pads=[kernel // 2] * 4, strides=[stride] * 2, group=group)

    def norm(self, x: str, channels: int) -> str:
        ones, zeros = np.ones(channels, np.float32), np.zeros(channels, np.float32)
        return self.node("BatchNormalization", x, *map(self.constant, (ones, zeros, zeros, ones)))

    def linear(self, x: str, cin: int, cout: int) -> str:
        return self.node("Add", self.node("MatMul", x, self.random(cin, cout)), self.constant(np.zeros(cout, np.float32)))

    def head(self, x: str, cin: int, classes: int = CLASSES, name: str = "logits") -> str:
        return self.node("Gemm", x, self.random(cin, classes), self.constant(np.zeros(classes, np.float32)), name=name)

    def pool(self, x: str) -> str:
        return self.node("Flatten", self.node("GlobalAveragePool", x))

    def layer_norm(self, x: str, width: int) -> str:
        scale, bias = self.constant(np.ones(width, np.float32)), self.constant(np.zeros(width, np.float32))
        if self.opset >= 17:
            return self.node("LayerNormalization", x, scale, bias, axis=-1)
        centred = self.node("Sub", x, self.node("ReduceMean", x, axes=[-1]))
        squared = self.node("Pow", centred, self.constant(np.float32(2)))
        spread = self.node("Add", self.node("ReduceMean", squared, axes=[-1]), self.constant(np.float32(1e-5)))
        return self.node("Add", self.node("Mul", self.node("Div", centred, self.node("Sqrt", spread)), scale), bias)

    def gelu(self, x: str) -> str:
        error = self.node("Erf", self.node("Div", x, self.constant(np.float32(2**0.5))))
        gate = self.node("Add", error, self.constant(np.float32(1)))
        return self.node("Mul", self.node("Mul", x, gate), self.constant(np.float32(0.5)))

    def model(
        self,
        shape: tuple[int | str, ...],
        outputs: dict[str, tuple[int | str, ...]],
        dtype: int = TensorProto.FLOAT,
        image: str = "image",
        domains: tuple[str, ...] = (),
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "classifier",
            [helper.make_tensor_value_info(image, dtype, shape)],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, sides) for name, sides in outputs.items()],
            self.weights,
        )
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
        onnx.checker.check_model(model)
        return model


def scores(classes: int = CLASSES) -> dict[str, tuple[int | str, ...]]:
    return {"logits": ("N", classes)}

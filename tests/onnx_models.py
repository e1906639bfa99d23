"""Small ONNX image classifiers with seeded random weights, made without torch, in the styles that exporters write."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnx_builder import CLASSES, OPSET, Builder, scores

MAP = ("N", 8, 8, 8)


def plain_cnn(
    opset: int = OPSET, batch: int | str = "N", size: int | str = 16, channels: int = 3, end: str = ""
) -> onnx.ModelProto:
    """Three stages of two convolutions with normalisation and ReLU, pooled; `end` is an operator behind the logits."""
    b = Builder(1, opset)
    x, cin = "image", channels
    for stage, width in enumerate((8, 16, 24)):
        for step in range(2):
            stride = 2 if stage and step == 0 else 1
            x = b.node("Relu", b.norm(b.conv(x, cin, width, stride=stride), width), name=f"stage{stage}_{step}")
            cin = width
    x = b.head(b.pool(x), cin, name="inner" if end else "logits")
    if end:
        b.node(end, x, name="logits", axis=1)
    return b.model((batch, channels, size, size), {"logits": (batch, CLASSES)})


def silu_cnn() -> onnx.ModelProto:
    """Convolutions with x * sigmoid(x), whose products are called ``active<i>``."""
    b = Builder(12)
    x, cin = "image", 3
    for i, width in enumerate((8, 8, 16, 16, 24, 24)):
        x = b.norm(b.conv(x, cin, width, stride=1 + i % 2), width)
        x, cin = b.node("Mul", x, b.node("Sigmoid", x), name=f"active{i}"), width
    b.head(b.node("Flatten", b.node("GlobalAveragePool", x), name="pooled"), cin)
    return b.model(("N", 3, 16, 16), scores())


def branching() -> onnx.ModelProto:
    """An If whose branches read ``shallow`` and a deeper tensor from the outer graph; then a convolution."""
    b = Builder(13)
    x = b.node("Relu", b.conv("image", 3, 8), name="shallow")
    y = b.node("Relu", b.conv(x, 8, 8), name="bypassed")
    branches = {
        key: helper.make_graph(
            [helper.make_node(op, [x, y], [key])], key, [], [helper.make_tensor_value_info(key, TensorProto.FLOAT, MAP)]
        )
        for key, op in (("then_branch", "Add"), ("else_branch", "Sub"))
    }
    z = b.node("If", b.constant(np.array(True)), name="branched", **branches)
    z = b.node("Relu", b.conv(z, 8, 8), name="last")
    b.head(b.node("Flatten", b.node("GlobalAveragePool", z), name="pooled"), 8)
    return b.model(("N", 3, 8, 8), scores())


def folded_tokens() -> onnx.ModelProto:
    """Folds tokens into the batch between its two blocks, ``folded`` being (N * tokens, width)."""
    b = Builder(15)
    patches = b.node("Relu", b.node("Conv", "image", b.random(8, 3, 4, 4), strides=[4, 4]))
    tokens = b.node("Transpose", b.node("Reshape", patches, b.ints(0, 8, 16)), perm=[0, 2, 1])
    folded = b.node("Relu", b.linear(b.node("Reshape", tokens, b.ints(-1, 8)), 8, 8), name="folded")
    tokens = b.node("Relu", b.linear(b.node("Reshape", folded, b.ints(-1, 16, 8)), 8, 8), name="unfolded")
    b.head(b.node("ReduceMean", tokens, axes=[1], keepdims=0, name="pooled"), 8)
    return b.model(("N", 3, 16, 16), scores())


def half_precision() -> onnx.ModelProto:
    """Takes and gives float32, computes in float16 between casts."""
    b = Builder(14)
    x = b.node("Cast", "image", to=TensorProto.FLOAT16)
    for cin in (3, 8):
        weight = b.constant(b.rng.normal(0, 0.3, (8, cin, 3, 3)).astype(np.float16))
        x = b.node("Relu", b.node("Conv", x, weight, pads=[1] * 4, strides=[2, 2]))
    weight = b.constant(b.rng.normal(0, 0.3, (8, CLASSES)).astype(np.float16))
    b.node("Cast", b.node("MatMul", b.pool(x), weight), name="logits", to=TensorProto.FLOAT)
    return b.model(("N", 3, 16, 16), scores())


def two_layers(batch: int | None = None) -> onnx.ModelProto:
    """A net with two inner layers only, without any convolution behind the first."""
    b = Builder(2)
    x = b.node("Relu", b.conv("image", 1, 8, stride=2))
    b.head(b.pool(x), 8)
    return b.model((batch or "N", 1, 12, 12), {"logits": (batch or "N", CLASSES)})


def preact_resnet(opset: int = OPSET, blocks: int = 2) -> onnx.ModelProto:
    """Three stages of pre-activation residual blocks; outputs of the blocks are called ``block<stage>_<step>``."""
    b = Builder(3, opset)
    x, cin = b.conv("image", 3, 8), 8
    for stage, width in enumerate((8, 16, 32)):
        for step in range(blocks):
            stride = 2 if stage and step == 0 else 1
            inner = b.node("Relu", b.norm(x, cin))
            branch = b.node("Relu", b.norm(b.conv(inner, cin, width, stride=stride), width))
            skip = x if cin == width and stride == 1 else b.conv(inner, cin, width, kernel=1, stride=stride)
            x, cin = b.node("Add", b.conv(branch, width, width), skip, name=f"block{stage}_{step}"), width
    x = b.node("Relu", b.norm(x, cin), name="last_map")
    b.head(b.node("Flatten", b.node("GlobalAveragePool", x), name="pooled"), cin)
    return b.model(("N", 3, 16, 16), scores())


def vit(opset: int = OPSET, blocks: int = 4, width: int = 16, heads: int = 2, sequence_first: bool = False) -> onnx.ModelProto:
    """Patch embedding, class token, pre-norm blocks with outputs ``attended<i>`` and ``block<i>``, class-token head.

    `sequence_first` holds the same tokens as (T, N, D), which PyTorch's transformers do unless told otherwise.
    """
    b = Builder(4, opset)
    patches = b.node("Conv", "image", b.random(width, 3, 4, 4), strides=[4, 4])
    flat = b.node("Reshape", patches, b.ints(0, width, 16))
    tokens = b.node("Transpose", flat, perm=[2, 0, 1] if sequence_first else [0, 2, 1])
    batch = b.node("Gather", b.node("Shape", "image"), b.ints(0), axis=0)
    sides = (b.ints(1), batch, b.ints(width)) if sequence_first else (batch, b.ints(1), b.ints(width))
    token = b.node("Expand", b.random(1, 1, width), b.node("Concat", *sides, axis=0))
    places = b.rng.normal(size=(17, 1, width) if sequence_first else (1, 17, width)).astype(np.float32)
    joined = b.node("Concat", token, tokens, axis=0 if sequence_first else 1)
    x = b.node("Add", joined, b.constant(places), name="embedded")
    attend = _attention_sequence_first if sequence_first else _attention
    for i in range(blocks):
        x = b.node("Add", x, attend(b, b.layer_norm(x, width), width, heads), name=f"attended{i}")
        hidden = b.gelu(b.linear(b.layer_norm(x, width), width, 2 * width))
        x = b.node("Add", x, b.linear(hidden, 2 * width, width), name=f"block{i}")
    x = b.layer_norm(x, width)
    first = b.constant(np.array(0, np.int64))
    b.head(b.node("Gather", x, first, axis=0 if sequence_first else 1, name="class_token"), width)
    return b.model(("N", 3, 16, 16), scores())


def vit_sequence_first() -> onnx.ModelProto:
    """The classifier of `vit`, written with (T, N, D) tokens."""
    return vit(sequence_first=True)


def _attention(b: Builder, x: str, width: int, heads: int) -> str:
    def split(perm: list[int]) -> str:
        projected = b.node("Reshape", b.linear(x, width, width), b.ints(0, 17, heads, width // heads))
        return b.node("Transpose", projected, perm=perm)

    query, key, value = split([0, 2, 1, 3]), split([0, 2, 3, 1]), split([0, 2, 1, 3])
    weights = b.node("Softmax", b.node("MatMul", query, key), axis=-1)
    mixed = b.node("Transpose", b.node("MatMul", weights, value), perm=[0, 2, 1, 3])
    return b.linear(b.node("Reshape", mixed, b.ints(0, 17, width)), width, width)


def _attention_sequence_first(b: Builder, x: str, width: int, heads: int) -> str:
    """As PyTorch exports it: the heads stand beside the batch, and the last product is made of (T N, D)."""

    def split(perm: list[int]) -> str:
        projected = b.node("Reshape", b.linear(x, width, width), b.ints(17, -1, width // heads))
        return b.node("Transpose", projected, perm=perm)

    query, key, value = split([1, 0, 2]), split([1, 2, 0]), split([1, 0, 2])
    weights = b.node("Softmax", b.node("MatMul", query, key), axis=-1)
    mixed = b.node("Transpose", b.node("MatMul", weights, value), perm=[1, 0, 2])
    rows = b.linear(b.node("Reshape", mixed, b.ints(-1, width)), width, width)
    return b.node("Reshape", rows, b.ints(17, -1, width))


def convnext(opset: int = OPSET, channels_last: bool = False) -> onnx.ModelProto:
    """Depthwise convolution, layer norm and MLP in NHWC, layer scale; `channels_last`: the residual is NHWC too."""
    b = Builder(5, opset)
    x = b.node("Conv", "image", b.random(8, 3, 2, 2), strides=[2, 2])
    cin = 8
    if channels_last:
        x = b.node("Transpose", x, perm=[0, 2, 3, 1])
    for stage, width in enumerate((8, 16, 32)):
        if stage:
            inner = b.node("Transpose", x, perm=[0, 3, 1, 2]) if channels_last else x
            x = b.node("Conv", inner, b.random(width, cin, 2, 2), strides=[2, 2])
            x = b.node("Transpose", x, perm=[0, 2, 3, 1]) if channels_last else x
            cin = width
        for step in range(2):
            inner = b.node("Transpose", x, perm=[0, 3, 1, 2]) if channels_last else x
            inner = b.node("Transpose", b.conv(inner, width, width, kernel=3, group=width), perm=[0, 2, 3, 1])
            inner = b.linear(b.gelu(b.linear(b.layer_norm(inner, width), width, 4 * width)), 4 * width, width)
            inner = b.node("Mul", inner, b.constant(np.full(width, 0.5, np.float32)))
            inner = inner if channels_last else b.node("Transpose", inner, perm=[0, 3, 1, 2])
            x = b.node("Add", x, inner, name=f"block{stage}_{step}")
    x = b.node("Transpose", x, perm=[0, 3, 1, 2]) if channels_last else x
    b.head(b.layer_norm(b.pool(x), cin), cin)
    return b.model(("N", 3, 16, 16), scores())


def densenet() -> onnx.ModelProto:
    """Two dense blocks in torch's way: each layer concatenates all earlier ones anew, so nothing cuts a block."""
    b = Builder(6)
    x, cin = b.node("Relu", b.conv("image", 3, 8)), 8
    for block in range(2):
        parts, widths = [x], [cin]
        for _ in range(4):
            joined = b.node("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
            active = b.node("Relu", b.norm(joined, sum(widths)))
            parts.append(b.conv(active, sum(widths), 4))
            widths.append(4)
        x, cin = b.node("Concat", *parts, axis=1, name=f"dense{block}"), sum(widths)
        if block == 0:
            x = b.node("AveragePool", b.conv(x, cin, 8, kernel=1), kernel_shape=[2, 2], strides=[2, 2])
            cin = 8
    b.head(b.pool(b.node("Relu", b.norm(x, cin))), cin)
    return b.model(("N", 3, 16, 16), scores())


def two_towers() -> onnx.ModelProto:
    """Two convolution towers side by side whose features meet in front of the head only."""
    b = Builder(7)
    ends = []
    for tower in range(2):
        x, cin = "image", 3
        for step, width in enumerate((8, 8, 16, 16)):
            x = b.node("Relu", b.conv(x, cin, width, stride=1 + step % 2), name=f"tower{tower}_{step}")
            cin = width
        ends.append(b.pool(x))
    b.head(b.node("Concat", *ends, axis=1, name="joined"), 32)
    return b.model(("N", 3, 16, 16), scores())


def uint8_input() -> onnx.ModelProto:
    """Takes pixels as uint8 and scales them inside."""
    b = Builder(8)
    x = b.node("Mul", b.node("Cast", "image", to=TensorProto.FLOAT), b.constant(np.float32(1 / 255)))
    for stage, width in enumerate((8, 16)):
        x = b.node("Relu", b.conv(x, 3 if stage == 0 else 8, width, stride=2))
    b.head(b.pool(x), 16)
    return b.model(("N", 3, 16, 16), scores(), dtype=TensorProto.UINT8)


def nhwc_input(size: int | str = 16, channels: int | str = 3, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Takes (N, H, W, C) and transposes first."""
    b = Builder(9)
    x = b.node("Cast", "image", to=TensorProto.FLOAT) if dtype != TensorProto.FLOAT else "image"
    x = b.node("Transpose", x, perm=[0, 3, 1, 2])
    for stage, width in enumerate((8, 16, 16)):
        x = b.node("Relu", b.conv(x, (3, 8, 16)[stage], width, stride=2))
    b.head(b.pool(x), 16)
    return b.model(("N", size, size, channels), scores(), dtype=dtype)


def patchify_mixer() -> onnx.ModelProto:
    """Cuts patches by reshapes, so that no convolution tells the layout; then token and channel mixing."""
    b = Builder(10)
    x = b.node("Reshape", "image", b.ints(0, 3, 4, 4, 4, 4))
    x = b.node("Reshape", b.node("Transpose", x, perm=[0, 2, 4, 1, 3, 5]), b.ints(0, 16, 48))
    x = b.linear(x, 48, 16)
    for i in range(3):
        mixed = b.node("Transpose", b.gelu(b.linear(b.node("Transpose", x, perm=[0, 2, 1]), 16, 16)), perm=[0, 2, 1])
        x = b.node("Add", x, mixed)
        x = b.node("Add", x, b.linear(b.gelu(b.linear(x, 16, 32)), 32, 16), name=f"block{i}")
    b.head(b.node("ReduceMean", x, axes=[1], keepdims=0), 16)
    return b.model(("N", 3, 16, 16), scores())


def with_features(extra: str) -> onnx.ModelProto:
    """Two outputs: the logits and ``features`` before them, ``softmax`` behind them, or another head ``aux``."""
    b = Builder(11)
    x = b.node("Relu", b.conv("image", 3, 8, stride=2))
    y = b.node("Relu", b.conv(x, 8, 16, stride=2))
    pooled = b.node("Flatten", b.node("GlobalAveragePool", y), name="features")
    logits = b.head(pooled, 16)
    if extra == "softmax":
        b.node("Softmax", logits, name="softmax", axis=1)
    elif extra == "aux":
        b.head(b.pool(x), 8, name="aux")
    return b.model(("N", 3, 16, 16), {extra: ("N", "F"), "logits": ("N", CLASSES)})


def add_outputs(model: onnx.ModelProto, batch: int | str) -> onnx.ModelProto:
    """Further outputs behind the logits: int64 (N,), float32 (N,) and float32 (N, C)."""
    graph = model.graph
    graph.node.append(helper.make_node("ArgMax", ["logits"], ["label"], axis=1, keepdims=0))
    graph.node.append(helper.make_node("ReduceMax", ["logits"], ["margin"], axes=[1], keepdims=0))
    graph.node.append(helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1))
    shapes = {"label": (TensorProto.INT64, [batch]), "margin": (TensorProto.FLOAT, [batch])}
    shapes["probabilities"] = (TensorProto.FLOAT, [batch, CLASSES])
    for name, (kind, shape) in shapes.items():
        graph.output.append(helper.make_tensor_value_info(name, kind, shape))
    onnx.checker.check_model(model)
    return model


def save(model: onnx.ModelProto, path: Path, external: str = "") -> Path:
    """Write a model; `external` names the file for its weights."""
    if external:
        onnx.save(model, path, save_as_external_data=True, location=external, size_threshold=0)
    else:
        onnx.save(model, path)
    return path

"""The target: any ONNX image classifier, opened, checked, and read as a black box."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir

from diffense.errors import TargetError
from diffense.flow import name_axes, trace_flow
from diffense.graphs import cut_graph, hash_model, hash_target, load_model, open_session, run_batched, save_graph
from diffense.signature import (
    PROBE_BATCH,
    Layout,
    TensorSpec,
    check_input,
    describe_tensor,
    draw_pixels,
    find_layout,
    find_logits,
    find_size,
    try_run,
)
from diffense.taps import Measured, Tap, choose_taps, find_taps, named_taps

__all__ = ["Layout", "Tap", "Target", "TensorSpec", "hash_target", "open_session", "run_batched", "save_graph"]

SOFTMAX_TOLERANCE: Final = 1e-3
NOT_TENSORS: Final = ("Sequence", "Optional")  # parts of the names of operators whose results have no shape
SHAPE_OF: Final = "diffense_shape_of/"


@dataclass(frozen=True)
class Target:
    """An image classifier in an ONNX file.

    Attributes:
        path: of the file.
        sha256: of the file, and of its external data files if it has any (see `hash_target`).
        input: its one input.
        outputs: all outputs, in the graph's order.
        logits: the output that holds a number for each class, (N, classes) or (N, classes, 1, 1).
        classes: how many.
        probabilities: whether that output is a softmax already.
        layout: of the input.
        channels: 1 or 3.
        size: height and width.
        batch: the batch that it must be run with; None when any will do.
        opset: of the standard operators.
    """

    path: Path
    sha256: str
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    logits: str
    classes: int
    probabilities: bool
    layout: Layout
    channels: int
    size: tuple[int, int]
    batch: int | None
    opset: int

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        logits: str | None = None,
        size: tuple[int, int] | None = None,
        layout: Layout | None = None,
    ) -> "Target":
        """Open a classifier and run it once on random pixels.

        Args:
            path: of the ONNX file.
            logits: name of the output with the class scores; found when the classifier has one such output.
            size: height and width; needed when the graph leaves them open.
            layout: of the input; found from the graph unless it is ambiguous.

        Raises:
            TargetError: the file cannot be used; the message names the tensor and says what to do.
        """
        model = load_model(path)
        session = open_session(path, optimize=False)
        image = check_input(path, session)
        found_layout, channels = find_layout(path, model.graph, image, layout)
        found_size = find_size(path, image, found_layout, size)
        run = try_run(path, session, image, found_layout, channels, found_size)
        rows = len(run.pixels)
        name = find_logits(path, model.graph, image.name, run.results, rows, logits)
        scores = run.results[name].astype(np.float64).reshape(rows, -1)
        sums_to_one = np.allclose(scores.sum(axis=1), 1, rtol=0, atol=SOFTMAX_TOLERANCE)
        return cls(
            path=path,
            sha256=hash_model(path, model),
            input=image,
            outputs=tuple(describe_tensor(output) for output in session.get_outputs()),
            logits=name,
            classes=scores.shape[1],
            probabilities=bool(sums_to_one and (scores >= 0).all()),
            layout=found_layout,
            channels=run.channels,
            size=found_size,
            batch=run.batch,
            opset=model.graph.opset_imports.get("", 0),
        )

    def load_graph(self) -> ir.Model:
        """A fresh copy of the graph, to be changed at will; external weights are mapped when they are used.

        Raises:
            TargetError: the file has gone or was damaged since it was opened.
        """
        return load_model(self.path)

    def with_outputs(self, names: Sequence[str]) -> ir.Model:
        """The whole graph with these tensors as further outputs, behind its own.

        Raises:
            TargetError: there is no tensor of such a name.
        """
        model = self.load_graph()
        values = self._find_values(model.graph, names)
        model.graph.outputs.extend(value for value in values if not value.is_graph_output())
        return model

    def truncate(self, names: Sequence[str]) -> ir.Model:
        """The part of the graph that these tensors need, with them as its outputs, in this order.

        Raises:
            TargetError: there is no tensor of such a name.
        """
        model = self.load_graph()
        self._find_values(model.graph, names)
        return cut_graph(model, self.input.name, names)

    def list_taps(self) -> list[Tap]:
        """All tensors worth tapping, shallow to deep; the last is the representation that the classifier's head reads.

        Raises:
            TargetError: as `choose_taps`.
        """
        return find_taps(self._measure())

    def choose_taps(self, names: Sequence[str] | None = None) -> list[Tap]:
        """Six to ten taps at the ends of blocks and stages (fewer in a small net), or the named ones; shallow to deep.

        Raises:
            TargetError: fewer than two tensors can be tapped, or a name is no usable tensor between image and logits.
        """
        measured = self._measure()
        return choose_taps(find_taps(measured)) if names is None else named_taps(measured, names)

    def _find_values(self, graph: ir.Graph, names: Sequence[str]) -> list[ir.Value]:
        values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
        missing = [name for name in names if name not in values]
        if missing:
            raise TargetError(f"{self.path}: there is no tensor {missing[0]!r} in the graph")
        return [values[name] for name in names]

    def _measure(self) -> Measured:
        """Run the graph once for the shape of every tensor between the image and the logits; no tensor is kept."""
        model = self.load_graph()
        image, logits = self._find_values(model.graph, [self.input.name, self.logits])
        flow = trace_flow(model.graph, image, logits)
        if not flow.nodes:
            raise TargetError(f"{self.path}: output {self.logits!r} does not depend on the input; name another with --logits")
        inner = [value for value in flow.tensors[1:] if not _is_container(value)]
        shapes, dtypes = self._run_shapes(model, inner)
        return Measured(flow, self.batch or PROBE_BATCH, shapes, dtypes, name_axes(flow, shapes, self.layout))

    def _run_shapes(self, model: ir.Model, values: Sequence[ir.Value]) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        """Shape (with the batch) and dtype of each tensor, by name; the model gets outputs for both."""
        graph = model.graph
        shapers = [ir.node("Shape", [value]) for value in values]
        for value, shaper in zip(values, shapers, strict=True):
            shaper.outputs[0].name = f"{SHAPE_OF}{value.name}"
        graph.extend(shapers)
        graph.outputs.extend(value for value in values if not value.is_graph_output())
        graph.outputs.extend(shaper.outputs[0] for shaper in shapers)
        session = open_session(model, optimize=False)
        dtypes = {node.name: describe_tensor(node).dtype for node in session.get_outputs()}
        rows = self.batch or PROBE_BATCH
        pixels = draw_pixels(self.input.dtype, self.layout, self.channels, self.size, rows)
        arrays = session.run([f"{SHAPE_OF}{value.name}" for value in values], {self.input.name: pixels})
        shapes = {str(value.name): tuple(map(int, shape)) for value, shape in zip(values, arrays, strict=True)}
        return shapes | {self.input.name: pixels.shape}, dtypes


def _is_container(value: ir.Value) -> bool:
    """Whether a tensor is none, but a sequence or optional, which has no shape."""
    producer = value.producer()
    return producer is not None and any(part in producer.op_type for part in NOT_TENSORS)

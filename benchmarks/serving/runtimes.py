"""The graphs of one guarded target, and what runs them on a GPU in one process: onnxruntime or TensorRT plans."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.serving.floor import write_graphs
from diffense import names
from diffense.errors import OptionError
from diffense.graphs import load_model, save_graph
from diffense.guard import Guard
from diffense_export.engine import Engine, Shapes
from diffense_export.half import convert_half
from diffense_export.parity import draw_smooth_noise

BATCHES: Final = (1, 8, 32)
ASIDE: Final = "fused, scorer on the CPU"

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Mapping[str, NDArray[Any]]], Arrays]


class Graphs:
    """The graphs of one guarded target as files: ``production``, ``tapped``, ``scorer``, ``whole`` and ``direct``."""

    def __init__(self, target: Path, guard: Guard, folder: Path) -> None:
        self.guard, self.folder = guard, folder
        written = write_graphs(guard, target, folder)
        self.files = {name: written[name] for name in ("production", "tapped", "scorer", "whole", "direct")}

    def find(self, name: str, precision: str) -> Path:
        """A graph's file, in half precision where ``fp16`` is wanted."""
        path = self.folder / f"{name}_fp16.onnx"
        if precision == "fp32":
            return self.files[name]
        if not path.exists():
            save_graph(convert_half(load_model(self.files[name])), path)
        return path

    def list_shapes(self, name: str, batch: int) -> dict[str, tuple[int, ...]]:
        """Input shapes of a graph."""
        inputs = load_model(self.files[name]).graph.inputs
        image = self.draw(batch).shape
        shapes = {str(v.name): tuple(int(size) for size in (v.shape or ())[1:] if isinstance(size, int)) for v in inputs}
        return {key: image if key == self.guard.manifest.input.name else (batch, *rest) for key, rest in shapes.items()}

    def draw(self, batch: int) -> NDArray[Any]:
        """Images of smooth noise, as the target takes them."""
        preprocessing = self.guard.preprocessing
        return preprocessing.apply(draw_smooth_noise(batch, preprocessing.size, preprocessing.channels))

    def ask(self, runs: Mapping[str, Run], loop: str, image: NDArray[Any]) -> Arrays:
        """Production outputs, latents and score of a batch, as with ``--placement shared`` and this loop.

        `ASIDE` asks the run of that name instead of the scorer's.
        """
        if loop in ("whole", "direct"):
            found = runs[loop]({self.guard.manifest.input.name: image})
            return found if loop == "direct" else found | {names.SCORE: found[names.RAW_SCORE]}
        seen = runs["tapped"]({self.guard.manifest.input.name: image})
        logits = seen[self.guard.manifest.logits].reshape(len(image), -1).astype(np.float32, copy=False)
        return seen | runs[ASIDE if loop == ASIDE else "scorer"]({names.LATENTS: seen[names.LATENTS], names.LOGITS: logits})


class Bound:
    """A session whose inputs and outputs keep their place on the device, batch size by batch size, as CUDA graphs want it."""

    def __init__(self, session: onnxruntime.InferenceSession, device: str) -> None:
        self.session, self.device = session, device
        self.kept: dict[tuple[tuple[int, ...], ...], tuple[Any, dict[str, Any], Any]] = {}

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """Copy the inputs to their places, run, copy the outputs back."""
        arrays = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        key = tuple(array.shape for array in arrays.values())
        if key not in self.kept:
            self.kept[key] = self.bind(arrays)
        binding, values, options = self.kept[key]
        for name, array in arrays.items():
            values[name].update_inplace(array)
        self.session.run_with_iobinding(binding, options)
        wanted = [output.name for output in self.session.get_outputs()]
        return dict(zip(wanted, binding.copy_outputs_to_cpu(), strict=True))

    def bind(self, arrays: Arrays) -> tuple[Any, dict[str, Any], Any]:
        """Lay inputs and outputs of this size out; a first run that is not captured tells the outputs' sizes."""
        values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(a, self.device, 0) for n, a in arrays.items()}
        first, second = self.session.io_binding(), self.session.io_binding()
        for binding in (first, second):
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
        for output in self.session.get_outputs():
            first.bind_output(output.name, self.device)
        options = [onnxruntime.RunOptions() for _ in range(2)]
        for number, run in zip((-1, len(self.kept) + 1), options, strict=True):
            run.add_run_config_entry("gpu_graph_id", str(number))  # -1 captures nothing
        self.session.run_with_iobinding(first, options[0])
        for output, value in zip(self.session.get_outputs(), first.get_outputs(), strict=True):
            second.bind_ortvalue_output(output.name, value)
        return second, values, options[1]


@contextmanager
def open_onnxruntime(
    graphs: Graphs, provider: str, precision: str = "fp32", captured: bool = False
) -> Iterator[dict[str, Run]]:
    """The graphs on one of onnxruntime's providers.

    Args:
        graphs: of the target.
        provider: as onnxruntime calls it.
        precision: ``fp32`` or ``fp16``.
        captured: whether each batch size becomes a CUDA graph.
    """
    cuda = provider.startswith("CUDA")

    def start(path: Path) -> Run:
        options: Any = [(provider, {"use_tf32": 0, "enable_cuda_graph": int(captured)})] if cuda else [provider]
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1 if path == graphs.files["scorer"] else 0  # too small to be shared by cores
        session = onnxruntime.InferenceSession(str(path), settings, providers=options)
        if session.get_providers()[0] != provider:
            raise OptionError(f"onnxruntime cannot use {provider} here: CUDA or cuDNN is missing, or of another version")
        if captured:
            return Bound(session, "cuda" if cuda else "cpu")
        wanted = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(wanted, session.run(wanted, dict(inputs)), strict=True))

    yield {name: start(graphs.find(name, precision)) for name in graphs.files}


@contextmanager
def open_plans(graphs: Graphs, engine: Engine, precision: str) -> Iterator[dict[str, Run]]:
    """The graphs as TensorRT plans."""
    with ExitStack() as stack:
        runs = {}
        for name in graphs.files:
            three = [graphs.list_shapes(name, batch) for batch in BATCHES]
            shapes = {key: Shapes(*(shape[key] for shape in three)) for key in three[0]}
            plan, _ = engine.build(graphs.find(name, precision), shapes)
            runs[name] = stack.enter_context(engine.open(plan))
        yield runs

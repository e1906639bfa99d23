"""Everything that needs a GPU, on a machine that has one, as one report: benchmarks/results/gpu.json and gpu.md.

usage: python -m benchmarks.gpu_check [--targets resnet18_32,resnet50_224] [--seconds 5]

Runs the tests marked ``gpu``; then compares and times, in one process, the guarded path (tapped and scorer graph) beside the
production graph alone, with onnxruntime's CUDA provider and with TensorRT plans, as far as they are installed. Times hold the
copies from and to the CPU's memory. No server takes part: `diffense bench` measures one that runs.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from benchmarks.serving.exports import IMAGES, choose, prepare_guard
from benchmarks.serving.networks import NETWORKS, draw_images
from benchmarks.settings import RESULTS, ROOT, describe_machine, find_commit
from diffense import names
from diffense.bench.statistics import Statistics, summarise
from diffense.errors import DiffenseError, OptionError
from diffense.graphs import load_model, save_graph
from diffense.guard import Guard
from diffense_export.engine import Device, Engine, Shapes, find_device, open_engine
from diffense_export.half import convert_half
from diffense_export.parity import draw_smooth_noise
from diffense_export.scorer import build_scorer

JSON: Final = RESULTS / "gpu.json"
PAGE: Final = RESULTS / "gpu.md"
BATCHES: Final = (1, 8, 32)
NEEDED: Final = (
    "gpu-check needs a machine with an NVIDIA GPU and its driver (nvidia-smi shows none here); with onnxruntime-gpu it "
    "measures the CUDA provider, with tensorrt and polygraphy plans"
)

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Mapping[str, NDArray[Any]]], Arrays]


class Graphs:
    """The graphs of one guarded target as files: ``production``, ``tapped`` and ``scorer``."""

    def __init__(self, target: Path, guard: Guard, folder: Path) -> None:
        self.guard, self.folder = guard, folder
        self.files = {"production": target, "tapped": guard.tapped_path, "scorer": folder / "scorer.onnx"}
        save_graph(build_scorer(guard), self.files["scorer"])

    def halve(self, name: str) -> Path:
        """The same graph in half precision."""
        path = self.folder / f"{name}_fp16.onnx"
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

    def ask_guarded(self, runs: Mapping[str, Run], image: NDArray[Any]) -> Arrays:
        """Production outputs, latents and score of a batch, as with ``--placement shared --loop fused``."""
        seen = runs["tapped"]({self.guard.manifest.input.name: image})
        logits = seen[self.guard.manifest.logits].reshape(len(image), -1).astype(np.float32, copy=False)
        return seen | runs["scorer"]({names.LATENTS: seen[names.LATENTS], names.LOGITS: logits})


@contextmanager
def open_onnxruntime(graphs: Graphs, provider: str) -> Iterator[dict[str, Run]]:
    """The three graphs on one of onnxruntime's providers."""

    def start(path: Path) -> Run:
        options: Any = [(provider, {"use_tf32": 0})] if provider.startswith("CUDA") else [provider]
        session = onnxruntime.InferenceSession(str(path), providers=options)
        if session.get_providers()[0] != provider:
            raise OptionError(f"onnxruntime cannot use {provider} here: CUDA or cuDNN is missing, or of another version")
        wanted = [output.name for output in session.get_outputs()]
        return lambda inputs: dict(zip(wanted, session.run(wanted, dict(inputs)), strict=True))

    yield {name: start(path) for name, path in graphs.files.items()}


@contextmanager
def open_plans(graphs: Graphs, engine: Engine, precision: str) -> Iterator[dict[str, Run]]:
    """The three graphs as TensorRT plans."""
    with ExitStack() as stack:
        runs = {}
        for name, path in graphs.files.items():
            three = [graphs.list_shapes(name, batch) for batch in BATCHES]
            shapes = {key: Shapes(*(shape[key] for shape in three)) for key in three[0]}
            plan, _ = engine.build(graphs.halve(name) if precision == "fp16" else path, shapes)
            runs[name] = stack.enter_context(engine.open(plan))
        yield runs


def measure_runs(graphs: Graphs, runs: Mapping[str, Run], truth: Mapping[str, Run], seconds: float) -> list[dict[str, Any]]:
    """One row a batch: unguarded and guarded in turns, and what differs from onnxruntime on the CPU."""
    rows = []
    entry = graphs.guard.manifest.input.name
    for batch in BATCHES:
        image = graphs.draw(batch)
        ours, reference = graphs.ask_guarded(runs, image), graphs.ask_guarded(truth, image)
        calls = [partial(runs["production"], {entry: image}), partial(graphs.ask_guarded, runs, image)]
        unguarded, guarded = time_in_turns(calls, batch, seconds)
        rows.append(
            {
                "batch": batch,
                "unguarded": asdict(unguarded),
                "guarded": asdict(guarded),
                "p50_ratio": guarded.p50_ms / unguarded.p50_ms,
                "throughput_ratio": guarded.throughput / unguarded.throughput,
                "latents_differ": float(np.abs(ours[names.LATENTS] - reference[names.LATENTS]).max()),
                "scores_differ": float(np.abs(ours[names.SCORE] - reference[names.SCORE]).max()),
            }
        )
    return rows


def time_in_turns(calls: Sequence[Callable[[], Arrays]], batch: int, seconds: float) -> list[Statistics]:
    """Call one after the other until the time is over; the first three rounds warm up."""
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(3):
        for call in calls:
            call()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for times, call in zip(taken, calls, strict=True):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return [summarise(times, sum(times), batch) for times in taken]


def measure_target(name: str, seconds: float, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """All rows of one target, on every provider that is installed."""
    target, guard = prepare_guard(name, draw_images(name, IMAGES))
    rows = []
    with tempfile.TemporaryDirectory(prefix="diffense-") as folder, ExitStack() as stack:
        graphs = Graphs(target, guard, Path(folder))
        truth = stack.enter_context(open_onnxruntime(graphs, "CPUExecutionProvider"))
        ways: dict[str, Callable[[], AbstractContextManager[dict[str, Run]]]] = {}
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            ways["onnxruntime CUDA"] = partial(open_onnxruntime, graphs, "CUDAExecutionProvider")
        if importlib.util.find_spec("tensorrt") and importlib.util.find_spec("polygraphy"):
            engine = open_engine(Path(folder) / "timing", Path(folder), name)
            for precision in ("fp32", "fp16"):
                ways[f"TensorRT {engine.version} {precision}"] = partial(open_plans, graphs, engine, precision)
        if not ways:
            raise OptionError("neither onnxruntime-gpu nor tensorrt with polygraphy is installed: nothing can use the GPU")
        for way, start in ways.items():
            progress(f"{name}, {way}")
            with start() as runs:
                rows += [{"target": name, "way": way} | row for row in measure_runs(graphs, runs, truth, seconds)]
    return rows


def run_tests() -> str:
    """The last line of pytest on the tests marked ``gpu``."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return next(reversed(done.stdout.strip().splitlines()), f"pytest ended with code {done.returncode}")


def render_page(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    lines = [
        "# On a GPU",
        "",
        f"Written by `make gpu-check`. {report['gpu']} ({report['compute_capability']}), {report['machine']}, commit "
        f"{report['commit']}. Tests marked `gpu`: {report['tests']}.",
        "",
        "One process, no server; unguarded is the production graph, guarded the tapped and the scorer graph.",
        "",
        "| target | with | batch | p50 ms | guarded | p99 ms | guarded | images/s | guarded | p50 ratio | throughput ratio "
        "| scores differ |",
        "| --- | --- |" + " --- |" * 10,
    ]
    for row in report["rows"]:
        plain, guarded = row["unguarded"], row["guarded"]
        figures = [f"{part[key]:.4g}" for key in ("p50_ms", "p99_ms", "throughput") for part in (plain, guarded)]
        ratios = [f"{row['p50_ratio']:.2f}", f"{row['throughput_ratio']:.2f}", f"{row['scores_differ']:.1e}"]
        lines.append("| " + " | ".join([row["target"], row["way"], str(row["batch"]), *figures, *ratios]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> None:
    """Read the options, check and write the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description="All that needs a GPU.")
    parser.add_argument("--targets", default="resnet18_32,resnet50_224")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each pair of figures")
    options = parser.parse_args(arguments)
    device = find_device()
    if device is None:
        sys.exit(NEEDED)
    try:
        for report in check(device, choose(options.targets, NETWORKS), options.seconds):
            JSON.write_text(json.dumps(report, indent=1) + "\n")
            PAGE.write_text(render_page(report))
    except DiffenseError as error:
        sys.exit(f"gpu-check: {error}")
    print(PAGE.read_text())


def check(device: Device, targets: Sequence[str], seconds: float) -> Iterator[dict[str, Any]]:
    """The report, with the rows of one target more each time: what is measured survives a machine that is taken away."""
    report: dict[str, Any] = {
        "gpu": device.name,
        "compute_capability": device.capability,
        "machine": describe_machine(),
        "commit": find_commit(),
        "onnxruntime": onnxruntime.__version__,
        "tests": run_tests(),
        "rows": [],
    }
    for name in targets:
        report["rows"] += measure_target(name, seconds, print)
        yield report


if __name__ == "__main__":
    main(sys.argv[1:])

"""Everything that needs a GPU, on a machine that has one, as a report a target: benchmarks/results/gpu.json and gpu.md.

usage: python -m benchmarks.gpu_check [--targets resnet18_32,resnet50_224] [--seconds 5]

Runs the tests marked ``gpu``; then compares and times, in one process, the guarded path beside the production graph alone:
tapped and scorer graph one after the other (``fused``), one graph of both (``whole``) and that with the verdict behind it
(``direct``), with onnxruntime's CUDA provider (launched kernel by kernel, or captured once and replayed as a CUDA graph) and
with TensorRT plans, as far as they are installed. Times hold the copies from and to the CPU's memory. No server takes part:
`diffense bench` measures one that runs.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime

from benchmarks.records import Row, read_rows, write_row
from benchmarks.serving.exports import IMAGES, choose, prepare_guard
from benchmarks.serving.networks import NETWORKS, draw_images
from benchmarks.serving.runtimes import ASIDE, BATCHES, Arrays, Graphs, Run, open_onnxruntime, open_plans
from benchmarks.settings import RESULTS, ROOT, describe_machine, find_commit
from diffense import names
from diffense.bench.statistics import Statistics, summarise
from diffense.errors import DiffenseError, OptionError
from diffense.graphs import first_line
from diffense_export.engine import Device, find_device, open_engine

JSON: Final = RESULTS / "gpu.json"
PAGE: Final = RESULTS / "gpu.md"
PRECISIONS: Final = ("fp32", "fp16")
LOOPS: Final = ("fused", ASIDE, "whole", "direct")
NEEDED: Final = (
    "gpu-check needs a machine with an NVIDIA GPU and its driver (nvidia-smi shows none here); with onnxruntime-gpu it "
    "measures the CUDA provider, with tensorrt and polygraphy plans"
)


def measure_runs(graphs: Graphs, runs: Mapping[str, Run], truth: Mapping[str, Run], seconds: float) -> list[dict[str, Any]]:
    """A row a batch and loop: unguarded and guarded in turns, and what differs from onnxruntime on the CPU."""
    rows = []
    runs = {**runs, ASIDE: truth["scorer"]}
    entry = graphs.guard.manifest.input.name
    for batch in BATCHES:
        image = graphs.draw(batch)
        reference = graphs.ask(truth, "fused", image)
        calls = [partial(runs["production"], {entry: image}), *(partial(graphs.ask, runs, loop, image) for loop in LOOPS)]
        unguarded, *loops = time_in_turns(calls, batch, seconds)
        for loop, guarded in zip(LOOPS, loops, strict=True):
            ours = graphs.ask(runs, loop, image)
            row: dict[str, Any] = {"loop": loop, "batch": batch, "unguarded": asdict(unguarded), "guarded": asdict(guarded)}
            row |= {
                "p50_ratio": guarded.p50_ms / unguarded.p50_ms,
                "throughput_ratio": guarded.throughput / unguarded.throughput,
                "latents_differ": float(np.abs(ours[names.LATENTS] - reference[names.LATENTS]).max()),
                "scores_differ": float(np.abs(ours[names.SCORE] - reference[names.SCORE]).max()),
            }
            rows.append(row)
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


def measure_target(name: str, seconds: float, progress: Callable[[str], None]) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows of one target, on every provider that is installed, and what did not run."""
    target, guard = prepare_guard(name, draw_images(name, IMAGES))
    rows, failed = [], []
    with tempfile.TemporaryDirectory(prefix="diffense-") as folder, ExitStack() as stack:
        graphs = Graphs(target, guard, Path(folder))
        truth = stack.enter_context(open_onnxruntime(graphs, "CPUExecutionProvider"))
        ways: dict[str, Callable[[], AbstractContextManager[dict[str, Run]]]] = {}
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            for precision, captured in product(PRECISIONS, (False, True)):
                title = f"onnxruntime CUDA {precision}" + (", CUDA graph" if captured else "")
                ways[title] = partial(open_onnxruntime, graphs, "CUDAExecutionProvider", precision, captured)
        if importlib.util.find_spec("tensorrt") and importlib.util.find_spec("polygraphy"):
            engine = open_engine(Path(folder) / "timing", Path(folder), name)
            for precision in PRECISIONS:
                ways[f"TensorRT {engine.version} {precision}"] = partial(open_plans, graphs, engine, precision)
        if not ways:
            raise OptionError("neither onnxruntime-gpu nor tensorrt with polygraphy is installed: nothing can use the GPU")
        for way, start in ways.items():
            progress(f"{name}, {way}")
            try:
                with start() as runs:
                    rows += [{"way": way} | row for row in measure_runs(graphs, runs, truth, seconds)]
            except Exception as error:  # onnxruntime's errors share no base; one way that fails takes no other's figures
                failed.append(f"{name}, {way}: {first_line(error)}")
    return rows, failed


def run_tests() -> str:
    """The last line of pytest on the tests marked ``gpu``; modules that lack a package there are errors in it, no end."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return next(reversed(done.stdout.strip().splitlines()), f"pytest ended with code {done.returncode}")


def render_page(reports: Sequence[Mapping[str, Any]]) -> str:
    """The reports in Markdown, a section a target."""
    lines = [
        "# On a GPU",
        "",
        "Written by `make gpu-check`, the last run of each target.",
        "",
        "One process, no server; unguarded is the production graph; guarded is tapped and scorer graph one after the other "
        "(`fused`), the scorer on one core of the CPU if told so, one graph of both (`whole`), or that with the verdict "
        "(`direct`).",
    ]
    for report in reports:
        lines += ["", f"## {report['target']}", "", *render_report(report)]
    return "\n".join(lines) + "\n"


def render_report(report: Mapping[str, Any]) -> list[str]:
    """Where one target was measured, what did not run, and its rows."""
    lines = [
        f"{report['gpu']} ({report['compute_capability']}), {report['machine']}, commit {report['commit']}, onnxruntime "
        f"{report['onnxruntime']}. Tests marked `gpu`: {report['tests']}.",
        *(f"\nDid not run: {reason}" for reason in report["failed"]),
        "",
        "| with | loop | batch | p50 ms | guarded | p99 ms | guarded | images/s | guarded | p50 ratio | throughput ratio "
        "| scores differ |",
        "| --- | --- |" + " --- |" * 10,
    ]
    for row in report["rows"]:
        plain, guarded = row["unguarded"], row["guarded"]
        figures = [f"{part[key]:.4g}" for key in ("p50_ms", "p99_ms", "throughput") for part in (plain, guarded)]
        ratios = [f"{row['p50_ratio']:.2f}", f"{row['throughput_ratio']:.2f}", f"{row['scores_differ']:.1e}"]
        lines.append("| " + " | ".join([row["way"], row["loop"], str(row["batch"]), *figures, *ratios]) + " |")
    return lines


def main(arguments: Sequence[str]) -> None:
    """Read the options, check and write the reports."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description="All that needs a GPU.")
    parser.add_argument("--targets", default="resnet18_32,resnet50_224")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each pair of figures")
    options = parser.parse_args(arguments)
    device = find_device()
    if device is None:
        sys.exit(NEEDED)
    try:
        for report in check(device, choose(options.targets, NETWORKS), options.seconds):
            write_row(report, JSON)
            PAGE.write_text(render_page(read_rows(JSON)))
    except DiffenseError as error:
        sys.exit(f"gpu-check: {error}")
    print(PAGE.read_text())


def check(device: Device, targets: Sequence[str], seconds: float) -> Iterator[Row]:
    """A report a target, as soon as there is one: what is measured survives a machine that is taken away."""
    tests = run_tests()
    for name in targets:
        rows, failed = measure_target(name, seconds, print)
        yield {
            "target": name,
            "gpu": device.name,
            "compute_capability": device.capability,
            "machine": describe_machine(),
            "commit": find_commit(),
            "onnxruntime": onnxruntime.__version__,
            "tests": tests,
            "rows": rows,
            "failed": failed,
        }


if __name__ == "__main__":
    main(sys.argv[1:])

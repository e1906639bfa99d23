"""Where a guarded request's time goes, moment by moment, by Triton's tracing.

usage: python -m benchmarks.serving.timeline [--targets resnet50_224] [--placements shared] [--loops whole] [--seconds 5]

Writes benchmarks/results/timeline.json. One request under way, gRPC, by the built-in load generator; every request is traced.
"""

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import numpy as np

from benchmarks.records import TIMELINE, Row, read_rows, write_row
from benchmarks.serving.exports import IMAGES, LOOPS, PLACEMENTS, Served, choose, prepare_repository
from benchmarks.serving.networks import NETWORKS, draw_images
from benchmarks.settings import describe_run
from diffense.bench.comparison import pack_requests, read_models
from diffense.bench.load import Load, run_load
from diffense.errors import BenchError, DiffenseError
from diffense.health import REQUEST_ID
from diffense.names import DENOISER_SUFFIX, FEATURES_SUFFIX, GUARD_SUFFIX, GUARDED_SUFFIX, SCORER_SUFFIX, TAPPED_SUFFIX
from diffense.serve import TritonServer

BATCHES: Final = (1, 8)
# Where several run at a moment, the innermost has it; of those side by side the first of these.
STEPS: Final = (
    "production", "features", "denoiser or scorer", "guard's loop and scoring", "copies", "queues",
    "between the models", "gRPC",
)  # fmt: skip
ROLES: Final = {
    DENOISER_SUFFIX: "denoiser or scorer",
    SCORER_SUFFIX: "denoiser or scorer",
    GUARD_SUFFIX: "guard's loop and scoring",
    FEATURES_SUFFIX: "features",
    TAPPED_SUFFIX: "production",  # whose outputs that graph gives, with the latents
    "": "production",
}
# What a model does between two of its time stamps; of one that is a Python process
# (the guard's, and every ONNX graph under the stand-in) the way there is in it.
PHASES: Final = (
    ("queues", "QUEUE_START", "COMPUTE_START"),
    ("copies", "COMPUTE_START", "COMPUTE_INPUT_END"),
    ("", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START"),
    ("copies", "COMPUTE_OUTPUT_START", "COMPUTE_END"),
)
TRANSPORT: Final = ("GRPC_WAITREAD_END", "REQUEST_START", "GRPC_SEND_START", "GRPC_SEND_END")
HEAD: Final = ("target", "placement", "loop", "batch", "requests", "in the server, ms", *STEPS)


@dataclass
class Span:
    """What one model did for one request: time stamps in nanoseconds by name, and the spans of the models that it asked."""

    model: str = ""
    request: str = ""
    parent: int | None = None
    stamps: dict[str, int] = field(default_factory=dict)
    children: list["Span"] = field(default_factory=list)


class Phase(NamedTuple):
    """What a model did between two moments, in nanoseconds; models that were asked by another one lie deeper."""

    step: str
    depth: int
    start: int
    end: int


def main(arguments: Sequence[str]) -> None:
    """Read the options, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", default=",".join(NETWORKS))
    parser.add_argument("--placements", default=",".join(PLACEMENTS))
    parser.add_argument("--loops", default=",".join(LOOPS))
    parser.add_argument("--seconds", type=float, default=5.0)
    options = parser.parse_args(arguments)
    try:
        for target in choose(options.targets, NETWORKS):
            for placement in choose(options.placements, PLACEMENTS):
                for loop in choose(options.loops, LOOPS):
                    measure(Served(target, cast("Any", placement), cast("Any", loop), False), options.seconds)
        print("\n".join(render_table(read_rows(TIMELINE))))
    except DiffenseError as error:
        sys.exit(f"timeline: {error}")


def measure(served: Served, seconds: float) -> None:
    """Serve one export, ask it, and write a row a batch."""
    images = draw_images(served.target, IMAGES)
    model = f"{served.target}_{served.placement}_{served.loop}"
    repository = prepare_repository(served, images, model)
    for batch in BATCHES:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json"
            with TritonServer(repository, extra=trace_into(file)) as server:
                description = read_models(server.endpoints.grpc, "grpc", model + GUARDED_SUFFIX, model)
                load = Load(server.endpoints.grpc, "grpc", 1, False, seconds)
                run_load(load, pack_requests(description, images[:32], batch))
            spans = read_trace(file, model + GUARDED_SUFFIX)
        begun = spans[0].stamps["REQUEST_START"] + load.warm_up_s * 1e9
        parts = [divide(span, model) for span in spans if span.stamps["REQUEST_START"] >= begun]
        if not parts:
            raise BenchError(f"{model}: no request was answered within {seconds:g} s; give --seconds more")
        row = {
            "target": served.target,
            "placement": served.placement,
            "loop": served.loop,
            "batch": batch,
            "traced": len(parts),
            "server_ms": float(np.mean([sum(part.values()) for part in parts])),
            "steps_ms": {step: float(np.mean([part[step] for part in parts])) for step in STEPS},
            **describe_run(),
        }
        write_row(row, TIMELINE)
        print(f"{model}, batch {batch}: {row['server_ms']:.2f} ms in the server", file=sys.stderr, flush=True)


def trace_into(file: Path) -> list[str]:
    """Options that make the server trace every request into a file, written when it ends."""
    return [f"--trace-config={setting}" for setting in ("mode=triton", f"triton,file={file}", "rate=1", "level=TIMESTAMPS")]


def read_trace(file: Path, model: str) -> list[Span]:
    """The requests to one model, in order of their arrival, health checks left out, each with what was asked for it.

    Raises:
        BenchError: the server wrote no trace, or none of that model.
    """
    try:
        events = json.loads(file.read_text())
    except (OSError, ValueError):
        raise BenchError(f"the server wrote no trace into {file}") from None
    spans: dict[int, Span] = {}
    for event in events:
        span = spans.setdefault(event["id"], Span())
        span.model = event.get("model_name", span.model)
        span.request = event.get("request_id", span.request)
        span.parent = event.get("parent_id", span.parent)
        span.stamps |= {stamp["name"]: stamp["ns"] for stamp in event.get("timestamps", ())}
    for span in spans.values():
        if span.parent in spans:
            spans[span.parent].children.append(span)
    found = [span for span in spans.values() if span.model == model and span.request != REQUEST_ID]
    if not found:
        raise BenchError(f"the server's trace holds no request to {model}")
    return sorted(found, key=lambda span: span.stamps["REQUEST_START"])


def divide(span: Span, model: str) -> dict[str, float]:
    """Milliseconds of each of `STEPS` in a request; they add up to what it took in the server, each moment counted once.

    Args:
        span: of the guarded model, asked over gRPC.
        model: the plain model's name.
    """
    start, begun, sent, end = (span.stamps[name] for name in TRANSPORT)
    phases = [Phase("gRPC", 0, start, begun), Phase("gRPC", 0, sent, end), *list_phases(span, model, 1)]
    marks = sorted({start, end, *(min(max(at, start), end) for phase in phases for at in (phase.start, phase.end))})
    totals = dict.fromkeys(STEPS, 0.0)
    for left, right in itertools.pairwise(marks):
        totals[find_step([phase for phase in phases if phase.start <= left and phase.end >= right])] += (right - left) / 1e6
    return totals


def list_phases(span: Span, model: str, depth: int) -> list[Phase]:
    """Everything that the models below a span did."""
    found = []
    for child in span.children:
        role = ROLES[child.model.removeprefix(model)]
        for step, first, last in PHASES:
            if first in child.stamps and last in child.stamps:
                found.append(Phase(step or role, depth, child.stamps[first], child.stamps[last]))
        found += list_phases(child, model, depth + 1)
    return found


def find_step(running: Sequence[Phase]) -> str:
    """Whose a moment is in which these run."""
    if not running:
        return "between the models"
    deepest = max(phase.depth for phase in running)
    return min((phase.step for phase in running if phase.depth == deepest), key=STEPS.index)


def render_table(rows: Sequence[Row]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|"]
    for row in rows:
        steps: Mapping[str, float] = row["steps_ms"]
        cells = [row["target"], row["placement"], row["loop"], str(row["batch"]), str(row["traced"]), f"{row['server_ms']:.4g}"]
        lines.append("| " + " | ".join([*cells, *(f"{steps[step]:.3g}" for step in STEPS)]) + " |")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])

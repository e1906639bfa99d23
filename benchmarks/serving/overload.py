"""Measure overload: what guarded clients get at and beyond capacity, and what production gets beside them.

usage: python -m benchmarks.serving.overload [--targets resnet18_32] [--fronts shared:gateway] [--queue 128] [--seconds 10]
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final, Literal, cast

from benchmarks.records import OVERLOAD, Row, read_rows, write_row
from benchmarks.serving.exports import IMAGES, choose, prepare_guard
from benchmarks.serving.networks import NETWORKS, draw_images
from benchmarks.serving.offered import Offer, run_offer
from benchmarks.settings import describe_run
from diffense.bench.comparison import pack_requests, read_models
from diffense.bench.load import Load, run_load
from diffense.errors import BenchError, DiffenseError
from diffense.serve import TritonServer
from diffense_client._core import Request
from diffense_export.repository import export_guard

FACTORS: Final = (1.0, 2.0, 4.0)
FRONTS: Final = ("separate:gateway", "shared:gateway")  # the ensemble has no limit
START_S: Final = 60.0
FULL: Final = 32  # requests under way that keep every model busy, none refused: capacity is what is answered then
HEAD: Final = (
    "target", "placement", "asked", "queue", "stack", "capacity", "offered", "accepted", "refused", "unscored", "p50 ms",
    "p99 ms", "refusal p99 ms", "sent late, ms", "production p50 ms, alone", "beside", "p99 ms, alone", "beside",
    "images/s, alone", "beside",
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Read the options, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", default="resnet18_32")
    parser.add_argument("--fronts", default=",".join(FRONTS), help=f"of {', '.join(FRONTS)}")
    parser.add_argument("--queue", type=int, default=128, help="most requests that wait")
    parser.add_argument("--max-batch-size", type=int, default=8, help="most images that are stacked")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each measurement")
    options = parser.parse_args(arguments)
    try:
        for target in choose(options.targets, NETWORKS):
            for front in choose(options.fronts, FRONTS):
                measure(target, front, options.queue, options.max_batch_size, options.seconds)
        print("\n".join(render_table(read_rows(OVERLOAD))))
    except DiffenseError as error:
        sys.exit(f"overload: {error}")
    except KeyboardInterrupt:
        sys.exit("overload: interrupted; what is finished is kept")


def measure(target: str, front: str, queue: int, max_batch_size: int, seconds: float) -> None:
    """Start a server on one export and offer it more and more; each row is written as soon as it is there."""
    placement, asked = front.split(":")
    images = draw_images(target, IMAGES)
    model = f"{target}_{placement}"
    guarded = f"{model}_{asked}"
    with TritonServer(export(target, cast("Any", placement), model, queue, max_batch_size)) as server:
        url = server.endpoints.grpc
        served = read_models(url, "grpc", guarded, model)
        requests = pack_requests(served, images[:32], 1)
        plain = [replace(request, model=model, outputs=served.outputs) for request in requests]
        capacity = run_load(Load(url, "grpc", min(FULL, queue), False, seconds), requests).throughput
        for factor in FACTORS:
            offer = Offer(url, factor * capacity, seconds)
            found = run_offer(offer, requests).describe()
            single = Load(url, "grpc", 1, False, seconds)
            alone = run_load(single, plain)
            with flood(replace(offer, seconds=math.inf), requests):
                beside = run_load(single, plain)
            row = {
                "target": target,
                "placement": placement,
                "front": asked,
                "queue": queue,
                "max_batch_size": max_batch_size,
                "factor": factor,
                **describe_run(),
                "capacity": capacity,
                "offered": offer.rate,
                "seconds": seconds,
                **found,
                "production": {"alone": asdict(alone), "beside": asdict(beside)},
            }
            write_row(row, OVERLOAD)
            print(f"{guarded}, {factor:g} x {capacity:.1f}/s: {found['refused']:.1%} refused", file=sys.stderr, flush=True)


def export(target: str, placement: Literal["separate", "shared"], model: str, queue: int, max_batch_size: int) -> Path:
    """Write a repository of its own, its queues limited."""
    path, guard = prepare_guard(target, draw_images(target, IMAGES))
    repository = path.parent / f"overload-{placement}"
    export_guard(guard, path, repository, model, placement=placement, queue=queue, max_batch_size=max_batch_size)
    return repository


@contextmanager
def flood(offer: Offer, requests: Sequence[Request]) -> Iterator[None]:
    """Offer a load meanwhile, from a process of its own, which shares no interpreter with what is measured.

    Raises:
        BenchError: that process failed.
    """
    context = get_context("spawn")
    started, stop = context.Event(), context.Event()
    process = context.Process(target=run_offer, args=(offer, requests, started, stop))
    process.start()
    try:
        if not started.wait(START_S):
            raise BenchError("the process that offers the load did not start")
        yield
    finally:
        stop.set()
        process.join()
    if process.exitcode:
        raise BenchError(f"the process that offers the load ended with code {process.exitcode}")


def render_table(rows: Sequence[Row]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|", *map(render_row, rows)]


def render_row(row: Row) -> str:
    """One line of the table."""
    alone, beside = row["production"]["alone"], row["production"]["beside"]
    refusal = row["refusal_p99_ms"]
    cells = [
        row["target"],
        row["placement"],
        row["front"],
        str(row["queue"]),
        str(row["max_batch_size"]),
        f"{row['capacity']:.1f}/s",
        f"{row['factor']:g} x",
        *(f"{row[name]:.1%}" for name in ("accepted", "refused", "unscored")),
        *(f"{row[name]:.4g}" for name in ("p50_ms", "p99_ms")),
        "–" if refusal is None else f"{refusal:.4g}",
        f"{row['late_ms']:.3g}",
        *(f"{side[name]:.4g}" for name in ("p50_ms", "p99_ms", "throughput") for side in (alone, beside)),
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(sys.argv[1:])

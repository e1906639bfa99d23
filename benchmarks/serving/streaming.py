"""Measure the stream: how soon prediction and verdict are there, beside the unguarded model, in turns.

usage: python -m benchmarks.serving.streaming [--targets resnet18_32,resnet50_224] [--seconds 5] [--rounds 3]

Writes benchmarks/results/stream.json and prints it as a table. One request under way, gRPC, by the project's own client.
"""

import argparse
import asyncio
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, cast

import numpy as np

from benchmarks.records import STREAM, Row, read_rows, write_row
from benchmarks.serving.exports import IMAGES, PLACEMENTS, choose, prepare_guard
from benchmarks.serving.networks import NETWORKS, draw_images
from benchmarks.settings import describe_run
from diffense.bench.comparison import pack_requests, read_models
from diffense.bench.load import TIMEOUT_S, Load, run_load
from diffense.errors import DiffenseError
from diffense.names import STREAM_SUFFIX
from diffense.serve import TritonServer
from diffense_client._aio import open_transport
from diffense_client._core import Request, Settings
from diffense_client._failures import Deadline
from diffense_client._transport import Parts
from diffense_export.repository import export_guard

BATCHES: Final = (1, 8)
WARM_UP: Final = 5
HEAD: Final = (
    "target", "placement", "batch", "unguarded p50, ms", "prediction", "ratio", "verdict", "ratio",
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Read the options, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", default="demo,resnet18_32,resnet50_224")
    parser.add_argument("--placements", default=",".join(PLACEMENTS))
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    try:
        for target in choose(options.targets, NETWORKS):
            for placement in choose(options.placements, PLACEMENTS):
                measure(target, placement, options.seconds, options.rounds)
        print("\n".join(render_table(read_rows(STREAM))))
    except DiffenseError as error:
        sys.exit(f"streaming: {error}")


def measure(target: str, placement: str, seconds: float, rounds: int) -> None:
    """Start a server on one export; a row a batch is written as soon as it is there."""
    images = draw_images(target, IMAGES)
    path, guard = prepare_guard(target, images)
    model = f"{target}_{placement}"
    repository = path.parent / f"stream-{placement}"
    export_guard(guard, path, repository, model, placement=cast("Any", placement), stream=True)
    with TritonServer(repository) as server:
        url = server.endpoints.grpc
        served = read_models(url, "grpc", model + STREAM_SUFFIX, model)
        for batch in BATCHES:
            requests = pack_requests(served, images[:32], batch)
            plain = [replace(request, model=model, outputs=served.outputs) for request in requests]
            unguarded, parts = [], []
            for _ in range(rounds):
                unguarded.append(run_load(Load(url, "grpc", 1, False, seconds), plain).p50_ms)
                parts.append(asyncio.run(time_parts(url, requests, seconds)))
            prediction, verdict = np.asarray(parts).T
            row = {
                "target": target,
                "placement": placement,
                "batch": batch,
                "unguarded_p50_ms": float(np.median(unguarded)),
                "prediction_p50_ms": float(np.median(prediction)),
                "verdict_p50_ms": float(np.median(verdict)),
                "prediction_ratio": float(np.median(prediction / unguarded)),
                "verdict_ratio": float(np.median(verdict / unguarded)),
                "rounds": rounds,
                "seconds": seconds,
                **describe_run(),
            }
            write_row(row, STREAM)
            print(f"{model}, batch {batch}: prediction x{row['prediction_ratio']:.3f}", file=sys.stderr, flush=True)


async def time_parts(url: str, requests: Sequence[Request], seconds: float) -> tuple[float, float]:
    """Median milliseconds until the prediction and until the verdict, one request after the other."""
    times: list[list[float]] = []
    transport = open_transport(Settings.check(url, requests[0].model, "grpc", TIMEOUT_S, 0, None))
    try:
        end = time.perf_counter() + seconds
        for request in itertools.cycle(requests):
            start = time.perf_counter()
            if len(times) > WARM_UP and start > end:
                break
            parts = transport.stream(request, TIMEOUT_S)
            times.append([await _read(parts, start), await _read(parts, start)])
    finally:
        await transport.close()
    prediction, verdict = np.median(np.asarray(times[WARM_UP:]), axis=0) * 1e3
    return float(prediction), float(verdict)


async def _read(parts: Parts, start: float) -> float:
    await parts.read(Deadline(TIMEOUT_S))
    return time.perf_counter() - start


def render_table(rows: Sequence[Row]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|"]
    for row in rows:
        cells = [row["target"], row["placement"], str(row["batch"]), f"{row['unguarded_p50_ms']:.4g}"]
        for part in ("prediction", "verdict"):
            cells += [f"{row[f'{part}_p50_ms']:.4g}", f"{row[f'{part}_ratio']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])

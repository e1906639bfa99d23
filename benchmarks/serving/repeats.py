"""Measure what the server's response cache gives where images come again, and what it takes where none does.

usage: python -m benchmarks.serving.repeats [--targets resnet18_32,resnet50_224] [--requests 200] [--rounds 3]

Writes benchmarks/results/repeats.json and prints it as a table. Two guarded models that differ by `diffense export --cache`
alone (``--placement shared --loop whole``), and the unguarded one, in turns on one server that has a cache; one request of
one image under way, gRPC.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from benchmarks.records import REPEATS, Row, read_rows, write_row
from benchmarks.serving.exports import IMAGES, choose, prepare_guard
from benchmarks.serving.networks import NETWORKS, draw_images
from benchmarks.settings import describe_run
from diffense.bench.comparison import pack_requests, read_models
from diffense.bench.load import TIMEOUT_S
from diffense.errors import DiffenseError
from diffense.names import GUARDED_SUFFIX
from diffense.serve import TritonServer
from diffense_client._aio import open_transport
from diffense_client._core import Request, Settings
from diffense_export.repository import export_guard

SHARES: Final = (0.0, 0.5, 1.0)
CACHE_MIB: Final = 64
WARM_UP: Final = 10
HEAD: Final = (
    "target", "seen before", "unguarded, ms", "guarded", "ratio", "guarded, with a cache", "ratio",
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """Read the options, measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", default="resnet18_32,resnet50_224")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    try:
        for target in choose(options.targets, NETWORKS):
            measure(target, options.requests, options.rounds)
        print("\n".join(render_table(read_rows(REPEATS))))
    except DiffenseError as error:
        sys.exit(f"repeats: {error}")


def measure(target: str, requests: int, rounds: int) -> None:
    """Start a server on both exports; a row a share is written as soon as it is there."""
    images = draw_images(target, IMAGES)
    path, guard = prepare_guard(target, images)
    repository = path.parent / "repeats"
    models = {"guarded": f"{target}_plain", "cached": f"{target}_cached"}
    for way, model in models.items():
        export_guard(guard, path, repository, model, placement="shared", loop="whole", gateway=False, cache=way == "cached")
    with TritonServer(repository, cache_mib=CACHE_MIB) as server:
        url = server.endpoints.grpc
        asked: dict[str, Request] = {}
        for way, model in models.items():
            served = read_models(url, "grpc", model + GUARDED_SUFFIX, model)
            asked[way] = pack_requests(served, images[:1], 1)[0]
        asked["unguarded"] = replace(asked["guarded"], model=models["guarded"], outputs=served.outputs)
        for share in SHARES:
            times = [
                [asyncio.run(time_requests(url, repeat(asked[way], share, turn), requests)) for way in sorted(asked)]
                for turn in range(rounds)
            ]
            cached, guarded, unguarded = np.asarray(times).T
            row = {
                "target": target,
                "repeated": share,
                "unguarded_ms": float(np.median(unguarded)),
                "guarded_ms": float(np.median(guarded)),
                "cached_ms": float(np.median(cached)),
                "guarded_ratio": float(np.median(guarded / unguarded)),
                "cached_ratio": float(np.median(cached / unguarded)),
                "rounds": rounds,
                "requests": requests,
                **describe_run(),
            }
            write_row(row, REPEATS)
            print(f"{target}, {share:.0%} seen before: x{row['cached_ratio']:.3f}", file=sys.stderr, flush=True)


def repeat(request: Request, share: float, turn: int) -> Iterator[Request]:
    """The request again and again, in `share` of all cases with the same image, else with one that never was."""
    random = np.random.default_rng((turn, round(share * 100)))  # no image of another turn or share
    while True:
        if random.random() < share:
            yield request
        else:
            tensor = request.tensor.copy()
            tensor.reshape(-1)[:2] = random.random(2)
            yield replace(request, tensor=tensor)


async def time_requests(url: str, requests: Iterator[Request], number: int) -> float:
    """Mean milliseconds of an answer in the middle four fifths, one request after the other.

    A mean, since with half of the images seen before a median would show one half or the other.
    """
    first = next(requests)
    transport = open_transport(Settings.check(url, first.model, "grpc", TIMEOUT_S, 0, None))
    times = []
    try:
        await transport.infer(first, TIMEOUT_S)
        for _ in range(WARM_UP + number):
            request = next(requests)
            start = time.perf_counter()
            await transport.infer(request, TIMEOUT_S)
            times.append(time.perf_counter() - start)
    finally:
        await transport.close()
    kept = np.sort(times[WARM_UP:])
    cut = len(kept) // 10
    return float(kept[cut : len(kept) - cut].mean() * 1e3)


def render_table(rows: Sequence[Row]) -> list[str]:
    """Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|"]
    for row in rows:
        cells = [row["target"], f"{row['repeated']:.0%}", f"{row['unguarded_ms']:.4g}"]
        for way in ("guarded", "cached"):
            cells += [f"{row[f'{way}_ms']:.4g}", f"{row[f'{way}_ratio']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])

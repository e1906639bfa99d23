"""Measure memory: many guarded requests, and how the server's processes grow meanwhile.

usage: python -m benchmarks.serving.memory [--target demo] [--placement separate] [--loop bls] [--requests 200000]
"""

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.records import MEMORY, Row, write_row
from benchmarks.serving.exports import IMAGES, LOOPS, Served, prepare_repository
from benchmarks.serving.networks import NETWORKS, draw_images
from benchmarks.settings import describe_run
from diffense.bench.comparison import pack_requests, read_models
from diffense.bench.load import TIMEOUT_S
from diffense.errors import BadInputError, DiffenseError, OverloadedError
from diffense.names import GUARDED_SUFFIX
from diffense.serve import TritonServer
from diffense_client._aio import open_transport
from diffense_client._core import Request, Settings
from diffense_client._transport import AsyncTransport

BATCHES: Final = (1, 2, 4, 8)
UNDER_WAY: Final = 16
BAD: Final = 50  # one request in so many holds a NaN, and one has another shape
SAMPLES: Final = 200
BLOCKS: Final = 20  # neighbouring samples are alike, so their means are what the line goes through
PER: Final = 100_000
MEGABYTE: Final = 2**20
INSTANCE: Final = 8  # place of the instance's name among the words of a stub's command line


def main(arguments: Sequence[str]) -> None:
    """Read the options, measure and print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--target", default="demo", choices=list(NETWORKS))
    parser.add_argument("--placement", default="separate", choices=["separate", "shared"])
    parser.add_argument("--loop", default="bls", choices=list(LOOPS))
    parser.add_argument("--requests", type=int, default=200_000)
    options = parser.parse_args(arguments)
    try:
        measure(Served(options.target, options.placement, options.loop, False), options.requests)
    except DiffenseError as error:
        sys.exit(f"memory: {error}")
    except KeyboardInterrupt:
        sys.exit("memory: interrupted; nothing was written")


def measure(served: Served, count: int) -> None:
    """Start a server on one export, send the requests, write the row and print its line."""
    images = draw_images(served.target, IMAGES)
    model = f"{served.target}_{served.placement}_{served.loop}"
    guarded = model + GUARDED_SUFFIX
    with TritonServer(prepare_repository(served, images, model)) as server:
        url = server.endpoints.grpc
        description = read_models(url, "grpc", guarded, model)
        requests = [request for batch in BATCHES for request in pack_requests(description, images[:32], batch)]
        watch = Watch(server.pid, count)
        started = time.perf_counter()
        answers = asyncio.run(send_all(url, requests, count, watch))
        seconds = time.perf_counter() - started
    grown = {name: describe_growth(watch.places, sizes) for name, sizes in watch.sizes.items()}
    total = describe_growth(watch.places, np.sum(list(watch.sizes.values()), axis=0).tolist())
    row = {
        "target": served.target,
        "placement": served.placement,
        "loop": served.loop,
        **describe_run(),
        "requests": count,
        "answers": dict(answers),
        "seconds": seconds,
        "processes": grown,
        "total": total,
        "samples": {"requests": watch.places, "mb": watch.sizes},
    }
    write_row(row, MEMORY)
    print(describe(row))


def describe(row: Row) -> str:
    """One line."""
    total = row["total"]
    return (
        f"{row['target']} {row['placement']} {row['loop']}: {total['slope']:+.2f} ± {total['error']:.2f} MB per {PER} requests "
        f"over the later half of {row['requests']} ({total['last_mb']:.0f} MB in {len(row['processes'])} processes), "
        f"{'within' if total['within_noise'] else 'beyond'} noise; {row['backend']} backend"
    )


class Watch:
    """Resident memory of a server's processes, sampled as requests are answered.

    Args:
        server: its process id; it leads the group that its stubs belong to.
        count: requests to come.
    """

    def __init__(self, server: int, count: int) -> None:
        self.server, self.count = server, count
        self.every = max(1, count // SAMPLES)
        self.places: list[int] = []
        self.sizes: dict[str, list[float]] = {}

    def note(self, answered: int) -> None:
        """Take a sample when it is time for one."""
        if answered % self.every:
            return
        found = read_sizes(self.server)
        if not self.sizes:
            self.sizes = {name: [] for name in found}
        self.places.append(answered)
        for name, sizes in self.sizes.items():
            sizes.append(found.get(name, 0.0))
        if sys.stderr.isatty():
            print(f"\r{answered}/{self.count} requests, {sum(found.values()):.0f} MB", end="", file=sys.stderr, flush=True)


def read_sizes(server: int) -> dict[str, float]:
    """Model instance, or ``server`` -> resident megabytes."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
            if group != server:
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            lines = (folder / "status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        resident = next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)
        found[name_process(words)] = resident * 1024 / MEGABYTE
    return found


def name_process(words: Sequence[str]) -> str:
    """Name of the model instance that a stub serves, as its command line tells; else ``server``."""
    if not words[0].endswith("triton_python_backend_stub"):
        return "server"
    return words[INSTANCE]


async def send_all(url: str, requests: Sequence[Request], count: int, watch: Watch) -> Counter[str]:
    """Send so many requests, `UNDER_WAY` at a time, a few of them bad; what the answers were."""
    settings = Settings.check(url, requests[0].model, "grpc", TIMEOUT_S, 0, None)
    transport, answers = open_transport(settings), Counter[str]()
    numbers = iter(range(count))
    try:
        await asyncio.gather(*(_send(transport, requests, numbers, answers, watch) for _ in range(UNDER_WAY)))
    finally:
        await transport.close()
    return answers


async def _send(
    transport: AsyncTransport, requests: Sequence[Request], numbers: Iterator[int], answers: Counter[str], watch: Watch
) -> None:
    for number in numbers:
        request = requests[number % len(requests)]
        if number % BAD < 2:
            request = spoil(request, other_shape=number % BAD == 1)
        try:
            await transport.infer(request, TIMEOUT_S)
            answers["answered"] += 1
        except BadInputError:
            answers["bad input"] += 1
        except OverloadedError:
            answers["refused"] += 1
        watch.note(answers.total())


def spoil(request: Request, *, other_shape: bool) -> Request:
    """The same request with a NaN in its first image, or with a row of pixels less."""
    if other_shape:
        return replace(request, tensor=np.ascontiguousarray(request.tensor[:, :, :-1]))
    tensor = request.tensor.copy()
    tensor[0, 0, 0, 0] = np.nan
    return replace(request, tensor=tensor)


def describe_growth(places: Sequence[int], sizes: Sequence[float]) -> dict[str, Any]:
    """Slope in MB per `PER` requests over the later half, by least squares through means of neighbouring samples.

    Returns:
        first_mb, last_mb; slope and its standard error; within_noise: the slope is no more than two errors above 0.
    """
    half = len(places) // 2
    xs, ys = (np.asarray(values[half:], np.float64) for values in (places, sizes))
    blocks = max(3, min(BLOCKS, len(xs)))
    slope, error = fit_line(average_blocks(xs, blocks) / PER, average_blocks(ys, blocks))
    return {
        "first_mb": sizes[0],
        "last_mb": sizes[-1],
        "slope": slope,
        "error": error,
        "within_noise": slope <= 2 * error,
    }


def fit_line(xs: NDArray[np.float64], ys: NDArray[np.float64]) -> tuple[float, float]:
    """Slope of the line through at least three points by least squares, and its standard error."""
    x, y = xs - xs.mean(), ys - ys.mean()
    slope = x @ y / (x @ x)
    rest = y - slope * x
    return float(slope), float(np.sqrt(rest @ rest / (len(x) - 2) / (x @ x)))


def average_blocks(values: NDArray[np.float64], blocks: int) -> NDArray[np.float64]:
    """Means of so many runs of values, as equal in length as can be."""
    return np.asarray([part.mean() for part in np.array_split(values, blocks)])


if __name__ == "__main__":
    main(sys.argv[1:])

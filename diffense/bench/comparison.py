"""Guarded beside unguarded: the same images, in turns on one running server, so that the ratio is what counts."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from diffense import names
from diffense.bench.load import TIMEOUT_S, Load, run_load
from diffense.bench.perf_analyzer import run_perf_analyzer
from diffense.bench.statistics import Statistics, combine
from diffense.errors import BadInputError, OptionError
from diffense_client._aio import AsyncGuardClient, open_transport
from diffense_client._core import Request, Settings, plan_pixels
from diffense_client._model import ServedModel

DISTINCT: Final = 4  # different requests that are sent in turn

Measure = Callable[[Load, Sequence[Request]], Statistics]


@dataclass(frozen=True)
class Scenario:
    """One way to ask.

    Attributes:
        protocol: gRPC or HTTP.
        batch: images a request.
        concurrency: requests under way.
        shared_memory: whether inputs lie in system shared memory.
    """

    protocol: Literal["grpc", "http"]
    batch: int
    concurrency: int
    shared_memory: bool


@dataclass(frozen=True)
class Comparison:
    """One scenario, measured.

    Attributes:
        model: production model.
        guarded_model: ensemble or gateway.
        tool: what measured.
        unguarded, guarded: medians of the rounds.
        throughput_ratio, p50_ratio: guarded over unguarded, median of the rounds' own ratios.
    """

    model: str
    guarded_model: str
    protocol: str
    batch: int
    concurrency: int
    shared_memory: bool
    tool: str
    rounds: int
    seconds: float
    unguarded: Statistics
    guarded: Statistics
    throughput_ratio: float
    p50_ratio: float


def list_scenarios(
    protocol: Literal["grpc", "http"], batches: Sequence[int], concurrencies: Sequence[int], shared_memory: Sequence[bool]
) -> Iterator[Scenario]:
    """Every combination, small loads first."""
    for shared, batch, concurrency in product(shared_memory, batches, concurrencies):
        yield Scenario(protocol, batch, concurrency, shared)


def name_production(guarded: str) -> str:
    """Name of the production model behind a guarded one.

    Raises:
        OptionError: the name does not tell.
    """
    for suffix in (names.GUARDED_SUFFIX, names.GATEWAY_SUFFIX):
        if guarded.endswith(suffix) and guarded != suffix:
            return guarded.removesuffix(suffix)
    raise OptionError(f"{guarded!r} does not tell its production model (no {names.GUARDED_SUFFIX} at its end); give --beside")


def choose_tool(program: Path | None) -> tuple[str, Measure]:
    """The name and the function of what measures: perf_analyzer where there is one."""
    if program is None:
        return "builtin", run_load
    return "perf_analyzer", lambda load, requests: run_perf_analyzer(program, load, requests)


def read_models(url: str, protocol: Literal["grpc", "http"], guarded: str, production: str) -> ServedModel:
    """Read the guarded model's description, and see that the production model is there.

    Raises:
        ClientError: the server is down, or lacks one of them.
    """

    async def read() -> ServedModel:
        async with AsyncGuardClient(url, guarded, protocol, timeout_s=TIMEOUT_S) as client:
            served = await client.describe()
        transport = open_transport(Settings.check(url, production, protocol, TIMEOUT_S, 0, None))
        try:
            await transport.fetch_config(production, TIMEOUT_S)
        finally:
            await transport.close()
        return served

    return asyncio.run(read())


def compare_models(
    url: str,
    served: ServedModel,
    production: str,
    scenario: Scenario,
    images: NDArray[np.uint8],
    *,
    tool: tuple[str, Measure],
    rounds: int,
    seconds: float,
) -> Comparison:
    """Measure unguarded and guarded in turns.

    Args:
        url: ``host:port`` of the scenario's protocol.
        served: the guarded model.
        production: name of the production model.
        scenario: how to ask.
        images: (N, H, W, C) uint8, as clients would send them; repeated where a batch needs more.
        tool: from `choose_tool`.
        rounds: turns; every second one begins with the guarded model.
        seconds: length of each measurement.

    Raises:
        BadInputError: the server takes no such batch.
        BenchError: a measurement failed.
        ClientError: the server is down or failed.
    """
    requests = pack_requests(served, images, scenario.batch)
    plain = [replace(request, model=production, outputs=served.outputs) for request in requests]
    load = Load(url, scenario.protocol, scenario.concurrency, scenario.shared_memory, seconds)
    name, measure = tool
    pairs = []
    for turn in range(rounds):
        order = (plain, requests) if turn % 2 == 0 else (requests, plain)
        found = [measure(load, asked) for asked in order]
        pairs.append(tuple(found) if turn % 2 == 0 else tuple(reversed(found)))
    unguarded, guarded = (combine(side) for side in zip(*pairs, strict=True))
    return Comparison(
        model=production,
        guarded_model=served.name,
        **asdict(scenario),
        tool=name,
        rounds=rounds,
        seconds=seconds,
        unguarded=unguarded,
        guarded=guarded,
        throughput_ratio=float(np.median([g.throughput / u.throughput for u, g in pairs])),
        p50_ratio=float(np.median([g.p50_ms / u.p50_ms for u, g in pairs])),
    )


def pack_requests(served: ServedModel, images: NDArray[np.uint8], batch: int) -> list[Request]:
    """A few requests of that many images.

    Raises:
        BadInputError: the server takes no such batch, or no such images.
    """
    if batch > served.max_batch_size or (served.fixed_batch and batch != served.max_batch_size):
        word = "exactly" if served.fixed_batch else "at most"
        raise BadInputError(f"{served.name!r} takes {word} {served.max_batch_size} images a request, not {batch}")
    if not len(images):
        raise BadInputError("there is no image to send")
    rows = np.arange(DISTINCT * batch) % len(images)
    return list(plan_pixels(served, images[rows], None, "bench", batch))

"""The built-in load generator: so many requests at any time, each followed by the next one as soon as it is answered."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Final, Literal

from diffense.bench.statistics import Statistics, summarise
from diffense.errors import ClientError, OverloadedError
from diffense_client._aio import open_transport
from diffense_client._core import Request, Settings
from diffense_client._shared_memory import LET_GO_S, Region
from diffense_client._transport import AsyncTransport

TIMEOUT_S: Final = 30.0
BACK_OFF_S: Final = 0.005  # after a refusal, lest the generator itself takes the processor that it measures


@dataclass(frozen=True)
class Load:
    """How one model is asked.

    Attributes:
        url: ``host:port``.
        protocol: gRPC or HTTP.
        concurrency: requests that are under way at any time.
        shared_memory: whether inputs lie in system shared memory, written once.
        seconds: length of the measurement.
        warm_up_s: seconds before it that do not count.
    """

    url: str
    protocol: Literal["grpc", "http"]
    concurrency: int
    shared_memory: bool
    seconds: float
    warm_up_s: float = 0.5


def run_load(load: Load, requests: Sequence[Request]) -> Statistics:
    """Send these requests over and over, and measure.

    Args:
        load: how.
        requests: of one model, all of the same number of images.

    Raises:
        BenchError: none was answered in time.
        ClientError: the server is down, lacks the model, or failed.
    """
    return asyncio.run(_run(load, requests))


async def _run(load: Load, requests: Sequence[Request]) -> Statistics:
    settings = Settings.check(load.url, requests[0].model, load.protocol, TIMEOUT_S, 0, None)
    async with AsyncExitStack() as stack:
        transport = open_transport(settings)
        stack.push_async_callback(transport.close)
        sent = [await _place(transport, request, stack) for request in requests] if load.shared_memory else list(requests)
        start = time.perf_counter() + load.warm_up_s
        end = start + load.seconds
        recorders = [_Recorder(start, end) for _ in range(load.concurrency)]
        # Nothing is cancelled: the wheel's server has died of a request that was cancelled under way.
        failures: list[ClientError] = []
        turned = [sent[place % len(sent) :] + sent[: place % len(sent)] for place in range(load.concurrency)]
        runs = [
            recorder.run(transport, itertools.cycle(own), failures) for recorder, own in zip(recorders, turned, strict=True)
        ]
        await asyncio.gather(*runs)
        if failures:
            raise failures[0]
    latencies = [latency for recorder in recorders for latency in recorder.latencies]
    return summarise(latencies, load.seconds, requests[0].rows, sum(recorder.rejected for recorder in recorders))


class _Recorder:
    """One of the requests under way: its latencies within the measurement."""

    def __init__(self, start: float, end: float) -> None:
        self.start, self.end = start, end
        self.latencies: list[float] = []
        self.rejected = 0

    async def run(self, transport: AsyncTransport, requests: "itertools.cycle[Request]", failures: list[ClientError]) -> None:
        """Ask until the measurement ends, or one of all requests under way has failed."""
        for request in requests:
            sent = time.perf_counter()
            if sent >= self.end or failures:
                return
            try:
                await transport.infer(request, TIMEOUT_S)
            except OverloadedError:
                self.rejected += sent >= self.start
                await asyncio.sleep(BACK_OFF_S)
                continue
            except ClientError as error:
                failures.append(error)
                return
            now = time.perf_counter()
            if self.start <= now < self.end:
                self.latencies.append(now - sent)


async def _place(transport: AsyncTransport, request: Request, stack: AsyncExitStack) -> Request:
    region = Region(request.tensor.nbytes)
    stack.callback(region.remove)
    region.write(request.tensor)
    await transport.register(region.name, region.byte_size, TIMEOUT_S)
    stack.push_async_callback(transport.unregister, region.name, LET_GO_S)
    return replace(request, region=region.name)

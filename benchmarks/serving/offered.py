"""Offered load: requests are sent at a rate, whether or not earlier ones have been answered."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from typing import Any, Final

import numpy as np

from diffense import names
from diffense.bench.load import TIMEOUT_S
from diffense.errors import BenchError, ClientError, OverloadedError
from diffense_client._aio import open_transport
from diffense_client._core import Request, Settings
from diffense_client._transport import AsyncTransport

SEED: Final = 0


@dataclass(frozen=True)
class Offer:
    """How many gRPC requests a second are sent, and for how long; the gaps between them are exponential.

    Attributes:
        url: ``host:port``.
        rate: requests a second.
        seconds: how long requests are sent, `math.inf` until somebody says stop; their answers may take longer.
    """

    url: str
    rate: float
    seconds: float


@dataclass
class Outcome:
    """What became of the requests; times are seconds from sending to the answer.

    Attributes:
        sent: requests.
        accepted: times of those that were answered.
        refused: times of those that were refused as too many.
        failed: others; the last reason is kept.
        unscored: answered ones with an image that the guard had no time for.
        late_s: how far the generator itself fell behind its plan.
    """

    sent: int = 0
    accepted: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    failed: int = 0
    reason: str = ""
    unscored: int = 0
    late_s: float = 0.0

    def describe(self) -> dict[str, Any]:
        """Shares and quantiles.

        Raises:
            BenchError: a request got no answer, or nothing was accepted.
        """
        answers = len(self.accepted) + len(self.refused) + self.failed
        if answers != self.sent or not self.accepted:
            raise BenchError(f"{self.sent} requests, {answers} answers, {len(self.accepted)} accepted; {self.reason}")
        p50, p99 = np.quantile(np.asarray(self.accepted) * 1e3, (0.5, 0.99)).tolist()
        refusals = np.quantile(np.asarray(self.refused) * 1e3, (0.5, 0.99)).tolist() if self.refused else [None, None]
        return {
            "sent": self.sent,
            "accepted": len(self.accepted) / self.sent,
            "refused": len(self.refused) / self.sent,
            "failed": self.failed,
            "unscored": self.unscored / self.sent,
            "p50_ms": p50,
            "p99_ms": p99,
            "refusal_p50_ms": refusals[0],
            "refusal_p99_ms": refusals[1],
            "late_ms": self.late_s * 1e3,
        }


def run_offer(offer: Offer, requests: Sequence[Request], started: Event | None = None, stop: Event | None = None) -> Outcome:
    """Send these requests in turn at a rate and wait for every answer.

    Args:
        offer: how many and how long.
        requests: one image each, or as many as a request shall hold.
        started: set when the first one is sent.
        stop: ends the sending when it is set.
    """
    return asyncio.run(_run(offer, requests, started, stop))


async def _run(offer: Offer, requests: Sequence[Request], started: Event | None, stop: Event | None) -> Outcome:
    settings = Settings.check(offer.url, requests[0].model, "grpc", TIMEOUT_S, 0, None)
    transport, outcome = open_transport(settings), Outcome()
    gaps = np.random.default_rng(SEED)
    under_way: set[asyncio.Task[None]] = set()
    try:
        await transport.infer(requests[0], TIMEOUT_S)  # opens the connection
        start = time.perf_counter()
        planned = start
        if started is not None:
            started.set()
        for request in itertools.cycle(requests):
            planned += gaps.exponential(1 / offer.rate)
            if planned > start + offer.seconds or (stop is not None and stop.is_set()):
                break
            wait = planned - time.perf_counter()
            await asyncio.sleep(max(0.0, wait))
            outcome.late_s = max(outcome.late_s, -wait)
            task = asyncio.create_task(_ask(transport, request, outcome))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        await asyncio.gather(*under_way)
    finally:
        await transport.close()
    return outcome


async def _ask(transport: AsyncTransport, request: Request, outcome: Outcome) -> None:
    outcome.sent += 1
    sent = time.perf_counter()
    try:
        answer = await transport.infer(request, TIMEOUT_S)
    except OverloadedError:
        outcome.refused.append(time.perf_counter() - sent)
    except ClientError as error:
        outcome.failed, outcome.reason = outcome.failed + 1, str(error)
    else:
        outcome.accepted.append(time.perf_counter() - sent)
        outcome.unscored += bool((answer.arrays[names.FLAGGED] == names.UNSCORED).any())

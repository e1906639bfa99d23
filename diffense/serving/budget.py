"""Runs work that may hang, for a limited time, and leaves it alone for a while when it keeps failing."""

import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Final, TypeVar

from diffense.serving.calls import CallError

WORKERS: Final = 4  # abandoned calls that may still be under way, e.g. at a dead process, which takes a second for each
STRIKES: Final = 3
REST_S: Final = 1.0

T = TypeVar("T")


class OverBudgetError(Exception):
    """The work gave nothing in its time; the reason is a word for the metrics."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Budget:
    """A worker pool with a time limit.

    After `STRIKES` failures in a row nothing is tried for `REST_S` seconds, so that a dead guard costs its budget once a
    second and not at every request; the next attempt then decides.

    Args:
        seconds: the limit.
        clock: seconds, monotonic.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds, self.clock = seconds, clock
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="diffense")
        self._lock = threading.Lock()
        self._free = threading.Semaphore(WORKERS)
        self._strikes, self._rest_until = 0, 0.0

    def run(self, work: Callable[[float], T], seconds: float = math.inf) -> T:
        """Run ``work(deadline)`` in a worker thread; what comes too late is dropped.

        Args:
            work: gets the instant (of the clock) after which nobody waits for it.
            seconds: a limit below the budget.

        Raises:
            OverBudgetError: it took too long (``budget``), a model that it calls failed (``guard``), or it was not tried
                because the attempts before it failed (``resting``).
        """
        with self._lock:
            if self._strikes >= STRIKES and self.clock() < self._rest_until:
                raise OverBudgetError("resting")
        limit = min(seconds, self.seconds)
        deadline, end = self.clock() + limit, time.monotonic() + limit
        try:
            # Waits here and not in the pool's queue, which would hold its images for as long as others hang.
            if not self._free.acquire(timeout=limit):
                raise TimeoutError
            future = self._pool.submit(work, deadline)
            future.add_done_callback(lambda done: self._free.release())
            result = future.result(timeout=end - time.monotonic())
        except (TimeoutError, CancelledError):
            if limit == self.seconds:  # one client's short patience must not switch the guard off for the others
                self._strike()
            raise OverBudgetError("budget") from None
        except CallError as error:
            self._strike()
            raise OverBudgetError("guard") from error
        with self._lock:
            self._strikes = 0
        return result

    def close(self) -> None:
        """Let go of the workers without waiting for them."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _strike(self) -> None:
        with self._lock:
            self._strikes += 1
            self._rest_until = self.clock() + REST_S

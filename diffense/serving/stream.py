"""The served stream: production outputs as soon as they are there, the verdict after them, both to the same request."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diffense.serving.budget import Budget, OverBudgetError
from diffense.serving.calls import Arrays, CallError, RefusedError, mask_error, read_inputs, refuse, respond, split_rows
from diffense.serving.family import Family, Verdict
from diffense.serving.meter import Meter
from diffense.serving.settings import Wiring
from diffense.serving.turn import Turn
from diffense.serving.verdicts import VerdictRows

# Stacks whose verdict is under way while the next prediction is made. More wait in the server's queue, whose limit holds.
UNDER_WAY: Final = 2
PATIENCE_S: Final = 5.0  # less than the clients' own; a guard that hangs must not hold up the predictions of others for ever


@dataclass(frozen=True)
class Job:
    """One readable request; `sender` takes its responses, nobody waits for them after `deadline`."""

    request: Any
    sender: Any
    images: NDArray[Any]
    deadline: float


class StreamService:
    """Answers every request twice: with the production outputs, then with the verdict or an error.

    Args:
        backend: the server's module.
        wiring: the models behind the stream.
        meter: where images without a verdict are counted, and verdicts that no guard's model counts.
        turn: taken for as long as a prediction is made.
        clock: seconds, monotonic.
    """

    def __init__(
        self, backend: Any, wiring: Wiring, meter: Meter, turn: Turn, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.backend, self.wiring, self.meter, self.turn, self.clock = backend, wiring, meter, turn, clock
        self.family = Family(backend, wiring, meter)
        self.budget = Budget(PATIENCE_S, clock)
        self._pool = ThreadPoolExecutor(UNDER_WAY, thread_name_prefix="diffense")
        self._free = threading.Semaphore(UNDER_WAY)

    def close(self) -> None:
        """Wait until every verdict that is under way has been sent."""
        self._pool.shutdown()
        self.budget.close()
        self.turn.close()

    def answer(self, requests: Sequence[Any]) -> None:
        """Send the production outputs of a batch of requests; the verdicts follow from other threads.

        Whatever happens, each request gets its last response, and none gets another's error.
        """
        stacks: dict[tuple[int, ...], list[Job]] = {}
        for request in requests:
            sender = request.get_response_sender()
            try:
                job = self._open(request, sender)
                stacks.setdefault(job.images.shape[1:], []).append(job)
            except Exception as error:  # a raised error would leave all requests of the batch without an answer
                self._close(sender, refuse(self.backend, mask_error(self.backend, error)))
        for jobs in stacks.values():
            self._answer_stack(jobs)

    def _open(self, request: Any, sender: Any) -> Job:
        if request.is_cancelled():
            raise RefusedError("CANCELLED", "the request was cancelled")
        images = read_inputs(request, [self.wiring.input])[self.wiring.input]
        limit = request.timeout()
        return Job(request, sender, images, self.clock() + limit / 1e6 if limit else math.inf)

    def _answer_stack(self, jobs: Sequence[Job]) -> None:
        sizes = [len(job.images) for job in jobs]
        try:
            # A copy: the request's own memory need not outlive this call.
            images = np.concatenate([job.images for job in jobs])
            with self.turn:
                outputs, found = self.family.ask_production(images, jobs[0].request.trace())
            pieces = {name: split_rows(array, sizes) for name, array in outputs.items()}
            responses = [
                respond(self.backend, job.request, {name: rows[place] for name, rows in pieces.items()})
                for place, job in enumerate(jobs)
            ]
        except CallError as error:
            if error.code == "INVALID_ARG" and len(jobs) > 1:  # one of them is at fault; the others get their answers
                for job in jobs:
                    self._answer_stack([job])
                return
            self._refuse_all(jobs, f"production failed: {error}", error.code, error.public)
            return
        except Exception as error:  # a raised error would end all requests of the batch, its traceback sent to the clients
            self._refuse_all(jobs, f"cannot predict: {error!r}", "INTERNAL", "the stream failed; the server's log says why")
            return
        for job, response in zip(jobs, responses, strict=True):
            self._send(job.sender, response)
        self._free.acquire()
        self._pool.submit(self._finish_stack, jobs, images, outputs, found)

    def _finish_stack(self, jobs: Sequence[Job], images: NDArray[Any], outputs: Arrays, found: Arrays | None) -> None:
        left = list(jobs)
        try:
            for job, verdict in zip(jobs, self._judge(jobs, images, outputs, found), strict=True):
                if isinstance(verdict, RefusedError):
                    response = refuse(self.backend, verdict)
                else:
                    response = respond(self.backend, job.request, verdict.to_tensors())
                left.pop(0)
                self._close(job.sender, response)
        except Exception as error:  # nobody reads it from the pool, and the clients wait for their last response
            self._refuse_all(left, f"cannot judge: {error!r}", "INTERNAL", "the stream failed; the server's log says why")
        finally:
            self._free.release()

    def _judge(self, jobs: Sequence[Job], images: NDArray[Any], outputs: Arrays, found: Arrays | None) -> list[Verdict]:
        sizes = [len(job.images) for job in jobs]
        if all(job.request.is_cancelled() for job in jobs):
            return [RefusedError("CANCELLED", "the request was cancelled") for _ in jobs]
        left = max(job.deadline for job in jobs) - self.clock()
        try:
            own = jobs[0].request.request_id() if len(jobs) == 1 else ""
            verdicts = self.family.judge(self.budget, images, outputs, found, sizes, left, own)
            self.family.count([job.request for job in jobs], outputs, sizes, verdicts)
            return verdicts
        except OverBudgetError as error:
            self.meter.count_unscored(error.reason, sum(sizes))
            return [VerdictRows.make_unscored(size, error.reason) for size in sizes]

    def _refuse_all(self, jobs: Sequence[Job], logged: str, code: str, message: str) -> None:
        self.backend.Logger.log_error(logged)
        for job in jobs:
            self._close(job.sender, refuse(self.backend, RefusedError(code, message)))

    def _close(self, sender: Any, response: Any) -> None:
        self._send(sender, response, self.backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def _send(self, sender: Any, response: Any, flags: int = 0) -> None:
        """A response without tensors, of which the request wants none, is left out; its flags are not."""
        try:
            if response.has_error() or response.output_tensors():
                sender.send(response, flags)
            elif flags:
                sender.send(flags=flags)
        except Exception as error:  # whose sender it is, and nobody else, may miss an answer
            self.backend.Logger.log_error(f"cannot answer a request: {error!r}")
            if flags:
                with contextlib.suppress(Exception):  # without the last word the client waits for its deadline
                    sender.send(flags=flags)

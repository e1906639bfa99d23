"""The served gateway: production answers first, the verdict has a time budget, and a policy says what a flag does."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diffense import names
from diffense.serving.budget import Budget, OverBudgetError
from diffense.serving.calls import Arrays, CallError, RefusedError, mask_error, read_inputs, refuse, respond, split_rows
from diffense.serving.family import Family, Verdict
from diffense.serving.meter import Meter
from diffense.serving.policy import replace_outputs
from diffense.serving.settings import GatewayOptions, Wiring
from diffense.serving.turn import Turn
from diffense.serving.verdicts import VerdictRows

# Of a missing verdict, where the gateway is closed; all other reasons may be gone when the request comes again.
CODES: Final = {"score": "INVALID_ARG", "logits": "INVALID_ARG", "internal": "INTERNAL"}


@dataclass(frozen=True)
class Job:
    """One readable request of a batch; its client does not wait beyond ``deadline``."""

    place: int
    request: Any
    images: NDArray[Any]
    deadline: float


class GatewayService:
    """Answers batches of requests with production outputs and, when there is time, verdicts.

    Args:
        backend: the server's module.
        wiring: the models behind the gateway.
        options: policy and budget.
        meter: where images without a verdict are counted, and verdicts that no guard's model counts.
        turn: taken for as long as the models behind the gateway work for a batch.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        backend: Any,
        wiring: Wiring,
        options: GatewayOptions,
        meter: Meter,
        turn: Turn,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend, self.wiring, self.options, self.meter = backend, wiring, options, meter
        self.turn, self.clock = turn, clock
        self.family = Family(backend, wiring, meter)
        self.budget = Budget(options.budget_ms / 1000, clock)

    def close(self) -> None:
        """Let go of calls that are still under way."""
        self.budget.close()
        self.turn.close()

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request of a batch, in order; whatever happens, each gets a response of its own."""
        responses: list[Any] = [None] * len(requests)
        stacks: dict[tuple[int, ...], list[Job]] = {}
        for place, request in enumerate(requests):
            try:
                job = self._open(place, request)
                stacks.setdefault(job.images.shape[1:], []).append(job)
            except Exception as error:  # a raised error would end all requests of the batch
                responses[place] = refuse(self.backend, mask_error(self.backend, error))
        for jobs in stacks.values():
            with self.turn:
                answers = self._answer_stack(jobs)
            for job, response in zip(jobs, answers, strict=True):
                responses[job.place] = response
        return responses

    def _open(self, place: int, request: Any) -> Job:
        if request.is_cancelled():
            raise RefusedError("CANCELLED", "the request was cancelled")
        images = read_inputs(request, [self.wiring.input])[self.wiring.input]
        limit = request.timeout()
        return Job(place, request, images, self.clock() + limit / 1e6 if limit else math.inf)

    def _answer_stack(self, jobs: Sequence[Job]) -> list[Any]:
        sizes = [len(job.images) for job in jobs]
        try:
            images = np.concatenate([job.images for job in jobs])
            outputs, found = self.family.ask_production(images, jobs[0].request.trace())
            pieces = {name: split_rows(array, sizes) for name, array in outputs.items()}
        except CallError as error:
            if error.code == "INVALID_ARG" and len(jobs) > 1:  # one of them is at fault; the others get their answers
                return [response for job in jobs for response in self._answer_stack([job])]
            self.backend.Logger.log_error(f"production failed: {error}")
            return [refuse(self.backend, RefusedError(error.code, error.public)) for _ in jobs]
        except Exception as error:  # a raised error would end all requests of the batch, its traceback sent to the clients
            self.backend.Logger.log_error(f"cannot predict: {error!r}")
            refused = RefusedError("INTERNAL", "the gateway failed; the server's log says why")
            return [refuse(self.backend, refused) for _ in jobs]
        parts = [{name: rows[place] for name, rows in pieces.items()} for place in range(len(jobs))]
        verdicts = self._judge(jobs, images, outputs, found)
        return [self._close(job, part, verdict) for job, part, verdict in zip(jobs, parts, verdicts, strict=True)]

    def _judge(self, jobs: Sequence[Job], images: NDArray[Any], outputs: Arrays, found: Arrays | None) -> list[Verdict]:
        sizes = [len(job.images) for job in jobs]
        left = max(job.deadline for job in jobs) - self.clock()
        try:
            own = jobs[0].request.request_id() if len(jobs) == 1 else ""
            verdicts = self.family.judge(self.budget, images, outputs, found, sizes, left, own)
            self.family.count([job.request for job in jobs], outputs, sizes, verdicts)
            return verdicts
        except OverBudgetError as error:
            reason = error.reason
        for job in jobs:
            self.meter.count_unscored(reason, len(job.images), job.request.request_id())
        return [VerdictRows.make_unscored(size, reason) for size in sizes]

    def _close(self, job: Job, outputs: Arrays, verdict: Verdict) -> Any:
        try:
            if job.request.is_cancelled():
                raise RefusedError("CANCELLED", "the request was cancelled")
            if isinstance(verdict, RefusedError):
                raise verdict
            self._check_policy(verdict)
        except RefusedError as error:
            return refuse(self.backend, error)
        if self.options.policy == "abstain":
            hidden = verdict.flagged == names.FLAGGED_YES
            even = {self.wiring.logits} if self.wiring.probabilities else set()
            outputs = {name: replace_outputs(array, hidden, even=name in even) for name, array in outputs.items()}
        return respond(self.backend, job.request, {**outputs, **verdict.to_tensors()})

    def _check_policy(self, verdict: VerdictRows) -> None:
        if self.options.closed and (verdict.flagged == names.UNSCORED).any():
            reason = next(reason for reason in verdict.reasons if reason)
            said = f"the guard gave no verdict ({reason}), and this gateway is closed then"
            raise RefusedError(CODES.get(reason, "UNAVAILABLE"), said)
        rows = np.flatnonzero(verdict.flagged == names.FLAGGED_YES)
        if self.options.policy == "reject" and len(rows):
            shown = ", ".join(map(str, rows.tolist()))
            raise RefusedError("INVALID_ARG", f"the guard flagged image {shown} of the request (images count from 0)")

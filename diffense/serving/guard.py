"""The served guard: one verdict for every image, and the production outputs handed through untouched."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffense import names
from diffense.scorer import Scorer
from diffense.serving.calls import (
    Arrays,
    CallError,
    RefusedError,
    call_model,
    find_row_errors,
    has_numbers,
    mask_error,
    read_inputs,
    refuse,
    respond,
)
from diffense.serving.meter import Meter
from diffense.serving.settings import Wiring
from diffense.serving.verdicts import VerdictRows


class OutOfTimeError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class Job:
    """One readable request of a batch."""

    place: int
    request: Any
    inputs: Arrays
    logits: NDArray[np.float32]
    latents: NDArray[np.float32]  # or the (N, 1) scores, where that graph gives them
    deadline: float


class GuardService:
    """Answers batches of requests with the guard's verdicts.

    Args:
        backend: the server's module.
        wiring: the models around the guard.
        scorer: the guard's arithmetic.
        meter: where verdicts are counted.
        clock: seconds, monotonic.
    """

    def __init__(
        self, backend: Any, wiring: Wiring, scorer: Scorer, meter: Meter, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.backend, self.wiring, self.scorer, self.meter, self.clock = backend, wiring, scorer, meter, clock
        self._raw = wiring.raw
        self._raw_logits = next(raw for raw, output in self._raw.items() if output == wiring.logits)

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request of a batch, in order; whatever happens, each gets a response of its own."""
        responses: list[Any] = [None] * len(requests)
        started, jobs = self.clock(), []
        for place, request in enumerate(requests):
            try:
                jobs.append(self._open(place, request, started))
            except Exception as error:  # a raised error would end all requests of the batch
                responses[place] = self._refuse(request, mask_error(self.backend, error))
        if jobs:
            verdicts = self._score(jobs).split([len(job.latents) for job in jobs])
            self.meter.observe_time(self.clock() - started)
            for job, part in zip(jobs, verdicts, strict=True):
                responses[job.place] = self._close(job, part)
        return responses

    def _open(self, place: int, request: Any, now: float) -> Job:
        if request.is_cancelled():
            raise RefusedError("CANCELLED", "the request was cancelled")
        inputs = read_inputs(request, [*self._raw, self.wiring.judged])
        latents = inputs[self.wiring.judged]
        logits = inputs[self._raw_logits]
        if len(logits) != len(latents):
            raise RefusedError("INVALID_ARG", f"{len(latents)} rows of latents for {len(logits)} rows of logits")
        error = find_row_errors(latents, has_numbers(logits) if self.wiring.scored else None)
        if error:
            raise RefusedError("INVALID_ARG", error)
        flat = logits.reshape(len(logits), -1).astype(np.float32, copy=False)
        limit = request.timeout()
        return Job(place, request, inputs, flat, latents, now + limit / 1e6 if limit else math.inf)

    def _score(self, jobs: Sequence[Job]) -> VerdictRows:
        logits = np.concatenate([job.logits for job in jobs])
        latents = np.concatenate([job.latents for job in jobs])
        verdicts = VerdictRows.make_unscored(len(latents), "logits")
        rows = np.flatnonzero(has_numbers(logits))
        if not len(rows):
            return verdicts
        try:
            verdicts.fill(rows, *self._judge(logits[rows], latents[rows], jobs))
        except OutOfTimeError:
            return VerdictRows.make_unscored(len(latents), "timeout")
        except CallError as error:
            self.backend.Logger.log_error(f"{self.wiring.guard_model} cannot score: {error}")
            return VerdictRows.make_unscored(len(latents), "denoiser" if self.wiring.loop == "bls" else "scorer")
        except Exception as error:  # the guard never takes the production answer down with it
            self.backend.Logger.log_error(f"{self.wiring.guard_model} cannot score: {error!r}")
            return VerdictRows.make_unscored(len(latents), "internal")
        return verdicts

    def _judge(
        self, logits: NDArray[np.float32], latents: NDArray[np.float32], jobs: Sequence[Job]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        if self.wiring.scored:
            scores = latents.reshape(-1)
            return scores, *self.scorer.judge(scores)
        trace = jobs[0].request.trace()  # of a stack of requests the server can show a call under one alone
        if self.wiring.loop == "fused":
            self._check_patience(jobs)
            inputs = {names.LATENTS: latents, names.LOGITS: logits}
            (scores,) = call_model(self.backend, self.wiring.callee, inputs, [names.SCORE], trace=trace)
            scores = scores.reshape(-1)
            return scores, *self.scorer.judge(scores)

        def denoise(noised: NDArray[np.float32], sigma: NDArray[np.float32], guide: NDArray[Any]) -> NDArray[np.float32]:
            self._check_patience(jobs)
            inputs = {names.NOISED: noised, names.SIGMA: sigma, names.GUIDE: guide}
            return call_model(self.backend, self.wiring.callee, inputs, [names.SAMPLE], trace=trace)[0]

        scored = self.scorer.score(logits, latents, denoise if self.scorer.needs_denoiser else None)
        return scored.scores, scored.p_values, scored.flagged

    def _check_patience(self, jobs: Sequence[Job]) -> None:
        now = self.clock()
        if all(now > job.deadline or job.request.is_cancelled() for job in jobs):
            raise OutOfTimeError

    def _close(self, job: Job, verdicts: VerdictRows) -> Any:
        if job.request.is_cancelled():
            return self._refuse(job.request, RefusedError("CANCELLED", "the request was cancelled"))
        self.meter.count(verdicts, job.logits.argmax(axis=1), job.request.request_id())
        passed_on = {output: job.inputs[raw] for raw, output in self._raw.items()}
        return respond(self.backend, job.request, {**passed_on, **verdicts.to_tensors()})

    def _refuse(self, request: Any, error: RefusedError) -> Any:
        self.meter.count_unscored(error.code.lower(), 1, request.request_id())
        return refuse(self.backend, error)

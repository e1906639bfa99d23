"""The models of one family as a front asks them: production, latents, guard."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffense import names
from diffense.serving.budget import Budget, OverBudgetError
from diffense.serving.calls import Arrays, CallError, RefusedError, call_model, find_row_errors, has_numbers, split_rows
from diffense.serving.meter import Meter
from diffense.serving.settings import Wiring
from diffense.serving.verdicts import VerdictRows

Verdict = VerdictRows | RefusedError


class Family:
    """Calls the models behind a front. Those within a budget may outlive their request and are not part of its trace.

    What the latents model found (`Wiring.found`) is the latents or the scores, (N, W) float32, or with ``direct`` the verdict.

    Args:
        backend: the server's module.
        wiring: the models and the tensors between them.
        meter: where verdicts are counted that no guard's model counts.
    """

    def __init__(self, backend: Any, wiring: Wiring, meter: Meter) -> None:
        self.backend, self.wiring, self.meter = backend, wiring, meter

    def ask_production(self, images: NDArray[Any], trace: Any) -> tuple[Arrays, Arrays | None]:
        """Production outputs, and what the latents model finds where it is the same graph.

        Args:
            images: stacked requests.
            trace: of the first of them, as `call_model` takes it.

        Raises:
            CallError: production failed.
        """
        outputs = list(self.wiring.outputs)
        if self.wiring.shared:
            try:
                wanted = [*outputs, *self.wiring.found]
                inputs = {self.wiring.input: images}
                arrays = call_model(self.backend, self.wiring.latents_model, inputs, wanted, trace=trace)
                given = dict(zip(wanted, arrays, strict=True))
                return {name: given[name] for name in outputs}, {name: given[name] for name in self.wiring.found}
            except CallError as error:
                if error.code == "INVALID_ARG":
                    raise  # nor would the other model take this input
                # The untouched model is loaded as well, and without latents there is just no verdict.
                self.backend.Logger.log_error(f"asking {self.wiring.model} instead: {error}")
        found = call_model(self.backend, self.wiring.model, {self.wiring.input: images}, outputs, trace=trace)
        return dict(zip(outputs, found, strict=True)), None

    def ask_latents(self, images: NDArray[Any], outputs: Arrays) -> Arrays:
        """What the latents model finds in images (N, ...).

        Args:
            images: stacked requests.
            outputs: production outputs of these images.

        Raises:
            CallError: the model that gives them failed.
        """
        inputs = {self.wiring.input: images}
        if self.wiring.raw_logits:
            inputs[self.wiring.raw_logits] = outputs[self.wiring.logits]
        arrays = call_model(self.backend, self.wiring.latents_model, inputs, self.wiring.found)
        return dict(zip(self.wiring.found, arrays, strict=True))

    def judge(
        self,
        budget: Budget,
        images: NDArray[Any],
        outputs: Arrays,
        found: Arrays | None,
        sizes: Sequence[int],
        seconds: float,
        request_id: str,
    ) -> list[Verdict]:
        """Ask for the latents, where they are missing, and for the verdicts, within a budget.

        Args:
            budget: the time, and the rest after failures.
            images: stacked requests.
            outputs: production outputs of these images.
            found: in these images, None where production gave nothing but its outputs.
            sizes: images of each request.
            seconds: that the clients still wait, a limit below the budget; a verdict that is there already goes out anyway.
            request_id: of the one request that these are the images of; none of several.

        Raises:
            OverBudgetError: there is no verdict; its reason is a word for the metrics.
        """

        def ask(deadline: float) -> list[Verdict]:
            known = self.ask_latents(images, outputs) if found is None else found
            left = deadline - budget.clock()
            if left <= 0:
                raise OverBudgetError("budget")
            if self.wiring.direct:
                return self.read_verdicts(known, sizes)
            return self.ask_guard(outputs, known, sizes, max(1, int(left * 1e6)), request_id)

        try:
            if found is not None and self.wiring.direct:
                return self.read_verdicts(found, sizes)
            if seconds <= 0:
                raise OverBudgetError("timeout")
            return budget.run(ask, seconds)
        except OverBudgetError:
            raise
        except Exception as error:  # the production outputs go out, whatever happens to the verdict
            self.backend.Logger.log_error(f"no verdict: {error!r}")
            raise OverBudgetError("internal") from error

    def read_verdicts(self, found: Arrays, sizes: Sequence[int]) -> list[Verdict]:
        """The verdicts that a ``direct`` graph gave, one a request.

        Raises:
            ValueError: there are more or fewer than images.
        """
        scores, p_values, flagged = (found[name].reshape(-1) for name in names.VERDICT_TENSORS)
        if {len(scores), len(p_values), len(flagged)} != {sum(sizes)}:
            raise ValueError(f"verdicts on {len(scores)}, {len(p_values)} and {len(flagged)} of {sum(sizes)} images")
        reasons = ["score" if value == names.UNSCORED else "" for value in flagged]
        return list(VerdictRows(scores, p_values, flagged, reasons).split(sizes))

    def count(self, requests: Sequence[Any], outputs: Arrays, sizes: Sequence[int], verdicts: Sequence[Verdict]) -> None:
        """Count the verdicts of `judge` on stacked requests, where no guard's model has done so.

        Args:
            requests: of the clients, in order.
            outputs: production outputs of all their images, each with N rows.
            sizes: rows of each request, N together.
            verdicts: one a request.
        """
        if not self.wiring.direct:
            return
        try:
            logits = outputs[self.wiring.logits]
            labels = split_rows(logits.reshape(len(logits), -1).argmax(axis=1), sizes)
            for request, own, verdict in zip(requests, labels, verdicts, strict=True):
                if isinstance(verdict, VerdictRows):
                    self.meter.count(verdict, own, request.request_id())
        except Exception as error:  # the answers go out, counted or not
            self.backend.Logger.log_error(f"verdicts were not counted: {error!r}")

    def ask_guard(
        self, outputs: Arrays, found: Arrays, sizes: Sequence[int], timeout_us: int, request_id: str
    ) -> list[Verdict]:
        """Judge stacked requests with one call; one that holds an unusable image is refused and not handed on.

        Args:
            outputs: production outputs, each with N rows.
            found: in these images.
            sizes: rows of each request, N together.
            timeout_us: microseconds that the guard may use, 0 for no limit.
            request_id: of the call.

        Returns:
            One verdict a request.

        Raises:
            CallError: the guard failed.
        """
        rows = split_rows(found[self.wiring.judged], sizes)
        logits = split_rows(outputs[self.wiring.logits], sizes)
        errors = [
            find_row_errors(piece, has_numbers(own) if self.wiring.scored else None)
            for piece, own in zip(rows, logits, strict=True)
        ]
        good = [place for place, error in enumerate(errors) if error is None]
        verdicts: list[Verdict] = [RefusedError("INVALID_ARG", error or "") for error in errors]
        if not good:
            return verdicts
        stacked = {}
        for raw, name in self.wiring.raw.items():
            pieces = split_rows(outputs[name], sizes)
            stacked[raw] = np.concatenate([pieces[place] for place in good])
        stacked[self.wiring.judged] = np.concatenate([rows[place] for place in good])
        columns = call_model(
            self.backend, self.wiring.guard_model, stacked, names.VERDICT_TENSORS, timeout_us, request_id=request_id
        )
        scores, p_values, flagged = (column.reshape(-1) for column in columns)
        reasons = ["guard" if value == names.UNSCORED else "" for value in flagged]
        answers = VerdictRows(scores, p_values, flagged, reasons).split([len(rows[place]) for place in good])
        for place, answer in zip(good, answers, strict=True):
            verdicts[place] = answer
        return verdicts

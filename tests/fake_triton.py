"""A small stand-in for `triton_python_backend_utils`, for what a real server cannot be made to do on purpose."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np


class TritonError(Exception):
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG, UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(8)

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] | None = None, error: TritonError | None = None) -> None:
        self._tensors, self._error = output_tensors or [], error

    def has_error(self) -> bool:
        return self._error is not None

    def error(self) -> TritonError | None:
        return self._error

    def output_tensors(self) -> list[Tensor]:
        return self._tensors

    def arrays(self) -> dict[str, np.ndarray]:
        assert self._error is None, self._error
        return {tensor.name(): tensor.as_numpy() for tensor in self._tensors}


FINAL = 1


class Sender:
    """Takes the responses of one request; `sent` are their arrays or errors."""

    def __init__(self) -> None:
        self.sent, self.closed = [], threading.Event()

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        assert not self.closed.is_set(), "a response after the last one"
        if response is not None:
            self.sent.append(response.error() if response.has_error() else response.arrays())
        if flags & FINAL:
            self.closed.set()

    def wait(self) -> list[Any]:
        assert self.closed.wait(30), "no last response"
        return self.sent


class Request:
    """A client's request; `cancelled` may be a function that is asked each time."""

    def __init__(
        self,
        inputs: dict[str, np.ndarray],
        wanted: list[str],
        *,
        cancelled: Callable[[], bool] = lambda: False,
        timeout_us: int = 0,
        identity: str = "",
    ) -> None:
        self._inputs, self._wanted, self.is_cancelled = inputs, wanted, cancelled
        self._timeout, self._identity, self.sender = timeout_us, identity, Sender()

    def get_response_sender(self) -> Sender:
        return self.sender

    def inputs(self) -> list[Tensor]:
        return [Tensor(name, array) for name, array in self._inputs.items()]

    def requested_output_names(self) -> list[str]:
        return self._wanted

    def timeout(self) -> int:
        return self._timeout

    def trace(self) -> str:
        return f"trace of {self._identity}"

    def request_id(self) -> str:
        return self._identity


class Series:
    def __init__(self) -> None:
        self.total, self.observed = 0.0, []

    def increment(self, by: float) -> None:
        self.total += by

    def observe(self, value: float) -> None:
        self.observed.append(value)


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = "counter", "gauge", "histogram"

    def __init__(self, name: str, description: str, kind: str) -> None:
        self.name, self.kind, self.series = name, kind, {}

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Series:  # noqa: N802 - Triton's name
        assert (buckets is not None) == (self.kind == "histogram")
        return self.series.setdefault(tuple(sorted(labels.items())), Series())


class FakeBackend:
    """The module itself, with models that are plain functions: arrays in by name, arrays out by name."""

    TritonError, Tensor, InferenceResponse = TritonError, Tensor, InferenceResponse
    TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    TRITONSERVER_MEMORY_CPU = "cpu"
    PreferredMemory = staticmethod(lambda kind, device: (kind, device))

    def __init__(self, **models: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> None:
        backend = self
        self.models, self.calls, self.traces, self.logged, self.families = models, [], [], [], {}
        self.identities: list[tuple[str, str]] = []

        class InferenceRequest:
            def __init__(
                self,
                model_name: str,
                requested_output_names: list[str],
                inputs: list[Tensor],
                timeout: int,
                preferred_memory: tuple[str, int],
                trace: str | None = None,
                request_id: str = "",
            ) -> None:
                assert preferred_memory == ("cpu", 0), "on a GPU, NumPy could not read the outputs"
                self.model, self.wanted, self.timeout = model_name, requested_output_names, timeout
                backend.traces.append((model_name, trace))
                backend.identities.append((model_name, request_id))
                self.arrays = {tensor.name(): tensor.as_numpy() for tensor in inputs}

            def exec(self) -> InferenceResponse:
                backend.calls.append((self.model, {name: array.shape for name, array in self.arrays.items()}))
                try:
                    given = backend.models[self.model](self.arrays)
                except TritonError as error:
                    return InferenceResponse(error=error)
                return InferenceResponse([Tensor(name, given[name]) for name in self.wanted if name in given])

        class Family(MetricFamily):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args)
                backend.families[self.name] = self

        class Logger:
            log_error = staticmethod(self.logged.append)

        self.InferenceRequest, self.MetricFamily, self.Logger = InferenceRequest, Family, Logger

    def total(self, family: str, **labels: str) -> float:
        """Sum of a counter over the series with these labels."""
        wanted = set(labels.items())
        return sum(series.total for key, series in self.families[family].series.items() if wanted <= set(key))

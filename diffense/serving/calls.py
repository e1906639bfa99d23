"""Talking to the server from inside a served model: read requests, call other models, make responses."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
CODES: Final = ("INVALID_ARG", "UNAVAILABLE", "NOT_FOUND", "CANCELLED", "UNSUPPORTED", "ALREADY_EXISTS", "UNKNOWN")


class CallError(Exception):
    """Another model of the server failed or did not answer completely; ``code`` is the name of a code of ``TritonError``."""

    def __init__(self, model: str, reason: str, code: str = "INTERNAL") -> None:
        super().__init__(f"{model}: {reason}")
        self.model, self.reason, self.code = model, reason, code

    @property
    def public(self) -> str:
        """What a client may read: the reason where the input is at fault, else nothing of the server's inside."""
        return f"{self.model}: {self.reason}" if self.code == "INVALID_ARG" else f"{self.model} failed"


class RefusedError(Exception):
    """A request gets an error instead of an answer; ``code`` is the name of a code of ``TritonError``."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def call_model(
    backend: Any,
    model: str,
    inputs: Mapping[str, NDArray[Any]],
    outputs: Sequence[str],
    timeout_us: int = 0,
    trace: Any = None,
    request_id: str = "",
) -> list[NDArray[Any]]:
    """Call another model of this server and check its answer; no other line of Diffense makes such a call.

    Args:
        backend: the server's module.
        model: name of the model to call.
        inputs: tensor name -> array.
        outputs: names of the wanted outputs.
        timeout_us: microseconds that the called model may use, 0 for no limit; the guard keeps to it, ONNX models do not.
        trace: of the request that the call is made for, so that the server's tracing shows the one under the other; only
            where that request is answered after the call has ended, since its trace ends with it.
        request_id: of the call.

    Returns:
        The wanted outputs, in order.

    Raises:
        CallError: the call failed or an output is missing.
    """
    tensors = [backend.Tensor(name, np.ascontiguousarray(array)) for name, array in inputs.items()]
    traced = {} if trace is None else {"trace": trace}
    request = backend.InferenceRequest(
        model_name=model,
        request_id=request_id,
        requested_output_names=list(outputs),
        inputs=tensors,
        timeout=timeout_us,
        # Unasked, outputs stay on the GPU that made them, where NumPy cannot read them (docs/decisions/0010).
        preferred_memory=backend.PreferredMemory(backend.TRITONSERVER_MEMORY_CPU, 0),
        **traced,
    )
    try:
        response = request.exec()
    except Exception as error:  # the backend raises its own type, which exists only inside the server
        raise CallError(model, str(error)) from None
    if response.has_error():
        given = response.error()
        code = next((name for name in CODES if given.code() == getattr(backend.TritonError, name)), "INTERNAL")
        raise CallError(model, given.message(), code)
    found = {tensor.name(): tensor for tensor in response.output_tensors()}
    missing = [name for name in outputs if name not in found]
    if missing:
        raise CallError(model, f"gave no {', '.join(missing)}")
    return [found[name].as_numpy() for name in outputs]


def read_inputs(request: Any, wanted: Sequence[str]) -> Arrays:
    """Read the inputs of a request.

    Raises:
        RefusedError: one is missing, or holds no image.
    """
    arrays = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
    missing = [name for name in wanted if name not in arrays]
    if missing:
        raise RefusedError("INVALID_ARG", f"input {', '.join(missing)} is missing")
    if not all(len(arrays[name]) for name in wanted):
        raise RefusedError("INVALID_ARG", "the request holds no image")
    return arrays


def respond(backend: Any, request: Any, outputs: Mapping[str, NDArray[Any]]) -> Any:
    """Make a response of those outputs that the request asks for."""
    wanted = set(request.requested_output_names())
    tensors = [backend.Tensor(name, np.ascontiguousarray(array)) for name, array in outputs.items() if name in wanted]
    return backend.InferenceResponse(output_tensors=tensors)


def refuse(backend: Any, error: RefusedError) -> Any:
    """Make an error response; each response has an error object of its own, a shared one reaches clients garbled."""
    code = getattr(backend.TritonError, error.code)
    return backend.InferenceResponse(error=backend.TritonError(error.message, code))


def mask_error(backend: Any, error: Exception) -> RefusedError:
    """The refusal itself; of any other error, which must not reach the server, one that tells the client nothing of it."""
    if isinstance(error, RefusedError):
        return error
    backend.Logger.log_error(f"cannot read a request: {error!r}")
    return RefusedError("INTERNAL", "the request cannot be read; the server's log says why")


def read_parameters(model_config: str) -> dict[str, str]:
    """Read the ``parameters`` of a model's config, as the server hands it to ``initialize`` (JSON)."""
    parameters: dict[str, dict[str, str]] = json.loads(model_config).get("parameters", {})
    return {name: entry["string_value"] for name, entry in parameters.items()}


def split_rows(array: NDArray[Any], sizes: Sequence[int]) -> list[NDArray[Any]]:
    """Cut stacked rows back into one piece a request."""
    return np.split(array, np.cumsum(sizes)[:-1])


def has_numbers(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """(N,) whether all values of a row are finite."""
    return np.asarray(np.isfinite(rows.reshape(len(rows), -1)).all(axis=1))


def find_row_errors(found: NDArray[np.float32], judgeable: NDArray[np.bool_] | None = None) -> str | None:
    """Say which images of a request have latents that are no numbers, as NaN, infinite and huge pixels give; else None.

    Args:
        found: (N, W) latents, or the (N, 1) scores of a graph that reads the logits too.
        judgeable: (N,) with scores, whether the logits are numbers; where they are not, no score says what is wrong, and
            the row is left without a verdict instead.
    """
    broken = ~has_numbers(found)
    rows = np.flatnonzero(broken if judgeable is None else broken & judgeable)
    if not len(rows):
        return None
    shown = ", ".join(str(row) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
    return f"image {shown} of the request holds NaN, infinite or far too large values (images count from 0)"

"""Is a server able to answer? The one honest check is an inference: a dead Python model still looks ready.

Run as ``python -m diffense.health [HOST:PORT]`` in containers: exit code 0 when every guarded model answers.
"""

import http.client
import json
import math
import sys
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diffense import names
from diffense.errors import ServeError

DTYPES: Final = {
    "FP32": np.float32, "FP16": np.float16, "FP64": np.float64, "UINT8": np.uint8, "INT8": np.int8,
    "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "BOOL": np.bool_,
}  # fmt: skip
REQUEST_ID: Final = "diffense-health"  # counted apart from other requests
FRONTS: Final = (names.GUARDED_SUFFIX, names.GATEWAY_SUFFIX)
# What a gateway's process answers by its policy, or because it is busy.
ALIVE: Final = (http.client.BAD_REQUEST, http.client.SERVICE_UNAVAILABLE)
HEADER_LENGTH: Final = "Inference-Header-Content-Length"


@dataclass(frozen=True)
class Answer:
    """One HTTP answer."""

    status: int
    body: bytes
    header_length: int | None

    def read_json(self) -> Any:
        """Read the JSON part of the body."""
        return json.loads(self.body[: self.header_length])


def ask(address: str, method: str, path: str, body: bytes = b"", *, timeout_s: float, **headers: str) -> Answer:
    """Send one HTTP request to ``address`` (host:port); header names have ``_`` for ``-``.

    Raises:
        ServeError: nobody answers there, or not in time.
    """
    try:
        connection = http.client.HTTPConnection(address, timeout=timeout_s)
    except http.client.InvalidURL as error:
        raise ServeError(f"{address} is no address: {error}; give HOST:PORT") from None
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        length = response.getheader(HEADER_LENGTH)
        return Answer(response.status, response.read(), int(length) if length else None)
    except TimeoutError:
        raise ServeError(f"{address} gives no answer to {path} within {timeout_s:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise ServeError(f"nobody answers at {address}: {error}") from None
    finally:
        connection.close()


def is_ready(address: str, timeout_s: float = 2.0) -> bool:
    """Whether the server says that it is ready, which says nothing about its Python models."""
    try:
        return ask(address, "GET", "/v2/health/ready", timeout_s=timeout_s).status == http.client.OK
    except ServeError:
        return False


def check_server(address: str, timeout_s: float = 30.0) -> list[str]:
    """Ask every guarded model and gateway for an inference, or, where there is none, every model whose input shape is known.

    A stream answers over gRPC alone and is not asked. A gateway may refuse the image, take no more work, or give no verdict in
    its time: its process answers.

    Returns:
        The models that answered; empty when the server has no model loaded.

    Raises:
        ServeError: a model failed, gave an empty tensor, or did not score; the message names it.
    """
    answer = ask(address, "POST", "/v2/repository/index", b"{}", timeout_s=timeout_s)
    if answer.status != http.client.OK:
        raise ServeError(f"{address} does not list its models ({answer.status}); is this a Triton server?")
    try:
        listed = [entry for entry in answer.read_json() if entry["name"] and entry.get("state")]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ServeError(f"{address} does not list its models in words that can be read; is this a Triton server?") from None
    entries = [entry for entry in listed if entry["state"] != "UNLOADING" and entry.get("reason") != "unloaded"]
    fronts = sorted({entry["name"] for entry in entries if entry["name"].endswith(FRONTS)})
    ready = fronts or sorted({entry["name"] for entry in entries if entry["state"] == "READY"})
    return [name for name in ready if _check_model(address, name, timeout_s, must=name.endswith(names.GUARDED_SUFFIX))]


def _check_model(address: str, model: str, timeout_s: float, *, must: bool) -> bool:
    answer = ask(address, "GET", f"/v2/models/{model}/config", timeout_s=timeout_s)
    if answer.status != http.client.OK:
        raise ServeError(f"{model} is not loaded: {_reason(answer)}")
    config = answer.read_json()
    inputs = _make_inputs(config)
    if inputs is None:
        if must:
            raise ServeError(f"{model} cannot be checked: its config leaves the input's shape open")
        return False
    described = [
        {"name": name, "datatype": datatype, "shape": array.shape, "parameters": {"binary_data_size": array.nbytes}}
        for name, datatype, array in inputs
    ]
    head = json.dumps({"id": REQUEST_ID, "inputs": described, "parameters": {"binary_data_output": True}}).encode()
    body = head + b"".join(array.tobytes() for _, _, array in inputs)
    length = {HEADER_LENGTH.replace("-", "_"): str(len(head))}
    answer = ask(address, "POST", f"/v2/models/{model}/infer", body, timeout_s=timeout_s, **length)
    gateway = model.endswith(names.GATEWAY_SUFFIX)
    if gateway and answer.status in ALIVE:
        return True
    if answer.status != http.client.OK:
        raise ServeError(f"{model} does not answer: {_reason(answer)}")
    _check_outputs(model, answer, must_score=not gateway)
    return True


def _make_inputs(config: dict[str, Any]) -> list[tuple[str, str, NDArray[Any]]] | None:
    """Make one row for each input, random where it can hold an image; None where that is not possible."""
    if config.get("sequence_batching") or config.get("model_transaction_policy", {}).get("decoupled"):
        return None
    batch = [1] if config.get("max_batch_size", 0) > 0 else []
    preprocessing = config.get("parameters", {}).get(names.PREPROCESSING_PARAMETER, {}).get("string_value")
    image = _image_shape(json.loads(preprocessing)) if preprocessing else None
    pixels = np.random.default_rng(0)
    made = []
    for entry in config["input"]:
        if entry.get("optional"):
            continue
        datatype = entry["data_type"].removeprefix("TYPE_")
        shape = batch + [int(size) for size in entry["dims"]]
        if not batch and shape and shape[0] == -1:
            shape[0] = 1
        if image and len(shape) >= 3:
            shape[-3:] = [known if size == -1 else size for size, known in zip(shape[-3:], image, strict=True)]
        if datatype not in DTYPES or -1 in shape:
            return None
        values: NDArray[Any]
        if datatype == "UINT8":
            values = pixels.integers(0, 256, shape)
        elif datatype.startswith("FP"):
            values = pixels.random(shape)  # the range of the usual scaling
        else:
            values = np.zeros(shape)  # an index or a switch: 0 exists everywhere
        made.append((entry["name"], datatype, np.asarray(values, DTYPES[datatype])))
    return made


def _image_shape(preprocessing: dict[str, Any]) -> list[int]:
    height, width = preprocessing["size"]
    channels = preprocessing["channels"]
    return [channels, height, width] if preprocessing["layout"] == "NCHW" else [height, width, channels]


def _check_outputs(model: str, answer: Answer, *, must_score: bool) -> None:
    """Outputs of zero bytes are what NumPy 2 and broken stubs give without an error."""
    start = answer.header_length or 0
    outputs = answer.read_json().get("outputs", [])
    if not outputs:
        raise ServeError(f"{model} answers without outputs")
    for output in outputs:
        size = int(output.get("parameters", {}).get("binary_data_size", 0))
        dtype = DTYPES.get(output["datatype"])
        if dtype is not None and size != math.prod(output["shape"]) * np.dtype(dtype).itemsize:
            raise ServeError(f"{model} gives {size} bytes for {output['name']} of shape {output['shape']}")
        if must_score and output["name"] == names.FLAGGED and answer.body[start] == names.UNSCORED:
            raise ServeError(f"{model} answers, but its guard does not score (flagged = {names.UNSCORED})")
        start += size


def _reason(answer: Answer) -> str:
    try:
        return str(answer.read_json()["error"]).strip().splitlines()[0]
    except (ValueError, KeyError, IndexError, TypeError):
        return f"HTTP {answer.status}"


def main() -> None:
    """Check the server at the given address (default 127.0.0.1:8000); exit code 1 with the reason when it fails."""
    address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"
    try:
        print("answered:", ", ".join(check_server(address)) or "the server (no model loaded)")
    except ServeError as error:
        sys.exit(f"unhealthy: {error}")


if __name__ == "__main__":
    main()

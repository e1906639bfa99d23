"""HTTP transports: tritonclient's codec over urllib3 and aiohttp.

tritonclient's own HTTP clients take their deadline once for all calls, and the blocking one cannot be shared by
threads; its codec has neither limit.
"""

import json
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import tritonclient.http as triton
import urllib3
from tritonclient.utils import InferenceServerException

from diffense.errors import ClientError, DeadlineError, OptionError, ServerDownError, ServerError
from diffense_client._core import Answer, Request
from diffense_client._failures import classify_http, describe_failure
from diffense_client._transport import Parts

HEADER_LENGTH: Final = "Inference-Header-Content-Length"
CONNECTIONS: Final = 64  # kept open for threads that call at once; more are opened when needed
OK: Final = 200


class HttpTransport:
    """Blocking HTTP; one pool of connections, which threads may share."""

    def __init__(self, host: str, port: int) -> None:
        self._address = f"{host}:{port}"
        self._pool = urllib3.HTTPConnectionPool(host, port, maxsize=CONNECTIONS, retries=False)

    def fetch_config(self, model: str, timeout_s: float) -> Mapping[str, Any]:
        """Return Triton's model configuration in its JSON form."""
        body, _ = self._call("GET", f"/v2/models/{quote(model, safe='')}/config", repr(model), timeout_s)
        return _read_json(self._address, body)

    def infer(self, request: Request, timeout_s: float) -> Answer:
        """Send a request and read its answer."""
        path, body, headers = _encode(request, timeout_s)
        return _decode(request, *self._call("POST", path, str(request), timeout_s, body, headers))

    def register(self, region: str, byte_size: int, timeout_s: float) -> None:
        """Tell the server to map a region of system shared memory; its name is also its key."""
        path, body = _encode_region(region, byte_size)
        self._call("POST", path, "shared memory", timeout_s, body)

    def unregister(self, region: str, timeout_s: float) -> None:
        """Tell the server to let go of a region."""
        self._call("POST", f"/v2/systemsharedmemory/region/{region}/unregister", "shared memory", timeout_s)

    def close(self) -> None:
        """Close all connections."""
        self._pool.close()

    def _call(
        self,
        method: str,
        path: str,
        subject: str,
        timeout_s: float,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> tuple[bytes, Mapping[str, str]]:
        timeout = urllib3.Timeout(total=timeout_s)
        try:
            response = self._pool.urlopen(method, path, body, headers, timeout=timeout, redirect=False)
        except urllib3.exceptions.HTTPError as error:
            raise _explain(self._address, subject, error, late=_is_late(error)) from error
        _check(self._address, subject, response.status, response.data)
        return response.data, response.headers


class AsyncHttpTransport:
    """HTTP for asyncio."""

    def __init__(self, host: str, port: int) -> None:
        self._address = f"{host}:{port}"
        self._session = aiohttp.ClientSession(f"http://{host}:{port}")

    async def fetch_config(self, model: str, timeout_s: float) -> Mapping[str, Any]:
        """Return Triton's model configuration in its JSON form."""
        body, _ = await self._call("GET", f"/v2/models/{quote(model, safe='')}/config", repr(model), timeout_s)
        return _read_json(self._address, body)

    async def infer(self, request: Request, timeout_s: float) -> Answer:
        """Send a request and read its answer."""
        path, body, headers = _encode(request, timeout_s)
        return _decode(request, *await self._call("POST", path, str(request), timeout_s, body, headers))

    def stream(self, request: Request, timeout_s: float) -> Parts:
        """Refuse: an HTTP answer has one part."""
        raise OptionError(f"streaming {request} needs gRPC; make a client with protocol='grpc', whose port is usually 8001")

    async def register(self, region: str, byte_size: int, timeout_s: float) -> None:
        """Tell the server to map a region of system shared memory; its name is also its key."""
        path, body = _encode_region(region, byte_size)
        await self._call("POST", path, "shared memory", timeout_s, body)

    async def unregister(self, region: str, timeout_s: float) -> None:
        """Tell the server to let go of a region."""
        await self._call("POST", f"/v2/systemsharedmemory/region/{region}/unregister", "shared memory", timeout_s)

    async def close(self) -> None:
        """Close all connections."""
        await self._session.close()

    async def _call(
        self,
        method: str,
        path: str,
        subject: str,
        timeout_s: float,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> tuple[bytes, Mapping[str, str]]:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.request(
                method, path, data=body, headers=headers, timeout=timeout, allow_redirects=False
            ) as response:
                content = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise _explain(self._address, subject, error, late=isinstance(error, TimeoutError)) from error
        _check(self._address, subject, response.status, content)
        return content, response.headers


def _encode(request: Request, timeout_s: float) -> tuple[str, bytes, dict[str, str]]:
    tensor = triton.InferInput(request.input_name, list(request.tensor.shape), request.datatype)
    if request.region is None:
        tensor.set_data_from_numpy(request.tensor)
    else:
        tensor.set_shared_memory(request.region, request.tensor.nbytes)
    body, header_length = triton.InferenceServerClient.generate_request_body(
        [tensor],
        outputs=[triton.InferRequestedOutput(name) for name in request.outputs],
        request_id=request.request_id,
        timeout=int(timeout_s * 1e6),  # microseconds; the server can stop work that nobody waits for
    )
    headers = {} if header_length is None else {HEADER_LENGTH: str(header_length)}
    return f"/v2/models/{quote(request.model, safe='')}/infer", body, headers


def _encode_region(region: str, byte_size: int) -> tuple[str, bytes]:
    body = json.dumps({"key": region, "offset": 0, "byte_size": byte_size}).encode()
    return f"/v2/systemsharedmemory/region/{region}/register", body


def _decode(request: Request, body: bytes, headers: Mapping[str, str]) -> Answer:
    length = headers.get(HEADER_LENGTH)
    try:
        result = triton.InferResult.from_response_body(body, header_length=int(length) if length else None)
        arrays = {name: result.as_numpy(name) for name in request.outputs}
        identity = str(result.get_response().get("id", ""))
    except (ValueError, TypeError, KeyError, AttributeError, InferenceServerException) as error:
        raise ServerError(f"the answer to {request} cannot be read: {error}") from error
    return Answer(identity, {name: array for name, array in arrays.items() if array is not None})


def _read_json(address: str, body: bytes) -> Mapping[str, Any]:
    try:
        read = json.loads(body)
    except ValueError as error:
        raise ServerError(f"{address} answers, but not with JSON; is it a Triton server?") from error
    if not isinstance(read, dict):
        raise ServerError(f"{address} answers with other JSON than expected; is it a Triton server?")
    return read


def _check(address: str, subject: str, status: int, body: bytes) -> None:
    if status == OK:
        return
    try:
        detail = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        detail = f"HTTP {status}"
    kind = classify_http(status)
    raise kind(describe_failure(kind, "http", address, subject, detail))


def _is_late(error: urllib3.exceptions.HTTPError) -> bool:
    # urllib3 counts a refused connection as a timeout, and hides one while a body is being sent in a ProtocolError.
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        return False
    return isinstance(error, urllib3.exceptions.TimeoutError) or any(isinstance(cause, TimeoutError) for cause in error.args)


def _explain(address: str, subject: str, error: Exception, *, late: bool) -> ClientError:
    kind: type[ClientError] = DeadlineError if late else ServerDownError
    return kind(describe_failure(kind, "http", address, subject, str(error)))

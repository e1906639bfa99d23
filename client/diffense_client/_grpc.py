"""gRPC transports over tritonclient, whose exceptions end here."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any, Final

import grpc
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from diffense.errors import ClientError, DeadlineError, ServerError
from diffense_client._core import Answer, Request
from diffense_client._failures import Deadline, classify_grpc, classify_stream, describe_failure

PROBE_S: Final = 1.0
DRAIN_S: Final = 10.0  # what streams whose reader has left get beyond their deadline, and in all from a client that closes
STATUS_MODE: Final = {"triton_grpc_error": "true"}  # errors of a stream carry their status, and end it
# A server that comes back is found again within a second (gRPC's own limit is two minutes).
CHANNEL: Final = [
    ("grpc.max_send_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
    ("grpc.max_receive_message_length", triton.MAX_GRPC_MESSAGE_SIZE),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]


class GrpcTransport:
    """Blocking gRPC; one channel, which threads may share."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._client = triton.InferenceServerClient(address, channel_args=CHANNEL)

    def fetch_config(self, model: str, timeout_s: float) -> Mapping[str, Any]:
        """Return Triton's model configuration in its JSON form."""
        return _read_config(self._call("get_model_config", repr(model), timeout_s, model, as_json=True))

    def infer(self, request: Request, timeout_s: float) -> Answer:
        """Send a request and read its answer."""
        return _read_answer(request, self._call("infer", str(request), timeout_s, **_describe(request, timeout_s)))

    def register(self, region: str, byte_size: int, timeout_s: float) -> None:
        """Tell the server to map a region of system shared memory; its name is also its key."""
        self._call("register_system_shared_memory", "shared memory", timeout_s, region, region, byte_size)

    def unregister(self, region: str, timeout_s: float) -> None:
        """Tell the server to let go of a region."""
        self._call("unregister_system_shared_memory", "shared memory", timeout_s, region)

    def close(self) -> None:
        """Close the channel."""
        self._client.close()

    def _call(self, method: str, subject: str, timeout_s: float, *values: Any, **more: Any) -> Any:
        deadline = Deadline(timeout_s)
        try:
            return getattr(self._client, method)(*values, client_timeout=timeout_s, **more)
        except InferenceServerException as error:
            reachable = _code(error) != "UNAVAILABLE" or self._is_live(deadline.remaining())
            raise _explain(error, self._address, subject, reachable=reachable) from error

    def _is_live(self, timeout_s: float) -> bool:
        """A channel without connection and a busy server give the same status; only asking again tells them apart."""
        try:
            return bool(self._client.is_server_live(client_timeout=min(PROBE_S, timeout_s)))
        except InferenceServerException:
            return False


class GrpcParts:
    """The parts of one streamed answer, in order, with the error that ended it as the last."""

    def __init__(self, address: str, request: Request) -> None:
        self._address, self._request = address, request
        self._queue: asyncio.Queue[Answer | ClientError] = asyncio.Queue()

    def put(self, part: Answer | ClientError) -> None:
        """Hand the next part to the reader."""
        self._queue.put_nowait(part)

    async def read(self, deadline: Deadline) -> Answer:
        """Return the next part; one that is there already is never too late, whatever the reader did meanwhile."""
        try:
            part = self._queue.get_nowait()
        except asyncio.QueueEmpty:
            try:
                part = await asyncio.wait_for(self._queue.get(), deadline.remaining())
            except TimeoutError:
                raise DeadlineError(describe_failure(DeadlineError, "grpc", self._address, str(self._request), "")) from None
        if isinstance(part, ClientError):
            raise part
        return part


class AsyncGrpcTransport:
    """gRPC for asyncio."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._client = triton_aio.InferenceServerClient(address, channel_args=CHANNEL)
        self._drains: set[asyncio.Task[None]] = set()

    async def fetch_config(self, model: str, timeout_s: float) -> Mapping[str, Any]:
        """Return Triton's model configuration in its JSON form."""
        return _read_config(await self._call("get_model_config", repr(model), timeout_s, model, as_json=True))

    async def infer(self, request: Request, timeout_s: float) -> Answer:
        """Send a request and read its answer."""
        call = self._call("infer", str(request), timeout_s, **_describe(request, timeout_s))
        return _read_answer(request, await call)

    async def register(self, region: str, byte_size: int, timeout_s: float) -> None:
        """Tell the server to map a region of system shared memory; its name is also its key."""
        await self._call("register_system_shared_memory", "shared memory", timeout_s, region, region, byte_size)

    async def unregister(self, region: str, timeout_s: float) -> None:
        """Tell the server to let go of a region."""
        await self._call("unregister_system_shared_memory", "shared memory", timeout_s, region)

    def stream(self, request: Request, timeout_s: float) -> GrpcParts:
        """Send a request whose answer comes in parts; the server may work on it for ``timeout_s``."""
        parts = GrpcParts(self._address, request)
        # Read to the end by a task of its own: the wheel's server has died of streams that were cancelled under way.
        task = asyncio.create_task(self._drain(request, timeout_s, parts))
        self._drains.add(task)
        task.add_done_callback(self._drains.discard)
        return parts

    async def close(self) -> None:
        """Close the channel, after the streams that are still under way."""
        if self._drains:
            await asyncio.wait(self._drains, timeout=DRAIN_S)
        await self._client.close()

    async def _drain(self, request: Request, timeout_s: float, parts: GrpcParts) -> None:
        subject = str(request)
        try:
            async with asyncio.timeout(timeout_s + DRAIN_S):  # a server that is silent for so long does not mind
                async for result, error in self._client.stream_infer(_send_once(request, timeout_s), headers=STATUS_MODE):
                    if error is not None:
                        kind, detail = classify_stream(error.message()), error.message()
                        parts.put(kind(describe_failure(kind, "grpc", self._address, subject, detail)))
                    else:
                        parts.put(_read_answer(request, result))
            parts.put(ServerError(f"{self._address} (grpc) ended the stream before the whole answer, asked for {subject}"))
        except grpc.RpcError as error:
            code, detail = error.code().name, error.details() or ""
            kind = classify_grpc(code, reachable=code != "UNAVAILABLE" or await self._is_live(timeout_s))
            parts.put(kind(describe_failure(kind, "grpc", self._address, subject, detail)))
        except InferenceServerException as error:
            kind = classify_stream(error.message())
            parts.put(kind(describe_failure(kind, "grpc", self._address, subject, error.message())))
        except TimeoutError:
            parts.put(DeadlineError(describe_failure(DeadlineError, "grpc", self._address, subject, "")))
        except ServerError as error:
            parts.put(error)

    async def _call(self, method: str, subject: str, timeout_s: float, *values: Any, **more: Any) -> Any:
        deadline = Deadline(timeout_s)
        try:
            return await getattr(self._client, method)(*values, client_timeout=timeout_s, **more)
        except InferenceServerException as error:
            reachable = _code(error) != "UNAVAILABLE" or await self._is_live(deadline.remaining())
            raise _explain(error, self._address, subject, reachable=reachable) from error

    async def _is_live(self, timeout_s: float) -> bool:
        try:
            return bool(await self._client.is_server_live(client_timeout=min(PROBE_S, timeout_s)))
        except InferenceServerException:
            return False


def _describe(request: Request, timeout_s: float) -> dict[str, Any]:
    tensor = triton.InferInput(request.input_name, list(request.tensor.shape), request.datatype)
    if request.region is None:
        tensor.set_data_from_numpy(request.tensor)
    else:
        tensor.set_shared_memory(request.region, request.tensor.nbytes)
    return {
        "model_name": request.model,
        "inputs": [tensor],
        "outputs": [triton.InferRequestedOutput(name) for name in request.outputs],
        "request_id": request.request_id,
        "timeout": int(timeout_s * 1e6),  # microseconds; the server can stop work that nobody waits for
    }


async def _send_once(request: Request, timeout_s: float) -> AsyncGenerator[dict[str, Any], None]:
    yield _describe(request, timeout_s)


def _read_config(message: Mapping[str, Any]) -> Mapping[str, Any]:
    config: Mapping[str, Any] = message["config"]
    return config


def _read_answer(request: Request, result: Any) -> Answer:
    try:
        arrays = {name: result.as_numpy(name) for name in request.outputs}
    except (ValueError, TypeError) as error:
        raise ServerError(f"the answer to {request} cannot be read: {error}") from error
    return Answer(result.get_response().id, {name: array for name, array in arrays.items() if array is not None})


def _code(error: InferenceServerException) -> str:
    return str(error.status()).removeprefix("StatusCode.")


def _explain(error: InferenceServerException, address: str, subject: str, *, reachable: bool) -> ClientError:
    kind = classify_grpc(_code(error), reachable=reachable)
    return kind(describe_failure(kind, "grpc", address, subject, error.message() or ""))

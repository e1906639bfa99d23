import os
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import numpy as np
import pytest

from client_calls import PROTOCOLS, Protocol, check, connect
from client_codes import BROKEN, BUSY, BUSY_TWICE, INVALID, SHORT, SLOW
from client_repository import (
    MODEL,
    PLAIN,
    make_pixels,
    shared_repository,
    trigger,
)
from client_server import run_http
from diffense.errors import (
    BadInputError,
    ClientError,
    DeadlineError,
    DiffenseError,
    ModelNotReadyError,
    OptionError,
    OverloadedError,
    ServerDownError,
    ServerError,
)
from diffense.serve import Endpoints, TritonServer
from diffense_client import AsyncGuardClient, GuardClient
from diffense_client._shared_memory import MOUNT

both = pytest.mark.parametrize("protocol", PROTOCOLS)
ways = pytest.mark.parametrize("shared_memory", [False, True], ids=["plain", "shared_memory"])


@pytest.fixture(scope="module")
def endpoints(triton_for: Callable[..., TritonServer], tmp_path_factory: pytest.TempPathFactory) -> Endpoints:
    return triton_for(shared_repository(tmp_path_factory)).endpoints


@pytest.fixture
def free_port() -> Iterator[int]:
    with socket.socket() as held:  # bound but not listening, so nobody else can take it
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.fixture
def silent_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


@pytest.mark.server
@both
def test_only_busy_servers_are_asked_again(endpoints: Endpoints, protocol: Protocol) -> None:
    def count_calls(code: int, error: type[ClientError] | None, retries: int = 2) -> int:
        """How often the model saw a request, asked by a last clean request of the same id."""
        request_id = f"{protocol}-{code}-{retries}"
        with connect(endpoints, protocol, retries=retries) as client:
            if error is None:
                return int(client.infer(trigger(code), request_id=request_id).outputs["calls"][0, 0])
            with pytest.raises(error):
                client.infer(trigger(code), request_id=request_id)
            return int(client.infer(make_pixels(1), request_id=request_id).outputs["calls"][0, 0]) - 1

    assert count_calls(BUSY_TWICE, None) == 3
    assert count_calls(BUSY_TWICE, OverloadedError, retries=1) == 2
    assert count_calls(BUSY, OverloadedError) == 3
    assert count_calls(BUSY, OverloadedError, retries=0) == 1
    assert count_calls(BROKEN, ServerError) == 1
    assert count_calls(INVALID, BadInputError) == 1
    assert count_calls(SHORT, ServerError) == 1


@pytest.mark.server
@both
def test_failures_name_the_images_and_the_next_list_works(endpoints: Endpoints, protocol: Protocol) -> None:
    pixels = make_pixels(20)
    pixels[17, 0, 0, 0] = INVALID
    pixels[16, 0, 0, 0] = INVALID
    with connect(endpoints, protocol) as client:
        with pytest.raises(BadInputError, match=r"images 16 to 19 \(request mine-16\)"):
            client.infer(pixels, request_id="mine")
        check(client.infer(pixels[:8]), pixels[:8])


@pytest.mark.server
@both
@ways
def test_slow_answers_end_at_the_deadline(endpoints: Endpoints, protocol: Protocol, shared_memory: bool) -> None:
    before = set(MOUNT.glob(f"diffense-{os.getpid()}-*"))
    with connect(endpoints, protocol, timeout_s=0.3, shared_memory=shared_memory) as client:
        client.describe()
        with pytest.raises(DeadlineError, match="longer timeout_s"):
            client.infer(trigger(SLOW))
    assert set(MOUNT.glob(f"diffense-{os.getpid()}-*")) == before
    with connect(endpoints, protocol, timeout_s=30) as client:  # waits behind the slow one
        check(client.infer(make_pixels(1)), make_pixels(1))


@pytest.mark.server
@pytest.mark.anyio
@both
@ways
async def test_slow_answers_end_at_the_deadline_of_asyncio(
    endpoints: Endpoints, protocol: Protocol, shared_memory: bool
) -> None:
    address = getattr(endpoints, protocol)
    async with AsyncGuardClient(address, MODEL, protocol, timeout_s=0.3, shared_memory=shared_memory) as client:
        await client.describe()
        with pytest.raises(DeadlineError):
            await client.infer(trigger(SLOW))
    async with AsyncGuardClient(address, MODEL, protocol, timeout_s=30) as client:
        check(await client.infer(make_pixels(1)), make_pixels(1))


@pytest.mark.server
@both
def test_models_that_are_missing_or_not_guarded(endpoints: Endpoints, protocol: Protocol) -> None:
    with connect(endpoints, protocol, "nothing") as client, pytest.raises(ModelNotReadyError, match="'nothing'"):
        client.infer(make_pixels(1))
    with connect(endpoints, protocol, "a/b c?%") as client, pytest.raises(ModelNotReadyError):
        client.infer(make_pixels(1))
    with connect(endpoints, protocol, PLAIN) as client, pytest.raises(ModelNotReadyError, match="not guarded"):
        client.infer(make_pixels(1))


@pytest.mark.server
@both
def test_unusable_input_is_refused(endpoints: Endpoints, protocol: Protocol) -> None:
    with connect(endpoints, protocol) as client:
        tensor = client.describe().preprocessing.apply(make_pixels(12))
        broken = tensor.copy()
        broken[9, 0, 0, 0] = np.nan
        for bad, told in (
            (broken, "image 9 holds NaN"),
            (tensor[:0], "no images"),
            (tensor.astype(np.float64), "float64"),
            (tensor[:, :1], r"\(1, 8, 8\)"),
        ):
            with pytest.raises(BadInputError, match=told):
                client.infer_tensor(bad)
        with pytest.raises(BadInputError, match="no images"):
            client.infer([])
        check(client.infer_tensor(tensor), make_pixels(12))
    with connect(endpoints, protocol, batch_size=9) as client, pytest.raises(BadInputError, match="batch_size 9"):
        client.infer(make_pixels(1))


@pytest.mark.server
@both
def test_the_other_protocols_port_is_told(endpoints: Endpoints, protocol: Protocol) -> None:
    wrong = endpoints.http if protocol == "grpc" else endpoints.grpc
    with GuardClient(wrong, MODEL, protocol) as client, pytest.raises(ServerDownError, match=f"its {protocol} port"):
        client.infer(make_pixels(1))


@both
def test_nobody_at_the_address(free_port: int, protocol: Protocol) -> None:
    with GuardClient(f"{protocol}://127.0.0.1:{free_port}", MODEL, protocol) as client:
        for _ in range(2):
            with pytest.raises(ServerDownError, match=f"127.0.0.1:{free_port}"):
                client.infer(make_pixels(1))


@pytest.mark.anyio
@both
async def test_nobody_at_the_address_for_asyncio(free_port: int, protocol: Protocol) -> None:
    async with AsyncGuardClient(f"127.0.0.1:{free_port}", MODEL, protocol) as client:
        with pytest.raises(ServerDownError, match=f"127.0.0.1:{free_port}"):
            await client.infer(make_pixels(1))


@both
def test_a_server_that_says_nothing_ends_at_the_deadline(silent_port: int, protocol: Protocol) -> None:
    address = f"127.0.0.1:{silent_port}"
    with GuardClient(address, MODEL, protocol, timeout_s=0.3) as client, pytest.raises(DeadlineError):
        client.infer(make_pixels(1))


@pytest.mark.anyio
@both
async def test_a_server_that_says_nothing_ends_at_the_deadline_of_asyncio(silent_port: int, protocol: Protocol) -> None:
    async with AsyncGuardClient(f"127.0.0.1:{silent_port}", MODEL, protocol, timeout_s=0.3) as client:
        with pytest.raises(DeadlineError):
            await client.infer(make_pixels(1))


@pytest.mark.anyio
@both
async def test_a_closed_client_says_so(free_port: int, protocol: Protocol) -> None:
    client, twin = (make(f"127.0.0.1:{free_port}", MODEL, protocol) for make in (GuardClient, AsyncGuardClient))
    client.close()
    client.close()
    with pytest.raises(OptionError, match="closed"):
        client.infer(make_pixels(1))
    await twin.close()
    await twin.close()
    with pytest.raises(OptionError, match="closed"):
        await twin.infer(make_pixels(1))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("status", "body", "error"),
    [
        (200, b"<html>hello</html>", ServerError),
        (200, b"[1]", ServerError),
        (302, b"", ServerError),
        (400, b"\xff\xfe", BadInputError),
        (401, b"{}", ServerError),
        (404, b"[]", ModelNotReadyError),
        (500, b'{"error": "\\u001b[31mTraceback"}', ServerError),
        (502, b"", ServerDownError),
        (503, b'{"error": 1}', OverloadedError),
        (504, b"", DeadlineError),
    ],
)
async def test_other_http_servers_never_break_the_error_tree(status: int, body: bytes, error: type[DiffenseError]) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *values: Any) -> None:
            pass

    with run_http(Handler) as url:
        with GuardClient(url, MODEL, "http", retries=1) as client, pytest.raises(error) as told:
            client.infer(make_pixels(1))
        async with AsyncGuardClient(url, MODEL, "http", retries=1) as twin:
            with pytest.raises(error) as told_twin:
                await twin.infer(make_pixels(1))
    assert str(told.value) == str(told_twin.value)
    assert str(told.value).isprintable()

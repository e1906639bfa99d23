"""What the clients do where a server refuses: a region of shared memory, or a call near the end of its time."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from client_repository import CLASSES, MODEL, make_pixels
from client_server import Served, serve_http
from diffense.errors import OverloadedError
from diffense.images import Images
from diffense_client import AsyncGuardClient, GuardClient
from diffense_client._grpc import AsyncGrpcTransport, GrpcTransport
from diffense_client.scan import scan_images

TIMEOUT_S, BUSY_S = 9.0, 0.5


async def infer(url: str, twin: bool, count: int, **options: Any) -> Any:
    if not twin:
        with GuardClient(url, MODEL, "http", shared_memory=True, **options) as client:
            return client.infer(make_pixels(count))
    async with AsyncGuardClient(url, MODEL, "http", shared_memory=True, **options) as other:
        return await other.infer(make_pixels(count))


both = pytest.mark.parametrize("twin", [False, True], ids=["blocking", "asyncio"])


@pytest.mark.anyio
@both
async def test_a_region_that_was_refused_is_registered_at_the_next_attempt(twin: bool) -> None:
    served = Served(refusals=2)
    with serve_http(served) as url:
        prediction = await infer(url, twin, 3, retries=2)
    assert prediction.flagged.tolist() == [0] * 3
    assert len(served.asked) == 3
    assert served.regions == set()  # given back at the end


@pytest.mark.anyio
@both
async def test_a_server_that_refuses_every_region_is_told_as_busy(twin: bool) -> None:
    served = Served(refusals=9)
    with serve_http(served) as url, pytest.raises(OverloadedError):
        await infer(url, twin, 1, retries=1)
    assert len(served.asked) == 2


@pytest.mark.parametrize("ones", [0, 2])
def test_a_scan_takes_labels_from_logits_of_either_shape(ones: int) -> None:
    pixels = make_pixels(5)
    images = Images(pixels, tuple("abcde"), None, ())
    with serve_http(Served(ones=ones)) as url, GuardClient(url, MODEL, "http", shared_memory=True) as client:
        rows = [row for batch in scan_images(client, images, 2) for row in batch]
    assert [(row.index, row.label, row.score) for row in rows] == [(index, CLASSES - 1, 0.25) for index in range(5)]


class BusyServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Refuses after a while, and notes how much time its clients then give it to say that it lives."""

    def __init__(self) -> None:
        self.left: list[float] = []

    def ModelConfig(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - Triton's name
        time.sleep(BUSY_S)
        context.abort(grpc.StatusCode.UNAVAILABLE, "busy")

    def ServerLive(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802 - Triton's name
        self.left.append(context.time_remaining())
        return service_pb2.ServerLiveResponse(live=True)


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[BusyServer, str]]:
    monkeypatch.setattr("diffense_client._grpc.PROBE_S", 10 * TIMEOUT_S)
    servicer = BusyServer()
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield servicer, f"127.0.0.1:{port}"
        server.stop(None).wait()


def test_whether_a_server_lives_is_asked_within_the_calls_own_time(busy: tuple[BusyServer, str]) -> None:
    servicer, address = busy
    transport = GrpcTransport(address)
    with pytest.raises(OverloadedError):
        transport.fetch_config(MODEL, TIMEOUT_S)
    transport.close()
    assert len(servicer.left) == 1
    assert servicer.left[0] < TIMEOUT_S - BUSY_S / 2  # gRPC rounds up what it sends, by less than that


@pytest.mark.anyio
async def test_asyncio_asks_within_the_calls_own_time(busy: tuple[BusyServer, str]) -> None:
    servicer, address = busy
    transport = AsyncGrpcTransport(address)
    with pytest.raises(OverloadedError):
        await transport.fetch_config(MODEL, TIMEOUT_S)
    await transport.close()
    assert len(servicer.left) == 1
    assert servicer.left[0] < TIMEOUT_S - BUSY_S / 2  # gRPC rounds up what it sends, by less than that

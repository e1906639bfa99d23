import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tritonclient.grpc

from client_calls import PROTOCOLS, Protocol, check, connect
from client_codes import BROKEN, BUSY, BUSY_TWICE, INVALID, SLOW, UNSCORED
from client_repository import (
    BYTES,
    FIXED,
    MODEL,
    expect_scores,
    make_pixels,
    shared_repository,
    trigger,
)
from diffense import names
from diffense.errors import (
    BadInputError,
    ClientError,
    ServerError,
)
from diffense.serve import Endpoints, TritonServer
from diffense_client import AsyncGuardClient
from diffense_client._shared_memory import MOUNT

both = pytest.mark.parametrize("protocol", PROTOCOLS)
ways = pytest.mark.parametrize("shared_memory", [False, True], ids=["plain", "shared_memory"])


@pytest.fixture(scope="module")
def endpoints(triton_for: Callable[..., TritonServer], tmp_path_factory: pytest.TempPathFactory) -> Endpoints:
    return triton_for(shared_repository(tmp_path_factory)).endpoints


@pytest.mark.server
@both
@ways
@pytest.mark.parametrize("model", [MODEL, FIXED, BYTES])
def test_long_lists_are_answered_in_order(endpoints: Endpoints, protocol: Protocol, shared_memory: bool, model: str) -> None:
    pixels = make_pixels(21)
    with connect(endpoints, protocol, model, shared_memory=shared_memory) as client:
        check(client.infer(pixels), pixels)
        check(client.infer(list(pixels[:3])), pixels[:3])
        check(client.infer(pixels[:1]), pixels[:1])


@pytest.mark.server
@both
def test_tensors_and_pixels_give_the_same(endpoints: Endpoints, protocol: Protocol) -> None:
    pixels = make_pixels(10)
    with connect(endpoints, protocol, batch_size=3) as client:
        tensor = client.describe().preprocessing.apply(pixels)
        direct, ready = client.infer(pixels), client.infer_tensor(tensor)
    assert np.array_equal(direct.score, ready.score)
    assert np.array_equal(direct.outputs["logits"], ready.outputs["logits"])


@pytest.mark.server
@pytest.mark.anyio
@both
@ways
async def test_asyncio_gives_the_same(endpoints: Endpoints, protocol: Protocol, shared_memory: bool) -> None:
    sizes = [1, 20, 3, 8, 9, 2, 16, 5]
    async with AsyncGuardClient(getattr(endpoints, protocol), MODEL, protocol, shared_memory=shared_memory) as client:
        lists = [make_pixels(size, seed) for seed, size in enumerate(sizes)]
        for pixels, prediction in zip(lists, await asyncio.gather(*map(client.infer, lists)), strict=True):
            check(prediction, pixels)
        tensor = (await client.describe()).preprocessing.apply(lists[1])
        check(await client.infer_tensor(tensor), lists[1])
        with pytest.raises(BadInputError, match="unusable"):
            await client.infer(trigger(INVALID))
        with pytest.raises(ServerError, match="the guard broke"):
            await client.infer(trigger(BROKEN))
        prediction = await client.infer(trigger(BUSY_TWICE))
        assert prediction.outputs["calls"] == 3


@pytest.mark.server
@both
@ways
def test_threads_with_mixed_batches_get_their_own_answers(
    endpoints: Endpoints, protocol: Protocol, shared_memory: bool
) -> None:
    start = threading.Barrier(32)

    def ask(seed: int) -> None:
        start.wait()
        for turn in range(3):
            pixels = make_pixels(1 + (seed + 5 * turn) % 19, seed * 10 + turn)
            check(client.infer(pixels), pixels)

    with (
        connect(endpoints, protocol, timeout_s=60, shared_memory=shared_memory) as client,
        ThreadPoolExecutor(32) as threads,
    ):
        assert len(list(threads.map(ask, range(32)))) == 32


@pytest.mark.server
@both
def test_the_verdict_comes_with_any_choice_of_outputs(endpoints: Endpoints, protocol: Protocol) -> None:
    pixels = make_pixels(2)
    with connect(endpoints, protocol) as client:
        for outputs in ([], ["logits"], ["calls", "logits"]):
            prediction = client.infer(pixels, outputs)
            assert list(prediction.outputs) == outputs
            np.testing.assert_allclose(prediction.score, expect_scores(pixels), atol=1e-6)
        with pytest.raises(BadInputError, match="no output 'nothing'"):
            client.infer(pixels, ["nothing"])


@pytest.mark.server
@both
def test_not_scored_is_told(endpoints: Endpoints, protocol: Protocol) -> None:
    with connect(endpoints, protocol) as client:
        prediction = client.infer(trigger(UNSCORED, 2))
    assert prediction.flagged.tolist() == [names.UNSCORED] * 2
    assert prediction.score.tolist() == prediction.p_value.tolist() == [-1, -1]
    assert prediction.outputs["logits"].shape == (2, 4)


@pytest.mark.server
@pytest.mark.anyio
@both
async def test_a_cancelled_call_leaves_no_region(endpoints: Endpoints, protocol: Protocol) -> None:
    before = set(MOUNT.glob(f"diffense-{os.getpid()}-*"))
    async with AsyncGuardClient(getattr(endpoints, protocol), MODEL, protocol, shared_memory=True) as client:
        await client.describe()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.infer(trigger(SLOW))
        check(await client.infer(make_pixels(3)), make_pixels(3))
    assert set(MOUNT.glob(f"diffense-{os.getpid()}-*")) == before


@pytest.mark.server
@pytest.mark.anyio
@both
async def test_regions_that_the_server_has_forgotten_are_made_anew(endpoints: Endpoints, protocol: Protocol) -> None:
    before = set(MOUNT.glob(f"diffense-{os.getpid()}-*"))

    def forget() -> None:  # as one that is started again has
        with tritonclient.grpc.InferenceServerClient(endpoints.grpc) as plain:
            plain.unregister_system_shared_memory()

    with connect(endpoints, protocol, shared_memory=True) as client:
        for _ in range(2):
            check(client.infer(make_pixels(3)), make_pixels(3))
            forget()
    async with AsyncGuardClient(getattr(endpoints, protocol), MODEL, protocol, shared_memory=True) as client:
        for _ in range(2):
            check(await client.infer(make_pixels(3)), make_pixels(3))
            forget()
    assert set(MOUNT.glob(f"diffense-{os.getpid()}-*")) == before


@pytest.mark.server
@both
def test_shared_memory_is_given_back(endpoints: Endpoints, protocol: Protocol) -> None:
    def list_regions() -> set[str]:
        with tritonclient.grpc.InferenceServerClient(endpoints.grpc) as plain:
            return set(plain.get_system_shared_memory_status().regions)

    registered, mounted = list_regions(), set(MOUNT.glob(f"diffense-{os.getpid()}-*"))
    with connect(endpoints, protocol, shared_memory=True, timeout_s=30, retries=0) as client:
        for code in (BUSY, BROKEN, INVALID):
            with pytest.raises(ClientError):
                client.infer(trigger(code))
        check(client.infer(make_pixels(20)), make_pixels(20))
        assert 1 <= len(list_regions() - registered) <= 2  # a refused request's region may still be in use by the server
        check(client.infer(make_pixels(2)), make_pixels(2))
        assert 1 <= len(list_regions() - registered) <= 2
    assert list_regions() == registered
    assert set(MOUNT.glob(f"diffense-{os.getpid()}-*")) == mounted

"""The stream on the real server, asked by tritonclient and by the client of Diffense."""

import asyncio
import socket
from collections import defaultdict

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

import shapes
from diffense import names
from diffense.errors import BadInputError, DeadlineError, OptionError, OverloadedError, ServerDownError
from diffense_client import AsyncGuardClient, GuardClient, StreamedPrediction, StreamedVerdict
from diffense_client._core import Request
from diffense_client._failures import Deadline
from diffense_client._grpc import AsyncGrpcTransport
from diffense_export.repository import export_guard
from triton_calls import DEADLINE_S, MAX_BATCH, ask, read_total, send_stream

pytestmark = [pytest.mark.server, pytest.mark.anyio]

FAMILIES = {
    "separate": ("separate", "bls"), "shared": ("shared", "fused"),
    "direct_separate": ("separate", "direct"), "direct_shared": ("shared", "direct"),
}  # fmt: skip
QUEUE = 4


@pytest.fixture(scope="module")
def server(guard, small_target, clean_images, tmp_path_factory, triton_for):
    repository = tmp_path_factory.mktemp("streams") / "repository"
    for family, (placement, loop) in FAMILIES.items():
        export_guard(
            guard, small_target, repository, family, placement=placement, loop=loop, gateway=False, stream=True,
            max_batch_size=MAX_BATCH, threads=1, queue=1000, clean=clean_images[:64],
        )  # fmt: skip
    export_guard(
        guard, small_target, repository, "narrow", gateway=False, stream=True, max_batch_size=1, threads=1, queue=QUEUE,
        clean=clean_images[:64],
    )  # fmt: skip
    return triton_for(repository)


@pytest.fixture(scope="module")
def known(guard):
    """Pixels, half of them unlike anything clean, and their input tensors."""
    clean = shapes.draw_shapes(8, seed=77)[0]
    pixels = np.concatenate([clean, np.random.default_rng(3).integers(0, 256, clean.shape, np.uint8)])
    return pixels, guard.preprocessing.apply(pixels)


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_parts_are_what_production_and_the_guarded_model_say(server, known, family):
    _, image = known
    production, guarded = (ask(server, "grpc", model, image) for model in (family, f"{family}_guarded"))
    (first, prediction), (second, verdict) = await send_stream(server, [(f"{family}_stream", "mine", image)])
    assert (first, second) == ("mine", "mine")
    assert list(prediction) == ["logits"]
    # The shared graph is another graph than the untouched one; what the guarded model says comes from it too.
    source = production if FAMILIES[family][0] == "separate" else guarded
    assert np.array_equal(prediction["logits"], source.as_numpy("logits"))
    assert np.abs(prediction["logits"] - production.as_numpy("logits")).max() <= 1e-5
    assert tuple(verdict) == names.VERDICT_TENSORS
    for name in names.VERDICT_TENSORS:
        assert np.array_equal(verdict[name], guarded.as_numpy(name))
    assert 0 < (verdict[names.FLAGGED] == names.FLAGGED_YES).sum() < len(image)


@pytest.mark.parametrize("family", FAMILIES)
async def test_300_requests_on_one_stream_get_their_own_two_parts_in_order(server, known, family):
    _, image = known
    generator = np.random.default_rng(1)
    picks = [generator.choice(len(image), int(size)) for size in generator.integers(1, 5, 300)]
    whole = ask(server, "grpc", f"{family}_guarded", image)
    messages = await send_stream(server, [(f"{family}_stream", str(i), image[rows]) for i, rows in enumerate(picks)])
    parts = defaultdict(list)
    for identity, arrays in messages:
        assert isinstance(arrays, dict), arrays
        parts[int(identity)].append(arrays)
    assert sorted(parts) == list(range(300))
    for identity, rows in enumerate(picks):
        prediction, verdict = parts[identity]
        assert np.allclose(prediction["logits"], whole.as_numpy("logits")[rows], atol=1e-4)
        assert np.allclose(verdict[names.SCORE], whole.as_numpy(names.SCORE)[rows], atol=1e-4)
        assert np.array_equal(verdict[names.FLAGGED], whole.as_numpy(names.FLAGGED)[rows])


@pytest.mark.parametrize("family", ["separate", "shared"])
async def test_bad_input_beside_good_input_costs_the_good_one_nothing(server, known, family):
    _, image = known
    spoilt = image[:3].copy()
    spoilt[1, 0, 0, 0] = np.nan
    model, kinds = f"{family}_stream", [image[:2], spoilt, image[:2, :, :-1], image[:2]]
    refused = read_total(server, "diffense_unscored_total", model=family)
    messages = await send_stream(server, [(model, f"{turn}-{kind}", kinds[kind]) for turn in range(20) for kind in range(4)])
    errors = [text for _, text in messages if isinstance(text, str)]
    assert sum("image 1 of the request holds NaN" in text for text in errors) == 20
    assert sum("unexpected shape" in text for text in errors) == 20 == len(errors) - 20
    answered = defaultdict(list)
    for identity, arrays in messages:
        if isinstance(arrays, dict):
            answered[identity].append(list(arrays))
    for turn in range(20):
        for kind in (0, 3):
            assert answered[f"{turn}-{kind}"] == [["logits"], list(names.VERDICT_TENSORS)]
        assert answered[f"{turn}-1"] == [["logits"]]
    assert read_total(server, "diffense_unscored_total", model=family) == refused


def test_one_answer_a_request_is_refused_in_words(server, known):
    pixels, image = known
    for protocol, words in (("grpc", "UNIMPLEMENTED.*decoupled"), ("http", "501.*decoupled")):
        with pytest.raises(InferenceServerException, match=words):
            ask(server, protocol, "separate_stream", image)
        with (
            GuardClient(getattr(server.endpoints, protocol), "separate_stream", protocol) as client,
            pytest.raises(OptionError, match=r"two parts; use AsyncGuardClient.stream, or ask separate_guarded"),
        ):
            client.infer(pixels)


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_client_streams_batch_by_batch(server, known, family):
    pixels, image = known
    whole = ask(server, "grpc", f"{family}_guarded", image)
    async with AsyncGuardClient(server.endpoints.grpc, f"{family}_stream", batch_size=6) as client:
        events = [event async for event in client.stream(pixels, request_id="mine")]
    assert [type(event) for event in events] == [StreamedPrediction, StreamedVerdict] * 3
    assert [(event.request_id, event.first) for event in events[::2]] == [("mine-0", 0), ("mine-6", 6), ("mine-12", 12)]
    for prediction, verdict in zip(events[::2], events[1::2], strict=True):
        assert (prediction.request_id, prediction.first) == (verdict.request_id, verdict.first)
        rows = slice(prediction.first, prediction.first + len(prediction.outputs["logits"]))
        assert np.allclose(prediction.outputs["logits"], whole.as_numpy("logits")[rows], atol=1e-4)
        assert np.allclose(verdict.score, whole.as_numpy(names.SCORE)[rows, 0], atol=1e-4)
        assert np.array_equal(verdict.flagged, whole.as_numpy(names.FLAGGED)[rows, 0])


async def test_a_verdict_that_is_there_is_not_late_however_long_the_reader_takes(server, known):
    pixels, _ = known
    async with AsyncGuardClient(server.endpoints.grpc, "separate_stream", timeout_s=2) as client:
        kinds = []
        async for event in client.stream(pixels[:1]):
            kinds.append(type(event))
            await asyncio.sleep(2.5)
    assert kinds == [StreamedPrediction, StreamedVerdict]


async def test_a_stream_that_a_server_never_answers_does_not_stay_for_ever(monkeypatch):
    monkeypatch.setattr("diffense_client._grpc.DRAIN_S", 0.2)
    request = Request("id", "m", "x", "FP32", np.zeros((1, 1), np.float32), 1, 0, ("y",))
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        transport = AsyncGrpcTransport(f"127.0.0.1:{silent.getsockname()[1]}")
        parts = transport.stream(request, 0.3)
        with pytest.raises(DeadlineError):
            await parts.read(Deadline(0.1))
        await asyncio.sleep(1.0)
        assert not transport._drains
        await transport.close()


async def test_many_streams_of_one_client_run_at_once(server, known):
    pixels, _ = known

    async def count(client):
        return [len(event.flagged) async for event in client.stream(pixels[:3]) if isinstance(event, StreamedVerdict)]

    async with AsyncGuardClient(server.endpoints.grpc, "shared_stream") as client:
        assert await asyncio.gather(*(count(client) for _ in range(40))) == [[3]] * 40


async def test_only_verdicts_and_only_what_streams(server, known):
    pixels, _ = known
    async with AsyncGuardClient(server.endpoints.grpc, "separate_stream") as client:
        assert [type(event) async for event in client.stream(pixels[:2], [])] == [StreamedVerdict]
        with pytest.raises(BadInputError, match="uint8"):
            await anext(client.stream(pixels[:2].astype(np.float32)))
    async with AsyncGuardClient(server.endpoints.grpc, "separate_guarded") as client:
        with pytest.raises(OptionError, match="does not stream; the model that does is called <model>_stream"):
            await anext(client.stream(pixels[:2]))
    async with AsyncGuardClient(server.endpoints.http, "separate_stream", "http") as client:
        with pytest.raises(OptionError, match="needs gRPC"):
            await anext(client.stream(pixels[:2]))
    async with AsyncGuardClient(server.endpoints.grpc, "separate_stream", shared_memory=True) as client:
        with pytest.raises(OptionError, match="shared_memory"):
            await anext(client.stream(pixels[:2]))
    async with AsyncGuardClient("127.0.0.1:1", "separate_stream", timeout_s=2) as client:
        with pytest.raises(ServerDownError):
            await anext(client.stream(pixels[:2]))


async def test_who_stops_early_harms_nobody(server, known):
    pixels, image = known
    async with AsyncGuardClient(server.endpoints.grpc, "separate_stream", batch_size=2) as client:
        for _ in range(20):
            stream = client.stream(pixels)
            assert isinstance(await anext(stream), StreamedPrediction)
            await stream.aclose()
    ask(server, "grpc", "separate_guarded", image)


async def test_a_full_queue_is_an_overload_and_the_rest_is_answered(server, known):
    pixels, image = known
    whole = ask(server, "grpc", "narrow_guarded", image[:1])

    async def try_one(client):
        try:
            return [event async for event in client.stream(pixels[:1])]
        except OverloadedError as error:
            assert "takes no more work for now" in str(error)
            return None

    async with AsyncGuardClient(server.endpoints.grpc, "narrow_stream", retries=0, timeout_s=DEADLINE_S) as client:
        await client.describe()
        found = await asyncio.gather(*(try_one(client) for _ in range(100)))
    answered = [events for events in found if events is not None]
    assert 0 < len(answered) < 100
    for prediction, verdict in answered:
        assert np.array_equal(prediction.outputs["logits"], whole.as_numpy("logits"))
        assert np.allclose(verdict.score, whole.as_numpy(names.SCORE)[0], atol=1e-4)

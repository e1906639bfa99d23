"""More than a family can bear: whoever is refused hears it, whoever is not gets the right answer, nobody waits for ever."""

import asyncio
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tritonclient.grpc as grpc
import tritonclient.grpc.aio as grpc_aio

import shapes
from diffense import names
from diffense.errors import DeadlineError, OverloadedError
from diffense.serve import TritonServer
from diffense_client import AsyncGuardClient, GuardedPrediction, StreamedPrediction, StreamedVerdict
from diffense_export.configs import CONFIG_FILE, format_config, parse_config
from diffense_export.repository import export_guard
from triton_calls import DEADLINE_S

pytestmark = [pytest.mark.server, pytest.mark.anyio]

QUEUE = 16
BATCH = 4
CALLERS = 400

# An exported graph, run by a process that takes its time over every image.
SLOW_MODEL = """
import pathlib
import time
import onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        self.session = onnxruntime.InferenceSession(pathlib.Path(args["model_repository"]) / "1" / "model.onnx")

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        time.sleep(0.01)
        arrays = self.session.run(None, {tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        outputs = zip(self.session.get_outputs(), arrays)
        return pb_utils.InferenceResponse([pb_utils.Tensor(node.name, array) for node, array in outputs])
"""


def slow_down(folder):
    path = folder / CONFIG_FILE
    config = parse_config(path)
    config.backend, config.default_model_filename = "python", "model.py"
    config.ClearField("model_warmup")
    path.write_text(format_config(config), encoding="utf-8")
    (folder / "1" / "model.py").write_text(SLOW_MODEL)


@pytest.fixture(scope="module")
def slow(guard, small_target, tmp_path_factory):
    repository = tmp_path_factory.mktemp("slow") / "repository"
    for placement, model in (("separate", "separate"), ("shared", "shared_tapped")):
        export_guard(
            guard, small_target, repository, placement, placement=placement, stream=True,
            max_batch_size=BATCH, threads=1, queue=QUEUE,
        )  # fmt: skip
        slow_down(repository / model)
    server = TritonServer(repository)
    server.start()
    yield server
    assert server.stop() == 0  # no request was left behind


async def ask_all(server, model, pixels, callers=CALLERS):
    """So many callers at once, one image each; what each of them got."""
    async with AsyncGuardClient(server.endpoints.grpc, model, retries=0, timeout_s=DEADLINE_S) as client:
        streams = (await client.describe()).streams

        async def ask_one(caller):
            image = pixels[[caller % len(pixels)]]
            try:
                return [event async for event in client.stream(image)] if streams else [await client.infer(image)]
            except OverloadedError as error:
                return str(error)

        return await asyncio.gather(*(ask_one(caller) for caller in range(callers)))


@pytest.mark.parametrize("model", ["separate_gateway", "separate_stream", "shared_gateway", "shared_stream"])
async def test_400_callers_get_400_answers_and_those_of_the_lucky_ones_are_right(slow, guard, model):
    pixels = shapes.draw_shapes(8, seed=77)[0]
    truth, (logits, _) = guard.score(pixels), guard.run(pixels)
    found = await ask_all(slow, model, pixels)
    kinds = Counter(type(answer) for answer in found)
    assert kinds[list] + kinds[str] == CALLERS
    assert QUEUE <= kinds[list] < CALLERS
    assert all("takes no more work for now" in answer for answer in found if isinstance(answer, str))
    for caller, answer in enumerate(found):
        if isinstance(answer, list):
            check(answer, logits[caller % 8], truth, caller % 8)
    assert slow.check() == ["separate_gateway", "separate_guarded", "shared_gateway", "shared_guarded"]


def check(events, logits, truth, row):
    (prediction, verdict) = events if len(events) == 2 else (events[0], events[0])
    assert isinstance(prediction, GuardedPrediction | StreamedPrediction)
    assert isinstance(verdict, GuardedPrediction | StreamedVerdict)
    assert np.allclose(prediction.outputs["logits"][0], logits, atol=1e-4)
    if verdict.flagged[0] != names.UNSCORED:  # a gateway under load may run out of its budget
        assert np.allclose(verdict.score[0], truth.scores[row], atol=1e-4)
        assert verdict.flagged[0] == truth.flagged[row]


async def test_production_is_answered_while_the_guarded_front_refuses(slow, guard):
    """The plain model has no limit, and from the gateway never more than a few batches before it."""
    pixels = shapes.draw_shapes(8, seed=77)[0]
    image, (logits, _) = guard.preprocessing.apply(pixels[:1]), guard.run(pixels[:1])
    tensor = grpc.InferInput("image", list(image.shape), "FP32")
    tensor.set_data_from_numpy(image)
    flood = asyncio.create_task(ask_all(slow, "separate_gateway", pixels))
    answers = []
    async with grpc_aio.InferenceServerClient(slow.endpoints.grpc) as client:
        while not flood.done():
            answers.append((await client.infer("separate", [tensor], client_timeout=DEADLINE_S)).as_numpy("logits"))
    assert answers
    assert all(np.allclose(answer, logits, atol=1e-5) for answer in answers)
    assert {type(answer) for answer in await flood} == {list, str}


@pytest.mark.parametrize("model", ["separate_gateway", "separate_stream"])
async def test_a_front_of_three_processes_has_one_stack_at_the_classifier_at_a_time(slow, model):
    """With two or three of them there, a stack would wait for as long as another or two take."""
    async with grpc_aio.InferenceServerClient(slow.endpoints.grpc) as client:
        before = await read_times(client)
        found = await ask_all(slow, model, shapes.draw_shapes(8, seed=77)[0])
        after = await read_times(client)
    assert any(isinstance(answer, list) for answer in found)
    assert after["compute_infer"] - before["compute_infer"] > 0
    assert after["queue"] - before["queue"] < 0.15 * (after["compute_infer"] - before["compute_infer"])


async def read_times(client):
    """Nanoseconds that requests to the plain classifier have spent in its queue and in it."""
    found = await client.get_inference_statistics("separate", as_json=True)
    stats = found["model_stats"][0]["inference_stats"]
    return {name: int(stats[name].get("ns", 0)) for name in ("queue", "compute_infer")}


@pytest.mark.parametrize("model", ["separate_guarded", "shared_guarded"])
async def test_the_ensemble_refuses_nobody_and_loses_nobody(slow, model):
    """A limit on a step that runs beside another would leave clients without an answer."""
    found = await ask_all(slow, model, shapes.draw_shapes(8, seed=77)[0], CALLERS // 4)
    assert [len(answer) for answer in found] == [1] * (CALLERS // 4)


async def test_a_stream_too_late_for_its_client_ends_with_its_deadline_and_the_server_lives(slow):
    pixels = shapes.draw_shapes(8, seed=77)[0]
    async with AsyncGuardClient(slow.endpoints.grpc, "shared_stream", retries=0, timeout_s=DEADLINE_S) as client:
        await client.describe()
        client._settings = replace(client._settings, timeout_s=0.02)

        async def ask_one():
            return [event async for event in client.stream(pixels[:1])]

        found = await asyncio.gather(*(ask_one() for _ in range(QUEUE)), return_exceptions=True)
    assert all(isinstance(answer, list | DeadlineError | OverloadedError) for answer in found)
    assert any(isinstance(answer, DeadlineError) for answer in found)
    assert slow.check() == ["separate_gateway", "separate_guarded", "shared_gateway", "shared_guarded"]

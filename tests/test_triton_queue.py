"""What clients see while the guard's queue is full: its denoiser waits for a file, so that the queue stays as it is."""

from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from diffense import names
from diffense.serve import TritonServer
from diffense.serving.settings import CLOSED_PARAMETER
from diffense_export.configs import CONFIG_FILE, format_config, parse_config
from diffense_export.repository import export_guard
from triton_calls import CLIENTS, MAX_BATCH, UNAVAILABLE, ask, check_verdict, copy_gateway, read_total

pytestmark = pytest.mark.server

QUEUE = 2
CALLERS = 12
SEATS = 2 * QUEUE + 1  # a full queue may have moved to the guard as one batch before the next one filled up

# The exported denoiser, run by a process that first waits for a file.
SLOW_DENOISER = """
import pathlib
import time
import onnxruntime
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def initialize(self, args):
        folder = pathlib.Path(args["model_repository"])
        self.gate = folder / "gate"
        self.session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")

    def execute(self, requests):
        while not self.gate.exists():
            time.sleep(0.01)
        return [self.answer(request) for request in requests]

    def answer(self, request):
        arrays = self.session.run(None, {tensor.name(): tensor.as_numpy() for tensor in request.inputs()})
        outputs = zip(self.session.get_outputs(), arrays)
        return pb_utils.InferenceResponse([pb_utils.Tensor(node.name, array) for node, array in outputs])
"""


def change_config(repository, model, change):
    path = repository / model / CONFIG_FILE
    config = parse_config(path)
    change(config)
    path.write_text(format_config(config), encoding="utf-8")


def slow_down(config):
    config.backend, config.default_model_filename = "python", "model.py"
    config.ClearField("model_warmup")


def limit_queue(config):
    config.dynamic_batching.default_queue_policy.max_queue_size = QUEUE


@pytest.fixture
def crowded(guard, small_target, tmp_path):
    """A server whose guard lets no more than two requests wait, and the file that lets its denoiser answer."""
    repository = tmp_path / "repository"
    export_guard(guard, small_target, repository, "m", max_batch_size=MAX_BATCH, threads=1)
    copy_gateway(repository, "m", "closed", **{CLOSED_PARAMETER: "true"})
    change_config(repository, "m_guard", limit_queue)
    change_config(repository, "m_denoiser", slow_down)
    (repository / "m_denoiser" / "1" / "model.py").write_text(SLOW_DENOISER)
    gate = repository / "m_denoiser" / "gate"
    gate.touch()  # the start makes a real inference
    server = TritonServer(repository, grace_s=5)
    server.start()
    yield server, gate
    gate.touch()
    server.stop()


def test_a_full_queue_leaves_the_gateways_production_outputs_and_hangs_nobody(crowded, guard, clean_images):
    server, gate = crowded
    image, truth = guard.preprocessing.apply(clean_images[:2]), guard.score(clean_images[:2])
    production = ask(server, "grpc", "m", image).as_numpy("logits")
    gate.unlink()
    with ThreadPoolExecutor(CALLERS) as pool:
        protocols = [*CLIENTS] * (CALLERS // 2)
        pending = {pool.submit(ask, server, protocol, "m_guarded", image) for protocol in protocols}
        refused = set()
        try:
            while len(pending) > SEATS:
                done, pending = wait(pending, timeout=60, return_when=FIRST_COMPLETED)
                assert done, f"{len(pending)} callers got no answer"
                refused |= done
            for protocol in CLIENTS:
                result = ask(server, protocol, "m_gateway", image)
                assert np.array_equal(result.as_numpy("logits"), production)
                assert (result.as_numpy(names.FLAGGED) == names.UNSCORED).all()
                assert (result.as_numpy(names.SCORE) == -1).all()
                assert np.array_equal(ask(server, protocol, "m", image).as_numpy("logits"), production)
                with pytest.raises(InferenceServerException, match="no verdict") as caught:
                    ask(server, protocol, "closed", image)
                assert caught.value.status() in UNAVAILABLE
            assert read_total(server, "diffense_unscored_total", model="m", reason="guard") >= 4
        finally:
            gate.touch()
        answered = [future for future in pending if future.exception() is None]
        refused |= pending - set(answered)
        assert answered
        for future in answered:
            check_verdict(future.result(), truth, [0, 1])
        for future in refused:
            with pytest.raises(InferenceServerException, match="Exceeds maximum queue size") as caught:
                future.result()
            assert caught.value.status() in UNAVAILABLE
    for protocol in CLIENTS:
        check_verdict(ask(server, protocol, "m_guarded", image), truth, [0, 1])
        check_verdict(ask(server, protocol, "m_gateway", image), truth, [0, 1])
    assert server.stop() == 0

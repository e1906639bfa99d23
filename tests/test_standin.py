import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as grpc
from tritonclient.utils import InferenceServerException

from diffense.backends import NATIVE_SETTING
from diffense.serve import TritonServer
from repositories import CLASSES, FEATURES, make_weights, write_lookup_model, write_onnx_model, write_plain_model

pytestmark = pytest.mark.server
FIXED = f"""
max_batch_size: 0
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ 2, {FEATURES} ] }} ]
output [ {{ name: "logits" data_type: TYPE_FP32 dims: [ 2, {CLASSES} ] }} ]
"""

ACCELERATED = {
    name: f"""
max_batch_size: 8
input [ {{ name: "x" data_type: TYPE_FP32 dims: [ {FEATURES} ] }} ]
output [ {{ name: "logits" data_type: TYPE_FP32 dims: [ {CLASSES} ] }} ]
optimization {{ execution_accelerators {{ gpu_execution_accelerator: [ {{
  name: "{name}" parameters {{ key: "{key}" value: "{value}" }}
}} ] }} }}
"""
    for name, key, value in (("cuda", "use_tf32", "0"), ("tensorrt", "precision_mode", "FP32"))
}


@pytest.fixture(scope="module")
def client(
    triton_for: Callable[[Path], TritonServer], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[grpc.InferenceServerClient]:
    repository = tmp_path_factory.mktemp("standin")
    write_plain_model(repository, "plain")
    write_onnx_model(repository, "fixed", FIXED, batch=2)
    write_lookup_model(repository, "lookup")
    for name in ACCELERATED:
        write_onnx_model(repository, name, ACCELERATED[name])
    write_onnx_model(repository, "bare", "")
    write_onnx_model(repository, "loose", 'max_batch_size: 8\nparameters { key: "execution_mode" '
                     'value { string_value: "1" } }\n')  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(NATIVE_SETTING, raising=False)
        server = triton_for(repository)
    with grpc.InferenceServerClient(server.endpoints.grpc) as client:
        yield client


def ask(client: grpc.InferenceServerClient, model: str, rows: np.ndarray, outputs: list[str] | None = None) -> grpc.InferResult:
    given = grpc.InferInput("x", list(rows.shape), "FP32")
    given.set_data_from_numpy(rows)
    wanted = [grpc.InferRequestedOutput(name) for name in outputs] if outputs else None
    return client.infer(model, [given], outputs=wanted, client_timeout=30)


def draw(rows: int, seed: int = 0, width: int = FEATURES) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)


def test_outputs_are_the_graphs(client: grpc.InferenceServerClient) -> None:
    rows = draw(3)
    result = ask(client, "plain", rows)
    np.testing.assert_allclose(result.as_numpy("logits"), rows @ make_weights(), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(result.as_numpy("doubled"), rows + rows)


@pytest.mark.parametrize("asked", [["logits"], ["doubled"], ["doubled", "logits"]])
def test_only_the_requested_outputs_come(client: grpc.InferenceServerClient, asked: list[str]) -> None:
    outputs = ask(client, "plain", draw(1), asked).get_response().outputs
    assert {output.name for output in outputs} == set(asked)


def test_stacked_requests_get_each_their_own_answer_in_fewer_runs(client: grpc.InferenceServerClient) -> None:
    def count() -> int:
        return int(client.get_inference_statistics("plain").model_stats[0].execution_count)

    before = count()
    sizes = [1, 2, 3] * 8
    with ThreadPoolExecutor(len(sizes)) as pool:
        results = list(pool.map(lambda pair: ask(client, "plain", draw(pair[1], pair[0])), enumerate(sizes)))
    for seed, (size, result) in enumerate(zip(sizes, results, strict=True)):
        np.testing.assert_array_equal(result.as_numpy("doubled"), 2 * draw(size, seed))
    assert count() - before < len(sizes)


@pytest.mark.parametrize("model", ACCELERATED)
def test_a_config_for_a_gpu_is_served_on_the_cpu_too(client: grpc.InferenceServerClient, model: str) -> None:
    rows = draw(3)
    np.testing.assert_allclose(ask(client, model, rows).as_numpy("logits"), rows @ make_weights(), rtol=1e-5, atol=1e-6)


def test_fixed_batch_model_answers_its_one_shape(client: grpc.InferenceServerClient) -> None:
    rows = draw(2)
    result = ask(client, "fixed", rows)
    np.testing.assert_allclose(result.as_numpy("logits"), rows @ make_weights(), rtol=1e-5, atol=1e-6)
    assert result.as_numpy("doubled") is None
    with pytest.raises(InferenceServerException, match="unexpected shape"):
        ask(client, "fixed", draw(3))


@pytest.mark.parametrize(("model", "batch"), [("bare", 4), ("loose", 8)])
def test_config_without_tensors_is_completed_from_the_graph(client: grpc.InferenceServerClient, model: str, batch: int) -> None:
    config = client.get_model_config(model, as_json=True)["config"]
    assert config["max_batch_size"] == batch
    assert [(tensor["name"], tensor["dims"]) for tensor in config["output"]] == [
        ("logits", [str(CLASSES)]),
        ("doubled", [str(FEATURES)]),
    ]
    assert ask(client, model, draw(4)).as_numpy("logits").shape == (4, CLASSES)


def test_bad_request_of_a_stacked_run_fails_alone_and_names_no_file(client: grpc.InferenceServerClient) -> None:
    def look_up(index: int) -> np.ndarray | InferenceServerException:
        given = grpc.InferInput("index", [1, 1], "INT64")
        given.set_data_from_numpy(np.full((1, 1), index, np.int64))
        try:
            return client.infer("lookup", [given], client_timeout=30).as_numpy("row")
        except InferenceServerException as error:
            return error

    indices = [0, 1, 99, 2, 3, -50, 4, 0]
    with ThreadPoolExecutor(len(indices)) as pool:
        answers = list(pool.map(look_up, indices))
    for index, answer in zip(indices, answers, strict=True):
        if 0 <= index < FEATURES:
            np.testing.assert_array_equal(answer[0, 0], make_weights()[index])
            continue
        assert isinstance(answer, InferenceServerException)
        assert "INVALID_ARGUMENT" in str(answer.status())
        message = answer.message()
        assert f"idx={index}" in message
        assert message.startswith("onnx runtime: ")
        assert not re.search(r"/\w+/|\.(cc|h|py|onnx)\b|\n", message), message

"""Ask the running server: answers of the production and of the guarded model, over both protocols, and latencies."""

import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import tritonclient.grpc as grpc
from numpy.typing import NDArray
from tritonclient.utils import InferenceServerException

from diffense.demo.training import INPUT, OUTPUT
from diffense.errors import ServerError
from diffense.images import Preprocessing
from diffense.names import GUARDED_SUFFIX, VERDICT_TENSORS
from diffense.serve import Endpoints
from diffense_client import GuardClient, GuardedPrediction

BATCH: Final = 32
TIMEOUT_S: Final = 60.0
WARM_UP: Final = 20  # requests to each model that are not timed
TIMED: Final = 250  # requests to each model that are


@dataclass(frozen=True)
class Served:
    """Answers on N images.

    Attributes:
        production: (N, 10) float32 logits of the production model.
        logits: (N, 10) float32, the same output as the guarded model hands it through.
        scores: (N,) float32.
        p_values: (N,) float32.
        flagged: (N,) uint8.
    """

    production: NDArray[np.float32]
    logits: NDArray[np.float32]
    scores: NDArray[np.float32]
    p_values: NDArray[np.float32]
    flagged: NDArray[np.uint8]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) labels that the guarded model's clients see."""
        return np.asarray(self.logits.argmax(axis=1), np.int64)


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of one single-image request over gRPC."""

    unguarded: float
    guarded: float


class Channel:
    """A gRPC connection to the server for requests as any client of Triton makes them; a context manager."""

    def __init__(self, address: str) -> None:
        self._client = grpc.InferenceServerClient(address)

    def __enter__(self) -> "Channel":
        return self

    def __exit__(self, *reason: object) -> None:
        self._client.close()

    def read_version(self) -> str:
        """Version that the server says it has."""
        return str(self._client.get_server_metadata(client_timeout=TIMEOUT_S).version)

    def infer(self, model: str, inputs: NDArray[Any], outputs: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Send one batch, already preprocessed (N, 1, 28, 28) float32, and return the outputs by name.

        Raises:
            ServerError: the server refused or failed.
        """
        tensor = grpc.InferInput(INPUT, list(inputs.shape), "FP32")
        tensor.set_data_from_numpy(inputs)
        wanted = [grpc.InferRequestedOutput(name) for name in outputs]
        try:
            answer = self._client.infer(model, [tensor], outputs=wanted, client_timeout=TIMEOUT_S)
        except InferenceServerException as error:
            raise ServerError(f"{model}: {error}") from error
        return {name: answer.as_numpy(name) for name in outputs}


def ask_server(endpoints: Endpoints, model: str, images: NDArray[np.uint8], preprocessing: Preprocessing) -> Served:
    """Send (N, 28, 28, 1) uint8 images to the production model and, over gRPC and HTTP, to the guarded one.

    Raises:
        ServerError: gRPC and HTTP do not give the same answers, or the server failed.
        ClientError: another leaf, as for :meth:`GuardClient.infer`.
    """
    with Channel(endpoints.grpc) as channel:
        inputs = preprocessing.apply(images)
        starts = range(0, len(images), BATCH)
        production = [channel.infer(model, inputs[start : start + BATCH], (OUTPUT,))[OUTPUT] for start in starts]
    answers = []
    for url, protocol in ((endpoints.grpc, "grpc"), (endpoints.http, "http")):
        with GuardClient(url, model + GUARDED_SUFFIX, protocol, timeout_s=TIMEOUT_S, batch_size=BATCH) as client:  # type: ignore[arg-type]
            answers.append(client.infer(images))
    over_grpc, over_http = answers
    check_equal(model, over_grpc, over_http)
    return Served(np.concatenate(production), over_grpc.outputs[OUTPUT], over_grpc.score, over_grpc.p_value, over_grpc.flagged)


def check_equal(model: str, over_grpc: GuardedPrediction, over_http: GuardedPrediction) -> None:
    """Compare the answers of the two protocols, bit for bit.

    Raises:
        ServerError: they differ.
    """
    pairs = {name: (over_grpc.outputs[name], over_http.outputs[name]) for name in over_grpc.outputs}
    pairs |= {name: (getattr(over_grpc, name), getattr(over_http, name)) for name in ("score", "p_value", "flagged")}
    for name, (left, right) in pairs.items():
        if not np.array_equal(left, right):
            count = int((left != right).reshape(len(left), -1).any(axis=1).sum())
            raise ServerError(f"{model}: {name} differs between gRPC and HTTP for {count} of {len(left)} images")


def time_requests(address: str, model: str, images: NDArray[np.uint8], preprocessing: Preprocessing) -> Latency:
    """Time single-image requests over one gRPC connection, the two models in turn, so that both see the same machine."""
    inputs = preprocessing.apply(images)
    calls = ((model, (OUTPUT,)), (model + GUARDED_SUFFIX, (OUTPUT, *VERDICT_TENSORS)))
    elapsed: tuple[list[float], list[float]] = ([], [])
    with Channel(address) as channel:
        for turn in range(WARM_UP + TIMED):
            image = inputs[turn % len(inputs)][None]
            for (name, outputs), times in zip(calls, elapsed, strict=True):
                started = time.perf_counter()
                channel.infer(name, image, outputs)
                times.append(time.perf_counter() - started)
    unguarded, guarded = (1000 * float(np.median(times[WARM_UP:])) for times in elapsed)
    return Latency(unguarded, guarded)

"""What still answers when processes of the real server die."""

import asyncio
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from diffense import names
from diffense.serve import TritonServer
from diffense.serving.settings import CLOSED_PARAMETER
from diffense_export.repository import export_guard
from triton_calls import CLIENTS, MAX_BATCH, UNAVAILABLE, ask, check_verdict, copy_gateway, kill_stubs, read_total, send_stream

pytestmark = pytest.mark.server


@pytest.fixture
def mortal(guard, small_target, tmp_path, stand_in):
    """A server of its own, since what is killed stays dead; each graph is a process there."""
    repository = tmp_path / "repository"
    export_guard(guard, small_target, repository, "m", max_batch_size=MAX_BATCH, threads=1, stream=True)
    copy_gateway(repository, "m", "closed", **{CLOSED_PARAMETER: "true"})
    server = TritonServer(repository, grace_s=2)
    server.start()
    yield server
    server.stop()


def test_production_gateway_and_stream_survive_the_death_of_the_denoiser_and_of_the_guard(mortal, guard, clean_images):
    image, truth = guard.preprocessing.apply(clean_images[:2]), guard.score(clean_images[:2])
    production = ask(mortal, "grpc", "m", image[:2]).as_numpy("logits")
    check_verdict(ask(mortal, "grpc", "m_guarded", image[:2]), truth, [0, 1])

    kill_stubs(mortal.repository, "m_denoiser")
    result = ask(mortal, "grpc", "m_guarded", image[:2])
    assert np.array_equal(result.as_numpy("logits"), production)
    assert (result.as_numpy(names.FLAGGED) == names.UNSCORED).all()
    assert read_total(mortal, "diffense_unscored_total", model="m", reason="denoiser") == 2

    kill_stubs(mortal.repository, "m_guard")
    for _ in range(5):
        for protocol in CLIENTS:
            result = ask(mortal, protocol, "m_gateway", image[:2])
            assert np.array_equal(result.as_numpy("logits"), production)
            assert (result.as_numpy(names.FLAGGED) == names.UNSCORED).all()
            assert (result.as_numpy(names.SCORE) == -1).all()
    for protocol in CLIENTS:
        assert np.array_equal(ask(mortal, protocol, "m", image[:2]).as_numpy("logits"), production)
        with pytest.raises(InferenceServerException, match="no verdict") as caught:
            ask(mortal, protocol, "closed", image[:2])
        assert caught.value.status() in UNAVAILABLE
    messages = asyncio.run(send_stream(mortal, [("m_stream", str(place), image[:2]) for place in range(20)]))
    assert Counter(identity for identity, _ in messages) == {str(place): 2 for place in range(20)}
    for _, arrays in messages:
        if "logits" in arrays:
            assert np.allclose(arrays["logits"], production, atol=1e-5)
        else:
            assert (arrays[names.FLAGGED] == names.UNSCORED).all() and (arrays[names.SCORE] == -1).all()
    with ThreadPoolExecutor(16) as pool:
        for result in pool.map(lambda _: ask(mortal, "grpc", "m_gateway", image[:1], ["logits"]), range(16)):
            assert np.allclose(result.as_numpy("logits"), production[:1], atol=1e-5)

"""How the client's tests call the model of `client_repository`, and what they expect of it."""

from typing import Any, Literal

import numpy as np

from client_repository import (
    GUARD_ID,
    MODEL,
    expect_logits,
    expect_scores,
)
from diffense.serve import Endpoints
from diffense_client import GuardClient, GuardedPrediction

Protocol = Literal["grpc", "http"]
PROTOCOLS: tuple[Protocol, ...] = ("grpc", "http")


def connect(endpoints: Endpoints, protocol: Protocol, model: str = MODEL, **options: Any) -> GuardClient:
    return GuardClient(getattr(endpoints, protocol), model, protocol, **options)


def check(prediction: GuardedPrediction, pixels: Any) -> None:
    np.testing.assert_allclose(prediction.score, expect_scores(pixels), atol=1e-6)
    np.testing.assert_allclose(prediction.p_value, 1 - expect_scores(pixels), atol=1e-6)
    np.testing.assert_allclose(prediction.outputs["logits"], expect_logits(pixels), atol=1e-6)
    assert np.array_equal(prediction.flagged, expect_scores(pixels) > 0.5)
    assert prediction.guard_id == GUARD_ID

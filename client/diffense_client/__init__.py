"""Clients of a guarded classifier on Triton: predictions with a verdict on each input.

::

    with GuardClient("localhost:8001", "digits_guarded") as client:
        prediction = client.infer(images)  # (N, H, W, C) uint8
        prediction.outputs["logits"], prediction.flagged
"""

import logging

from diffense_client._aio import AsyncGuardClient
from diffense_client._client import GuardClient
from diffense_client._core import GuardedPrediction
from diffense_client._events import StreamedPrediction, StreamedVerdict, StreamEvent
from diffense_client._model import ServedModel

__all__ = [
    "AsyncGuardClient",
    "GuardClient",
    "GuardedPrediction",
    "ServedModel",
    "StreamEvent",
    "StreamedPrediction",
    "StreamedVerdict",
]

# stamina logs each retry as a warning; without this, a program that configured no logging gets a bare line on stderr.
logging.getLogger("stamina").addHandler(logging.NullHandler())

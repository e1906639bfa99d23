"""What a streaming model says, part by part."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffense import names
from diffense.errors import OptionError
from diffense_client._core import Answer, Request, decode_answer
from diffense_client._model import ServedModel


@dataclass(frozen=True, eq=False)
class StreamedPrediction:
    """The first part: what the production model says about some of the images.

    Attributes:
        request_id: of the request that these images went with; its verdict carries the same.
        first: index of the first of these images in the caller's list.
        outputs: the production model's outputs by name, each with one row an image.
    """

    request_id: str
    first: int
    outputs: dict[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class StreamedVerdict:
    """The second part: what the guard says about the same images; the fields are those of :class:`GuardedPrediction`."""

    request_id: str
    first: int
    score: NDArray[np.float32]
    p_value: NDArray[np.float32]
    flagged: NDArray[np.uint8]
    guard_id: str


StreamEvent = StreamedPrediction | StreamedVerdict


def check_streams(served: ServedModel) -> None:
    """Refuse a model that answers once.

    Raises:
        OptionError: it does.
    """
    if not served.streams:
        raise OptionError(f"{served.name!r} does not stream; the model that does is called <model>{names.STREAM_SUFFIX}")


def decode_event(served: ServedModel, request: Request, answer: Answer) -> StreamEvent:
    """Check one part of an answer and make an event of it.

    Raises:
        ServerError: it belongs to another request, lacks an output, or has another number of rows.
    """
    if names.FLAGGED not in answer.arrays:
        outputs = decode_answer(request, answer, [name for name in request.outputs if name not in names.VERDICT_TENSORS])
        return StreamedPrediction(request.request_id, request.first, outputs)
    parts = decode_answer(request, answer, names.VERDICT_TENSORS)
    return StreamedVerdict(
        request_id=request.request_id,
        first=request.first,
        score=parts[names.SCORE].reshape(-1).astype(np.float32),
        p_value=parts[names.P_VALUE].reshape(-1).astype(np.float32),
        flagged=parts[names.FLAGGED].reshape(-1).astype(np.uint8),
        guard_id=served.guard_id,
    )

"""From images to requests and from answers to a prediction, without any I/O; both clients stand on it."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diffense import names
from diffense.errors import BadInputError, OptionError, ServerError
from diffense_client._failures import PROTOCOLS, Protocol, choose_protocol, split_url
from diffense_client._model import ServedModel

LARGEST_REQUEST: Final = 2**31 - 2**20  # bytes; protobuf messages end at 2 GiB

Pixels = NDArray[np.uint8] | Sequence[NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class GuardedPrediction:
    """What a guarded classifier says about N images.

    Attributes:
        outputs: the production model's outputs by name, each with N rows.
        score: (N,) float32, higher = more suspicious; -1 where not scored.
        p_value: (N,) float32, lower = more suspicious; -1 where not scored.
        flagged: (N,) uint8: 0 passed, 1 flagged, 2 not scored.
        guard_id: which guard judged, as it was when the client first asked.
    """

    outputs: dict[str, NDArray[Any]]
    score: NDArray[np.float32]
    p_value: NDArray[np.float32]
    flagged: NDArray[np.uint8]
    guard_id: str


@dataclass(frozen=True, eq=False)
class Request:
    """One inference request, ready for a transport."""

    request_id: str
    model: str
    input_name: str
    datatype: str
    tensor: NDArray[Any]  # in the layout and dtype of the graph's input, contiguous
    rows: int  # rows of the tensor that are images; the rest fills a fixed batch
    first: int  # index of the first image in the caller's list
    outputs: tuple[str, ...]
    region: str | None = None  # shared memory that holds the tensor's bytes

    def __str__(self) -> str:
        last = self.first + self.rows - 1
        span = f"image {self.first}" if self.rows == 1 else f"images {self.first} to {last}"
        return f"{self.model!r}, {span} (request {self.request_id})"


@dataclass(frozen=True, eq=False)
class Answer:
    """One inference answer as a transport read it."""

    request_id: str
    arrays: Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Settings:
    """What a client was made with.

    Attributes:
        protocol, host, port: where the server answers.
        model: name of the guarded model.
        timeout_s: deadline of each request in seconds, retries and waits between them included.
        retries: how often a request that a busy server refused is sent again.
        batch_size: most images of one request; None for the server's own limit.
    """

    protocol: Protocol
    host: str
    port: int
    model: str
    timeout_s: float
    retries: int
    batch_size: int | None

    @classmethod
    def check(
        cls, url: str, model: str, protocol: Protocol, timeout_s: float, retries: int, batch_size: int | None
    ) -> "Settings":
        """Check a client's arguments.

        Raises:
            OptionError: one of them makes no sense.
        """
        if protocol not in PROTOCOLS:
            raise OptionError(f"protocol is {protocol!r}; choose one of {', '.join(PROTOCOLS)}")
        choose_protocol(url, protocol)
        _, host, port = split_url(url)
        if not model:
            raise OptionError("the model's name is empty")
        if not 0 < timeout_s < float("inf"):
            raise OptionError(f"timeout_s is {timeout_s}; every request needs a deadline above 0 seconds")
        if retries < 0:
            raise OptionError(f"retries is {retries}; it must be 0 or more")
        if batch_size is not None and batch_size < 1:
            raise OptionError(f"batch_size is {batch_size}; it must be 1 or more")
        return cls(protocol, host, port, model, timeout_s, retries, batch_size)

    @property
    def address(self) -> str:
        """host:port."""
        return f"{self.host}:{self.port}"


def plan_pixels(
    served: ServedModel, images: Pixels, outputs: Sequence[str] | None, request_id: str | None, batch_size: int | None
) -> Iterator[Request]:
    """Check all images, then preprocess and pack them batch by batch.

    Args:
        served: the model.
        images: (N, H, W, C) uint8 pixels, or a list of N such images.
        outputs: which outputs of the production model to ask for; None for all.
        request_id: what the ids of the requests start with; None for a random one.
        batch_size: most images of one request; None for the server's limit.

    Raises:
        BadInputError: nothing, or an image (named by its index) of another dtype or shape.
    """
    expected = (*served.preprocessing.size, served.preprocessing.channels)
    _check_list(images, served, f"(N, {', '.join(map(str, expected))}) uint8")
    for index, image in enumerate(images[:1] if isinstance(images, np.ndarray) else images):
        if image.dtype != np.uint8 or image.shape != expected:
            raise BadInputError(
                f"image {index} is {image.dtype} {image.shape}; {served.name!r} takes pixels, uint8 {expected} "
                "(infer_tensor takes what is already preprocessed)"
            )
    spans = split_list(len(images), choose_batch(served, batch_size))
    names_wanted, prefix = choose_outputs(served, outputs), request_id or uuid.uuid4().hex
    return (
        pack_request(served, served.preprocessing.apply(np.asarray(images[span])), span, names_wanted, prefix) for span in spans
    )


def plan_tensor(
    served: ServedModel,
    tensor: NDArray[Any],
    outputs: Sequence[str] | None,
    request_id: str | None,
    batch_size: int | None,
) -> Iterator[Request]:
    """Check a preprocessed tensor, then pack it batch by batch; arguments and errors as in :func:`plan_pixels`."""
    _check_list(tensor, served, f"(N, {', '.join(map(str, served.shape))}) {served.dtype}")
    if tensor.dtype != served.dtype or not _fits(tensor.shape[1:], served.shape):
        raise BadInputError(
            f"image 0 is {tensor.dtype} {tensor.shape[1:]}; {served.name!r} takes {served.dtype} {served.shape}, "
            "-1 for any size (infer takes uint8 pixels and preprocesses them)"
        )
    spans = split_list(len(tensor), choose_batch(served, batch_size))
    if served.dtype.kind == "f":
        for span in spans:
            finite = np.isfinite(tensor[span]).all(axis=tuple(range(1, tensor.ndim)))
            if not finite.all():
                raise BadInputError(f"image {span.start + int(finite.argmin())} holds NaN or infinite values")
    names_wanted, prefix = choose_outputs(served, outputs), request_id or uuid.uuid4().hex
    return (pack_request(served, np.ascontiguousarray(tensor[span]), span, names_wanted, prefix) for span in spans)


def _check_list(images: Any, served: ServedModel, expected: str) -> None:
    if not isinstance(images, np.ndarray) and not (
        isinstance(images, Sequence) and all(isinstance(image, np.ndarray) for image in images)
    ):
        raise BadInputError(f"images are {type(images).__name__}; {served.name!r} takes an array {expected}")
    if isinstance(images, np.ndarray) and images.ndim != 1 + len(served.shape):
        raise BadInputError(
            f"images are an array of shape {images.shape}; {served.name!r} takes {expected}; "
            "a single image needs a leading axis, image[None]"
        )
    if not len(images):
        raise BadInputError("there are no images; hand over at least one")


def _fits(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and all(
        want in (-1, have) and have > 0 for have, want in zip(shape, expected, strict=True)
    )


def choose_batch(served: ServedModel, batch_size: int | None) -> int:
    """Return how many images one request carries.

    Raises:
        BadInputError: ``batch_size`` is more than the server takes.
    """
    if batch_size is not None and batch_size > served.max_batch_size:
        raise BadInputError(f"batch_size {batch_size} is more than the {served.max_batch_size} of {served.name!r}")
    return served.max_batch_size if batch_size is None else batch_size


def choose_outputs(served: ServedModel, outputs: Sequence[str] | None) -> tuple[str, ...]:
    """Return the tensors to ask for: the chosen production outputs and always the whole verdict.

    Raises:
        BadInputError: the model has no such output.
    """
    chosen = served.outputs if outputs is None else tuple(dict.fromkeys(outputs))
    if unknown := [name for name in chosen if name not in served.outputs]:
        raise BadInputError(f"{served.name!r} has no output {unknown[0]!r}; it has {', '.join(served.outputs)}")
    return (*chosen, *names.VERDICT_TENSORS)


def check_answers_once(served: ServedModel) -> None:
    """Refuse a model that streams its answer.

    Raises:
        OptionError: it does.
    """
    if served.streams:
        whole = served.name.removesuffix(names.STREAM_SUFFIX) + names.GUARDED_SUFFIX
        raise OptionError(f"{served.name!r} answers in two parts; use AsyncGuardClient.stream, or ask {whole} for both at once")


def split_list(count: int, size: int) -> list[slice]:
    """Split ``count`` items into consecutive slices of at most ``size``."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def pack_request(served: ServedModel, tensor: NDArray[Any], span: slice, outputs: tuple[str, ...], prefix: str) -> Request:
    """Make one request of a batch; a model of fixed batch gets its last image repeated until the batch is full.

    Raises:
        BadInputError: the batch is too big for one message, or the preprocessing stored with the guard does not give
            what the model takes.
    """
    if tensor.dtype != served.dtype or not _fits(tensor.shape[1:], served.shape):
        raise BadInputError(
            f"preprocessing gives {tensor.dtype} {tensor.shape[1:]}, but {served.name!r} takes {served.dtype} "
            f"{served.shape}; use infer_tensor"
        )
    rows = len(tensor)
    if served.fixed_batch and rows < served.max_batch_size:
        tensor = np.concatenate([tensor, np.repeat(tensor[-1:], served.max_batch_size - rows, axis=0)])
    if tensor.nbytes > LARGEST_REQUEST:
        raise BadInputError(f"a batch of {rows} images has {tensor.nbytes} bytes, over 2 GB; give a smaller batch_size")
    return Request(
        request_id=f"{prefix}-{span.start}",
        model=served.name,
        input_name=served.input_name,
        datatype=served.datatype,
        tensor=tensor,
        rows=rows,
        first=span.start,
        outputs=outputs,
    )


def decode_answer(request: Request, answer: Answer, wanted: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
    """Check an answer and cut it to the rows that were asked about.

    Args:
        request: what was asked.
        answer: of the server.
        wanted: the tensors of this part of a streamed answer; None for all that were asked for.

    Raises:
        ServerError: it belongs to another request, lacks an output, or has another number of rows.
    """
    if answer.request_id != request.request_id:
        raise ServerError(f"the answer to {request} carries the id {answer.request_id!r}; is a proxy mixing answers?")
    parts = {}
    for name in request.outputs if wanted is None else wanted:
        array = answer.arrays.get(name)
        if array is None:
            raise ServerError(f"the answer lacks {name!r}, asked for {request}")
        if array.ndim == 0 or len(array) != len(request.tensor):
            raise ServerError(f"{name!r} came as {array.shape} for {len(request.tensor)} rows, asked for {request}")
        if name in names.VERDICT_TENSORS and array.size != len(array):
            raise ServerError(f"{name!r} came as {array.shape}, not as one value an image, asked for {request}")
        parts[name] = array[: request.rows]
    if names.FLAGGED in parts and (parts[names.FLAGGED] > names.UNSCORED).any():
        raise ServerError(f"{names.FLAGGED!r} holds values above {names.UNSCORED}, asked for {request}")
    return parts


def join_parts(served: ServedModel, parts: Sequence[Mapping[str, NDArray[Any]]]) -> GuardedPrediction:
    """Put the parts of a list of images together again, in order."""
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return GuardedPrediction(
        score=joined.pop(names.SCORE).reshape(-1).astype(np.float32),
        p_value=joined.pop(names.P_VALUE).reshape(-1).astype(np.float32),
        flagged=joined.pop(names.FLAGGED).reshape(-1).astype(np.uint8),
        outputs=joined,
        guard_id=served.guard_id,
    )

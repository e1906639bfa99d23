"""Addresses, deadlines and failures: which error a status means, and what is worth another try. No I/O."""

import re
import time
from typing import Final, Literal, TypeAlias, TypedDict

from diffense.errors import (
    BadInputError,
    ClientError,
    DeadlineError,
    ModelNotReadyError,
    OptionError,
    OverloadedError,
    ServerDownError,
    ServerError,
)

Protocol: TypeAlias = Literal["grpc", "http"]
PROTOCOLS: Final[tuple[Protocol, ...]] = ("grpc", "http")
USUAL_PORTS: Final = {"grpc": 8001, "http": 8000}
FIRST_WAIT_S: Final = 0.05
LONGEST_WAIT_S: Final = 1.0
JITTER_S: Final = 0.1
LONGEST_DETAIL: Final = 400  # characters of a server's message that are passed on

# Only a server that says it is busy gets another try: everything else would fail again, or cost twice.
RETRIED: Final = OverloadedError

GRPC_ERRORS: Final[dict[str, type[ClientError]]] = {
    "UNAVAILABLE": OverloadedError,
    "INVALID_ARGUMENT": BadInputError,
    "OUT_OF_RANGE": BadInputError,
    "NOT_FOUND": ModelNotReadyError,
    "DEADLINE_EXCEEDED": DeadlineError,
}
HTTP_ERRORS: Final[dict[int, type[ClientError]]] = {
    400: BadInputError,
    404: ModelNotReadyError,
    408: DeadlineError,
    413: BadInputError,
    502: ServerDownError,
    503: OverloadedError,
    504: DeadlineError,
}
# What Triton refuses before a model is asked comes over a stream as text without a status.
STREAM_ERRORS: Final[dict[str, type[ClientError]]] = {
    "exceeds maximum queue size": OverloadedError,
    "unknown model": ModelNotReadyError,
    "not ready": ModelNotReadyError,
    "unexpected shape": BadInputError,
    "unexpected datatype": BadInputError,
}
MEANINGS: Final[dict[type[ClientError], str]] = {
    ServerDownError: "does not answer",
    ModelNotReadyError: "does not have that model, or it is not loaded",
    BadInputError: "refused the input",
    DeadlineError: "gave no answer within the deadline",
    OverloadedError: "takes no more work for now",
    ServerError: "failed",
}


class Deadline:
    """A point in time that all attempts for one request share."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, more than 0.

        Raises:
            DeadlineError: none are left.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise DeadlineError(f"no answer within the deadline of {self._seconds:g} s; give a longer timeout_s")
        return left


def split_url(url: str) -> tuple[Protocol | None, str, int]:
    """Split ``[grpc://|http://]host:port`` into protocol (None when not named), host and port.

    Raises:
        OptionError: the address has no port, a path, or another scheme.
    """
    match = re.fullmatch(r"(?:(grpc|http)://)?(\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]@?#]+):(\d{1,5})/?", url)
    if not match or not 0 < int(match[3]) < 2**16:
        raise OptionError(f"{url!r} is no address of a server; write host:port, like 127.0.0.1:8001")
    scheme: Protocol | None = next((known for known in PROTOCOLS if known == match[1]), None)
    return scheme, match[2], int(match[3])


def choose_protocol(url: str, protocol: Protocol | None) -> Protocol:
    """The protocol that is asked for, else the one that the URL names, else gRPC.

    Raises:
        OptionError: the two contradict each other, or the URL is no address.
    """
    scheme = split_url(url)[0]
    if protocol is not None and scheme not in (None, protocol):
        raise OptionError(f"{url!r} says {scheme}, but the protocol is {protocol}; leave out one of them")
    return protocol or scheme or "grpc"


def classify_grpc(code: str, *, reachable: bool) -> type[ClientError]:
    """Choose the error of a gRPC status name; a channel's own UNAVAILABLE means that nobody answers."""
    if code == "UNAVAILABLE" and not reachable:
        return ServerDownError
    return GRPC_ERRORS.get(code, ServerError)


def classify_stream(message: str) -> type[ClientError]:
    """Choose the error of a streamed message that carries no status."""
    return next((kind for words, kind in STREAM_ERRORS.items() if words in message.lower()), ServerError)


def classify_http(status: int) -> type[ClientError]:
    """Choose the error of an HTTP status other than 200."""
    return HTTP_ERRORS.get(status, ServerError)


def describe_failure(kind: type[ClientError], protocol: Protocol, address: str, subject: str, detail: str) -> str:
    """Write one line: who, what, and what to do.

    Args:
        kind: the error that will be raised.
        protocol: the protocol that was spoken.
        address: host:port.
        subject: the model and the images that the call was about.
        detail: what the server or the network said.
    """
    line = f"{address} ({protocol}) {MEANINGS[kind]}, asked for {subject}"
    if kind is DeadlineError:  # what the network says about it adds nothing
        return f"{line}; give a longer timeout_s if it needs more"
    if detail := shorten(detail):
        line += f": {detail}"
    if kind is ServerDownError:
        line += f"; is the server up, and is this its {protocol} port (usually {USUAL_PORTS[protocol]})?"
    return line


def shorten(detail: str) -> str:
    """Make one printable line of a server's message; of a traceback only its last line is of use to a client."""
    lines = [line.strip() for line in detail.splitlines() if line.strip()]
    if not lines:
        return ""
    text = lines[-1] if any("Traceback" in line for line in lines) else " ".join(lines)
    text = "".join(character if character.isprintable() else "?" for character in text)
    return text if len(text) <= LONGEST_DETAIL else text[: LONGEST_DETAIL - 1] + "…"


class RetrySettings(TypedDict):
    """Arguments of stamina's callers."""

    attempts: int
    timeout: float
    wait_initial: float
    wait_max: float
    wait_jitter: float


def plan_retries(retries: int, timeout_s: float) -> RetrySettings:
    """Choose exponential backoff with jitter whose waits each take at most a fifth of the deadline."""
    longest = min(LONGEST_WAIT_S, timeout_s / 10)
    return RetrySettings(
        attempts=retries + 1,
        timeout=timeout_s,
        wait_initial=min(FIRST_WAIT_S, longest),
        wait_max=longest,
        wait_jitter=min(JITTER_S, longest),
    )

"""What a transport does: one call, one answer, errors already mapped."""

from collections.abc import Mapping
from typing import Any, Protocol

from diffense_client._core import Answer, Request
from diffense_client._failures import Deadline


class Transport(Protocol):
    """A blocking connection to one server; may be used by several threads at once.

    Every method but ``close`` raises a leaf of :class:`diffense.errors.ClientError` and ends within ``timeout_s``.
    """

    def fetch_config(self, model: str, timeout_s: float) -> Mapping[str, Any]:
        """Return Triton's model configuration in its JSON form."""
        ...

    def infer(self, request: Request, timeout_s: float) -> Answer:
        """Send a request and read its answer."""
        ...

    def register(self, region: str, byte_size: int, timeout_s: float) -> None:
        """Tell the server to map a region of system shared memory; its name is also its key."""
        ...

    def unregister(self, region: str, timeout_s: float) -> None:
        """Tell the server to let go of a region."""
        ...

    def close(self) -> None:
        """Close all connections."""
        ...


class Parts(Protocol):
    """The parts of one streamed answer."""

    async def read(self, deadline: Deadline) -> Answer:
        """Return the next part; errors as those of a transport."""
        ...


class AsyncTransport(Protocol):
    """The same for asyncio; to be made and used within one event loop."""

    async def fetch_config(self, model: str, timeout_s: float) -> Mapping[str, Any]:
        """Return Triton's model configuration in its JSON form."""
        ...

    async def infer(self, request: Request, timeout_s: float) -> Answer:
        """Send a request and read its answer."""
        ...

    def stream(self, request: Request, timeout_s: float) -> Parts:
        """Send a request whose answer comes in parts; the server may work on it for ``timeout_s``."""
        ...

    async def register(self, region: str, byte_size: int, timeout_s: float) -> None:
        """Tell the server to map a region of system shared memory; its name is also its key."""
        ...

    async def unregister(self, region: str, timeout_s: float) -> None:
        """Tell the server to let go of a region."""
        ...

    async def close(self) -> None:
        """Close all connections."""
        ...

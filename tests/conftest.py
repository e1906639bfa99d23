"""Fixtures that several test modules share."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from diffense.serve import TritonServer


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def triton_for() -> Iterator[Callable[[Path], TritonServer]]:
    """Give a running server for a model repository; one server a repository and session."""
    servers: dict[Path, TritonServer] = {}
    with ExitStack() as stack:

        def start(repository: Path) -> TritonServer:
            path = repository.resolve()
            if path not in servers:
                servers[path] = stack.enter_context(TritonServer(path))
            return servers[path]

        yield start

"""Regions of system shared memory that carry inputs to a server on the same host. The RPCs are the clients' part."""

import os
import threading
import uuid
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from diffense.errors import ClientError, OptionError

LET_GO_S: Final = 3.0  # deadline of asking the server to unmap a region
# A server refuses while a request that the client gave up on still runs.
LET_GO_WAITS_S: Final = (0.0, 0.1, 0.2, 0.4, 0.8, 1.6)
MOUNT: Final = Path("/dev/shm")  # noqa: S108 - POSIX shared memory has this one place on Linux


class Region:
    """One region, whose name nobody else uses."""

    def __init__(self, byte_size: int) -> None:
        self.name = f"diffense-{os.getpid()}-{uuid.uuid4().hex}"
        self.byte_size = byte_size
        self.registered = False
        try:
            self._memory = SharedMemory(self.name, create=True, size=byte_size)
        except OSError as error:
            raise _no_room(byte_size, error) from error
        try:
            _reserve(self.name, byte_size)
        except OSError as error:
            self.remove()
            raise _no_room(byte_size, error) from error

    def write(self, tensor: NDArray[Any]) -> None:
        """Copy a tensor to the region's start."""
        np.ndarray(tensor.shape, tensor.dtype, buffer=self._memory.buf)[...] = tensor

    def remove(self) -> None:
        """Unmap and unlink it; a server that has it mapped keeps its own mapping."""
        self._memory.close()
        self._memory.unlink()


class RegionPool:
    """Regions of one client, each used by one request at a time.

    A region whose request failed is never written again, for the server may still read it: it is unlinked at once, and
    its name waits in ``retired`` until the server lets go of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: list[Region] = []
        self._retired: list[str] = []

    def acquire(self, byte_size: int) -> Region:
        """Take a free region of at least that many bytes, or make one.

        Raises:
            OptionError: there is no room in /dev/shm.
        """
        with self._lock:
            for index, region in enumerate(self._free):
                if region.byte_size >= byte_size:
                    return self._free.pop(index)
        return Region(byte_size)

    def release(self, region: Region) -> None:
        """Give a region back for the next request."""
        with self._lock:
            self._free.append(region)

    def retire(self, region: Region) -> None:
        """Remove a region that the server may still have mapped."""
        region.remove()
        if region.registered:
            self.postpone(region.name)

    def postpone(self, name: str) -> None:
        """Note a name that the server has not let go of yet."""
        with self._lock:
            self._retired.append(name)

    def take_retired(self) -> list[str]:
        """Take the names that the server should let go of."""
        with self._lock:
            names, self._retired = self._retired, []
        return names

    def retire_all(self) -> None:
        """Remove all free regions."""
        with self._lock:
            free, self._free = self._free, []
        for region in free:
            self.retire(region)


def _reserve(name: str, byte_size: int) -> None:
    """Claim the pages now: writing to a full /dev/shm later would end the process with SIGBUS."""
    path = MOUNT / name
    if path.exists():
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, byte_size)


def _no_room(byte_size: int, error: OSError) -> OptionError:
    return OptionError(
        f"shared_memory: no region of {byte_size} bytes can be made in {MOUNT} ({error.strerror}); "
        "make it bigger (a container's --shm-size) or leave shared_memory off"
    )


def is_forgotten(error: ClientError) -> bool:
    """Whether a server refused a request because it does not know its region: one that was started again knows none."""
    return "unable to find shared memory region" in str(error).lower()


def explain_refusal(error: ClientError) -> OptionError:
    """Say what a server's refusal to map a region means."""
    return OptionError(
        f"shared_memory: the server cannot map a region of this host ({error}); server and client must share one "
        f"{MOUNT}, and the server must allow it; leave shared_memory off otherwise"
    )

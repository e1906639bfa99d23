"""Lets some of a front's processes work while the others wait, so that the classifier's queue is not filled by all of them."""

import fcntl
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from diffense.serving.settings import AT_ONCE_PARAMETER

MODE: Final = 0o600


class Turn:
    """A lock that processes of one server share, held inside ``with``; one thread of a process uses it.

    A process that dies gives it back: the system holds it, not the file.

    Args:
        path: of the file that is locked, made where it is missing; None: nobody waits.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._file = -1
        if path is not None:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, MODE)

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, str], instance: str) -> Self:
        """Make the turn of one instance of a model.

        Args:
            parameters: of the model's config; without `AT_ONCE_PARAMETER` nobody waits.
            instance: its name as the server gives it, ``<model>_<group>_<index>``.

        Raises:
            ValueError: the parameter is no whole number above 0, or the file cannot be opened.
        """
        stated = parameters.get(AT_ONCE_PARAMETER)
        if stated is None:
            return cls(None)
        if not stated.isdecimal() or int(stated) < 1:
            raise ValueError(f"{AT_ONCE_PARAMETER} is a whole number above 0, not {stated!r}")
        model, _, index = instance.rpartition("_")
        # The server started this process, so its number tells this server's models from another's of the same name.
        name = f"diffense_{os.getppid()}_{model}_{int(index) % int(stated)}"
        try:
            return cls(Path(tempfile.gettempdir()) / name)
        except OSError as error:
            raise ValueError(
                f"no file {name} for {AT_ONCE_PARAMETER} ({error}); take the parameter out to do without"
            ) from None

    def __enter__(self) -> None:
        if self.path is not None:
            fcntl.flock(self._file, fcntl.LOCK_EX)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.path is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go of the file; the server is unloading the model, so that nobody needs it by its name any more."""
        if self.path is not None:
            os.close(self._file)
            self.path.unlink(missing_ok=True)
            self.path = None

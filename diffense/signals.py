"""Ending a command that keeps a server: the first Ctrl-C or SIGTERM stops it in order, a second one changes nothing."""

import signal
from types import FrameType
from typing import Final

ENDING: Final = (signal.SIGINT, signal.SIGTERM)


def interrupt_on_signals() -> None:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt, also in a script's background job, where the shell has SIGINT ignored."""
    for number in ENDING:
        signal.signal(number, _interrupt)


def ignore_signals() -> None:
    """Let nothing interrupt the clean-up, which bounds its own time."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt

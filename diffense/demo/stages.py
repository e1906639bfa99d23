"""Progress of a run in named stages: a live display on a terminal, one line a stage elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

NAME_WIDTH: Final = 34

Update = Callable[[float], None]  # share of the stage that is done


class Stages:
    """Shows which stage runs and how long each took.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.seconds: dict[str, float] = {}
        """Wall-clock seconds of each finished stage."""

    @contextmanager
    def stage(self, name: str) -> Iterator[Update]:
        """Run one stage; what it gives takes the share that is done, for stages that know it."""
        live = Progress(
            SpinnerColumn(finished_text="[green]✓[/]"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TimeElapsedColumn(),
            console=self.console,
            disable=self.console.quiet or not self.console.is_terminal,
        )
        started = time.monotonic()
        with live:
            task = live.add_task(f"{name:<{NAME_WIDTH}}", total=None)
            yield lambda share: live.update(task, total=1.0, completed=share)
            live.update(task, total=1.0, completed=1.0)
        self.seconds[name] = time.monotonic() - started
        if live.disable:
            self.say(f"{name:<{NAME_WIDTH}} {self.seconds[name]:6.1f} s")

    def say(self, message: str) -> None:
        """Print a line above the display; `message` is no markup."""
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

"""`diffense calibrate`: a new calibration without refitting."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffense.cli.notes import GROUPS_HELP, note_skipped
from diffense.errors import OptionError
from diffense.options import group_names


def command(
    guard: Annotated[Path, typer.Argument(help="The guard's folder.")],
    clean: Annotated[
        Path | None, typer.Argument(help="Clean images that the guard was not fitted on; without them --alpha alone changes.")
    ] = None,
    alpha: Annotated[float | None, typer.Option(help="False-alarm rate you accept; the guard's own by default.")] = None,
    groups: Annotated[str | None, typer.Option(help=GROUPS_HELP)] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the new guard; the old one is replaced by default.")] = None,
) -> None:
    """Calibrate a guard anew, on other clean images or for another alpha."""
    from diffense.bundle import recalibrate
    from diffense.guard import Guard
    from diffense.images import load_images

    if clean is None and alpha is None:
        raise OptionError("there is nothing to change; give clean images, --alpha, or both")
    if clean is None and groups is not None:
        raise OptionError("--groups tells which clean images belong together, and none are given")
    loaded, console, pixels, numbers = Guard.load(guard), Console(stderr=True), None, None
    if clean is not None:
        images = load_images(clean, loaded.preprocessing.size, loaded.preprocessing.channels)
        note_skipped(console, images)
        pixels, numbers = images.pixels, None if groups is None else group_names(groups, images.names)
    place = out or guard
    wanted = loaded.manifest.alpha if alpha is None else alpha
    renewed = recalibrate(
        loaded, pixels, wanted, place, lambda said: console.print(said, markup=False, highlight=False), numbers
    )
    made = renewed.manifest
    low, high = made.false_alarm_interval
    print(
        f"{place}: guard {renewed.guard_id}, {made.calibration_size} calibration images, alpha {made.alpha:g}; "
        f"the false-alarm rate will lie between {low:.2%} and {high:.2%} (90 % interval)"
    )

"""`diffense calibrate`: a new calibration without refitting."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from diffense.cli.notes import note_skipped


def command(
    guard: Annotated[Path, typer.Argument(help="The guard's folder.")],
    clean: Annotated[Path, typer.Argument(help="Clean images that the guard was not fitted on.")],
    alpha: Annotated[float, typer.Option(help="False-alarm rate you accept.")] = 0.01,
    out: Annotated[Path | None, typer.Option(help="Folder of the new guard; the old one is replaced by default.")] = None,
) -> None:
    """Calibrate a guard anew, on other clean images or for another alpha."""
    from diffense.bundle import recalibrate
    from diffense.guard import Guard
    from diffense.images import load_images

    loaded = Guard.load(guard)
    images = load_images(clean, loaded.preprocessing.size, loaded.preprocessing.channels)
    note_skipped(Console(stderr=True), images)
    place = out or guard
    renewed = recalibrate(loaded, images.pixels, alpha, place)
    low, high = renewed.manifest.false_alarm_interval
    print(
        f"{place}: guard {renewed.guard_id}, {renewed.manifest.calibration_size} calibration images, alpha {alpha:g}; "
        f"the false-alarm rate will lie between {low:.2%} and {high:.2%} (90 % interval)"
    )

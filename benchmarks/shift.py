"""How the false-alarm rate moves when clean images change a little: brightness, noise, JPEG. No threshold is set anew.

usage: python -m benchmarks.shift [--cells gtsrb-none,cifar10-none]
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import numpy as np
from PIL import Image

from benchmarks.datasets import Pixels
from benchmarks.evaluation import fit_cell, prepare_cell
from benchmarks.inspection import inspect_images, score_inspected
from benchmarks.metrics import measure_detection
from benchmarks.records import SHIFT, write_row
from benchmarks.settings import describe_machine, find_commit
from benchmarks.targets import Cell, read_cell
from diffense.errors import DiffenseError

CELLS: Final = "gtsrb-none,cifar10-none"


def brighten(images: Pixels, gain: float) -> Pixels:
    """(N, H, W, C) uint8 times a gain, rounded and clipped."""
    return np.asarray(np.clip(np.rint(images * gain), 0, 255), np.uint8)


def add_noise(images: Pixels, spread: float) -> Pixels:
    """(N, H, W, C) uint8 plus normal noise of this standard deviation, in 8-bit steps."""
    noise = np.random.default_rng(0).standard_normal(images.shape, np.float32)
    return np.asarray(np.clip(np.rint(images + spread * noise), 0, 255), np.uint8)


def compress(images: Pixels, quality: int) -> Pixels:
    """(N, H, W, C) uint8 to JPEG and back."""
    return np.stack([_compress_one(image, quality) for image in images])


def _compress_one(image: Pixels, quality: int) -> Pixels:
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
    with Image.open(file) as opened:
        return np.asarray(opened, np.uint8).reshape(image.shape)


SHIFTS: Final[dict[str, Callable[[Pixels], Pixels]]] = {
    "none": lambda images: images,
    "brightness -25 %": partial(brighten, gain=0.75),
    "brightness -10 %": partial(brighten, gain=0.9),
    "brightness +10 %": partial(brighten, gain=1.1),
    "brightness +25 %": partial(brighten, gain=1.25),
    "noise 2/255": partial(add_noise, spread=2.0),
    "noise 5/255": partial(add_noise, spread=5.0),
    "noise 10/255": partial(add_noise, spread=10.0),
    "JPEG 95": partial(compress, quality=95),
    "JPEG 75": partial(compress, quality=75),
    "JPEG 50": partial(compress, quality=50),
}


def measure_shifts(cell: Cell, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """One row a shift: accuracy and false-alarm rates on the clean evaluation images, shifted."""
    found = prepare_cell(cell, None, progress)
    guard = fit_cell(found, None, 0, progress)
    rows = []
    for name, shift in SHIFTS.items():
        view = inspect_images(guard, shift(found.evaluation.pixels))
        right = view.logits.argmax(1) == found.evaluation.labels
        nothing = np.zeros(0, np.float32)
        measured = measure_detection(guard.scorer.calibration, score_inspected(guard, view), right, nothing, np.zeros(0, bool))
        rows.append(
            {
                **cell.describe(guard_seed=0),
                "shift": name,
                "accuracy": float(right.mean()),
                "fpr_at_1": measured.fpr_at_1,
                "fpr_at_5": measured.fpr_at_5,
                "commit": find_commit(),
                "machine": describe_machine(),
            }
        )
        progress(f"{name}: accuracy {right.mean():.4f}, FPR {measured.fpr_at_1:.4f} / {measured.fpr_at_5:.4f}")
    return rows


def main(arguments: Sequence[str]) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.shift", description="False alarms on shifted clean images.")
    parser.add_argument("--cells", default=CELLS, help="dataset-attack, comma-separated")
    options = parser.parse_args(arguments)
    try:
        for name in options.cells.split(","):
            for row in measure_shifts(read_cell(name), print):
                write_row(row, SHIFT)
    except DiffenseError as error:
        sys.exit(f"shift: {error}")
    except KeyboardInterrupt:
        sys.exit("shift: interrupted; cells that are finished are kept")


if __name__ == "__main__":
    main(sys.argv[1:])

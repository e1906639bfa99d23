"""A made-up image set for the bench: no shared data, targets that train in seconds."""

from pathlib import Path

import pytest

from benchmarks import datasets, matrix, records, targets
from benchmarks.attacks import htba, idba, issba
from benchmarks.datasets import Images, Spec, Split
from shapes import draw_shapes

SPEC = Spec("mnist", "Shapes", True, 16, 3, 4, False, False, 0, 500, 10, "small_cnn")


def make_split() -> Split:
    return Split(*(Images(*draw_shapes(rows, seed)) for rows, seed in ((1500, 0), (500, 1), (300, 2))))


def set_up(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Give the bench this image set, its own cache and its own results."""
    split = make_split()
    patch.setitem(datasets.SPECS, "mnist", SPEC)
    patch.setattr(targets, "load_split", lambda name: split)
    patch.setattr("benchmarks.evaluation.load_split", lambda name: split)
    patch.setenv("DIFFENSE_BENCH", str(folder / "cache"))
    patch.setattr(records, "DETECTION", folder / "detection.json")
    patch.setattr(records, "VARIANTS", folder / "variants.json")
    patch.setattr(matrix, "DETECTION", folder / "detection.json")
    for module, name, value in ((idba, "MASK_STEPS", 3), (issba, "STEPS", 3), (issba, "LEARNED", 0), (htba, "CRAFT_STEPS", 2)):
        patch.setattr(module, name, value)

"""Latents of a cell, kept in the cache: what the ablation tries its variants on without running the target again."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from benchmarks.cache import read_entry, write_entry
from benchmarks.evaluation import prepare_cell
from benchmarks.settings import find_cache
from benchmarks.targets import Cell, get_target
from diffense.chain import assign_folds
from diffense.crossfit import FOLDS
from diffense.fit import default_preprocessing
from diffense.latent import GRID
from diffense.manifest import hash_file
from diffense.preparation import prepare_clean
from diffense.settings import FitSettings
from diffense.tapping import open_pooling, project_taps
from diffense.target import Target

FORM: Final = 3  # raise it when whitening, taps or the split change
ARRAYS: Final = "latents.safetensors"
MOST: Final = 3000  # clean and triggered evaluation images each that are kept

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Seen:
    """(N, C) logits and (N, W) latents of some images."""

    logits: Matrix
    latents: Matrix


@dataclass(frozen=True)
class CellLatents:
    """A cell as its guard sees it.

    Attributes:
        clean: images to fit on and their copies.
        folds: (n,) fold of each row, as the guard's fit has them; copies share their original's.
        originals: how many rows are originals; they come first.
        calibration, evaluation, triggered: the rest; triggered are those that reach the attacker's label.
        width: d.
    """

    clean: Seen
    folds: NDArray[np.int64]
    originals: int
    calibration: Seen
    evaluation: Seen
    triggered: Seen
    width: int


def get_latents(cell: Cell, seed: int, progress: Callable[[str], None], grid: int = GRID) -> CellLatents:
    """Give the latents of a cell under one seed of the guard's split, from the cache or by running the target once.

    Args:
        cell: of the matrix.
        seed: of the guard.
        progress: told what is going on.
        grid: parts of a tap's map each way whose means are read.
    """
    target = get_target(cell, progress)
    recipe = {"version": FORM, "target": hash_file(target.path), "seed": seed, "most": MOST, "grid": grid}
    folder = find_cache() / "latents" / f"{cell.name}-{seed}-{grid}"
    facts = read_entry(folder, recipe, progress)
    if facts is None:
        facts = write_entry(folder, recipe, lambda work: _collect(cell, seed, grid, work, progress))
    arrays = load_file(folder / ARRAYS)
    seen = {
        part: Seen(arrays[f"{part}_logits"].astype(np.float64), arrays[f"{part}_latents"].astype(np.float64))
        for part in ("clean", "calibration", "evaluation", "triggered")
    }
    return CellLatents(folds=arrays["folds"], originals=facts["originals"], width=facts["width"], **seen)


def _collect(cell: Cell, seed: int, grid: int, work: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    found = prepare_cell(cell, None, progress)
    target = Target.open(found.target.path)
    taps, preprocessing = target.choose_taps(None), default_preprocessing(target)
    settings = FitSettings(seed=seed)
    clean = found.clean
    prepared = prepare_clean(
        target, clean.pixels, taps, preprocessing, settings.alpha, "label", seed, progress, grid, clean.groups
    )
    run = open_pooling(target, taps, preprocessing, grid)
    width = prepared.latents.shape[1] // len(taps)
    folds = assign_folds(prepared.clean.labels[: prepared.clean.originals], FOLDS, prepared.generator, prepared.clean.groups)
    arrays: dict[str, NDArray[Any]] = {
        "folds": folds[prepared.clean.source],
        "clean_logits": prepared.clean.logits.astype(np.float32),
        "clean_latents": prepared.latents.astype(np.float32),
    }
    parts = {
        "calibration": clean.pixels[prepared.calibration_rows],
        "evaluation": found.evaluation.pixels[:MOST],
        "triggered": found.triggered,
    }
    for part, pixels in parts.items():
        logits, pooled = run(pixels)
        latents = project_taps(prepared.whitenings, pooled)
        if part == "triggered":
            rows = np.flatnonzero(logits.argmax(1) == found.target.attack.target)[:MOST]
            logits, latents = logits[rows], latents[rows]
        arrays |= {f"{part}_logits": logits.astype(np.float32), f"{part}_latents": latents.astype(np.float32)}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, work / ARRAYS)
    return {"originals": prepared.clean.originals, "width": width}

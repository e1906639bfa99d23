"""A cascade, tried: the closed form clears most inputs, only the doubtful ones are denoised. What would it lose?

usage: python -m benchmarks.cascade [cifar10-wanet gtsrb-wanet ...]

Writes benchmarks/results/cascade.json. Cleared inputs rank below all others, by their closed-form score.
"""

import sys
from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.evaluation import Evaluated, fit_cell, prepare_cell
from benchmarks.inspection import inspect_images, score_inspected
from benchmarks.metrics import Scores, measure_detection
from benchmarks.peers.base import Inspected
from benchmarks.records import CASCADE, Row, write_row
from benchmarks.settings import describe_machine, find_cache, find_commit
from benchmarks.targets import read_cell
from diffense.errors import DiffenseError
from diffense.guard import Guard

CELLS: Final = ("cifar10-wanet", "cifar10-issba", "cifar10-idba", "gtsrb-wanet", "gtsrb-htba")
CLEARED_ABOVE: Final = (0.1, 0.2, 0.5)  # closed-form p-values from which an input is cleared
FAR: Final = 100.0  # more than a cleared score ever is, and float32 still tells neighbours apart


def main(names: Sequence[str]) -> None:
    """Measure the cells and print a line for each."""
    try:
        for name in names or CELLS:
            for row in measure_cell(name):
                write_row(row, CASCADE)
                print(describe(row), flush=True)
    except DiffenseError as error:
        sys.exit(f"cascade: {error}")


def describe(row: Row) -> str:
    """One line."""
    return (
        f"{row['dataset']} {row['attack']}, cleared above p = {row['cleared_above']}: {row['cleared_clean']:.1%} of clean, "
        f"{row['cleared_triggered']:.2%} of triggered inputs; AUROC {row['auroc']:.5f} for {row['auroc_whole']:.5f}, "
        f"TPR at 1 % {row['tpr_at_fpr1']:.4f} for {row['tpr_at_fpr1_whole']:.4f}"
    )


def measure_cell(name: str) -> list[Row]:
    """One row a border, on all evaluation images; the guards are those of the matrix where they lie in the cache."""
    cell = read_cell(name)
    found = prepare_cell(cell, None, print)
    guard, closed = load_guard(found, "auto"), load_guard(found, "off")
    clean, triggered = (inspect_images(guard, pixels) for pixels in (found.evaluation.pixels, found.triggered))
    reached = triggered.logits.argmax(1) == found.target.attack.target
    right = clean.logits.argmax(1) == found.evaluation.labels
    whole = [score_inspected(guard, view) for view in (clean, triggered)]
    rows = []
    for border in (None, *CLEARED_ABOVE):
        tried = [run_cascade(closed, view, s, border) for view, s in zip((clean, triggered), whole, strict=True)]
        scores, cleared = [pair[0] for pair in tried], [pair[1] for pair in tried]
        # Half of the clean images set the threshold of both: the calibration scores of the two guards do not mix.
        half = np.arange(len(scores[0])) % 2 == 0
        told = measure_detection(scores[0][half], scores[0][~half], right[~half], scores[1], reached)
        if border is None:
            plain = told
            continue
        rows.append(
            {
                **cell.describe(guard_seed=0),
                "cleared_above": border,
                "cleared_clean": float(cleared[0].mean()),
                "cleared_triggered": float(cleared[1][reached].mean()),
                "auroc": told.auroc,
                "auroc_whole": plain.auroc,
                "tpr_at_fpr1": told.tpr_at_fpr1,
                "tpr_at_fpr1_whole": plain.tpr_at_fpr1,
                "machine": describe_machine(),
                "commit": find_commit(),
            }
        )
    return rows


def load_guard(found: Evaluated, network: Literal["auto", "off"]) -> Guard:
    """The matrix's guard from the cache, else a new one."""
    try:
        return Guard.load(find_cache() / "guards" / f"{found.target.cell.name}-all-0-{network}", found.target.path)
    except DiffenseError:
        return fit_cell(found, None, 0, print, network=network)


def run_cascade(closed: Guard, view: Inspected, whole: Scores, border: float | None) -> tuple[Scores, NDArray[np.bool_]]:
    """Scores with the cleared inputs below all others, and which those are; nobody is cleared without a border."""
    if border is None:
        return whole, np.zeros(len(whole), bool)
    first = score_inspected(closed, view)
    cleared = closed.scorer.judge(first)[0] > border
    return np.where(cleared, first.astype(np.float64) - FAR, whole), cleared


if __name__ == "__main__":
    main(sys.argv[1:])

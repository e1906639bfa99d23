"""Measure the variants on the latents of some cells; what is measured already is kept.

usage: python -m benchmarks.ablation [--cells cifar10-wanet,gtsrb-idba] [--target-seed 0] [--seeds 0,1,2] [--groups chain]
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.ablation.fits import Fits
from benchmarks.ablation.trial import Trial
from benchmarks.ablation.variants import VARIANTS, Variant
from benchmarks.latents import get_latents
from benchmarks.metrics import measure_detection
from benchmarks.records import ABLATION, read_rows, write_row
from benchmarks.settings import describe_machine, find_commit
from benchmarks.targets import Cell, read_cell
from diffense.errors import DiffenseError, OptionError

CELLS: Final = "cifar10-wanet,cifar10-idba,cifar10-issba,gtsrb-wanet,gtsrb-idba,gtsrb-issba"


def measure_variant(fits: Fits, variant: Variant) -> dict[str, Any]:
    """The figures of one variant."""
    cell = fits.cell
    trial = Trial(fits, variant)
    scores = [trial.score(part) for part in (cell.calibration, cell.evaluation, cell.triggered)]
    everything = np.ones(len(scores[1]), bool)
    found = measure_detection(scores[0], scores[1], everything, scores[2], np.ones(len(scores[2]), bool))
    losses = None if trial.learned is None else [round(trial.learned.loss, 5), round(trial.learned.gaussian_loss, 5)]
    return {"auroc": found.auroc, "tpr_at_fpr1": found.tpr_at_fpr1, "tpr_at_fpr5": found.tpr_at_fpr5, "losses": losses}


def list_missing(cells: Sequence[Cell], seeds: Sequence[int], groups: Sequence[str]) -> list[tuple[Cell, int, list[Variant]]]:
    """The variants that each cell and guard seed lacks."""
    done = {(r["dataset"], r["attack"], r["target"], r["seed"], r["guard_seed"], r["variant"]) for r in read_rows(ABLATION)}
    missing = []
    for cell in cells:
        for seed in seeds:
            key = (cell.dataset, cell.attack, cell.network, cell.seed, seed)
            lacking = [v for v in VARIANTS if (not groups or v.group in groups) and (*key, v.name) not in done]
            if lacking:
                missing.append((cell, seed, lacking))
    return missing


def run_ablation(cells: Sequence[Cell], seeds: Sequence[int], groups: Sequence[str]) -> None:
    """Measure what is missing and write each row as soon as it is there."""
    jobs = list_missing(cells, seeds, groups)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("ablation", total=sum(len(variants) for *_, variants in jobs))
        for cell, seed, variants in jobs:
            fits: dict[int, Fits] = {}
            for variant in variants:
                progress.update(task, description=f"{cell.name} {seed}: {variant.name}")
                if variant.grid not in fits:
                    fits[variant.grid] = Fits(get_latents(cell, seed, progress.console.print, variant.grid), seed)
                write_row(describe_row(cell, seed, variant) | measure_variant(fits[variant.grid], variant), ABLATION)
                progress.advance(task)


def describe_row(cell: Cell, seed: int, variant: Variant) -> dict[str, Any]:
    """What a row is about."""
    return {
        "dataset": cell.dataset,
        "attack": cell.attack,
        "target": cell.network,
        "seed": cell.seed,
        "guard_seed": seed,
        "variant": variant.name,
        "group": variant.group,
        "commit": find_commit(),
        "machine": describe_machine(),
    }


def main(arguments: Sequence[str]) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description="Measure what each part is worth.")
    parser.add_argument("--cells", default=CELLS, help="dataset-attack, comma-separated")
    parser.add_argument("--target-seed", type=int, default=0, help="of the targets and their attacks")
    parser.add_argument("--seeds", default="0,1,2", help="of the guard")
    parser.add_argument("--groups", default="", help="of variants; all by default")
    options = parser.parse_args(arguments)
    try:
        cells = [replace(read_cell(name), seed=options.target_seed) for name in options.cells.split(",")]
        groups = [group for group in options.groups.split(",") if group]
        known = sorted({variant.group for variant in VARIANTS})
        unknown = [group for group in groups if group not in known]
        if unknown:
            raise OptionError(f"there is no group {unknown[0]!r}; known are {', '.join(known)}")
        run_ablation(cells, [int(seed) for seed in options.seeds.split(",")], groups)
    except (DiffenseError, ValueError) as error:
        sys.exit(f"ablation: {error}")
    except KeyboardInterrupt:
        sys.exit("ablation: interrupted; what is finished is kept, run it again to go on")


if __name__ == "__main__":
    main(sys.argv[1:])

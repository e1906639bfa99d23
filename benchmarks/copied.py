"""Whether the guard leads because it fits on changed copies too: the latent peers fitted on the same rows.

usage: python -m benchmarks.copied --cells gtsrb-wanet,cifar10-wanet
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.datasets import Pixels
from benchmarks.evaluation import fit_cell, prepare_cell
from benchmarks.figures import average, show
from benchmarks.inspection import inspect_images, score_inspected, view_images
from benchmarks.metrics import measure_detection
from benchmarks.peer_figures import measure_peer
from benchmarks.peers.base import Inspected
from benchmarks.records import COPIED, Row, read_rows, write_row
from benchmarks.settings import describe_machine, find_commit
from benchmarks.targets import Cell, read_cell
from diffense.copies import make_copies
from diffense.errors import DiffenseError
from diffense.guard import Guard

PEERS: Final = ("latent_all_doubt", "latent_all", "mahalanobis", "rmd", "meandist", "ratio", "lda", "ranks", "knn", "probe")


def add_copies(guard: Guard, clean: Inspected) -> tuple[Inspected, NDArray[np.int64]]:
    """Clean images, behind them changed copies that keep their label, of the kinds the guard fits on; and each one's source."""

    def predict(pixels: Pixels) -> NDArray[np.int64]:
        return np.asarray(guard.run(pixels)[0].argmax(axis=1), np.int64)

    views, sources = [clean], [np.arange(len(clean.images))]
    for pixels, source in make_copies(clean.images, clean.predicted, predict, np.random.default_rng(guard.manifest.seed)):
        views.append(inspect_images(guard, pixels))
        sources.append(source)
    source = np.concatenate(sources)
    images, logits, latents = (np.concatenate([getattr(v, name) for v in views]) for name in ("images", "logits", "latents"))
    return Inspected(images, logits, latents, source), source


def measure_cell(cell: Cell, peers: Sequence[str], progress: Callable[[str], None]) -> Row:
    """One row: AUROC of the guard, and of each peer fitted on the originals alone and on their copies too."""
    found = prepare_cell(cell, None, progress)
    guard = fit_cell(found, None, 0, progress)
    views = view_images(guard, found.clean, found.evaluation.pixels, found.triggered)
    right = views.clean.logits.argmax(1) == found.evaluation.labels
    reached = views.triggered.logits.argmax(1) == found.target.attack.target
    clean, triggered = score_inspected(guard, views.clean), score_inspected(guard, views.triggered)
    detection = measure_detection(guard.scorer.calibration, clean, right, triggered, reached)
    # AUROC alone is kept, so where the guard fits on all of its images so do the peers, and nothing need calibrate them.
    fitted, labels = (views.fit, views.labels) if views.crossed is None else (views.crossed.images, views.crossed.labels)
    copied, source = add_copies(guard, fitted)
    fits = {
        "originals": replace(views, fit=fitted, labels=labels, crossed=None),
        "copies too": replace(views, fit=copied, labels=labels[source], crossed=None),
    }
    return {
        **cell.describe(guard_seed=0),
        "auroc": detection.auroc,
        "network": guard.manifest.network.used,
        "images": len(labels),
        "copies": len(source) - len(labels),
        "peers": {
            name: {how: measure_peer(name, found.target, view, right, reached, progress)["auroc"] for how, view in fits.items()}
            for name in peers
        },
        "commit": find_commit(),
        "machine": describe_machine(),
    }


def render_table(rows: Sequence[Row]) -> str:
    """Markdown: a cell a line, originals -> copies too, and the means."""
    names = [name for name in PEERS if all(name in row["peers"] for row in rows)]
    lines = ["| cell | Diffense | " + " | ".join(names) + " |", "| --- |" + " --- |" * (len(names) + 1)]
    for row in rows:
        pairs = [f"{show(p['originals'])} → {show(p['copies too'])}" for p in (row["peers"][name] for name in names)]
        lines.append(f"| {row['dataset']}, {row['attack']} | {show(row['auroc'])} | " + " | ".join(pairs) + " |")
    means = [
        " → ".join(show(average(row["peers"][name][how] for row in rows)) for how in ("originals", "copies too"))
        for name in names
    ]
    lines.append(f"| mean | {show(average(row['auroc'] for row in rows))} | " + " | ".join(means) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> None:
    """Read the options, measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.copied", description="Latent peers with the guard's copies.")
    parser.add_argument("--cells", default="", help="dataset-attack, comma-separated; none: print what there is")
    options = parser.parse_args(arguments)
    try:
        for name in filter(None, options.cells.split(",")):
            write_row(measure_cell(read_cell(name), PEERS, print), COPIED)
        print(render_table(read_rows(COPIED)))
    except DiffenseError as error:
        sys.exit(f"copied: {error}")
    except KeyboardInterrupt:
        sys.exit("copied: interrupted; cells that are finished are kept")


if __name__ == "__main__":
    main(sys.argv[1:])

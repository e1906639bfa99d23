"""One cell, measured: the guard as its users fit it, and the peers on the same target, images and calibration split."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.datasets import Images, Pixels, load_split, pick_per_class
from benchmarks.inspection import score_inspected, view_images
from benchmarks.metrics import count_scores, measure_detection, trace_curve
from benchmarks.peer_figures import CLOSED_FORM, measure_closed_form, measure_peer
from benchmarks.settings import describe_machine, find_cache, find_commit
from benchmarks.targets import Cell, TrainedTarget, get_target
from diffense.fit import fit_guard
from diffense.guard import Guard
from diffense.manifest import hash_file
from diffense.settings import FitSettings
from diffense.target import Target


@dataclass(frozen=True)
class Evaluated:
    """What a cell is measured on.

    Attributes:
        target: trained, from the cache.
        clean: the defender's images.
        evaluation: clean evaluation images.
        triggered: (T, H, W, C) attacked evaluation images with the trigger on.
        attacked: (T,) their rows among the evaluation images.
    """

    target: TrainedTarget
    clean: Images
    evaluation: Images
    triggered: Pixels
    attacked: NDArray[np.int64]


def prepare_cell(cell: Cell, clean_per_class: int | None, progress: Callable[[str], None], seed: int = 0) -> Evaluated:
    """Get the target, the defender's images (at most so many a class, chosen by the seed) and the evaluation images."""
    target = get_target(cell, progress)
    split = load_split(cell.dataset)
    clean = split.clean
    if clean_per_class is not None:
        clean = clean.take(pick_per_class(clean.labels, clean_per_class, np.random.default_rng(seed)))
    rows = target.attack.attacked(split.evaluation.labels)
    return Evaluated(target, clean, split.evaluation, target.attack.trigger(split.evaluation.pixels[rows]), rows)


def evaluate_cell(
    cell: Cell,
    *,
    clean_per_class: int | None = None,
    guard_seed: int = 0,
    peers: Sequence[str] = (),
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:
    """Fit the guard on the cell's target and measure it, then the peers.

    Args:
        cell: which.
        clean_per_class: most clean images a class that the defender has; None for all.
        guard_seed: of the guard's fit, and of the choice of few images.
        peers: keys of `benchmarks.peers.PEERS`.
        progress: told what is going on.

    Returns:
        One row of ``detection.json``.
    """
    found = prepare_cell(cell, clean_per_class, progress, guard_seed)
    begun = start = time.monotonic()
    guard = fit_cell(found, clean_per_class, guard_seed, progress)
    fit_seconds = time.monotonic() - start
    views = view_images(guard, found.clean, found.evaluation.pixels, found.triggered)
    start = time.monotonic()
    guard.score(found.evaluation.pixels[:1000])
    score_ms = (time.monotonic() - start) / min(1000, len(found.evaluation)) * 1e3
    scores = {"clean": score_inspected(guard, views.clean), "triggered": score_inspected(guard, views.triggered)}
    reached = views.triggered.logits.argmax(1) == found.target.attack.target
    right = views.clean.logits.argmax(1) == found.evaluation.labels
    # What reaches the label without a trigger is misclassified and not attacked; weak attacks have many such images.
    turned = reached & (views.clean.logits.argmax(1)[found.attacked] != found.target.attack.target)
    detection = measure_detection(guard.scorer.calibration, scores["clean"], right, scores["triggered"], reached)
    row = {
        "dataset": cell.dataset,
        "stand_in": cell.spec.stand_in,
        "attack": cell.attack,
        "target": cell.network,
        "target_sha256": hash_file(found.target.path),
        "recipe": cell.recipe_hash,
        "seed": cell.seed,
        "guard_seed": guard_seed,
        "clean_per_class": clean_per_class,
        "commit": find_commit(),
        "machine": describe_machine(),
        "clean_accuracy": float(right.mean()),
        "cross_accuracy": found.target.cross_accuracy,
        "asr_before": float(reached.mean()) if len(reached) else None,
        **asdict(detection),
        "curve": trace_curve(scores["clean"], scores["triggered"][reached]),
        "histogram": count_scores(scores["clean"], scores["triggered"][reached]),
        "n_clean_fit": guard.manifest.clean.fitted,
        "n_clean_calibration": guard.manifest.calibration_size,
        "n_clean_eval": len(found.evaluation),
        "n_triggered": len(found.triggered),
        "n_turned": int(turned.sum()),
        "auroc_turned": measure_detection(guard.scorer.calibration, scores["clean"], right, scores["triggered"], turned).auroc,
        "network": guard.manifest.network.model_dump(),
        "train_s": found.target.train_s,
        "fit_s": round(fit_seconds, 1),
        "cell_s": round(time.monotonic() - begun, 1),  # fit and evaluation, without peers
        "score_ms": round(score_ms, 3),
        "target_forwards": 1.0,
    }
    beside = {name: measure_peer(name, found.target, views, right, reached, progress) for name in peers}
    if guard.manifest.network.used:
        closed = fit_cell(found, clean_per_class, guard_seed, progress, network="off")
        beside[CLOSED_FORM] = measure_closed_form(closed, views, right, reached)
    return row | {"peers": beside}


def fit_cell(
    found: Evaluated,
    clean_per_class: int | None,
    seed: int,
    progress: Callable[[str], None],
    network: Literal["auto", "off"] = "auto",
) -> Guard:
    """Fit a guard on the defender's images of a cell."""
    folder = find_cache() / "guards" / f"{found.target.cell.name}-{clean_per_class or 'all'}-{seed}-{network}"
    settings = replace(choose_settings(len(found.clean), seed), network=network)
    clean, target = found.clean, Target.open(found.target.path)
    return fit_guard(target, clean.pixels, folder, groups=clean.groups, settings=settings, notify=progress)


def choose_settings(images: int, seed: int) -> FitSettings:
    """The default setting; with few images alpha is what so few can reach."""
    return FitSettings(seed=seed, alpha=0.01 if images >= 300 else 0.05)

"""One cell, measured: the guard as its users fit it, and the peers on the same target, images and calibration split."""

import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.datasets import Images, Pixels, load_split, pick_per_class
from benchmarks.metrics import measure_detection
from benchmarks.peers import make_peer
from benchmarks.peers.base import Inspected, Model
from benchmarks.settings import ROOT, describe_machine, find_cache
from benchmarks.targets import Cell, TrainedTarget, get_target
from diffense.clean import split_rows
from diffense.fit import FitSettings, fit_guard
from diffense.guard import Guard
from diffense.target import Target

EXPENSIVE_IMAGES: Final = 500  # clean and triggered images each on which an expensive peer is tried


@dataclass(frozen=True)
class Evaluated:
    """What a cell is measured on.

    Attributes:
        target: trained, from the cache.
        clean: the defender's images.
        evaluation: clean evaluation images.
        triggered: (T, H, W, C) attacked evaluation images with the trigger on.
    """

    target: TrainedTarget
    clean: Images
    evaluation: Images
    triggered: Pixels


def prepare_cell(cell: Cell, clean_per_class: int | None, progress: Callable[[str], None]) -> Evaluated:
    """Get the target, the defender's images (at most so many a class) and the evaluation images."""
    target = get_target(cell, progress)
    split = load_split(cell.dataset)
    clean = split.clean
    if clean_per_class is not None:
        clean = clean.take(pick_per_class(clean.labels, clean_per_class, np.random.default_rng(cell.seed)))
    rows = target.attack.attacked(split.evaluation.labels)
    return Evaluated(target, clean, split.evaluation, target.attack.trigger(split.evaluation.pixels[rows]))


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
        guard_seed: of the guard's fit.
        peers: keys of `benchmarks.peers.PEERS`.
        progress: told what is going on.

    Returns:
        One row of ``detection.json``.
    """
    found = prepare_cell(cell, clean_per_class, progress)
    settings = choose_settings(len(found.clean), guard_seed)
    folder = find_cache() / "guards" / f"{cell.name}-{clean_per_class or 'all'}-{guard_seed}"
    start = time.monotonic()
    target = Target.open(found.target.path)
    guard = fit_guard(target, found.clean.pixels, folder, settings=settings, notify=progress)
    fit_seconds = time.monotonic() - start
    defender = inspect_images(guard, found.clean.pixels)
    # The guard's own split of the defender's images; the peers get the same.
    generator = np.random.default_rng(guard.manifest.seed)
    fit_rows, calibration_rows = split_rows(defender.predicted, guard.manifest.calibration_size, generator)
    views = {
        "fit": take(defender, fit_rows),
        "calibration": take(defender, calibration_rows),
        "clean": inspect_images(guard, found.evaluation.pixels),
        "triggered": inspect_images(guard, found.triggered),
    }
    start = time.monotonic()
    guard.score(found.evaluation.pixels[:1000])
    score_ms = (time.monotonic() - start) / min(1000, len(found.evaluation)) * 1e3
    scores = {name: score_inspected(guard, view) for name, view in views.items()}
    reached = views["triggered"].logits.argmax(1) == found.target.attack.target
    right = views["clean"].logits.argmax(1) == found.evaluation.labels
    detection = measure_detection(scores["calibration"], scores["clean"], right, scores["triggered"], reached)
    row = {
        "dataset": cell.dataset,
        "stand_in": cell.spec.stand_in,
        "attack": cell.attack,
        "target": cell.network,
        "seed": cell.seed,
        "guard_seed": guard_seed,
        "clean_per_class": clean_per_class,
        "commit": find_commit(),
        "machine": describe_machine(),
        "clean_accuracy": float(right.mean()),
        "cross_accuracy": found.target.cross_accuracy,
        "asr_before": float(reached.mean()) if len(reached) else None,
        **asdict(detection),
        "n_clean_fit": guard.manifest.clean.fitted,
        "n_clean_calibration": guard.manifest.calibration_size,
        "n_clean_eval": len(found.evaluation),
        "n_triggered": len(found.triggered),
        "network": guard.manifest.network.model_dump(),
        "fit_s": round(fit_seconds, 1),
        "score_ms": round(score_ms, 3),
        "target_forwards": 1.0,
    }
    labels = found.clean.labels[fit_rows]
    return row | {"peers": {name: measure_peer(name, found.target, views, labels, right, reached, progress) for name in peers}}


def choose_settings(images: int, seed: int) -> FitSettings:
    """The default setting; with few images alpha is what so few can reach."""
    return FitSettings(seed=seed, alpha=0.01 if images >= 300 else 0.05)


def inspect_images(guard: Guard, pixels: Pixels) -> Inspected:
    """Run the target once: (N, H, W, C) uint8 -> logits and latents."""
    if not len(pixels):
        taps, width = len(guard.manifest.taps), guard.manifest.tap_width
        return Inspected(pixels, np.zeros((0, guard.manifest.classes), np.float32), np.zeros((0, taps, width), np.float32))
    logits, latents = guard.run(pixels)
    return Inspected(pixels, logits, latents.reshape(len(pixels), -1, guard.manifest.tap_width))


def score_inspected(guard: Guard, view: Inspected) -> NDArray[np.float32]:
    """(N,) scores of the guard."""
    flat = view.latents.reshape(len(view.logits), guard.manifest.latent_dim)
    parts = [
        guard.scorer.score(view.logits[i : i + 256], flat[i : i + 256], guard.denoise).scores for i in range(0, len(flat), 256)
    ]
    return np.concatenate([np.zeros(0, np.float32), *parts])


def measure_peer(
    name: str,
    target: TrainedTarget,
    views: dict[str, Inspected],
    labels: NDArray[np.int64],
    right: NDArray[np.bool_],
    reached: NDArray[np.bool_],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Fit a peer on the guard's fit rows and measure it with the guard's calibration rows.

    Expensive peers see the first 500 clean and the first 500 triggered images that reach the attacker's label.

    Args:
        name: of the peer.
        target: what is guarded.
        views: fit, calibration, clean and triggered images.
        labels: (n,) true labels of the fit images.
        right: (N,) whether the target classifies the clean images as their true label.
        reached: (T,) whether it gives the triggered ones the attacker's label.
        progress: told what is going on.
    """
    peer = make_peer(name)
    model = Model(target.network, target.cell.spec.classes)
    start = time.monotonic()
    peer.fit(model, views["fit"], labels)
    progress(f"{name}: fitted in {time.monotonic() - start:.1f} s")
    clean, triggered = np.arange(len(views["clean"].logits)), np.arange(len(reached))
    calibration = np.arange(len(views["calibration"].logits))
    if not peer.cheap:
        clean, calibration = clean[:EXPENSIVE_IMAGES], calibration[:EXPENSIVE_IMAGES]
        triggered = np.flatnonzero(reached)[:EXPENSIVE_IMAGES]
    fitting, start = model.forwards, time.monotonic()
    scores = {
        "calibration": peer.score(model, take(views["calibration"], calibration)),
        "clean": peer.score(model, take(views["clean"], clean)),
    }
    seen = len(calibration) + len(clean)
    milliseconds, forwards = (time.monotonic() - start) / seen * 1e3, (model.forwards - fitting) / seen
    scores["triggered"] = peer.score(model, take(views["triggered"], triggered)) if len(triggered) else np.zeros(0, np.float64)
    detection = measure_detection(scores["calibration"], scores["clean"], right[clean], scores["triggered"], reached[triggered])
    # Over all triggered inputs, also where an expensive peer saw only some that reach the label.
    after = None if detection.tpr_at_fpr5 is None else (1.0 - detection.tpr_at_fpr5) * float(reached.mean())
    return {
        "commit": find_commit(),
        "auroc": detection.auroc,
        "auroc_right": detection.auroc_right,
        "tpr_at_fpr1": detection.tpr_at_fpr1,
        "tpr_at_fpr5": detection.tpr_at_fpr5,
        "fpr_at_5": detection.fpr_at_5,
        "asr_after_fpr5": after,
        "target_forwards": round(forwards + (0.0 if forwards else 1.0), 2),
        "score_ms": round(milliseconds, 3),
        "images": [len(clean), len(triggered)],
    }


def take(view: Inspected, rows: NDArray[np.int64]) -> Inspected:
    """These rows of what was inspected."""
    return Inspected(view.images[rows], view.logits[rows], view.latents[rows])


def find_commit() -> str:
    """Short hash of the checkout's commit, with ``+`` where files differ from it."""
    run = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--", "diffense", "benchmarks/peers", "benchmarks/attacks"],
        capture_output=True,
        text=True,
        check=False,
    )
    return (run.stdout.strip() or "unknown") + ("+" if dirty.stdout.strip() else "")

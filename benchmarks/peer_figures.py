"""What stands beside the guard in a row: the peers, and the guard itself with its network off."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.inspection import Crossed, Views, score_inspected, take
from benchmarks.metrics import measure_detection
from benchmarks.peers import REVISIONS, make_peer
from benchmarks.peers.base import Matrix, Model
from benchmarks.precision import choose_device
from benchmarks.records import Row
from benchmarks.settings import describe_machine, find_commit
from benchmarks.targets import TrainedTarget
from diffense.calibration import count_groups_once
from diffense.errors import OptionError
from diffense.guard import Guard

CLOSED_FORM: Final = "closed_form"  # the guard's chain without its network; in every row whose guard has one
FIGURES: Final = (
    "auroc", "auroc_right", "tpr_at_fpr1", "tpr_at_fpr5", "fpr_at_5", "asr_after_fpr5", "target_forwards", "score_ms",
)  # fmt: skip
EXPENSIVE_IMAGES: Final = 500  # clean and triggered images each on which an expensive peer is tried


def is_outdated(row: Row, name: str) -> bool:
    """Whether a row has figures of this peer that an older revision of it gave."""
    peer = row["peers"].get(name)
    return peer is not None and peer.get("revision", 0) < REVISIONS.get(name, 0)


def note_origin() -> dict[str, str]:
    """Commit and machine, which a peer's figures may not share with the rest of their row."""
    return {"commit": find_commit(), "machine": describe_machine()}


def measure_closed_form(guard: Guard, views: Views, right: NDArray[np.bool_], reached: NDArray[np.bool_]) -> dict[str, Any]:
    """Measure a guard without network on the views of one that has it; its latents are the same."""
    start = time.monotonic()
    clean = score_inspected(guard, views.clean)
    milliseconds = (time.monotonic() - start) / len(clean) * 1e3
    triggered = score_inspected(guard, views.triggered)
    found = asdict(measure_detection(guard.scorer.calibration, clean, right, triggered, reached))
    return {name: found[name] for name in FIGURES if name in found} | {
        **note_origin(),
        "target_forwards": 1.0,
        "score_ms": round(milliseconds, 3),
        "images": [len(clean), len(triggered)],
    }


def measure_peer(
    name: str,
    target: TrainedTarget,
    views: Views,
    right: NDArray[np.bool_],
    reached: NDArray[np.bool_],
    progress: Callable[[str], None],
) -> dict[str, Any]:
    """Fit a peer on what the guard is fitted on and measure it with what calibrates the guard, groups counted as there.

    Where all calibrate by folds, expensive peers are fitted on three fifths and calibrated on the others. They see the first
    500 clean and the first 500 triggered images that reach the attacker's label. A peer that is not defined for the target's
    network has no figures but the reason.

    Args:
        name: of the peer.
        target: what is guarded; its network goes to the GPU where CUDA finds one, and stays there.
        views: the cell's images.
        right: (N,) whether the target classifies the clean images as their true label.
        reached: (T,) whether it gives the triggered ones the attacker's label.
        progress: told what is going on.
    """
    peer = make_peer(name)
    crossed = views.crossed if peer.cheap else None
    model = Model(target.network.to(choose_device()), target.cell.spec.classes)
    begun = time.monotonic()
    try:
        own = None if crossed is None else score_by_folds(name, model, crossed)
        peer.fit(model, *((views.fit, views.labels) if crossed is None else (crossed.images, crossed.labels)))
    except OptionError as error:
        progress(f"{name}: {error}")
        undefined = {"revision": REVISIONS[name], "images": [0, 0], "reason": str(error)}
        return dict.fromkeys(FIGURES) | note_origin() | undefined
    progress(f"{name}: fitted in {time.monotonic() - begun:.1f} s")
    clean, triggered = np.arange(len(views.clean.logits)), np.arange(len(reached))
    calibration = np.arange(len(views.calibration.logits))
    if not peer.cheap:
        clean, calibration = clean[:EXPENSIVE_IMAGES], calibration[:EXPENSIVE_IMAGES]
        triggered = np.flatnonzero(reached)[:EXPENSIVE_IMAGES]
    before, start = model.forwards, time.monotonic()
    usual = peer.score(model, take(views.clean, clean))
    milliseconds, forwards = (time.monotonic() - start) / len(clean) * 1e3, (model.forwards - before) / len(clean)
    strange = peer.score(model, take(views.triggered, triggered)) if len(triggered) else np.zeros(0, np.float64)
    groups = views.groups if crossed is None else crossed.groups
    if own is None:
        own, groups = peer.score(model, take(views.calibration, calibration)), None if groups is None else groups[calibration]
    reference = count_groups_once(own.astype(np.float32), groups)
    detection = measure_detection(reference, usual, right[clean], strange, reached[triggered])
    # Over all triggered inputs, also where an expensive peer saw only some that reach the label.
    after = None if detection.tpr_at_fpr5 is None else (1.0 - detection.tpr_at_fpr5) * float(reached.mean())
    return {
        **note_origin(),
        "revision": REVISIONS[name],
        "auroc": detection.auroc,
        "auroc_right": detection.auroc_right,
        "tpr_at_fpr1": detection.tpr_at_fpr1,
        "tpr_at_fpr5": detection.tpr_at_fpr5,
        "fpr_at_5": detection.fpr_at_5,
        "asr_after_fpr5": after,
        "target_forwards": round(forwards + (0.0 if forwards else 1.0), 2),
        "score_ms": round(milliseconds, 3),
        "took_s": round(time.monotonic() - begun, 1),  # fit and all scores
        "images": [len(clean), len(triggered)],
    }


def score_by_folds(name: str, model: Model, crossed: Crossed) -> Matrix:
    """(n,) scores of the defender's images, each by a peer that was fitted on the other folds."""
    scores = np.empty(len(crossed.folds))
    for fold in np.unique(crossed.folds):
        others, held = (np.flatnonzero(rows) for rows in (crossed.folds != fold, crossed.folds == fold))
        peer = make_peer(name)
        peer.fit(model, take(crossed.images, others), crossed.labels[others])
        scores[held] = peer.score(model, take(crossed.images, held))
    return scores

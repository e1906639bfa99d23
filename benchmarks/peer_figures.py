"""What stands beside the guard in a row: the peers, and the guard itself with its network off."""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.inspection import score_inspected, take
from benchmarks.metrics import measure_detection
from benchmarks.peers import REVISIONS, make_peer
from benchmarks.peers.base import Inspected, Model
from benchmarks.precision import choose_device
from benchmarks.records import Row
from benchmarks.settings import describe_machine, find_commit
from benchmarks.targets import TrainedTarget
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


def measure_closed_form(
    guard: Guard, views: dict[str, Inspected], right: NDArray[np.bool_], reached: NDArray[np.bool_]
) -> dict[str, Any]:
    """Measure a guard without network on the views of one that has it; its latents are the same."""
    start = time.monotonic()
    scores = {name: score_inspected(guard, views[name]) for name in ("calibration", "clean")}
    milliseconds = (time.monotonic() - start) / sum(map(len, scores.values())) * 1e3
    triggered = score_inspected(guard, views["triggered"])
    found = asdict(measure_detection(scores["calibration"], scores["clean"], right, triggered, reached))
    return {name: found[name] for name in FIGURES if name in found} | {
        **note_origin(),
        "target_forwards": 1.0,
        "score_ms": round(milliseconds, 3),
        "images": [len(scores["clean"]), len(triggered)],
    }


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

    Expensive peers see the first 500 clean and the first 500 triggered images that reach the attacker's label. A peer that is
    not defined for the target's network has no figures but the reason.

    Args:
        name: of the peer.
        target: what is guarded; its network goes to the GPU where CUDA finds one, and stays there.
        views: fit, calibration, clean and triggered images.
        labels: (n,) true labels of the fit images.
        right: (N,) whether the target classifies the clean images as their true label.
        reached: (T,) whether it gives the triggered ones the attacker's label.
        progress: told what is going on.
    """
    peer = make_peer(name)
    model = Model(target.network.to(choose_device()), target.cell.spec.classes)
    begun = time.monotonic()
    try:
        peer.fit(model, views["fit"], labels)
    except OptionError as error:
        progress(f"{name}: {error}")
        undefined = {"revision": REVISIONS[name], "images": [0, 0], "reason": str(error)}
        return dict.fromkeys(FIGURES) | note_origin() | undefined
    progress(f"{name}: fitted in {time.monotonic() - begun:.1f} s")
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

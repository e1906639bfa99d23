"""From served answers to figures, and what the report says around them."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

import diffense
from diffense.charts import measure_auroc
from diffense.demo import digits
from diffense.demo.attacks import TARGET_LABEL, Attack
from diffense.demo.serving import TIMED, Latency, Served
from diffense.guard import Guard
from diffense.names import FLAGGED_YES
from diffense.report import AttackReport, Figures, Judged, Meta

PACKAGES: Final = ("numpy", "torch", "onnxruntime", "onnx", "tritonclient")
Settings = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Setup:
    """What is the same for all attacks of a run."""

    alpha: float
    placement: str
    loop: str
    server_version: str


@dataclass(frozen=True)
class Victim:
    """One classifier with a backdoor, and its guard.

    Attributes:
        attack: what was done to it.
        model: name under which it is served.
        path: its ONNX file.
        guard: its guard.
        originals: evaluation images of the classes that the attack moves.
        triggered: (N, 28, 28, 1) uint8, the same images with the trigger.
    """

    attack: Attack
    model: str
    path: Path
    guard: Guard
    originals: digits.Digits
    triggered: NDArray[np.uint8]


def compute_figures(
    attack: str, truth: NDArray[np.int64], clean: Served, triggered: Served, latency: Latency, setup: Setup
) -> Figures:
    """Work out one row of the table from served answers.

    Args:
        attack: its name.
        truth: (N,) true labels of the clean images.
        clean: answers on them.
        triggered: answers on images of other classes than the target label, with the trigger.
        latency: of single requests.
        setup: the rest of the row.
    """
    reached = triggered.labels == TARGET_LABEL
    unflagged = triggered.flagged != FLAGGED_YES
    return Figures(
        dataset=digits.DATASET,
        attack=attack,
        clean_accuracy_before=_share(clean.production.argmax(axis=1) == truth),
        clean_accuracy_after=_share(clean.labels == truth),
        asr_before=_share(triggered.production.argmax(axis=1) == TARGET_LABEL),
        asr_after=_share(reached & unflagged),
        alpha=setup.alpha,
        fpr=_share(clean.flagged == FLAGGED_YES),
        auroc=round(measure_auroc(clean.scores, triggered.scores), 6),
        p50_ms_unguarded=round(latency.unguarded, 3),
        p50_ms_guarded=round(latency.guarded, 3),
        placement=setup.placement,
        loop=setup.loop,
        server_version=setup.server_version,
    )


def describe_attack(
    victim: Victim, evaluation: digits.Digits, clean: Served, triggered: Served, figures: Figures
) -> AttackReport:
    """Gather what the report shows about one attack."""
    return AttackReport(
        figures=figures,
        settings=_list_settings(victim, figures),
        target_label=TARGET_LABEL,
        threshold=victim.guard.scorer.threshold,
        clean=_judge(evaluation.pixels, evaluation.labels, clean, "clean"),
        triggered=_judge(victim.triggered, victim.originals.labels, triggered, "triggered"),
        originals=victim.originals.pixels,
        explain=lambda image: victim.guard.explain(image).tap,
    )


def describe_run(setup: Setup, seed: int, seconds: Mapping[str, float]) -> Meta:
    """Say what was measured where, and how long each stage took."""
    commit = read_commit()
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs, {_read_processor()}"
    environment = [
        ("measured on", time.strftime("%Y-%m-%d %H:%M %Z")),
        ("Diffense", diffense.__version__ + (f", commit {commit}" if commit else "")),
        ("machine", machine),
        ("server", f"Triton {setup.server_version}, on this machine"),
        ("Python", platform.python_version()),
        *((name, _read_version(name)) for name in PACKAGES),
        ("seed", str(seed)),
        ("images", f"{digits.DATASET}; {_describe_split()}"),
        ("accuracy, attack success, false alarms, AUROC", "from answers over gRPC; HTTP gave the same, bit for bit"),
        ("latency", f"median of {TIMED} single-image requests over gRPC to each model, in turn"),
        *((f"time: {name}", f"{taken:.1f} s") for name, taken in seconds.items()),
    ]
    lead = (
        "Two questions for each attack: does the guard stop the triggered images, and what does it cost? The classifier "
        "was trained with a backdoor and is from then on a file that the guard does not change. The guard was fitted on "
        "clean images alone. Every figure is worked out from the answers of a running Triton server."
    )
    return Meta("Diffense: backdoored digit classifiers under guard", lead, environment)


def write_summary(path: Path, rows: Sequence[Figures]) -> None:
    """Write the figures as a JSON list; a reader sees the whole file or none."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def read_commit() -> str | None:
    """Commit of the checkout that this package runs from; None for an installed package."""
    checkout = Path(diffense.__file__).resolve().parents[1]
    if not (checkout / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _list_settings(victim: Victim, figures: Figures) -> Settings:
    manifest = victim.guard.manifest
    low, high = manifest.false_alarm_interval
    levels = "; ".join(", ".join(f"{sigma:g}" for sigma in sorted(set(row))) for row in manifest.sampling.sigmas)
    return [
        ("attack", victim.attack.recipe),
        ("attacker's label", str(TARGET_LABEL)),
        ("served as", f"{victim.model}, guarded as {victim.model}_guarded"),
        ("placement and loop", f"{figures.placement}, {figures.loop}"),
        ("guard", victim.guard.guard_id),
        ("taps", ", ".join(tap.name for tap in manifest.taps)),
        ("clean images", f"{manifest.clean.given}, of which {manifest.calibration_size} only for the calibration"),
        ("false alarms to expect", f"{low:.2%} to {high:.2%} (90 % interval) at alpha {manifest.alpha:g}"),
        ("learned part", f"{'on' if manifest.network.used else 'off'}: {manifest.network.reason}"),
        ("noise levels, steps, draws", f"{levels}; {manifest.sampling.steps}; {manifest.sampling.draws}"),
    ]


def _judge(images: NDArray[np.uint8], truth: NDArray[np.int64], served: Served, kind: str) -> Judged:
    names = [f"{kind} image {index}" for index in range(len(images))]
    return Judged(images, names, truth, served.labels, served.scores, served.p_values, served.flagged)


def _describe_split() -> str:
    parts = ("train", digits.TRAIN_PER_CLASS), ("clean", digits.CLEAN_PER_CLASS), ("evaluation", digits.EVALUATION_PER_CLASS)
    return ", ".join(f"{name} {count * digits.CLASSES:,}" for name, count in parts) + ", disjoint"


def _share(hits: NDArray[np.bool_]) -> float:
    return round(float(hits.mean()), 6)


def _read_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed as a package"


def _read_processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()

"""The HTML report: one file that opens offline, loads nothing and runs no script."""

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from diffense.charts import draw_histogram, draw_roc
from diffense.names import FLAGGED_YES

GALLERY: Final = 12  # images of one kind
PAIRS: Final = 6  # images shown before and after the trigger
PREVIEW: Final = 112  # pixels at which an image is shown
TEMPLATE: Final = "report.html.jinja"

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Figures:
    """What was measured for one attack; one object of ``summary.json``.

    Attributes:
        dataset: name of the images.
        attack: name of the attack.
        clean_accuracy_before: of the production model alone, a share.
        clean_accuracy_after: of the same outputs as the guarded model hands them through.
        asr_before: share of the triggered images that reach the attacker's label.
        asr_after: share of the triggered images that reach it and are not flagged.
        alpha: false-positive rate that was asked for.
        fpr: share of the clean images that were flagged.
        auroc: chance that a triggered image scores higher than a clean one.
        p50_ms_unguarded: median milliseconds of one single-image request to the production model.
        p50_ms_guarded: the same to the guarded model.
        placement: ``separate`` or ``shared``.
        loop: ``bls`` or ``fused``.
        server_version: what the server says of itself.
    """

    dataset: str
    attack: str
    clean_accuracy_before: float
    clean_accuracy_after: float
    asr_before: float
    asr_after: float
    alpha: float
    fpr: float
    auroc: float
    p50_ms_unguarded: float
    p50_ms_guarded: float
    placement: str
    loop: str
    server_version: str


@dataclass(frozen=True)
class Judged:
    """N images and what the guarded model said of them.

    Attributes:
        images: (N, H, W, C) uint8, C = 1 or 3.
        names: N names; they may hold anything.
        truth: (N,) true labels.
        labels: (N,) predicted labels.
        scores: (N,) float, higher = more suspicious.
        p_values: (N,) float, lower = more suspicious.
        flagged: (N,) uint8: 0 passed, 1 flagged, 2 not scored.
    """

    images: Pixels
    names: Sequence[str]
    truth: NDArray[np.int64]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    p_values: NDArray[np.float32]
    flagged: NDArray[np.uint8]

    @property
    def is_flagged(self) -> NDArray[np.bool_]:
        """(N,) whether the guard flagged it."""
        return np.asarray(self.flagged == FLAGGED_YES)


@dataclass(frozen=True)
class AttackReport:
    """All that the report says about one attack.

    Attributes:
        figures: the row of the table.
        settings: names and values of what was chosen.
        target_label: what the attacker wants to see.
        threshold: largest score that passes.
        clean: clean images that neither the classifier nor the guard was fitted on.
        triggered: images of other classes with the trigger.
        originals: (N, H, W, C) uint8, the triggered images before the trigger.
        explain: names the tap that spoke for an (H, W, C) uint8 image.
    """

    figures: Figures
    settings: Sequence[tuple[str, str]]
    target_label: int
    threshold: float
    clean: Judged
    triggered: Judged
    originals: Pixels
    explain: Callable[[Pixels], str]


@dataclass(frozen=True)
class Meta:
    """What holds for the whole report: its title, a sentence on what was done, and what was measured where."""

    title: str
    lead: str
    environment: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Exhibit:
    """One image of a gallery, as the template shows it."""

    source: str
    name: str
    verdict: str
    score: str
    p_value: str
    tap: str


@dataclass(frozen=True)
class Gallery:
    """Images of one kind: how many there are, and those that are shown."""

    key: str
    title: str
    note: str
    count: int
    of: int
    exhibits: tuple[Exhibit, ...]


def write_report(path: Path, sections: Sequence[AttackReport], meta: Meta) -> None:
    """Write the report; a reader sees the whole file or none.

    Args:
        path: the HTML file.
        sections: one for each attack.
        meta: what holds for all of them.
    """
    environment = Environment(
        loader=PackageLoader("diffense", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["percent"] = format_percent
    text = environment.get_template(TEMPLATE).render(
        meta=meta, preview=PREVIEW, sections=[_lay_out(section) for section in sections]
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    # A file name on Linux may hold bytes that are no text.
    partial.write_text(text, encoding="utf-8", errors="replace")
    partial.replace(path)


def collect_galleries(section: AttackReport) -> tuple[Gallery, ...]:
    """Choose the images to show: flagged triggered ones, false alarms, misses; spread evenly over their scores."""
    triggered, clean, wanted = section.triggered, section.clean, section.target_label
    missed = (triggered.labels == wanted) & ~triggered.is_flagged
    kinds = (
        (
            "caught",
            "Triggered images that were flagged",
            "Each of these answers carried the flag. Bold: the true class, and what the classifier made of it.",
            triggered,
            triggered.is_flagged,
        ),
        ("alarms", "False alarms", "Clean images that were flagged all the same.", clean, clean.is_flagged),
        ("misses", "Misses", "Triggered images that reached the attacker's label without a flag.", triggered, missed),
    )
    return tuple(
        Gallery(key, title, note, int(chosen.sum()), len(chosen), _exhibit(judged, chosen, section.explain))
        for key, title, note, judged, chosen in kinds
    )


def encode_png(image: Pixels) -> str:
    """Encode (H, W, C) uint8 as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def format_percent(share: float) -> str:
    """Write a share with enough digits to tell one image in a thousand."""
    return f"{100 * share:.2f} %"


def list_keys() -> tuple[str, ...]:
    """Keys of one object of ``summary.json``, in order."""
    return tuple(field.name for field in fields(Figures))


def _lay_out(section: AttackReport) -> dict[str, object]:
    clean, triggered = section.clean, section.triggered
    caught = float(triggered.is_flagged.mean())
    pairs = np.unique(np.linspace(0, len(triggered.images) - 1, PAIRS).astype(int)).tolist()
    return {
        "figures": section.figures,
        "settings": section.settings,
        "clean_count": len(clean.images),
        "triggered_count": len(triggered.images),
        "false_alarms": int(clean.is_flagged.sum()),
        "caught": int(triggered.is_flagged.sum()),
        "unscored": int((clean.flagged > FLAGGED_YES).sum() + (triggered.flagged > FLAGGED_YES).sum()),
        "histogram": draw_histogram(clean.scores, triggered.scores, section.threshold),
        "roc": draw_roc(clean.scores, triggered.scores, (section.figures.fpr, caught)),
        "pairs": [
            (encode_png(section.originals[i]), encode_png(triggered.images[i]), encode_png(_amplify(section, i))) for i in pairs
        ],
        "galleries": collect_galleries(section),
    }


def _amplify(section: AttackReport, index: int) -> Pixels:
    change = section.triggered.images[index].astype(np.int16) - section.originals[index]
    return np.asarray(np.clip(128 + change, 0, 255), np.uint8)


def _exhibit(judged: Judged, chosen: NDArray[np.bool_], explain: Callable[[Pixels], str]) -> tuple[Exhibit, ...]:
    rows = np.flatnonzero(chosen)
    rows = rows[np.argsort(-judged.scores[rows], kind="stable")]
    shown = rows[np.unique(np.linspace(0, len(rows) - 1, GALLERY).astype(int))] if len(rows) else rows
    return tuple(
        Exhibit(
            encode_png(judged.images[row]),
            judged.names[row],
            f"{judged.truth[row]} read as {judged.labels[row]}",
            f"{judged.scores[row]:.3g}",
            f"{judged.p_values[row]:.3g}",
            explain(judged.images[row]),
        )
        for row in shown.tolist()
    )

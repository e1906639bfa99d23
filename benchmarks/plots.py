"""Draw the results: ROC and score histograms of every cell, AUROC against clean images, noise level and steps.

usage: python -m benchmarks.plots
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any, Final

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.attacks import ATTACKS, MATRIX
from benchmarks.datasets import SPECS
from benchmarks.figures import is_cell
from benchmarks.metrics import BINS, FALSE_ALARMS
from benchmarks.records import ABLATION, DETECTION, VARIANTS, Row, read_rows
from benchmarks.settings import RESULTS
from diffense.settings import FitSettings

CLEAN: Final = "#3b6ea5"
TRIGGERED: Final = "#c8553d"
COLOURS: Final = dict(zip(MATRIX, ("#3b6ea5", "#c8553d", "#4a8c5f", "#8a5fa8", "#b58900"), strict=True))
LEAST_RATE: Final = 5e-4  # where the logarithmic axis starts; no false alarm at all is drawn there
PANEL: Final = 2.3  # inches
DEFAULTS: Final = FitSettings()


def draw_rocs(rows: list[Row]) -> Figure | None:
    """True-positive against false-alarm rate on a logarithmic axis, one panel a data set."""
    found = [row for row in rows if row.get("curve")]
    names = [name for name in SPECS if any(row["dataset"] == name for row in found)]
    if not names:
        return None
    figure, panels = make_panels(1, len(names))
    for panel, name in zip(panels[0], names, strict=True):
        for row in (row for row in found if row["dataset"] == name):
            label = f"{ATTACKS[row['attack']].title} {row['auroc']:.4f}"
            panel.plot(np.maximum(FALSE_ALARMS, LEAST_RATE), row["curve"], label=label, color=COLOURS[row["attack"]])
        panel.set(xscale="log", xlim=(LEAST_RATE, 0.5), ylim=(0, 1.02), xlabel="false-alarm rate")
        panel.set_title(SPECS[name].title, fontsize=8)
        panel.legend(fontsize=6, loc="lower right", title="AUROC", title_fontsize=6)
    panels[0][0].set_ylabel("true-positive rate")
    return figure


def draw_histograms(rows: list[Row]) -> Figure | None:
    """Scores of clean and triggered images, one panel a cell."""
    found = [row for row in rows if row.get("histogram") and row["auroc"] is not None]
    names = [name for name in SPECS if any(row["dataset"] == name for row in found)]
    if not names:
        return None
    attacks = [key for key in ATTACKS if any(row["attack"] == key for row in found)]
    figure, panels = make_panels(len(names), len(attacks), height=1.2)
    for panel in panels.flat:
        panel.axis("off")
    for row in found:
        panel = panels[names.index(row["dataset"])][attacks.index(row["attack"])]
        panel.axis("on")
        low, high = row["histogram"]["edges"]
        edges = np.linspace(low, high, BINS + 1)
        for part, colour in (("clean", CLEAN), ("triggered", TRIGGERED)):
            counts = np.asarray(row["histogram"][part], np.float64)
            panel.stairs(counts / counts.sum(), edges, fill=True, alpha=0.6, color=colour, label=part)
        panel.set(yscale="log", ylim=(1e-4, 1.0), yticks=[])
        panel.set_title(f"{SPECS[row['dataset']].title}, {ATTACKS[row['attack']].title}", fontsize=6)
        panel.tick_params(labelsize=5)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=7)
    return figure


def draw_images(rows: list[Row]) -> Figure | None:
    """AUROC against clean images a class, mean and range over guard seeds; a line joins rows of one target alone."""
    few = {(row["dataset"], row["attack"]) for row in rows if row["clean_per_class"]}
    found = [row for row in rows if (row["dataset"], row["attack"]) in few]
    if not found:
        return None
    counts = sorted({row["clean_per_class"] for row in found if row["clean_per_class"]})
    figure, panels = make_panels(1, 1, height=3.0)
    for key, points in gather_images(found).items():
        places = [len(counts) if count is None else counts.index(count) for count in points]
        centre = [mean(figures) for figures in points.values()]
        below = [middle - min(figures) for middle, figures in zip(centre, points.values(), strict=True)]
        above = [max(figures) - middle for middle, figures in zip(centre, points.values(), strict=True)]
        label = f"{SPECS[key[0]].title}, {ATTACKS[key[1]].title}, target of {key[3]:.1%}"
        panels[0][0].errorbar(places, centre, (below, above), marker="o", markersize=3, capsize=3, label=label)
    panels[0][0].set_xticks(range(len(counts) + 1), [*map(str, counts), "all"])
    panels[0][0].set(xlim=(-0.4, len(counts) + 0.4), xlabel="clean images a class", ylabel="AUROC")
    figure.legend(fontsize=6, loc="outside lower center", ncols=1)
    return figure


def gather_images(rows: list[Row]) -> dict[tuple[str, str, str, float], dict[int | None, list[float]]]:
    """AUROC of each guard seed by clean images a class (None: all), for each data set, attack, target and its accuracy."""
    order = sorted(rows, key=lambda row: (row["dataset"], row["attack"], row["clean_per_class"] or float("inf")))
    found: dict[tuple[str, str, str, float], dict[int | None, list[float]]] = {}
    for row in order:
        key = (row["dataset"], row["attack"], row["target_sha256"], row["clean_accuracy"])
        found.setdefault(key, {}).setdefault(row["clean_per_class"], []).append(row["auroc"])
    return found


def draw_settings(rows: list[Row]) -> Figure | None:
    """AUROC against the noise level and against the steps, mean over guard seeds, one line a cell."""
    groups: tuple[tuple[str, Callable[[str], float | None]], ...] = (("noise level", read_level), ("steps", read_steps))
    if not any(read(row["variant"]) for row in rows if row["variant"] != "default" for _, read in groups):
        return None
    figure, panels = make_panels(1, len(groups))
    for panel, (title, read) in zip(panels[0], groups, strict=True):
        lines = gather_lines(rows, read)
        for (name, attack, seed), line in lines.items():
            label = f"{SPECS[name].title}, {ATTACKS[attack].title}" + (f", target seed {seed}" if seed else "")
            panel.plot(*zip(*line, strict=True), marker="o", markersize=3, label=label)
        places = sorted({place for line in lines.values() for place, _ in line})
        panel.set(xscale="log", xlabel=title, ylabel="AUROC")
        panel.set_xticks(places, [f"{place:g}" for place in places])
        panel.minorticks_off()  # their labels overlap those of the places that were measured
    figure.legend(*panels[0][-1].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=6)
    return figure


def gather_lines(rows: list[Row], read: Callable[[str], float | None]) -> dict[tuple[str, str, int], list[tuple[float, float]]]:
    """Places and mean AUROC over guard seeds, for each data set, attack and target seed."""
    points: dict[tuple[str, str, int], dict[float, list[float]]] = {}
    for row in rows:
        place = read(row["variant"])
        if place is not None:
            key = (row["dataset"], row["attack"], row["seed"])
            points.setdefault(key, {}).setdefault(place, []).append(row["auroc"])
    return {key: sorted((place, mean(found)) for place, found in points[key].items()) for key in sorted(points)}


def read_level(variant: str) -> float | None:
    """``level 0.3`` -> 0.3; the default's is that of `FitSettings`, None where it has several."""
    if variant != "default":
        return _read_number(variant, "level ", "")
    level = DEFAULTS.sigmas[0] if len(DEFAULTS.sigmas) == 1 else None
    return level if isinstance(level, float) else None


def read_steps(variant: str) -> float | None:
    """``10 steps`` -> 10; the default's are those of `FitSettings`."""
    return float(DEFAULTS.steps) if variant == "default" else _read_number(variant, "", " steps")


def _read_number(text: str, before: str, after: str) -> float | None:
    if not (text.startswith(before) and text.endswith(after)):
        return None
    try:
        return float(text[len(before) : len(text) - len(after)])
    except ValueError:
        return None


def make_panels(rows: int, columns: int, height: float = PANEL) -> tuple[Figure, Any]:
    """A figure and its (rows, columns) array of axes."""
    figure = Figure(figsize=(max(3.4, PANEL * columns), height * rows + 0.5), layout="constrained")
    panels = np.empty((rows, columns), object)
    for row in range(rows):
        for column in range(columns):
            panel: Axes = figure.add_subplot(rows, columns, row * columns + column + 1)
            panel.tick_params(labelsize=6)
            panel.xaxis.label.set_fontsize(7)
            panel.yaxis.label.set_fontsize(7)
            panels[row, column] = panel
    return figure, panels


def write_figure(figure: Figure, path: Path) -> None:
    """Write a picture, all or nothing, the same bytes for the same results."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        work = Path(folder) / path.name
        figure.savefig(work, dpi=130, metadata={"Software": None})
        work.replace(path)


def draw_all() -> list[Path]:
    """Draw what there are results for; gives the files."""
    matplotlib.use("Agg")
    rows = [row for row in read_rows(DETECTION) if is_cell(row)]
    variants, ablation = read_rows(VARIANTS), read_rows(ABLATION)
    figures = {
        "roc.png": draw_rocs(rows),
        "scores.png": draw_histograms(rows),
        "clean_images.png": draw_images([*variants, *rows]),
        "settings.png": draw_settings(ablation),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            write_figure(figure, RESULTS / name)
            written.append(RESULTS / name)
    return written


if __name__ == "__main__":
    for path in draw_all():
        print(path.name)

"""Geometry of the report's charts: numbers in, coordinates out; the template draws them as SVG."""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BINS: Final = 40
LOG_RATIO: Final = 20.0  # scores that span more than this are drawn on a logarithmic axis
WIDTH: Final = 560.0
MARGIN_LEFT: Final = 56.0
MARGIN_RIGHT: Final = 16.0
PLOT_RIGHT: Final = WIDTH - MARGIN_RIGHT
ROW_HEIGHT: Final = 96.0  # of one of the histogram's two rows
ROW_GAP: Final = 30.0
TOP: Final = 34.0
ROC_HEIGHT: Final = 222.0


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis, in SVG units."""

    at: float
    text: str


@dataclass(frozen=True)
class Bar:
    """One bin: a rectangle in SVG units, and what it says."""

    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class HistogramRow:
    """One series: its name, style class, bars, the line they stand on, and the share at the top of the row."""

    name: str
    style: str
    bars: tuple[Bar, ...]
    base: float
    top: float
    top_text: str


@dataclass(frozen=True)
class Histogram:
    """Two histograms, one above the other, over one axis, and the threshold through both."""

    width: float
    height: float
    left: float
    right: float
    rows: tuple[HistogramRow, ...]
    ticks: tuple[Tick, ...]
    threshold: Tick
    threshold_anchor: str
    logarithmic: bool


@dataclass(frozen=True)
class Roc:
    """A ROC curve over a logarithmic false-positive axis, with the point at which the guard works."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    path: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    point: tuple[float, float]
    point_text: str
    point_text_y: float
    point_anchor: str


def trace_roc(clean: NDArray[Any], triggered: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rates at every threshold, from (0, 0) to (1, 1); equal scores share one point.

    Args:
        clean: (n,) scores of clean inputs, higher = more suspicious.
        triggered: (m,) scores of triggered inputs.

    Returns:
        False-positive and true-positive rates, (k,) each, ascending.
    """
    cuts = np.unique(np.concatenate((clean, triggered)))[::-1]
    rates = [1 - np.searchsorted(np.sort(scores), cuts, side="left") / len(scores) for scores in (clean, triggered)]
    false, true = (np.concatenate(([0.0], rate)) for rate in rates)
    return false, true


def measure_auroc(clean: NDArray[Any], triggered: NDArray[Any]) -> float:
    """Chance that a triggered input scores higher than a clean one, ties counted half."""
    false, true = trace_roc(clean, triggered)
    return float(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2))


def draw_histogram(clean: NDArray[Any], triggered: NDArray[Any], threshold: float) -> Histogram:
    """Lay out the scores of clean and triggered inputs; every row shows shares of its own series."""
    together = np.concatenate((clean, triggered, [threshold])).astype(np.float64)
    low, high = float(together.min()), float(together.max())
    logarithmic = low > 0 and high / low > LOG_RATIO
    if low == high:
        low, high = low - 0.5, high + 0.5
    bounds = (math.log(low), math.log(high)) if logarithmic else (low, high)

    def place(values: NDArray[np.float64]) -> NDArray[np.float64]:
        moved = np.log(values) if logarithmic else values
        return MARGIN_LEFT + (moved - bounds[0]) / (bounds[1] - bounds[0]) * (PLOT_RIGHT - MARGIN_LEFT)

    edges = np.linspace(*bounds, BINS + 1)
    if logarithmic:
        edges = np.exp(edges)
    edges[0], edges[-1] = low, high
    rows = []
    for index, (name, style, scores) in enumerate((("clean", "clean", clean), ("triggered", "bad", triggered))):
        base = TOP + ROW_HEIGHT + index * (ROW_HEIGHT + ROW_GAP)
        rows.append(_stack_row(name, style, np.asarray(scores, np.float64), edges, place(edges), base))
    mark = float(place(np.array([threshold]))[0])
    ticks = [tick for tick in _lay_score_ticks(low, high, logarithmic) if low <= tick <= high]
    return Histogram(
        width=WIDTH,
        height=TOP + 2 * ROW_HEIGHT + ROW_GAP + 42,
        left=MARGIN_LEFT,
        right=PLOT_RIGHT,
        rows=tuple(rows),
        ticks=tuple(Tick(float(place(np.array([tick]))[0]), f"{tick:g}") for tick in ticks),
        threshold=Tick(mark, f"threshold {threshold:.3g}"),
        threshold_anchor="start" if mark < WIDTH / 2 else "end",
        logarithmic=logarithmic,
    )


def draw_roc(clean: NDArray[Any], triggered: NDArray[Any], point: tuple[float, float]) -> Roc:
    """Lay out the ROC curve.

    Args:
        clean: (n,) scores of clean inputs.
        triggered: (m,) scores of triggered inputs.
        point: false-positive and true-positive rate at which the guard works.
    """
    decades = max(1, math.ceil(math.log10(len(clean))))
    floor = 10.0**-decades
    right, bottom = PLOT_RIGHT, TOP + ROC_HEIGHT

    def place(false: float, true: float) -> tuple[float, float]:
        share = 1 + math.log10(max(false, floor)) / decades
        return MARGIN_LEFT + share * (right - MARGIN_LEFT), bottom - true * ROC_HEIGHT

    places = [place(float(false), float(true)) for false, true in zip(*trace_roc(clean, triggered), strict=True)]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    x, y = place(*point)
    return Roc(
        width=WIDTH,
        height=bottom + 44,
        left=MARGIN_LEFT,
        right=right,
        top=TOP,
        bottom=bottom,
        path=path,
        x_ticks=tuple(Tick(place(10.0**-d, 0)[0], _percent(10.0**-d)) for d in range(decades, -1, -1)),
        y_ticks=tuple(Tick(place(1, share)[1], f"{share:.0%}") for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
        point=(x, y),
        point_text_y=y + 22 if bottom - y > ROC_HEIGHT / 4 else y - 14,
        point_text=f"{_percent(point[1])} at {_percent(point[0])}",
        point_anchor="start" if x < (MARGIN_LEFT + right) / 2 else "end",
    )


def _stack_row(
    name: str,
    style: str,
    scores: NDArray[np.float64],
    edges: NDArray[np.float64],
    places: NDArray[np.float64],
    base: float,
) -> HistogramRow:
    shares = np.histogram(scores, edges)[0] / max(1, len(scores))
    largest = float(shares.max()) or 1.0
    bars = tuple(
        Bar(
            x=float(places[i]),
            y=base - share / largest * ROW_HEIGHT,
            width=max(float(places[i + 1] - places[i]) - 1, 0.5),
            height=share / largest * ROW_HEIGHT,
            text=f"{_percent(share)} of {name}: {edges[i]:.3g} to {edges[i + 1]:.3g}",
        )
        for i, share in enumerate(shares.tolist())
        if share > 0
    )
    return HistogramRow(name, style, bars, base, base - ROW_HEIGHT, _percent(largest))


def _lay_score_ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    if logarithmic:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 2, 5) if high / low < 1e4 else (1,)
        return [factor * 10.0**decade for decade in decades for factor in factors]
    step: float = 10.0 ** math.floor(math.log10(high - low))
    step *= next(factor for factor in (0.2, 0.5, 1.0, 2.0) if (high - low) / (step * factor) <= 7)
    return [round(step * i, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"

"""Write benchmarks/results/ablation.md from ablation.json.

usage: python -m benchmarks.ablation.table
"""

from collections.abc import Callable
from statistics import mean
from typing import Any

from benchmarks.ablation.variants import DEFAULT, VARIANTS
from benchmarks.attacks import ATTACKS
from benchmarks.datasets import SPECS
from benchmarks.figures import describe_runs, show
from benchmarks.records import ABLATION, Row, read_rows
from benchmarks.settings import RESULTS

Key = tuple[str, str, str, int]


def find_cell(row: Row) -> Key:
    """What tells cells apart."""
    return row["dataset"], row["attack"], row["target"], row["seed"]


def name_cell(key: Key) -> str:
    """As in the table's head."""
    seed = f", target seed {key[3]}" if key[3] else ""
    return f"{SPECS[key[0]].title} {ATTACKS[key[1]].title}{seed}"


def gather(rows: list[Row], figure: str) -> dict[tuple[Key, str], list[float]]:
    """The figure of each cell and variant, one a guard seed."""
    found: dict[tuple[Key, str], list[float]] = {}
    for row in rows:
        found.setdefault((find_cell(row), row["variant"]), []).append(row[figure])
    return found


def render_table(rows: list[Row], figure: str, form: Callable[[list[float]], str]) -> list[str]:
    """Variants by cells, in the order of `VARIANTS`; the last column is the mean, where every cell has a figure."""
    cells = sorted({find_cell(row) for row in rows})
    found = gather(rows, figure)
    lines = [
        "| part | variant | " + " | ".join(name_cell(key) for key in cells) + " | mean |",
        "| --- | --- |" + " --- |" * (len(cells) + 1),
    ]
    for variant in VARIANTS:
        figures = [found.get((key, variant.name), []) for key in cells]
        if any(figures):
            overall = mean(mean(f) for f in figures) if all(figures) else None
            shown = [form(f) if f else "–" for f in figures]
            lines.append(f"| {variant.group} | {variant.name} | " + " | ".join(shown) + f" | {show(overall)} |")
    return lines


def render_differences(rows: list[Row]) -> list[str]:
    """Each variant less the default on the same target and guard seed: mean, least and greatest difference."""
    runs: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        runs.setdefault((*find_cell(row), row["guard_seed"]), {})[row["variant"]] = row
    lines = [
        "| part | variant | runs | AUROC, mean | least | greatest | TPR at 1 % FPR, mean | least | greatest |",
        "| --- |" + " --- |" * 8,
    ]
    for variant in VARIANTS[1:]:
        pairs = [(run[variant.name], run[DEFAULT.name]) for run in runs.values() if {variant.name, DEFAULT.name} <= run.keys()]
        if pairs:
            cells = []
            for figure in ("auroc", "tpr_at_fpr1"):
                found = [ours[figure] - usual[figure] for ours, usual in pairs]
                cells += [f"{value:+.5f}" for value in (mean(found), min(found), max(found))]
            lines.append(f"| {variant.group} | {variant.name} | {len(pairs)} | " + " | ".join(cells) + " |")
    return lines


def show_spread(figures: list[float]) -> str:
    """Mean, and half the range where there are several."""
    spread = f" ± {(max(figures) - min(figures)) / 2:.4f}" if len(figures) > 1 else ""
    return f"{mean(figures):.4f}{spread}"


def render_page(rows: list[Row]) -> str:
    """The whole page."""
    seeds = ", ".join(sorted({str(row["guard_seed"]) for row in rows}))
    parts = [
        "# Ablation",
        "",
        f"Written by `python -m benchmarks.ablation.table` from `ablation.json`. {describe_runs(rows, seeds)}",
        "",
        "Each line is the default with one part changed, four draws and a network that learns from all clean images unless it "
        "says so (the guard takes two and leaves a hundredth out since these were measured: docs/decisions/0028, 0033). "
        "At most 3,000 clean and 3,000 triggered evaluation images a cell; "
        "mean over the guard's seeds ± half the range, which is missing where there is one seed.",
        "",
        "## AUROC",
        "",
        *render_table(rows, "auroc", show_spread),
        "",
        "## TPR at 1 % FPR",
        "",
        *render_table(rows, "tpr_at_fpr1", lambda figures: f"{mean(figures):.3f}"),
        "",
        "## Against the default, run by run",
        "",
        *render_differences(rows),
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    (RESULTS / "ablation.md").write_text(render_page(read_rows(ABLATION)))

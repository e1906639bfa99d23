"""Write benchmarks/results/detection.md from detection.json: the matrix, the peers side by side, the worst cells first.

usage: python -m benchmarks.tables [--summary]    (--summary prints the README's table instead)
"""

import sys
from statistics import mean
from typing import Final

from benchmarks.attacks import ATTACKS, MATRIX, UNSEEN
from benchmarks.datasets import SPECS
from benchmarks.duration_table import render_durations
from benchmarks.figures import (
    LEAST_ACCURACY,
    LEAST_SUCCESS,
    SUPERSEDED,
    describe_guards,
    describe_runs,
    find_current,
    find_figure,
    find_network,
    is_cell,
    list_peers,
    name_cell,
    show,
    sort_rows,
)
from benchmarks.peer_figures import CLOSED_FORM, is_outdated
from benchmarks.peer_tables import (
    OLD,
    find_pairs,
    render_costs,
    render_legend,
    render_pairs,
    render_peers,
    render_plain,
    render_published,
)
from benchmarks.records import DETECTION, SHIFT, VARIANTS, Row, read_rows
from benchmarks.settings import RESULTS

SUMMED_UP: Final = (CLOSED_FORM, "latent_all_doubt")  # named beside the guard below the README's table


def render_matrix(rows: list[Row]) -> list[str]:
    """One line a cell."""
    lines = [
        "| cell | target | accuracy (crossed) | ASR before → after at alpha 5 % / 1 % | AUROC (right only) "
        "| TPR at alpha 1 % / 5 % | FPR at alpha 1 % / 5 % | network |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    return lines + [render_row(row) for row in sort_rows(rows)]


def render_row(row: Row) -> str:
    """One cell."""
    cross = "" if row["cross_accuracy"] is None else f" ({row['cross_accuracy']:.3f})"
    target = row["target"] + (f", seed {row['seed']}" if row["seed"] else "")
    return (
        f"| {name_cell(row)} | {target} | {show(row['clean_accuracy'])}{cross} | {show(row['asr_before'], '.3f')} → "
        f"{show(row['asr_after_fpr5'])} / {show(row['asr_after_fpr1'])} | {show(row['auroc'])} ({show(row['auroc_right'])}) "
        f"| {show(row['tpr_at_fpr1'], '.3f')} / {show(row['tpr_at_fpr5'], '.3f')} "
        f"| {show(row['fpr_at_1'])} / {show(row['fpr_at_5'])} | {'on' if row['network']['used'] else 'off'} |"
    )


def render_variants(rows: list[Row], cells: list[Row]) -> list[str]:
    """Fewer clean images, other seeds of the guard, further targets; whether the target is that of the cell above."""
    of_cell = {find_network(cell): cell["target_sha256"] for cell in cells}
    lines = [
        "| cell | target's accuracy / ASR | images a class | guard seed | AUROC | TPR at alpha 5 % | FPR there | network |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        images = row["clean_per_class"] or "all"
        network = "on" if row["network"]["used"] else "off"
        another = "" if of_cell.get(find_network(row)) == row["target_sha256"] else ", another"
        lines.append(
            f"| {name_cell(row)} | {show(row['clean_accuracy'])} / {show(row['asr_before'], '.3f')}{another} | {images} "
            f"| {row['guard_seed']} | {show(row['auroc'])} | {show(row['tpr_at_fpr5'], '.3f')} | {show(row['fpr_at_5'])} "
            f"| {network} |"
        )
    return lines


def render_turned(rows: list[Row]) -> list[str]:
    """Of the triggered images that reach the label those that do so because of the trigger, where a row tells them apart."""
    told = [row for row in rows if row.get("n_turned") is not None and row["attack"] in MATRIX]
    if not told:
        return []
    lines = ["| cell | target | reach the label | turned by the trigger | AUROC | AUROC of those |", "| --- |" + " --- |" * 5]
    for row in sort_rows(told):
        count = round(row["asr_before"] * row["n_triggered"])
        lines.append(
            f"| {name_cell(row)} | {row['target']} | {count} | {row['n_turned']} | {show(row['auroc'])} "
            f"| {show(row['auroc_turned'])} |"
        )
    note = (
        "Some images reach the attacker's label without the trigger: the target misclassifies them. All figures above count "
        "them, as attacks are counted in the literature; with a weak attack (HTBA) they are many. Rows from before this was "
        "recorded do not tell."
    )
    return ["", "## Turned by the trigger", "", note, "", *lines]


def render_beside(title: str, rows: list[Row]) -> list[str]:
    """A section of targets beside the thirty cells, with their own commits and machines."""
    return ["", f"## {title}", "", describe_runs(rows), "", *render_matrix(rows)] if rows else []


def render_unseen(rows: list[Row]) -> list[str]:
    """Attacks beside the five, the guard and its peers."""
    peers = ["", "AUROC, beside the peers:", "", *render_peers(rows, "auroc")] if rows else []
    return [*render_beside("Attacks on which no setting was chosen", rows), *peers]


def render_shifts(rows: list[Row]) -> list[str]:
    """False-alarm rates on shifted clean images."""
    lines = [
        "| target | shift | accuracy | FPR at alpha 1 % / 5 % |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        name = f"{SPECS[row['dataset']].title}, {ATTACKS[row['attack']].title}"
        figures = f"{show(row['accuracy'])} | {show(row['fpr_at_1'])} / {show(row['fpr_at_5'])}"
        lines.append(f"| {name} | {row['shift']} | {figures} |")
    return (
        ["", "## Clean images that shift", "", describe_runs(rows), "", "Thresholds stay as they were calibrated.", "", *lines]
        if rows
        else []
    )


def render_page(rows: list[Row], variants: list[Row], shifts: list[Row]) -> str:
    """The whole page."""
    poisoned = [row for row in rows if is_cell(row)]
    cells = len(SPECS) * len(MATRIX)
    parts = [
        "# Detection",
        "",
        "Written by `python -m benchmarks.tables` from `detection.json`. " + describe_runs(poisoned),
        "",
        describe_guards(poisoned),
        "",
        f"{len({(r['dataset'], r['attack']) for r in poisoned})} of {cells} cells are recorded. "
        "AUROC: all clean evaluation images, misclassified ones too, against the triggered images that reach the attacker's "
        "label; in brackets without the misclassified ones. ASR after: triggered images that reach the label and are not "
        "flagged, over all triggered images; crossed: accuracy under "
        "triggers that must not work; thresholds are set on calibration images, the FPR beside them is what they gave. "
        f"Weak attack: less than {LEAST_SUCCESS:.0%} ASR (HTBA has what it has); weak target: an accuracy below its aim ("
        + ", ".join(f"{SPECS[name].title} {least:.0%}" for name, least in LEAST_ACCURACY.items())
        + f"). {SUPERSEDED}: of a target that is made otherwise now; the cell is to be measured again. "
        "What stands behind the figures: docs/detection.md.",
        "",
        *render_matrix(poisoned),
        "",
        "## Peers: AUROC",
        "",
        "Same targets, evaluation images and calibration split; STRIP, TeCo and BaDExpert see the first 500 of each. The "
        "guard is fitted on the fit images and on changed copies of them, peers on the images alone. `latent_all` joins "
        "`meandist`, `ratio`, `lda` and `ranks`, on the guard's taps, bands and rule; `latent_all_doubt` excuses doubt as the "
        f"guard does. `msp` flags low confidence. {OLD}: by the peer as it was before it was mended (docs/detection.md); such "
        "figures are in no mean.",
        "",
        *render_legend(),
        "",
        *render_peers(poisoned, "auroc"),
        "",
        "## Peers: TPR at alpha 5 %",
        "",
        *render_peers(poisoned, "tpr_at_fpr5"),
        "",
        "## Cost",
        "",
        "Milliseconds on the machine above, in batches. Those of Diffense and of every peer with target forwards of its own "
        "include them; the peers on the guard's latents are timed without the one pass that gives the latents. What ran "
        "on another machine alone (a GPU; `detection.json` tells which) has none.",
        "",
        *render_costs(poisoned),
    ]
    parts += render_durations(rows)
    parts += render_published(rows)
    parts += render_plain(rows)
    pairs = find_pairs(rows, variants)
    parts += render_pairs(pairs)
    others = [row for row in rows if row["attack"] in MATRIX and not is_cell(row) and row not in pairs]
    parts += render_beside("Other networks, other target seeds", others)
    parts += render_turned([*rows, *variants])
    parts += render_unseen([row for row in rows if row["attack"] in UNSEEN])
    parts += render_beside("Controls", [row for row in rows if row["attack"] not in (*MATRIX, *UNSEEN)])
    parts += render_shifts(shifts)
    if variants:
        seeds = ", ".join(sorted({str(row["guard_seed"]) for row in variants}))
        parts += [
            "",
            "## Fewer clean images, other guard seeds, targets trained again",
            "",
            describe_runs(variants, seeds),
            "",
            "`another`: a target trained again under the same seed, not that of the cell above (no two trainings on a GPU, or "
            "on other processors, give the same weights). Such rows compare among themselves; they are no further seeds of "
            "the cell.",
            "",
            *render_variants(variants, rows),
        ]
    return "\n".join(parts) + "\n"


def render_summary(rows: list[Row]) -> str:
    """The README's table: each cell with the guard's closed form and the best peer, worst first."""
    poisoned = [row for row in rows if is_cell(row)]
    lines = [
        "| cell | ASR before → after (alpha 5 %) | AUROC | TPR at alpha 1 % | AUROC, closed form | best peer (AUROC) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sort_rows(poisoned):
        figures = {
            name: peer["auroc"] for name, peer in row["peers"].items() if peer["auroc"] is not None and name != CLOSED_FORM
        }
        best = max(figures, key=lambda name: figures[name], default=None)
        old = OLD if best is not None and is_outdated(row, best) else ""
        closed = find_figure(row, CLOSED_FORM, "auroc")
        lines.append(
            f"| {name_cell(row)} | {show(row['asr_before'], '.1%')} → {show(row['asr_after_fpr5'], '.1%')} "
            f"| {show(row['auroc'])} | {show(row['tpr_at_fpr1'], '.3f')} | {show(closed)} "
            f"| {'–' if best is None else f'{best} ({figures[best]:.4f}{old})'} |"
        )
    return "\n".join([*lines, "", sum_up(poisoned), "", describe_runs(poisoned)])


def sum_up(rows: list[Row]) -> str:
    """Mean and worst AUROC of the guard, its closed form and the strongest peers, and the false alarms behind the table."""
    rows = [row for row in rows if row["auroc"] is not None]
    if not rows:
        return "No cell has figures."
    found = {"Diffense": [float(row["auroc"]) for row in rows]}
    for name in SUMMED_UP:
        found[name] = [figure for row in rows if (figure := find_figure(row, name, "auroc")) is not None]
    said = "; ".join(f"{name} {mean(own):.5f}, {min(own):.4f}" for name, own in found.items() if own)
    alarms = " and ".join(
        f"{min(rates):.1%} to {max(rates):.1%} at alpha {alpha} %"
        for alpha, rates in ((1, [row["fpr_at_1"] for row in rows]), (5, [row["fpr_at_5"] for row in rows]))
    )
    return (
        f"AUROC, mean and worst of the {len(rows)} cells with figures: {said}.{compare_without_htba(rows)} "
        f"Clean images flagged: {alarms}."
    )


def compare_without_htba(rows: list[Row]) -> str:
    """Mean and worst AUROC in the cells whose attack works, beside the best peer that has them all."""
    strong = [row for row in rows if row["attack"] != "htba"]
    if not strong:
        return ""
    own = [float(row["auroc"]) for row in strong]
    said = f" In the {len(strong)} without HTBA: Diffense {mean(own):.5f}, {min(own):.4f}"
    for name in list_peers(strong):  # best mean first
        figures = [figure for row in strong if (figure := find_current(row, name, "auroc")) is not None]
        if name != CLOSED_FORM and len(figures) == len(strong):
            return f"{said}; {name} {mean(figures):.5f}, {min(figures):.4f}."
    return f"{said}."


if __name__ == "__main__":
    found = read_rows(DETECTION)
    if "--summary" in sys.argv[1:]:
        print(render_summary(found))
    else:
        (RESULTS / "detection.md").write_text(render_page(found, read_rows(VARIANTS), read_rows(SHIFT)))

"""Write benchmarks/results/detection.md from detection.json: the matrix, the peers side by side, the worst cells first.

usage: python -m benchmarks.tables [--summary]    (--summary prints the README's table instead)
"""

import sys
from collections.abc import Iterable
from statistics import mean
from typing import Final

from benchmarks.attacks import ATTACKS, MATRIX
from benchmarks.datasets import SPECS
from benchmarks.peer_figures import CLOSED_FORM
from benchmarks.peers.published import PUBLISHED
from benchmarks.records import DETECTION, SHIFT, VARIANTS, Row, read_rows
from benchmarks.settings import RESULTS

LEAST_SUCCESS: Final = 0.95  # but for hidden triggers, which have what they have
LEAST_ACCURACY: Final = {"mnist": 0.99, "cifar10": 0.91, "gtsrb": 0.96}
# Commits of which rows are left from before the guard took two draws a level (docs/decisions/0028); all others have two.
FOUR_DRAWS: Final = (
    "0caaddc", "1b30f5f", "2165ba5", "7070524", "8b3f102", "9fa3ad1", "a41cad6", "b6940aa", "f07a700", "f76da34", "f99c974",
)  # fmt: skip
SUMMED_UP: Final = (CLOSED_FORM, "latent_all_doubt")  # named beside the guard below the README's table


def sort_rows(rows: list[Row]) -> list[Row]:
    """Worst AUROC first; cells where no trigger works, and so none can be missed, last."""
    return sorted(rows, key=lambda row: 2.0 if row["auroc"] is None else row["auroc"])


def show(figure: float | None, form: str = ".4f") -> str:
    """A figure, or a dash where there is none."""
    return "–" if figure is None else format(figure, form)


def average(figures: Iterable[float | None]) -> float | None:
    """Mean of the figures that there are."""
    found = [figure for figure in figures if figure is not None]
    return sum(found) / len(found) if found else None


def is_cell(row: Row) -> bool:
    """Whether a row is one of the thirty cells: a matrix attack on the image set's usual network, target seed 0."""
    return row["attack"] in MATRIX and row["target"] == SPECS[row["dataset"]].network and row["seed"] == 0


def name_cell(row: Row) -> str:
    """Data set and attack; a stand-in is named as one, a target or attack below its aim is marked.

    ``again`` is the number of a further target of the same seed: on a GPU no two trainings give the same weights.
    """
    weak = " (weak target)" if row["clean_accuracy"] < LEAST_ACCURACY.get(row["dataset"], 0.0) else ""
    if row["attack"] not in ("htba", "none") and row["asr_before"] < LEAST_SUCCESS:
        weak += " (weak attack)"
    if row.get("again"):
        weak += ", trained again"
    return f"{SPECS[row['dataset']].title}, {ATTACKS[row['attack']].title}{weak}"


def render_matrix(rows: list[Row]) -> list[str]:
    """One line a cell."""
    lines = [
        "| cell | target | accuracy (crossed) | ASR before → after at 5 % / 1 % FPR | AUROC (right only) | TPR at 1 % / 5 % "
        "| FPR at 1 % / 5 % | network |",
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


def find_figure(row: Row, name: str, figure: str) -> float | None:
    """A peer's figure; the closed form is the guard itself where its network stayed off."""
    if name == CLOSED_FORM and name not in row["peers"]:
        return float(row[figure]) if row[figure] is not None else None
    found = row["peers"].get(name, {}).get(figure)
    return None if found is None else float(found)


def list_peers(rows: list[Row]) -> list[str]:
    """All peers that some row has, best mean AUROC first."""
    names = {name for row in rows for name in row["peers"]}
    means = {name: average(find_figure(row, name, "auroc") for row in rows) for name in names}
    return sorted(names, key=lambda name: means[name] or 0.0, reverse=True)


def render_peers(rows: list[Row], figure: str) -> list[str]:
    """Cells by peers, the guard first; then each one's mean, and the guard's on the cells that the peer has."""
    names = list_peers(rows)
    lines = ["| cell | Diffense | " + " | ".join(names) + " |", "| --- |" + " --- |" * (len(names) + 1)]
    for row in sort_rows(rows):
        found = [show(find_figure(row, name, figure)) for name in names]
        lines.append(f"| {name_cell(row)} | {show(row[figure])} | " + " | ".join(found) + " |")
    own = [row[figure] for row in rows if row[figure] is not None]
    means, beside = [], []
    for name in names:
        figures = [find_figure(row, name, figure) for row in rows]
        count = sum(f is not None for f in figures)
        means.append(show(average(figures)) + ("" if count >= len(own) else f" ({count} cells)"))
        beside.append(show(average(row[figure] for row, found in zip(rows, figures, strict=True) if found is not None)))
    return [
        *lines,
        f"| mean | {show(average(own))} | " + " | ".join(means) + " |",
        "| Diffense on the same cells | | " + " | ".join(beside) + " |",
    ]


def render_published(rows: list[Row]) -> list[str]:
    """Our peers beside the figures that others published for them."""
    lines = []
    for row in rows:
        for name, published in PUBLISHED.get((row["dataset"], row["attack"]), {}).items():
            ours = find_figure(row, name, "auroc")
            if ours is not None:
                lines.append(f"| {name_cell(row)} | {name} | {published:.2f} | {ours:.2f} |")
    if not lines:
        return []
    note = (
        "AUROC; published: the comparison of TED++ (ICDM 2025, poster) on ResNet-18, with other targets of the same attacks. "
        "IBD-PSC amplifies the last batch norms of which ResNet-18 has twenty and ours six; SCALE-UP depends on what a target "
        "calls a saturated image."
    )
    return [
        "",
        "## Peers beside their published figures",
        "",
        note,
        "",
        "| cell | peer | published | here |",
        "| --- | --- | --- | --- |",
        *lines,
    ]


def is_measured_here(row: Row, name: str) -> bool:
    """Whether a row has this peer from its own machine; older figures name none."""
    peer = row["peers"].get(name)
    return peer is not None and peer.get("machine", row["machine"]) == row["machine"]


def render_costs(rows: list[Row]) -> list[str]:
    """What scoring one image costs, mean over the cells; a peer's time counts where it ran on its row's machine."""
    lines = ["| detector | target forwards an image | ms an image | images |", "| --- | --- | --- | --- |"]
    lines.append(f"| Diffense | 1 | {show(average(row['score_ms'] for row in rows), '.2f')} | all |")
    for name in list_peers(rows):
        found = [row["peers"][name] for row in rows if name in row["peers"]]
        images = "all" if all(peer["images"] != [500, 500] for peer in found) else "500 + 500"
        forwards = average(peer["target_forwards"] for peer in found)
        milliseconds = average(row["peers"][name]["score_ms"] for row in rows if is_measured_here(row, name))
        lines.append(f"| {name} | {show(forwards, '.1f')} | {show(milliseconds, '.2f')} | {images} |")
    return lines


def render_variants(rows: list[Row], cells: list[Row]) -> list[str]:
    """Fewer clean images, other seeds of the guard, further targets; whether the target is that of the cell above."""
    of_cell = {find_network(cell): cell["target_sha256"] for cell in cells}
    lines = [
        "| cell | target's accuracy / ASR | clean images a class | guard seed | AUROC | TPR at 5 % | FPR at 5 % | network |",
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


def find_network(row: Row) -> tuple[str, str, str, int]:
    """What tells trainings apart, but for a second one of the same seed."""
    return row["dataset"], row["attack"], row["target"], row["seed"]


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


def render_shifts(rows: list[Row]) -> list[str]:
    """False-alarm rates on shifted clean images."""
    lines = [
        "| target | shift | accuracy | FPR at 1 % / 5 % |",
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


def describe_runs(rows: list[Row], guard_seeds: str = "0") -> str:
    """Commits, target seeds and machines of the rows."""
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    seeds = ", ".join(sorted({str(row["seed"]) for row in rows}))
    return f"Target seed {seeds}, guard seed {guard_seeds}, commit {commits}, {machines}."


def describe_draws(rows: list[Row]) -> str:
    """How many draws a level the guards of the rows have."""
    two = ", ".join(sorted(name_cell(row) for row in rows if row["commit"].rstrip("+") not in FOUR_DRAWS))
    return "Guards have four draws a level" + (f"; two: {two}" if two else "") + " (docs/decisions/0028)."


def render_page(rows: list[Row], variants: list[Row], shifts: list[Row]) -> str:
    """The whole page."""
    poisoned = [row for row in rows if is_cell(row)]
    cells = len(SPECS) * len(MATRIX)
    parts = [
        "# Detection",
        "",
        "Written by `python -m benchmarks.tables` from `detection.json`. " + describe_runs(poisoned),
        "",
        describe_draws(poisoned),
        "",
        f"{len({(r['dataset'], r['attack']) for r in poisoned})} of {cells} cells are recorded. "
        "AUROC: all clean evaluation images, misclassified ones too, against the triggered images that reach the attacker's "
        "label; in brackets without the misclassified ones. ASR after: triggered images that reach the label and are not "
        "flagged, over all triggered images; crossed: accuracy under "
        "triggers that must not work; thresholds are set on calibration images, the FPR beside them is what they gave. "
        f"Weak attack: less than {LEAST_SUCCESS:.0%} ASR (HTBA has what it has); weak target: an accuracy below its aim ("
        + ", ".join(f"{SPECS[name].title} {least:.0%}" for name, least in LEAST_ACCURACY.items())
        + "). What stands behind the figures: docs/detection.md.",
        "",
        *render_matrix(poisoned),
        "",
        "## Peers: AUROC",
        "",
        "Same targets, evaluation images and calibration split; STRIP, TeCo and BaDExpert see the first 500 of each. The "
        "guard is fitted on the fit images and on changed copies of them, peers on the images alone. `latent_all` joins "
        "every peer without a network on the guard's taps, bands and rule; `latent_all_doubt` excuses doubt as the guard "
        "does. `msp` flags low confidence. The figures of `rmd`, and of `ibdpsc` on the sets up to 32 x 32, are of code "
        "that has been mended since: docs/detection.md.",
        "",
        *render_peers(poisoned, "auroc"),
        "",
        "## Peers: TPR at 5 % FPR",
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
    parts += render_published(poisoned)
    others = [row for row in rows if row["attack"] in MATRIX and not is_cell(row)]
    parts += render_beside("Other networks, other target seeds", others)
    parts += render_turned([*rows, *variants])
    parts += render_beside("Controls", [row for row in rows if row["attack"] not in MATRIX])
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
        "| cell | ASR before → after (5 % FPR) | AUROC | TPR at 1 % FPR | AUROC, closed form | best peer (AUROC) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in sort_rows(poisoned):
        figures = {
            name: peer["auroc"] for name, peer in row["peers"].items() if peer["auroc"] is not None and name != CLOSED_FORM
        }
        best = max(figures, key=lambda name: figures[name], default=None)
        closed = find_figure(row, CLOSED_FORM, "auroc")
        lines.append(
            f"| {name_cell(row)} | {show(row['asr_before'], '.1%')} → {show(row['asr_after_fpr5'], '.1%')} "
            f"| {show(row['auroc'])} | {show(row['tpr_at_fpr1'], '.3f')} | {show(closed)} "
            f"| {'–' if best is None else f'{best} ({figures[best]:.4f})'} |"
        )
    return "\n".join([*lines, "", sum_up(poisoned), "", describe_runs(poisoned)])


def sum_up(rows: list[Row]) -> str:
    """Mean and worst AUROC of the guard, its closed form and the strongest peer, over the cells with figures."""
    rows = [row for row in rows if row["auroc"] is not None]
    found = {"Diffense": [float(row["auroc"]) for row in rows]}
    for name in SUMMED_UP:
        found[name] = [figure for row in rows if (figure := find_figure(row, name, "auroc")) is not None]
    plain = [float(row["auroc"]) for row in rows if row["attack"] != "htba"]
    said = "; ".join(f"{name} {mean(own):.5f}, {min(own):.4f}" for name, own in found.items() if own)
    beside = f" Diffense in the {len(plain)} without HTBA: {mean(plain):.5f}, {min(plain):.4f}." if plain else ""
    return f"AUROC, mean and worst of the {len(rows)} cells with figures: {said}.{beside}"


if __name__ == "__main__":
    found = read_rows(DETECTION)
    if "--summary" in sys.argv[1:]:
        print(render_summary(found))
    else:
        (RESULTS / "detection.md").write_text(render_page(found, read_rows(VARIANTS), read_rows(SHIFT)))

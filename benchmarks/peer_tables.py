"""The peers side by side: their figures, their cost, and what others published for them."""

import inspect
from typing import Final

from benchmarks.attacks import MATRIX
from benchmarks.datasets import SPECS
from benchmarks.figures import (
    average,
    describe_runs,
    find_current,
    find_figure,
    is_cell,
    list_peers,
    name_cell,
    show,
    sort_rows,
)
from benchmarks.peer_figures import is_outdated
from benchmarks.peers import PEERS, make_peer
from benchmarks.peers.published import PUBLISHED
from benchmarks.records import Row

PLAIN: Final = "narrow_resnet18"
OLD: Final = "†"  # behind what an older revision of a peer gave


def render_legend() -> list[str]:
    """What each peer is called and where it comes from."""
    lines = ["| key | peer | from |", "| --- | --- | --- |"]
    for name, make in PEERS.items():
        source = (inspect.getdoc(make) or "").split("\n\n")[0].replace("\n", " ").replace("`ScaleUp`", "SCALE-UP")
        lines.append(f"| `{name}` | {make_peer(name).title} | {source} |")
    return lines


def render_peers(rows: list[Row], figure: str) -> list[str]:
    """Cells by peers, the guard first; then each one's mean, and the guard's on the cells that the peer has.

    What an older revision of a peer gave is marked and counts for nothing.
    """
    names = list_peers(rows)
    lines = ["| cell | Diffense | " + " | ".join(names) + " |", "| --- |" + " --- |" * (len(names) + 1)]
    for row in sort_rows(rows):
        found = [show(find_figure(row, name, figure)) + (OLD if is_outdated(row, name) else "") for name in names]
        lines.append(f"| {name_cell(row)} | {show(row[figure])} | " + " | ".join(found) + " |")
    own = [row[figure] for row in rows if row[figure] is not None]
    means, beside = [], []
    for name in names:
        figures = [find_current(row, name, figure) for row in rows]
        count = sum(f is not None for f in figures)
        means.append(show(average(figures)) + ("" if count >= len(own) else f" ({count} cells)"))
        beside.append(show(average(row[figure] for row, found in zip(rows, figures, strict=True) if found is not None)))
    return [
        *lines,
        f"| mean | {show(average(own))} | " + " | ".join(means) + " |",
        "| Diffense on the same cells | | " + " | ".join(beside) + " |",
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
        found = [row["peers"][name] for row in rows if name in row["peers"] and not is_outdated(row, name)]
        images = "all" if all(peer["images"] != [500, 500] for peer in found) else "500 + 500"
        forwards = average(peer["target_forwards"] for peer in found)
        milliseconds = average(
            row["peers"][name]["score_ms"] for row in rows if is_measured_here(row, name) and not is_outdated(row, name)
        )
        lines.append(f"| {name} | {show(forwards, '.1f')} | {show(milliseconds, '.2f')} | {images} |")
    return lines


def render_published(rows: list[Row]) -> list[str]:
    """Our peers beside the figures that others published for them, on each cell's target and on the plainly trained one."""
    lines = []
    for key, figures in PUBLISHED.items():
        pair = [row for row in rows if (row["dataset"], row["attack"]) == key]
        cells, plain = [row for row in pair if is_cell(row)], [row for row in pair if is_plain(row)]
        for name, published in figures.items():
            here, there = (average(find_current(row, name, "auroc") for row in side) for side in (cells, plain))
            if cells and (here, there) != (None, None):
                lines.append(
                    f"| {name_cell(cells[0])} | {name} | {published:.2f} | {show(here, '.2f')} | {show(there, '.2f')} |"
                )
    if not lines:
        return []
    note = (
        "AUROC; published: the comparison of TED++ (ICDM 2025, poster) on ResNet-18, with other targets of the same attacks. "
        "IBD-PSC amplifies the last batch norms, of which the usual targets have six, ResNet-18 and the narrow one twenty; "
        "SCALE-UP depends on what a target calls a saturated image."
    )
    head = ["| cell | peer | published | here | here, narrow ResNet-18 |", "| --- | --- | --- | --- | --- |"]
    return ["", "## Peers beside their published figures", "", note, "", *head, *lines]


def find_pairs(rows: list[Row], variants: list[Row]) -> list[Row]:
    """The rows of hidden triggers for each pair of classes, where a data set has several.

    The first pair is of the clean network that the others alter where its target was trained again, else of the matrix.
    """
    found: dict[tuple[str, int], Row] = {}
    for row in [*rows, *(row for row in variants if row.get("again"))]:
        if row["attack"] == "htba" and row["target"] == SPECS[row["dataset"]].network:
            found[row["dataset"], row["seed"]] = row
    several = {dataset for dataset, seed in found if seed > 0}
    return [found[key] for key in sorted(found) if key[0] in several]


def render_pairs(pairs: list[Row]) -> list[str]:
    """Hidden triggers pair by pair, and the means of the guard and of the peers that have all pairs of a data set."""
    if not pairs:
        return []
    names = list_peers(pairs)
    lines = ["| cell | pair | accuracy | reach the label | turned | AUROC | AUROC of those turned |", "| --- |" + " --- |" * 6]
    for row in pairs:
        reach = round(row["asr_before"] * row["n_triggered"])
        lines.append(
            f"| {name_cell(row)} | {row['seed']} | {show(row['clean_accuracy'])} | {reach} of {row['n_triggered']} "
            f"| {row.get('n_turned', '–')} | {show(row['auroc'])} | {show(row.get('auroc_turned'))} |"
        )
    means = ["| data set | pairs | Diffense | " + " | ".join(names) + " |", "| --- |" + " --- |" * (len(names) + 2)]
    for dataset in sorted({row["dataset"] for row in pairs}):
        same = [row for row in pairs if row["dataset"] == dataset]
        figures = [show(average(row["auroc"] for row in same))]
        for name in names:
            found = [find_current(row, name, "auroc") for row in same]
            figures.append(show(None if None in found else average(found)))
        means.append(f"| {SPECS[dataset].title} | {len(same)} | " + " | ".join(figures) + " |")
    note = (
        "The attack's paper takes the mean over ten pairs of a source and a target class. A seed draws the pair, the patch and "
        "the poisons; the clean network whose last layer is trained anew is the same."
    )
    return [
        "",
        "## Hidden triggers, pair by pair",
        "",
        describe_runs(pairs),
        "",
        note,
        "",
        *lines,
        "",
        "Mean AUROC:",
        "",
        *means,
    ]


def render_plain(rows: list[Row]) -> list[str]:
    """The peers on targets that are trained as the literature on backdoors does."""
    plain = [row for row in rows if is_plain(row)]
    if not plain:
        return []
    note = (
        "A ResNet-18 a quarter as wide (`narrow_resnet18`), trained by SGD with hard labels: no label smoothing, no Muon, "
        "twenty batch norms. Do peers that read confidence, or batch norms, do better there than on the targets above?"
    )
    return [
        "",
        "## Peers on plainly trained targets: AUROC",
        "",
        describe_runs(plain),
        "",
        note,
        "",
        *render_peers(plain, "auroc"),
    ]


def is_plain(row: Row) -> bool:
    """Whether a row's target is the plainly trained one, under an attack of the matrix."""
    return row["target"] == PLAIN and row["attack"] in MATRIX

"""The peers side by side: their figures, their cost, and what others published for them."""

from typing import Final

from benchmarks.attacks import MATRIX
from benchmarks.figures import average, describe_runs, find_figure, is_cell, list_peers, name_cell, show, sort_rows
from benchmarks.peers.published import PUBLISHED
from benchmarks.records import Row

PLAIN: Final = "narrow_resnet18"


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


def render_published(rows: list[Row]) -> list[str]:
    """Our peers beside the figures that others published for them, on each cell's target and on the plainly trained one."""
    lines = []
    for key, figures in PUBLISHED.items():
        pair = [row for row in rows if (row["dataset"], row["attack"]) == key]
        cells, plain = [row for row in pair if is_cell(row)], [row for row in pair if is_plain(row)]
        for name, published in figures.items():
            here, there = (average(find_figure(row, name, "auroc") for row in side) for side in (cells, plain))
            if cells and here is not None:
                lines.append(f"| {name_cell(cells[0])} | {name} | {published:.2f} | {here:.2f} | {show(there, '.2f')} |")
    if not lines:
        return []
    note = (
        "AUROC; published: the comparison of TED++ (ICDM 2025, poster) on ResNet-18, with other targets of the same attacks. "
        "IBD-PSC amplifies the last batch norms, of which the usual targets have six, ResNet-18 and the narrow one twenty; "
        "SCALE-UP depends on what a target calls a saturated image."
    )
    head = ["| cell | peer | published | here | here, narrow ResNet-18 |", "| --- | --- | --- | --- | --- |"]
    return ["", "## Peers beside their published figures", "", note, "", *head, *lines]


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

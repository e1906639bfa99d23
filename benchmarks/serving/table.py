"""Write benchmarks/results/serving.md and serving.png from serving.json.

usage: python -m benchmarks.serving.table [--summary]    (--summary prints the README's table instead)
"""

import sys
from typing import Final

from matplotlib.figure import Figure

from benchmarks.plots import CLEAN, TRIGGERED, make_panels, write_figure
from benchmarks.records import SERVING, Row, read_rows
from benchmarks.settings import RESULTS

HEAD: Final = (
    "target", "placement", "loop", "asked", "protocol", "batch", "under way", "shm", "p50 ms", "guarded", "p99 ms", "guarded",
    "images/s", "guarded", "p50 ratio", "throughput ratio",
)  # fmt: skip
FIGURES: Final = ("p50_ms", "p99_ms", "throughput")
STAND_IN: Final = (
    "Measured on the server of nvidia-pytriton, whose ONNX backend is a stand-in written in Python, one process a model: "
    "the milliseconds are an upper bound for the container's C++ backend, the ratios hold for this stand-in."
)


def render_row(row: Row) -> str:
    """One line of the table."""
    pairs = [(row["unguarded"][name], row["guarded"][name]) for name in FIGURES]
    cells = [
        row["target"],
        row["placement"],
        row["loop"],
        "gateway" if row["gateway"] else "ensemble",
        row["protocol"],
        str(row["batch"]),
        str(row["concurrency"]),
        "on" if row["shared_memory"] else "off",
        *(f"{value:.4g}" for pair in pairs for value in pair),
        f"{row['p50_ratio']:.2f}",
        f"{row['throughput_ratio']:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


def render_page(rows: list[Row]) -> str:
    """The whole page."""
    made = "; ".join(sorted({f"{row['machine']}, {row['tool']}, commit {row['commit']}" for row in rows}))
    rounds = ", ".join(sorted({f"{row['rounds']} rounds of {row['seconds']:g} s" for row in rows}))
    lines = [
        "# Serving: guarded beside unguarded",
        "",
        "Written by `python -m benchmarks.serving.table` from `serving.json`; measured by `python -m benchmarks.serving`.",
        f"{made}; {rounds}, medians.",
        "",
        f"{STAND_IN} Weights are random and the guard's network is on, the costlier of the two guards that a user may get.",
        "",
        *render_table(rows),
    ]
    return "\n".join(lines) + "\n"


def render_table(rows: list[Row]) -> list[str]:
    """Rows as they are sorted in the file."""
    return ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|", *map(render_row, rows)]


def pick_summary(rows: list[Row]) -> list[Row]:
    """What the README shows: gRPC without shared memory, one request of 1 and of 8 images under way."""
    wanted = [(1, 1), (8, 1)]
    return [
        row
        for row in rows
        if row["protocol"] == "grpc"
        and not row["shared_memory"]
        and not row["gateway"]
        and (row["batch"], row["concurrency"]) in wanted
    ]


def draw_ratios(rows: list[Row]) -> Figure | None:
    """Throughput that is left and latency that is added, a bar an export, one panel a target."""
    found = pick_summary(rows)
    targets = sorted({row["target"] for row in found})
    if not targets:
        return None
    figure, panels = make_panels(1, len(targets))
    for panel, target in zip(panels[0], targets, strict=True):
        own = [row for row in found if row["target"] == target]
        names = [f"{row['placement']} {row['loop']}\nbatch {row['batch']}" for row in own]
        places = range(len(own))
        panel.barh([p + 0.2 for p in places], [row["p50_ratio"] for row in own], 0.4, label="p50", color=TRIGGERED)
        panel.barh([p - 0.2 for p in places], [row["throughput_ratio"] for row in own], 0.4, label="throughput", color=CLEAN)
        panel.axvline(1.0, color="black", linewidth=0.6)
        panel.set_yticks(list(places), names, fontsize=5)
        panel.set_title(target, fontsize=8)
        panel.legend(fontsize=6)
    return figure


def main() -> None:
    """Write the page and the plot, or print the README's table."""
    rows = read_rows(SERVING)
    if "--summary" in sys.argv[1:]:
        print("\n".join(render_table(pick_summary(rows))))
        return
    (RESULTS / "serving.md").write_text(render_page(rows))
    figure = draw_ratios(rows)
    if figure is not None:
        write_figure(figure, RESULTS / "serving.png")


if __name__ == "__main__":
    main()

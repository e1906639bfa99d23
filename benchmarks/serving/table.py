"""Write benchmarks/results/serving.md and its plots from serving.json.

usage: python -m benchmarks.serving.table [--summary]    (--summary prints the README's tables instead)
"""

import sys
from typing import Any, Final

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.plots import CLEAN, TRIGGERED, make_panels, write_figure
from benchmarks.records import FLOOR, MEMORY, OVERLOAD, PEERS_COST, REPEATS, SERVING, STREAM, TIMELINE, Row, read_rows
from benchmarks.serving import floor, memory, overload, peers_cost, repeats, streaming, timeline
from benchmarks.settings import RESULTS

HEAD: Final = (
    "target", "placement", "loop", "asked", "accelerator", "protocol", "batch", "under way", "shm", "tool", "p50 ms", "guarded",
    "p99 ms", "guarded", "images/s", "guarded", "p50 ratio", "throughput ratio", "processor",
)  # fmt: skip
SHORT: Final = (
    "target", "placement", "loop", "batch 1: p50 ms", "ratio", "throughput ratio", "batch 8: p50 ms", "ratio",
    "throughput ratio",
)  # fmt: skip
COLOURS: Final = dict(
    zip(
        timeline.STEPS,
        ("#3b6ea5", "#4a8c5f", "#8a5fa8", "#c8553d", "#d9a441", "#8c8c8c", "#bdbdbd", "#e2e2e2"),
        strict=True,
    )
)
SCENARIO: Final = (
    "target", "placement", "loop", "gateway", "accelerator", "protocol", "batch", "concurrency", "shared_memory", "backend",
    "machine",
)  # fmt: skip
FIGURES: Final = ("p50_ms", "p99_ms", "throughput")
BACKEND: Final = (
    "Measured on the server of nvidia-pytriton with Triton's own C++ onnxruntime backend, compiled by "
    "`benchmarks/serving/get_onnxruntime_backend.sh`."
)
STAND_IN: Final = (
    "The same server with its stand-in for that backend, written in Python, one process a model, as `diffense serve` runs it "
    "where none is compiled: dearer than the C++ backend in most rows, not in all."
)
NO_GPU: Final = "no GPU"


def render_row(row: Row) -> str:
    """One line of the table."""
    pairs = [(row["unguarded"][name], row["guarded"][name]) for name in FIGURES]
    cells = [
        row["target"],
        row["placement"],
        row["loop"],
        "gateway" if row["gateway"] else "ensemble",
        row["accelerator"],
        row["protocol"],
        str(row["batch"]),
        str(row["concurrency"]),
        "on" if row["shared_memory"] else "off",
        row["tool"],
        *(f"{value:.4g}" for pair in pairs for value in pair),
        f"{row['p50_ratio']:.2f}",
        f"{row['throughput_ratio']:.2f}",
        row["machine"].split(",")[0],
    ]
    return "| " + " | ".join(cells) + " |"


def list_commits(rows: list[Row]) -> str:
    """The machines, backends and commits that rows are of."""
    places = {(row["machine"], f"{row['backend']} backend, " if "backend" in row else "", row["commit"]) for row in rows}
    return "; ".join(f"{machine}, {backend}commit {commit}" for machine, backend, commit in sorted(places))


def render_page(rows: list[Row]) -> str:
    """The whole page."""
    served, floors = keep_tool(keep_backend(rows)), read_rows(FLOOR)
    lines = [
        "# Serving: guarded beside unguarded",
        "",
        "Written by `python -m benchmarks.serving.table` from `serving.json`; measured by `python -m benchmarks.serving`.",
        "Weights are random and the guard's network is on, the costlier of the two guards that a user may get. On a CPU with",
        "`--seconds 3` and `--perf-analyzer`, the backend chosen by `DIFFENSE_ONNXRUNTIME_BACKEND`, rows of the gateway with",
        "`--gateway`; on a GPU with `--accelerator cuda --rounds 2 --seconds 1.5` (one of its exports with `none`).",
        "",
        *render_part("On a CPU", BACKEND, pick_backend(rows, "C++")),
        *render_part("On a GPU", BACKEND, [row for row in rows if NO_GPU not in row["machine"] and row["backend"] == "C++"]),
        *render_part("With the stand-in", STAND_IN, pick_backend(rows, "stand-in")),
        "## Over the floor",
        "",
        "Written by `python -m benchmarks.serving.floor`: the same graphs, one after the other in one onnxruntime process. The",
        "scoring of `whole` and `direct` is inside another graph: a guard has nothing to be compared with, or there is none.",
        "MB: all weights read once, all activations written once, before any fusion. A row's floor is of its own machine.",
        "",
        f"{list_commits([row for _, row in floor.match_rows(floors, served)])}.",
        "",
        *floor.render_table(floors, served),
        "",
        "## Two load generators",
        "",
        "perf_analyzer and the built-in one of `diffense bench`, one after the other on the same commit and machine: without",
        "`--perf-analyzer` `python -m benchmarks.serving` takes the second. They differ by as much as one of them from run to",
        "run, some 10 %.",
        "",
        *render_tools(rows),
        "",
        "## Where the time goes",
        "",
        "Written by `python -m benchmarks.serving.timeline`: mean milliseconds of a request in the server, by tracing. Each",
        "moment has one owner, the innermost model at work. Production is the tapped graph with `shared`, and the scoring is",
        "inside it with `whole` and `direct`. [As bars](serving_time.png).",
        "",
        f"{list_commits(read_rows(TIMELINE))}.",
        "",
        *timeline.render_table(read_rows(TIMELINE)),
        "",
        "## What the peers cost",
        "",
        "Written by `python -m benchmarks.serving.peers_cost`: batches of 8, the guard in onnxruntime (shared placement), the",
        "peers on torch, each divided by a prediction of its own runtime; what the prediction itself gives is not counted.",
        "",
        *peers_cost.render_table(read_rows(PEERS_COST)),
        "",
        "## The stream",
        "",
        "Written by `python -m benchmarks.serving.streaming`: one request under way, the project's own client for both.",
        f"{list_commits(read_rows(STREAM))}.",
        "",
        *streaming.render_table(read_rows(STREAM)),
        "",
        "## Images seen before",
        "",
        "Written by `python -m benchmarks.serving.repeats`: single images, one under way, a server with a response cache.",
        f"{list_commits(read_rows(REPEATS))}.",
        "",
        *repeats.render_table(read_rows(REPEATS)),
        "",
        "## Overload",
        "",
        "Written by `python -m benchmarks.serving.overload`: single images, offered at multiples of what 32 clients get.",
        f"{list_commits(read_rows(OVERLOAD))}.",
        "",
        *overload.render_table(read_rows(OVERLOAD)),
        "",
        "## Memory",
        "",
        "Written by `python -m benchmarks.serving.memory`: resident memory of the server and its processes.",
        "",
        *map(memory.describe, read_rows(MEMORY)),
    ]
    return "\n".join(lines) + "\n"


def render_table(rows: list[Row]) -> list[str]:
    """Rows as they are sorted in the file."""
    return ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|", *map(render_row, rows)]


def render_part(title: str, introduction: str, rows: list[Row]) -> list[str]:
    """A section of rows of one backend, and what they are of; nothing without rows."""
    if not rows:
        return []
    rounds = ", ".join(sorted({f"{row['rounds']} rounds of {row['seconds']:g} s" for row in rows}))
    made = f"{list_commits(rows)}; {rounds}, medians; a ratio is the median of the rounds' ratios."
    return [f"## {title}", "", introduction, made, "", *render_table(rows), ""]


def pick_backend(rows: list[Row], backend: str) -> list[Row]:
    """The rows of a server without a GPU that runs its graphs on that backend."""
    return [row for row in rows if row["backend"] == backend and NO_GPU in row["machine"]]


def keep_backend(rows: list[Row]) -> list[Row]:
    """The rows of the C++ backend on a CPU, those of the stand-in where there are none."""
    return pick_backend(rows, "C++") or pick_backend(rows, "stand-in")


def render_tools(rows: list[Row]) -> list[str]:
    """What both tools say of the same scenario, where both were run on one commit and machine."""
    other = {(*find_scenario(row), row["commit"]): row for row in rows if row["tool"] == "builtin"}
    lines = [
        "| target | placement | loop | batch | under way | plain p50, ms: perf_analyzer | built-in | guarded | built-in "
        "| p50 ratio | built-in | throughput ratio | built-in | backend, commit |",
        "| --- |" + " --- |" * 13,
    ]
    for row in rows:
        twin = other.get((*find_scenario(row), row["commit"]))
        if row["tool"] == "builtin" or twin is None:
            continue
        named = [row["target"], row["placement"], row["loop"], str(row["batch"]), str(row["concurrency"])]
        times = [f"{one[part]['p50_ms']:.4g}" for part in ("unguarded", "guarded") for one in (row, twin)]
        ratios = [f"{one[ratio]:.2f}" for ratio in ("p50_ratio", "throughput_ratio") for one in (row, twin)]
        lines.append("| " + " | ".join([*named, *times, *ratios, f"{row['backend']}, {row['commit']}"]) + " |")
    return lines


def find_scenario(row: Row) -> tuple[Any, ...]:
    """What was measured and where, but for the tool."""
    return tuple(row[name] for name in SCENARIO)


def keep_tool(rows: list[Row]) -> list[Row]:
    """The rows of perf_analyzer where it measured anything."""
    tool = "perf_analyzer" if any(row["tool"] == "perf_analyzer" for row in rows) else "builtin"
    return [row for row in rows if row["tool"] == tool]


def pick_summary(rows: list[Row]) -> list[Row]:
    """What the README and the plots show: gRPC without shared memory, one request of 1 and of 8 images under way."""
    wanted = [(1, 1), (8, 1)]
    return [
        row
        for row in keep_tool(keep_backend(rows))
        if row["protocol"] == "grpc"
        and not row["shared_memory"]
        and not row["gateway"]
        and (row["batch"], row["concurrency"]) in wanted
    ]


def render_summary(rows: list[Row]) -> list[str]:
    """A line an export: one image and eight images a request, guarded beside unguarded."""
    found: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in pick_summary(rows):
        found.setdefault((row["target"], row["placement"], row["loop"]), {})[row["batch"]] = row
    lines = ["| " + " | ".join(SHORT) + " |", "| --- " * len(SHORT) + "|"]
    for key, pair in found.items():
        cells = [*key]
        for batch in (1, 8):
            if batch in pair:
                row = pair[batch]
                cells += [f"{row['unguarded']['p50_ms']:.1f} → {row['guarded']['p50_ms']:.1f}"]
                cells += [f"{row[name]:.2f}" for name in ("p50_ratio", "throughput_ratio")]
            else:
                cells += ["–"] * 3
        lines.append("| " + " | ".join(cells) + " |")
    return lines


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


def draw_times(rows: list[Row]) -> Figure | None:
    """Where a request's time goes: a stacked bar an export, one panel a target and batch."""
    keys = sorted({(row["target"], row["batch"]) for row in rows})
    if not keys:
        return None
    figure, panels = make_panels(1, len(keys))
    for panel, (target, batch) in zip(panels[0], keys, strict=True):
        own = [row for row in rows if (row["target"], row["batch"]) == (target, batch)]
        for place, row in enumerate(own):
            start = 0.0
            for step, colour in COLOURS.items():
                panel.barh(place, row["steps_ms"][step], 0.6, left=start, color=colour)
                start += row["steps_ms"][step]
        panel.set_yticks(range(len(own)), [f"{row['placement']} {row['loop']}" for row in own], fontsize=5)
        panel.set(xlabel="ms a request")
        panel.set_title(f"{target}, batch {batch}", fontsize=8)
    handles = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    figure.legend(handles=handles, fontsize=6, ncols=len(handles), loc="outside lower center")
    return figure


def main() -> None:
    """Write the page and the plot, or print the README's table."""
    rows = read_rows(SERVING)
    if "--summary" in sys.argv[1:]:
        print("\n".join(render_summary(rows)))
        return
    (RESULTS / "serving.md").write_text(render_page(rows))
    for name, figure in (("serving.png", draw_ratios(rows)), ("serving_time.png", draw_times(read_rows(TIMELINE)))):
        if figure is not None:
            write_figure(figure, RESULTS / name)


if __name__ == "__main__":
    main()

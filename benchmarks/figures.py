"""Reading rows of `detection.json`: which cell one is, what it is called, a figure of it, where it was measured."""

from collections.abc import Iterable
from typing import Final

from benchmarks.attacks import ATTACKS, MATRIX
from benchmarks.datasets import SPECS
from benchmarks.peer_figures import CLOSED_FORM, is_outdated
from benchmarks.records import Row
from benchmarks.targets import Cell

LEAST_SUCCESS: Final = 0.95  # but for hidden triggers, which have what they have
SUPERSEDED: Final = "‡"  # behind a cell whose target is not made like that any more
LEAST_ACCURACY: Final = {"mnist": 0.99, "cifar10": 0.91, "gtsrb": 0.96}


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


def is_superseded(row: Row) -> bool:
    """Whether a row's target was made by another recipe than its cell's now: a split or an attack has changed since."""
    return bool(row.get("recipe") != Cell(row["dataset"], row["attack"], row["target"], row["seed"]).recipe_hash)


def name_cell(row: Row) -> str:
    """Data set and attack; a stand-in is named as one, a target or attack below its aim or superseded is marked.

    ``again`` is the number of a further target of the same seed: on a GPU no two trainings give the same weights.
    """
    weak = " (weak target)" if row["clean_accuracy"] < LEAST_ACCURACY.get(row["dataset"], 0.0) else ""
    if row["attack"] not in ("htba", "none") and row["asr_before"] < LEAST_SUCCESS:
        weak += " (weak attack)"
    if row.get("again"):
        weak += ", trained again"
    weak += SUPERSEDED if is_superseded(row) else ""
    return f"{SPECS[row['dataset']].title}, {ATTACKS[row['attack']].title}{weak}"


def find_figure(row: Row, name: str, figure: str) -> float | None:
    """A peer's figure; the closed form is the guard itself where its network stayed off."""
    if name == CLOSED_FORM and name not in row["peers"]:
        return float(row[figure]) if row[figure] is not None else None
    found = row["peers"].get(name, {}).get(figure)
    return None if found is None else float(found)


def find_current(row: Row, name: str, figure: str) -> float | None:
    """As `find_figure`, but nothing that an older revision of the peer gave."""
    return None if is_outdated(row, name) else find_figure(row, name, figure)


def list_peers(rows: list[Row]) -> list[str]:
    """All peers that some row has, best mean AUROC first."""
    names = {name for row in rows for name in row["peers"]}
    means = {name: average(find_current(row, name, "auroc") for row in rows) for name in names}
    return sorted(names, key=lambda name: means[name] or 0.0, reverse=True)


def find_network(row: Row) -> tuple[str, str, str, int]:
    """What tells trainings apart, but for a second one of the same seed."""
    return row["dataset"], row["attack"], row["target"], row["seed"]


def describe_runs(rows: list[Row], guard_seeds: str = "0") -> str:
    """Commits, target seeds and machines of the rows."""
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    machines = "; ".join(sorted({row["machine"] for row in rows}))
    seeds = ", ".join(sorted({str(row["seed"]) for row in rows}))
    return f"Target seed {seeds}, guard seed {guard_seeds}, commit {commits}, {machines}."


def describe_guards(rows: list[Row]) -> str:
    """Which guards with a network are of an older method; nothing of it touches those without."""
    older = sorted(name_cell(row) for row in rows if row["network"]["used"] and row["network"].get("left_out") is None)
    usual = (
        "Guards take two draws a level, and their network, where they have one, learns from all but the strangest hundredth of "
        "the clean images"
    )
    return usual + (f"; of all in {'; '.join(older)}" if older else "") + " (docs/decisions/0028, 0033)."

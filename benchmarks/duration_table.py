"""How long the matrix takes: training, guard and peers of the cells whose rows tell, and all thirty at these means."""

from dataclasses import dataclass
from statistics import mean

from benchmarks.attacks import ATTACKS, MATRIX
from benchmarks.datasets import SPECS
from benchmarks.figures import is_cell
from benchmarks.peers import PEERS, make_peer
from benchmarks.records import Row


@dataclass(frozen=True)
class Duration:
    """Mean seconds of an image set's cells.

    Attributes:
        cells: how many tell.
        training: of a target whose trigger is not learned on the way; the others take `Attack.stretch` times as long.
        guard: fit and evaluation.
        cheap: peers that `make matrix` runs.
        expensive: the others.
    """

    cells: int
    training: float
    guard: float
    cheap: float
    expensive: float

    def sum_up(self, expensive: bool) -> float:
        """Seconds of all cells of the image set."""
        peers = self.cheap + (self.expensive if expensive else 0.0)
        return sum(ATTACKS[attack].stretch * self.training + self.guard + peers for attack in MATRIX)


def measure_durations(rows: list[Row]) -> dict[str, Duration]:
    """Mean durations of each image set that has a cell whose row tells those of all peers."""
    found = {}
    for dataset in SPECS:
        told = [row for row in rows if is_cell(row) and row["dataset"] == dataset and tells_all(row)]
        if told:
            found[dataset] = Duration(
                cells=len(told),
                training=mean(row["train_s"] / ATTACKS[row["attack"]].stretch for row in told),
                guard=mean(row["cell_s"] for row in told),
                cheap=mean(sum_peers(row, cheap=True) for row in told),
                expensive=mean(sum_peers(row, cheap=False) for row in told),
            )
    return found


def tells_all(row: Row) -> bool:
    """Whether a row tells how long its training took and each of its peers; one that is not defined there takes none."""
    peers = [row["peers"].get(name, {}) for name in PEERS]
    return row.get("train_s") is not None and all("took_s" in peer or "reason" in peer for peer in peers)


def sum_peers(row: Row, cheap: bool) -> float:
    """Seconds of a row's cheap peers, or of its others."""
    return sum(float(row["peers"][name].get("took_s", 0.0)) for name in PEERS if make_peer(name).cheap == cheap)


def render_durations(rows: list[Row]) -> list[str]:
    """A section: minutes a cell, and hours of the matrix where every image set has a cell that tells."""
    found = measure_durations(rows)
    if not found:
        return []
    lines = ["| data set | cells that tell | training | guard | cheap peers | the others |", "| --- |" + " --- |" * 5]
    for dataset, d in found.items():
        minutes = " | ".join(f"{seconds / 60:.1f}" for seconds in (d.training, d.guard, d.cheap, d.expensive))
        lines.append(f"| {SPECS[dataset].title} | {d.cells} | {minutes} |")
    note = (
        "Minutes a cell on one core while another job has the other; training of IDBA, which learns its trigger on the way, "
        f"is counted {ATTACKS['idba'].stretch:g} times."
    )
    if len(found) == len(SPECS):
        cheap, every = (sum(d.sum_up(expensive) for d in found.values()) / 3600 for expensive in (False, True))
        note += (
            f" At these means the thirty cells take {cheap:.0f} hours of one core with the cheap peers (`make matrix`) and "
            f"{every:.0f} with all, on two cores half of that."
        )
    return ["", "## How long it takes", "", note, "", *lines]

"""How long the matrix takes: training, guard and peers of the cells whose rows tell, and all thirty at these means."""

from dataclasses import dataclass
from statistics import mean

from benchmarks.attacks import ATTACKS, MATRIX
from benchmarks.datasets import SPECS
from benchmarks.figures import average, is_cell
from benchmarks.peers import PEERS, make_peer
from benchmarks.records import Row


@dataclass(frozen=True)
class Duration:
    """Mean seconds of an image set's cells.

    Attributes:
        cells: how many tell how long their training took.
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
    """Mean durations of each image set whose rows tell them: of a training, the guard, and every peer in some row at least."""
    found = {}
    for dataset in SPECS:
        cells = [row for row in rows if is_cell(row) and row["dataset"] == dataset]
        # A network that is altered afterwards tells the time of its training where it was not in the cache alone.
        told = [row for row in cells if row.get("train_s") is not None and ATTACKS[row["attack"]].poisons]
        peers = {name: average(find_seconds(row, name) for row in cells) for name in PEERS}
        if told and None not in peers.values():
            found[dataset] = Duration(
                cells=len(told),
                training=mean(row["train_s"] / ATTACKS[row["attack"]].stretch for row in told),
                guard=mean(row["cell_s"] for row in told),
                cheap=sum(seconds or 0.0 for name, seconds in peers.items() if make_peer(name).cheap),
                expensive=sum(seconds or 0.0 for name, seconds in peers.items() if not make_peer(name).cheap),
            )
    return found


def find_seconds(row: Row, name: str) -> float | None:
    """Seconds that a peer took in a row, where it tells; one that is not defined for its target takes none."""
    peer = row["peers"].get(name, {})
    return 0.0 if "reason" in peer else peer.get("took_s")


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

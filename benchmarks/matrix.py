"""Fill the matrix: evaluate the cells that have no result yet, one at a time, resumable.

usage: python -m benchmarks.matrix [--datasets mnist,gtsrb] [--peers none|cheap|all|NAMES] [--again]
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.attacks import find_attack
from benchmarks.datasets import find_spec
from benchmarks.evaluation import evaluate_cell
from benchmarks.figures import is_superseded
from benchmarks.peer_figures import is_outdated
from benchmarks.peers import PEERS, make_peer
from benchmarks.records import DETECTION, read_rows, write_detection
from benchmarks.targets import Cell, list_cells
from diffense.errors import DiffenseError


def choose_peers(text: str) -> list[str]:
    """``none``, ``cheap``, ``all`` or names separated by commas -> keys of `PEERS`.

    Raises:
        OptionError: an unknown name.
    """
    if text == "none":
        return []
    if text in ("cheap", "all"):
        return [name for name in PEERS if text == "all" or make_peer(name).cheap]
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        make_peer(name)
    return names


def find_missing(cells: Sequence[Cell], peers: Sequence[str]) -> list[tuple[Cell, list[str]]]:
    """Cells without a result on a target as made now, or without one of these peers as it is now, and the peers each lacks."""
    done = {
        (r["dataset"], r["attack"], r["target"], r["seed"]): {name for name in r["peers"] if not is_outdated(r, name)}
        for r in read_rows(DETECTION)
        if not is_superseded(r)
    }
    missing = []
    for cell in cells:
        key = (cell.dataset, cell.attack, cell.network, cell.seed)
        lacking = [peer for peer in peers if peer not in done.get(key, set())]
        if key not in done or lacking:
            missing.append((cell, lacking))
    return missing


def run_matrix(cells: Sequence[Cell], peers: Sequence[str], again: bool) -> None:
    """Evaluate what is missing and write each row as soon as it is there."""
    jobs = [(cell, list(peers)) for cell in cells] if again else find_missing(cells, peers)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("matrix", total=len(jobs))
        for cell, wanted in jobs:
            progress.update(task, description=cell.name)
            write_detection(evaluate_cell(cell, peers=wanted, progress=progress.console.print))
            progress.advance(task)


def main(arguments: Sequence[str]) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--datasets", help="comma-separated; all by default")
    parser.add_argument("--attacks", help="comma-separated; all by default")
    parser.add_argument("--peers", default="cheap", help="none, cheap, all, or names")
    parser.add_argument("--again", action="store_true", help="also the cells that have a result")
    options = parser.parse_args(arguments)
    try:
        datasets = {find_spec(name).name for name in options.datasets.split(",")} if options.datasets else None
        attacks = {find_attack(name).key for name in options.attacks.split(",")} if options.attacks else None
        cells = [
            cell
            for cell in list_cells()
            if (datasets is None or cell.dataset in datasets) and (attacks is None or cell.attack in attacks)
        ]
        run_matrix(cells, choose_peers(options.peers), options.again)
    except DiffenseError as error:
        sys.exit(f"matrix: {error}")
    except KeyboardInterrupt:
        sys.exit("matrix: interrupted; what is finished is kept, run it again to go on")


if __name__ == "__main__":
    main(sys.argv[1:])

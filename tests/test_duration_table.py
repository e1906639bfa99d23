from typing import Any

import pytest

from benchmarks.attacks import ATTACKS, MATRIX
from benchmarks.datasets import SPECS
from benchmarks.duration_table import measure_durations, render_durations
from benchmarks.peers import PEERS, make_peer

CHEAP = [name for name in PEERS if make_peer(name).cheap]


def make_row(dataset: str, attack: str, **changes: Any) -> dict[str, Any]:
    row = {
        "dataset": dataset,
        "attack": attack,
        "target": SPECS[dataset].network,
        "seed": 0,
        "train_s": 100.0 * ATTACKS[attack].stretch,
        "cell_s": 10.0,
        "peers": {name: {"took_s": 1.0 if name in CHEAP else 50.0} for name in PEERS},
    }
    return row | changes


def test_trainings_that_take_longer_are_counted_so_and_expensive_peers_apart() -> None:
    found = measure_durations([make_row("mnist", "idba"), make_row("mnist", "badnets", cell_s=30.0)])["mnist"]
    assert (found.cells, found.training, found.guard) == (2, 100.0, 20.0)
    assert (found.cheap, found.expensive) == (len(CHEAP), 50.0 * (len(PEERS) - len(CHEAP)))
    epochs = sum(ATTACKS[attack].stretch for attack in MATRIX)
    assert found.sum_up(False) == pytest.approx(100 * epochs + len(MATRIX) * (20 + len(CHEAP)))
    assert found.sum_up(True) - found.sum_up(False) == pytest.approx(len(MATRIX) * found.expensive)


def test_rows_that_do_not_tell_everything_are_left_out() -> None:
    untimed = make_row("mnist", "wanet")
    untimed["peers"]["strip"] = {}
    other = make_row("mnist", "wanet", target="convnext")
    assert not measure_durations([untimed, other]) and not measure_durations([make_row("mnist", "htba")])
    assert render_durations([untimed]) == []
    untrained = make_row("mnist", "badnets", train_s=None, cell_s=99.0)
    found = measure_durations([untimed, other, untrained])["mnist"]
    assert (found.cells, found.guard, found.expensive) == (1, 10.0, 50.0 * (len(PEERS) - len(CHEAP)))


def test_a_peer_that_is_not_defined_for_a_target_takes_no_time() -> None:
    row = make_row("gtsrb", "wanet")
    row["peers"]["ibdpsc"] = {"reason": "no batch norm"}
    assert measure_durations([row])["gtsrb"].cheap == len(CHEAP) - 1


def test_the_whole_matrix_is_summed_up_only_where_every_set_tells() -> None:
    rows = [make_row(dataset, "badnets") for dataset in SPECS]
    part, whole = ("\n".join(render_durations(found)) for found in (rows[1:], rows))
    assert "thirty cells" not in part
    seconds = len(SPECS) * measure_durations(rows)["mnist"].sum_up(False)
    assert f"thirty cells take {seconds / 3600:.0f} hours of one core" in whole

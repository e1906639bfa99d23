"""Latent peers that fit on the guard's copies too."""

import numpy as np
import pytest

from bench_world import set_up
from benchmarks import copied, records, targets
from benchmarks.evaluation import fit_cell, prepare_cell
from benchmarks.inspection import view_images

pytestmark = pytest.mark.usefixtures("float32")


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        set_up(patch, tmp_path_factory.mktemp("bench"))
        yield


def test_copies_stand_behind_their_originals_as_the_guard_counts_them(bench):
    found = prepare_cell(targets.make_cell("mnist", "none"), None, print)
    guard = fit_cell(found, None, 0, print)
    views = view_images(guard, found.clean, found.evaluation.pixels, found.triggered)
    joined, source = copied.add_copies(guard, views.fit)
    count = len(views.labels)
    assert len(joined.images) == len(source) == count + guard.manifest.clean.copies and guard.manifest.clean.copies > 0
    assert np.array_equal(source[:count], np.arange(count)) and joined.source is source
    assert np.array_equal(joined.latents[:count], views.fit.latents)
    assert np.array_equal(joined.predicted, joined.predicted[source]), "a copy that lost its label"
    assert (joined.images[count:] != joined.images[source[count:]]).any(axis=(1, 2, 3)).mean() > 0.9


def test_a_cell_has_two_figures_a_peer_and_its_line(bench, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(copied, "COPIED", tmp_path / "copied.json")
    monkeypatch.setattr(copied, "PEERS", ("ratio", "knn"))
    copied.main(["--cells", "mnist-badnets"])
    (row,) = records.read_rows(tmp_path / "copied.json")
    assert row["copies"] > 0 and all(0 <= row["peers"]["knn"][how] <= 1 for how in ("originals", "copies too"))
    line = capsys.readouterr().out.splitlines()[-2]
    assert line.startswith(f"| mnist, badnets | {row['auroc']:.4f} | {row['peers']['ratio']['originals']:.4f} → ")
    copied.main([])
    assert line in capsys.readouterr().out

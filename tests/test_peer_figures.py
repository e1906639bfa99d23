"""How the peers of a row are fitted and calibrated."""

import numpy as np
import pytest

from benchmarks import peer_figures, targets
from benchmarks.evaluation import evaluate_cell

pytestmark = pytest.mark.usefixtures("float32")


def test_where_the_guard_calibrates_by_folds_so_do_the_peers(bench, monkeypatch):
    fitted: list[int] = []

    class Unseen:
        """Scores 1 what it was not fitted on, else 0."""

        name, title, cheap = "unseen", "Unseen", True

        def fit(self, model, clean, labels):
            assert len(labels) == len(clean.images)
            self.seen = {image.tobytes() for image in clean.images}
            fitted.append(len(labels))

        def score(self, model, inspected):
            return np.array([float(image.tobytes() not in self.seen) for image in inspected.images])

    monkeypatch.setattr(peer_figures, "make_peer", lambda name: Unseen())
    monkeypatch.setitem(peer_figures.REVISIONS, "unseen", 0)
    row = evaluate_cell(targets.make_cell("mnist", "badnets"), clean_per_class=20, peers=["unseen"])
    assert row["n_clean_fit"] == row["n_clean_calibration"] == 80
    assert fitted == [72] * 10 + [80], "ten fits without a tenth, and one of all"
    # Every calibration score is 1, of an image that its fit has not seen, as that of an evaluation image is.
    assert row["peers"]["unseen"]["fpr_at_5"] == 0.0 and row["peers"]["unseen"]["auroc"] == 0.5
    fitted.clear()
    monkeypatch.setattr(Unseen, "cheap", False)
    row = evaluate_cell(targets.make_cell("mnist", "badnets"), clean_per_class=20, peers=["unseen"])
    assert fitted == [48], "three fifths, once, where a fit is expensive"

"""The pictures: what is kept of the scores, and that each picture is drawn from what there is."""

import numpy as np
import pytest

from benchmarks import plots
from benchmarks.metrics import BINS, FALSE_ALARMS, count_scores, trace_curve

ROW = {
    "dataset": "gtsrb",
    "attack": "wanet",
    "auroc": 0.99,
    "guard_seed": 0,
    "clean_per_class": 5,
    "curve": [0.5] * len(FALSE_ALARMS),
    "histogram": {"edges": [0.0, 2.0], "clean": [9] * BINS, "triggered": [1] * BINS},
    "variant": "level 0.3",
}


def test_the_curve_by_hand():
    clean, triggered = np.arange(1000.0), np.array([999.5, 998.0, 990.5, 0.0])
    curve = dict(zip(FALSE_ALARMS, trace_curve(clean, triggered), strict=True))
    assert curve[0.0] == 0.25  # above every clean score
    assert curve[0.002] == 0.5  # two of a thousand clean scores may be above
    assert curve[0.01] == curve[0.5] == 0.75
    assert trace_curve(clean, np.zeros(0)) is None


def test_histograms_count_everyone_once():
    generator = np.random.default_rng(0)
    clean, triggered = generator.standard_normal(500), generator.standard_normal(90) * 100
    found = count_scores(clean, triggered)
    assert sum(found["clean"]) == 500 and sum(found["triggered"]) == 90
    assert count_scores(clean, np.zeros(0))["triggered"] == [0] * BINS


@pytest.mark.parametrize("draw", [plots.draw_rocs, plots.draw_histograms, plots.draw_images, plots.draw_settings])
def test_pictures_are_drawn_the_same_twice_and_not_from_nothing(draw, tmp_path):
    assert draw([]) is None
    for name in ("a.png", "b.png"):
        plots.write_figure(draw([ROW, ROW | {"attack": "idba", "variant": "10 steps"}]), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_variant_names_say_level_and_steps():
    assert [plots.read_level(v) for v in ("default", "level 0.3", "levels 1, 2, 4")] == [2.0, 0.3, None]
    assert [plots.read_steps(v) for v in ("default", "10 steps", "level 4")] == [1.0, 10.0, None]

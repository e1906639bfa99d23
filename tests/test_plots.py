"""The pictures: what is kept of the scores, and that each picture is drawn from what there is."""

import numpy as np
import pytest

from benchmarks import plots
from benchmarks.metrics import BINS, FALSE_ALARMS, count_scores, trace_curve
from diffense.settings import FitSettings

ROW = {
    "dataset": "gtsrb",
    "attack": "wanet",
    "auroc": 0.99,
    "guard_seed": 0,
    "seed": 0,
    "clean_per_class": 5,
    "target_sha256": "a",
    "clean_accuracy": 0.98,
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
    assert [plots.read_level(v) for v in ("default", "level 0.3", "levels 1, 2, 4")] == [0.7, 0.3, None]
    assert [plots.read_steps(v) for v in ("default", "10 steps", "level 4")] == [1.0, 10.0, None]


def test_the_default_stands_at_its_own_level(monkeypatch):
    monkeypatch.setattr(plots, "DEFAULTS", FitSettings(sigmas=(1.5,), steps=3))
    assert plots.read_level("default") == 1.5 and plots.read_steps("default") == 3.0
    monkeypatch.setattr(plots, "DEFAULTS", FitSettings(sigmas=(0.5, 1.0)))
    assert plots.read_level("default") is None


def test_a_line_of_settings_is_of_one_target_seed_and_the_mean_of_guard_seeds():
    rows = [ROW, ROW | {"guard_seed": 1, "auroc": 0.97}, ROW | {"seed": 1, "auroc": 0.9}, ROW | {"variant": "default"}]
    assert plots.gather_lines(rows, plots.read_level) == {
        ("gtsrb", "wanet", 0): [(0.3, pytest.approx(0.98)), (0.7, 0.99)],
        ("gtsrb", "wanet", 1): [(0.3, 0.9)],
    }


def test_places_of_settings_are_labelled_and_nothing_between_them():
    figure = plots.draw_settings([ROW, ROW | {"variant": "default"}, ROW | {"variant": "10 steps"}])
    levels, steps = figure.axes
    assert [label.get_text() for label in levels.get_xticklabels()] == ["0.3", "0.7"]
    assert [label.get_text() for label in steps.get_xticklabels()] == ["1", "10"]
    assert not len(levels.get_xticks(minor=True)) and not len(steps.get_xticks(minor=True))


def test_few_and_all_images_are_joined_where_the_target_is_the_same():
    whole = ROW | {"clean_per_class": None, "auroc": 0.999}
    rows = [whole | {"target_sha256": "b", "clean_accuracy": 0.9}, ROW | {"guard_seed": 1, "auroc": 0.95}, whole, ROW]
    found = plots.gather_images(rows)
    assert found == {
        ("gtsrb", "wanet", "a", 0.98): {5: [0.95, 0.99], None: [0.999]},
        ("gtsrb", "wanet", "b", 0.9): {None: [0.999]},
    }
    assert [list(points) for points in found.values()] == [[5, None], [None]]  # all images last
    (panel,) = plots.draw_images([*rows, whole | {"attack": "idba"}]).axes
    assert [label.get_text() for label in panel.get_xticklabels()] == ["5", "all"]
    assert len(panel.containers) == 2  # idba has no row of few images
    (low, high) = panel.containers[0].lines[2][0].get_segments()[0]
    assert low == pytest.approx((0, 0.95)) and high == pytest.approx((0, 0.99))

"""Few clean images: all are fitted on, and all calibrate by fits without them."""

import numpy as np
import pytest
from numpy.typing import NDArray
from threadpoolctl import threadpool_info

import shapes
from diffense.bundle import recalibrate
from diffense.clean import FEW_COPIES, FEW_IMAGES, CleanSet
from diffense.crosscalibration import score_crossed
from diffense.description import describe_guard
from diffense.errors import TooFewImagesError
from diffense.fit import default_preprocessing, fit_guard
from diffense.preparation import prepare_clean
from diffense.settings import FitSettings
from diffense.target import Target


def make_set(originals: int, copies: int, classes: int, rng: np.random.Generator) -> CleanSet:
    source = np.tile(np.arange(originals), 1 + copies)
    return CleanSet(np.eye(classes)[source % classes], [np.stack([source, rng.random(len(source))], 1)], source, originals)


@pytest.mark.parametrize(("originals", "copies"), [(23, 0), (40, 3), (5, 1)])
def test_no_image_is_scored_by_a_fit_that_has_seen_it_or_a_copy_of_it(originals, copies):
    clean = make_set(originals, copies, 4, np.random.default_rng(0))
    parts = []

    def fit(part: CleanSet):
        assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {1}
        seen = set(part.pooled[0][:, 0].astype(int))
        assert len(part.source) == len(seen) * (1 + copies)
        parts.append(seen)

        def score(logits: NDArray[np.float64], pooled: list[NDArray[np.float64]]) -> NDArray[np.float32]:
            images = pooled[0][:, 0].astype(int)
            assert not seen & set(images) and len(logits) == len(images)
            return images.astype(np.float32)

        return score

    told: list[tuple[int, int]] = []
    scores = score_crossed(clean, fit, np.random.default_rng(1), lambda *step: told.append(step))
    assert np.array_equal(scores, np.arange(originals)), "each score stands at its own image"
    assert set.union(*parts) == set(range(originals))
    assert told == [(done, 10) for done in (*range(len(parts)), 10)]


@pytest.fixture(scope="module")
def few_guard(small_target, tmp_path_factory):
    images = shapes.draw_shapes(120, seed=3)[0]
    notes: list[str] = []
    out = tmp_path_factory.mktemp("few") / "g"
    return (
        fit_guard(Target.open(small_target), images, out, settings=FitSettings(alpha=0.05), notify=notes.append),
        images,
        notes,
    )


def test_few_images_are_all_fitted_on_and_all_calibrate(few_guard):
    guard, images, notes = few_guard
    report = guard.manifest.clean
    assert report.given == report.fitted == report.calibrated == guard.manifest.calibration_size == len(images) < FEW_IMAGES
    assert guard.manifest.false_alarm_interval[0] == 0.0 < 0.05 < guard.manifest.false_alarm_interval[1]
    assert any("each scored by a fit without it" in note for note in notes)
    assert "120 calibrate, the same ones by folds" in describe_guard(guard.directory).facts()["clean images"]


def test_their_calibration_scores_are_not_those_of_images_that_were_fitted_on(few_guard):
    guard, images, _ = few_guard
    own, crossed = np.sort(guard.score(images).scores), guard.scorer.calibration
    assert np.array_equal(crossed, np.sort(crossed)) and len(crossed) == len(images)
    assert np.quantile(own, 0.9) < np.quantile(crossed, 0.9)


@pytest.mark.parametrize(("count", "few"), [(FEW_IMAGES - 1, True), (FEW_IMAGES, False)])
def test_only_few_images_are_all_fitted_on_and_copied_six_times(small_target, count, few):
    target = Target.open(small_target)
    shape = shapes.draw_shapes(1, seed=0)[0].shape[1:]
    even = np.random.default_rng(0).integers(0, 256, (count, 1, 1, shape[2]), np.uint8)  # no mirror or shift changes these
    images = np.broadcast_to(even, (count, *shape))
    taps, preprocessing = target.choose_taps(None), default_preprocessing(target)
    prepared = prepare_clean(target, images, taps, preprocessing, 0.05, "auto", 0, lambda message: None)
    assert prepared.crossed == few
    assert len(prepared.clean.source) == len(prepared.fit_rows) * (1 + (FEW_COPIES if few else 1))
    assert len(prepared.fit_rows) == (count if few else count - len(prepared.calibration_rows))


def test_where_a_split_cannot_reach_alpha_all_are_fitted_on_too(small_target):
    target = Target.open(small_target)
    taps, preprocessing = target.choose_taps(None), default_preprocessing(target)
    images = shapes.draw_shapes(FEW_IMAGES, seed=6)[0]
    prepared = prepare_clean(target, images, taps, preprocessing, 0.005, "auto", 0, lambda message: None)
    assert prepared.crossed and len(prepared.fit_rows) == FEW_IMAGES
    assert prepared.clean.originals == FEW_IMAGES
    assert len(prepared.clean.source) <= 2 * FEW_IMAGES, "one copy each, as where a split is left"


def test_alpha_needs_no_more_images_than_calibrate(small_target):
    target = Target.open(small_target)
    taps, preprocessing = target.choose_taps(None), default_preprocessing(target)

    def prepare(count: int):
        images = shapes.draw_shapes(count, seed=6)[0]
        return prepare_clean(target, images, taps, preprocessing, 0.01, "auto", 0, lambda message: None)

    assert len(prepare(99).calibration_rows) == 99
    with pytest.raises(TooFewImagesError, match="needs 99 calibration images, there are 98"):
        prepare(98)


def test_false_alarms_on_fresh_images_stay_near_alpha(few_guard):
    guard, _, _ = few_guard
    fresh = shapes.draw_shapes(1500, seed=4)[0]
    assert guard.score(fresh).flagged.mean() < 2 * 0.05


def test_calibrating_with_fresh_images_gives_the_lower_bound_of_a_split_back(few_guard, guard, tmp_path):
    fresh = recalibrate(few_guard[0], shapes.draw_shapes(200, seed=5)[0], 0.05, tmp_path / "g")
    for split in (fresh, guard):
        low, high = split.manifest.false_alarm_interval
        assert 0 < low < split.manifest.alpha < high


def test_only_the_images_of_the_fit_are_called_the_same_ones(few_guard, tmp_path):
    guard, images, _ = few_guard
    fresh = recalibrate(guard, shapes.draw_shapes(len(images), seed=5)[0], 0.05, tmp_path / "g")
    assert guard.manifest.crossed and not fresh.manifest.crossed
    assert "120 calibrate" in (told := describe_guard(fresh.directory).facts()["clean images"])
    assert "by folds" not in told

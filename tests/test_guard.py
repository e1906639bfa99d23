import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, kstest

import onnx_models
from diffense.bundle import recalibrate
from diffense.errors import (
    ImageError,
    TooFewImagesError,
    WrongTargetError,
)
from diffense.fit import fit_guard
from diffense.guard import Guard
from diffense.names import MANIFEST_FILE
from diffense.rule import name_groups, share_score
from diffense.settings import FitSettings
from diffense.target import Target
from shapes import draw_shapes, fit_shape_classifier


def test_verdicts_unpack_to_three_arrays(guard, fresh):
    scores, p_values, flagged = guard.score(fresh[:5])
    assert (scores.dtype, p_values.dtype, flagged.dtype) == (np.float32, np.float64, np.uint8)
    assert scores.shape == p_values.shape == flagged.shape == (5,)
    assert np.array_equal(flagged == 1, p_values <= guard.manifest.alpha)


def test_no_images_give_no_verdicts(guard, fresh):
    assert all(len(column) == 0 for column in guard.score(fresh[:0]))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 63), min_size=1, max_size=40), st.integers(1, 40))
def test_a_score_depends_on_its_image_alone(guard, fresh, rows, cut):
    alone = np.concatenate([guard.score(fresh[i : i + 1]).scores for i in rows])
    together = guard.score(fresh[rows]).scores
    split = np.concatenate([guard.score(fresh[rows[:cut]]).scores, guard.score(fresh[rows[cut:]]).scores])
    np.testing.assert_allclose(together, alone, rtol=2e-5)
    np.testing.assert_allclose(split, alone, rtol=2e-5)


def test_clean_p_values_are_uniform(guard, fresh):
    p_values = guard.score(fresh).p_values
    # n calibration scores make the p-values of one guard uniform up to their own sampling error, so both samples count.
    n, m = guard.manifest.calibration_size, len(fresh)
    statistic = kstest(p_values, "uniform").statistic
    assert statistic < 1.95 * np.sqrt(1 / n + 1 / m)  # 0.1 % point of the two-sample KS statistic
    k = int(0.02 * (n + 1))
    assert guard.score(fresh).flagged.sum() <= binom.ppf(0.9999, m, 0.02) + m * 3 * np.sqrt(k) / (n + 1)


def test_images_unlike_any_clean_one_are_flagged(guard, fresh):
    foreign = np.random.default_rng(0).integers(0, 256, fresh[:200].shape, np.uint8)
    assert guard.score(foreign).flagged.mean() > 0.95


def test_the_same_inputs_and_seed_give_the_same_bytes(small_target, clean_images, tmp_path):
    settings_ = FitSettings(alpha=0.05, network="on", training_steps=50, seed=3)
    for name in ("a", "b"):
        fit_guard(Target.open(small_target), clean_images[:300], tmp_path / name, settings=settings_)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert Guard.load(tmp_path / "a").guard_id == Guard.load(tmp_path / "b").guard_id


def test_the_bundle_survives_a_move(guard, bundle, fresh):
    assert np.array_equal(Guard.load(bundle).score(fresh[:8]).scores, guard.score(fresh[:8]).scores)


def test_explain_names_the_evidence_behind_the_score(guard, fresh):
    explanation = guard.explain(fresh[3])
    scores, p_values, _ = guard.score(fresh[3:4])
    assert explanation.score == pytest.approx(float(scores[0]), rel=2e-5)
    assert explanation.p_value == pytest.approx(float(p_values[0]))
    assert explanation.tap in {tap.name for tap in guard.manifest.taps}
    found = {
        ([t.name for t in guard.manifest.taps].index(row.tap), row.kind, row.band, row.level): row.surprise
        for row in explanation.rows
    }
    surprises = np.array([[found[e.tap, e.kind, e.band, e.level] for e in guard.scorer.evidence]])
    shares = share_score(guard.scorer.rule, surprises, np)[0]
    assert explanation.score == pytest.approx(shares.sum(), rel=1e-5)
    names = [guard.manifest.taps[tap].name for _, tap in name_groups(guard.scorer.evidence)]
    totals = {name: sum(share for share, n in zip(shares, names, strict=True) if n == name) for name in names}
    assert totals[explanation.tap] == max(totals.values())
    assert list(explanation.rows) == sorted(explanation.rows, key=lambda row: -row.surprise)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 16, 16, 3), np.float32), np.zeros((2, 8, 8, 3), np.uint8), np.zeros((16, 16), np.uint8)]
)
def test_images_of_the_wrong_kind_are_refused(guard, images):
    with pytest.raises(ImageError):
        guard.score(images)


def test_another_target_is_refused_by_name(guard, small_target, tmp_path):
    Guard.load(guard.directory, small_target)
    other = onnx_models.save(onnx_models.plain_cnn(), tmp_path / "other.onnx")
    with pytest.raises(WrongTargetError, match=r"other\.onnx"):
        Guard.load(guard.directory, other)


def test_recalibration_keeps_the_scores_and_moves_the_threshold(guard, fresh, tmp_path):
    renewed = recalibrate(guard, fresh[:999], 0.1, tmp_path / "renewed")
    assert np.array_equal(renewed.score(fresh[:50]).scores, guard.score(fresh[:50]).scores)
    assert renewed.manifest.calibration_size == 999
    assert renewed.score(fresh[:999]).flagged.mean() == pytest.approx(0.1, abs=0.002)
    assert renewed.guard_id != guard.guard_id


def test_recalibration_refuses_an_alpha_out_of_reach_and_leaves_the_guard_alone(guard, bundle, fresh):
    before = (bundle / MANIFEST_FILE).read_bytes()
    with pytest.raises(TooFewImagesError, match="999"):
        recalibrate(Guard.load(bundle), fresh[:50], 0.001, bundle)
    assert (bundle / MANIFEST_FILE).read_bytes() == before
    assert [path.name for path in bundle.parent.iterdir()] == ["guard"]


def test_shared_placement_was_compared_at_fit_time(guard):
    assert guard.manifest.shared_same_labels
    assert guard.manifest.shared_exact or guard.manifest.shared_max_difference <= 1e-5


def test_the_classifier_of_the_fixture_is_credible(small_target, fresh, guard):
    kinds = draw_shapes(2000, seed=7)[1]
    assert (guard.score_all(fresh).labels == kinds).mean() > 0.65
    assert fit_shape_classifier().SerializeToString() == small_target.read_bytes()

"""Fitting on whitened taps: invariances, folds, what the network is given, calibrated verdicts."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from diffense import learning, scorer_fit
from diffense.clean import CleanSet
from diffense.learning import train_denoiser
from diffense.scorer import Scorer
from diffense.scorer_fit import fit_scorer
from diffense.settings import FitSettings, ignore_progress
from diffense.surprise import find_surprise
from diffense.tapping import whiten, whiten_by
from latent_sets import draw_rows


def fit_and_score(pooled: list[NDArray[Any]], logits: NDArray[Any], rows: int, kind: Any = "label") -> tuple[Any, Any, Scorer]:
    """Whiten and fit a guard without network on the first rows; evidence and scores of the rest."""
    clean = CleanSet(logits[:rows], [p[:rows] for p in pooled], np.arange(rows), rows)
    whitenings, latents = whiten(clean, kind, False)
    sigmas, generator = np.full((1, len(pooled)), 0.3), np.random.default_rng(0)
    scorer = fit_scorer(clean, latents, kind, False, sigmas, FitSettings(network="off"), generator, ignore_progress)[1]
    width = latents.shape[1] // len(pooled)
    fresh = np.zeros((len(logits) - rows, len(pooled), width))
    for tap, (p, w) in enumerate(zip(pooled, whitenings, strict=True)):
        fresh[:, tap, : w.directions.shape[1]] = (p[rows:] - w.mean) @ w.directions
    evidence = scorer.measure(logits[rows:], fresh.reshape(len(fresh), -1), None)
    return evidence, scorer.weigh(evidence), scorer


def fit_pooled(rows: int, options: FitSettings) -> Any:
    """Whiten and fit on that many made-up images, under these settings."""
    pooled, logits = draw_pooled(rows)
    clean = CleanSet(logits, pooled, np.arange(rows), rows)
    latents, generator = whiten(clean, "label", False)[1], np.random.default_rng(0)
    return fit_scorer(clean, latents, "label", False, np.full((1, 2), 0.3), options, generator, ignore_progress)


def draw_pooled(rows: int) -> tuple[list[NDArray[np.float64]], NDArray[np.float64]]:
    latents, logits = draw_rows(rows, 3, 2, 7, seed=0)
    return [np.exp(0.4 * latents[:, :7]), latents[:, 7:] @ np.diag(np.linspace(0.1, 9, 7))], logits


POOLED, LOGITS = draw_pooled(260)
PLAIN = {kind: fit_and_score(POOLED, LOGITS, 200, kind) for kind in ("label", "logits")}


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0, 1]), st.sampled_from(["label", "logits"]), st.floats(0.01, 100))
def test_the_score_is_unchanged_by_an_orthogonal_map_of_a_taps_features(seed: int, tap: int, kind: str, unit: float) -> None:
    turned = list(POOLED)
    turn = stats.ortho_group.rvs(7, random_state=seed) * unit  # turned or mirrored, moved, and in another unit
    turned[tap] = POOLED[tap] @ turn + np.random.default_rng(seed).normal(size=7)
    evidence, scores, _ = fit_and_score(turned, LOGITS, 200, kind)
    np.testing.assert_allclose(evidence, PLAIN[kind][0], atol=1e-5)
    np.testing.assert_allclose(scores, PLAIN[kind][1], rtol=1e-4, atol=1e-5)


def draw_wide(rows: int, seed: int) -> tuple[list[NDArray[np.float64]], NDArray[np.float64]]:
    """Two taps of 200 features about class means, many more than there are rows to fit on."""
    latents, logits = draw_rows(rows, 3, 2, 200, seed)
    return [latents[:, :200] * np.geomspace(3, 0.3, 200), latents[:, 200:]], logits


@pytest.mark.parametrize("kind", ["label", "logits"])
def test_fresh_images_are_as_surprising_as_the_few_that_were_fitted_on(kind: Any) -> None:
    few, (fresh, fresh_logits) = 90, draw_wide(600, seed=1)
    pooled, logits = draw_wide(few, seed=0)
    joined = [np.concatenate(pair) for pair in zip(pooled, fresh, strict=True)]
    evidence, _, scorer = fit_and_score(joined, np.concatenate([logits, fresh_logits]), few, kind)
    strange = [column for column, e in enumerate(scorer.evidence) if e.kind == "strangeness"]
    surprise = find_surprise(scorer.rule.pieces, evidence, np)[:, strange]
    # A tenth of fresh images should exceed what a tenth of the clean ones does; whitened with these, one in 200 would.
    assert 0.05 < np.mean(surprise >= -np.log(0.1)) < 0.25


def test_rows_left_out_of_a_whitening_have_no_part_in_it() -> None:
    pooled, logits = draw_wide(60, seed=0)
    clean = CleanSet(logits, pooled, np.arange(60), 60)
    kept = np.arange(60) % 5 != 0
    found = whiten_by(clean, kept, [11, 7], 11, "label", False)
    assert found.shape == (60, 22) and not found[:, 18:].any() and found[:, 17].any()
    changed = CleanSet(logits, [np.where(kept[:, None], p, 9.0 * p) for p in pooled], np.arange(60), 60)
    again = whiten_by(changed, kept, [11, 7], 11, "label", False)
    np.testing.assert_array_equal(again[kept], found[kept])
    assert np.abs(again[~kept] - found[~kept]).max() > 1


@pytest.mark.parametrize("size", [1e-18, 5e-16, 1e-15, 1e-12])
def test_a_wide_tap_of_rounding_noise_keeps_its_place_in_every_fold(size: float) -> None:
    noise = np.random.default_rng(0).normal(size=(260, 40)) * size
    _, scores, scorer = fit_and_score([POOLED[0], noise], LOGITS, 200)
    assert np.isfinite(scores).all()
    assert scorer.used[: len(scorer.used) // 2].sum() == 7  # the tap beside it has all its directions


@pytest.mark.parametrize(
    ("rows", "network", "again"), [(399, "off", True), (399, "auto", True), (399, "on", False), (400, "off", False)]
)
def test_folds_are_whitened_again_where_no_network_can_be_learned(
    rows: int, network: Any, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def stop(clean: Any, whole: Any, generator: Any, rewhiten: Any) -> Any:
        given.append(rewhiten)
        raise KeyboardInterrupt

    monkeypatch.setattr(scorer_fit, "cross_fit", stop)
    with pytest.raises(KeyboardInterrupt):
        fit_pooled(rows, FitSettings(network=network))
    assert (given[0] is not None) == again


def test_the_network_is_told_what_not_to_learn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    taught = []

    def train(rows: Any, *others: Any) -> Any:
        taught.append(len(rows.innovation))
        return train_denoiser(rows, *others)

    monkeypatch.setattr(learning, "train_denoiser", train)
    options = FitSettings(network="on", training_steps=50)
    report = fit_pooled(400, options)[3]
    monkeypatch.setattr(scorer_fit, "STRANGEST", 0.0)
    all_learned = fit_pooled(400, options)[3]
    assert (report.left_out, all_learned.left_out) == (4, 0)
    assert all_learned.gaussian_loss == report.gaussian_loss  # all held-out rows judge
    assert taught[1] == 320 and 316 <= taught[0] < 320  # four fifths, without those of the four that are among them


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_tap_that_never_moves_does_not_spoil_the_others(place: int) -> None:
    pooled = list(POOLED)
    pooled.insert(place, np.full((260, 5), 0.3))
    evidence, scores, scorer = fit_and_score(pooled, LOGITS, 200)
    assert np.isfinite(evidence).all() and np.isfinite(scores).all()
    strange = [column for column, e in enumerate(scorer.evidence) if e.kind == "strangeness"]
    kept = [column for column, e in enumerate(PLAIN["label"][2].evidence) if e.kind == "strangeness"]
    np.testing.assert_allclose(evidence[:, strange], PLAIN["label"][0][:, kept], atol=0.2)  # shrinkage sees more zeros


def test_p_values_of_unseen_clean_latents_are_uniform_and_strange_ones_are_flagged() -> None:
    pooled, logits = draw_pooled(3400)
    _, scores, scorer = fit_and_score(pooled, logits, 400)
    strange = [p.copy() for p in pooled]
    strange[1][400:] = np.roll(pooled[1][400:], 1, axis=0)  # the deeper tap of an input of another class
    _, strange_scores, _ = fit_and_score(strange, logits, 400)
    calibrated = replace(scorer, calibration=np.sort(scores[:1500]), alpha=0.02)
    p, flagged = calibrated.judge(scores[1500:])
    assert stats.kstest(p, "uniform").statistic < 1.63 * np.sqrt(1 / 1500 + 1 / 1500)  # 1 % level of two samples
    assert flagged.mean() == pytest.approx(0.02, abs=0.012)
    assert np.array_equal(flagged == 1, scores[1500:] > calibrated.threshold)
    assert calibrated.judge(strange_scores)[1].mean() > 0.5

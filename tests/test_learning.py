from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffense.crossfit import GAIN, LatentSet, cross_fit, learn_network, measure_reference
from diffense.denoiser import CONSTANTS, denoise, init_weights
from diffense.errors import OptionError
from diffense.learning import CHECK_EVERY, Innovations, Learned, train_denoiser
from diffense.sampling import draw_noise, lay_ladder
from diffense.scorer_fit import STRANGEST, choose_typical
from diffense.scoring import Formula, lay_bands, list_evidence, list_parts
from diffense.settings import FitSettings, ignore_progress
from latent_sets import draw_rows, make_set

TAPS, WIDTH, CLASSES = 2, 4, 4
SIZE = TAPS * WIDTH
SIGMAS = np.array([[0.5, 0.5]])
ALL = np.ones(SIZE, bool)


def draw_innovations(rows: int, seed: int, spread: float) -> Innovations:
    """Unit variance over all; the label's own standard deviation is a multiple exp(+-spread) of it."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, rows)
    deviation = np.exp(np.where(labels % 2, spread, -spread)) / np.sqrt(np.cosh(2 * spread))
    u = rng.normal(size=(rows, SIZE)) * deviation[:, None]
    return Innovations(*(np.asarray(a, np.float32) for a in (u, np.eye(CLASSES)[labels])))


def train(spread: float, steps: int = 300, seed: int = 0, used: NDArray[np.bool_] = ALL) -> Learned:
    rows, validation = (draw_innovations(n, s, spread) for n, s in ((1200, 1), (300, 2)))
    rows, validation = (Innovations(r.innovation * used, r.guide) for r in (rows, validation))
    return train_denoiser(rows, validation, used, SIGMAS, WIDTH, steps, seed, lambda step, of: None)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Batches here are too small to share, and threads that wait for each other are slow where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def learned() -> Learned:
    return train(0.8)


def restore(weights: Any, rows: Innovations, sigma: float, seed: int = 9) -> tuple[float, float]:
    """Squared error of the denoiser and of the Gaussian, per entry; seed 1 is the validation's noise."""
    noise = draw_noise(1, 4, SIZE, seed)
    noised = rows.innovation[:, None] + sigma * noise
    levels = np.full((len(noised), 4, TAPS), sigma, np.float32)
    shape = (4, TAPS, WIDTH)
    found = denoise(weights, noised, levels, rows.guide, shape=shape, label_guidance=1.0, xp=np)
    errors = [float(np.mean((d - rows.innovation[:, None]) ** 2)) for d in (found, noised / (1 + sigma**2))]
    return errors[0], errors[1]


def test_a_spread_that_depends_on_the_label_is_learned(learned: Learned) -> None:
    assert learned.loss < 0.9 * learned.gaussian_loss
    fresh = draw_innovations(500, 3, 0.8)
    rounds = np.mean([restore(learned.weights, fresh, 0.5, seed) for seed in range(20, 40)], axis=0)
    # The best denoiser knows the label's deviation s: s^2 sigma^2 / (s^2 + sigma^2) on average over the labels.
    variances = np.exp([1.6, -1.6]) / np.cosh(1.6)
    best = np.mean(variances * 0.25 / (variances + 0.25))
    assert rounds[1] == pytest.approx(0.2, rel=0.1)  # sigma^2 / (1 + sigma^2)
    assert 0.9 * best < rounds[0] < 0.9 * rounds[1]
    assert rounds[1] - rounds[0] > 0.6 * (rounds[1] - best)


def test_it_is_the_guide_that_tells_the_spread(learned: Learned) -> None:
    fresh = draw_innovations(500, 3, 0.8)
    other = Innovations(fresh.innovation, np.roll(fresh.guide, 1, axis=1))
    assert restore(learned.weights, other, 0.5)[0] > 1.2 * restore(learned.weights, fresh, 0.5)[0]


def test_the_loss_of_the_validation_rows_is_that_of_the_weights_that_come_back(learned: Learned) -> None:
    validation = draw_innovations(300, 2, 0.8)
    ideal = 0.5**2 / (0.5**2 + 1)  # the Gaussian's, over noise and data of unit variance
    found, gaussian = restore(learned.weights, validation, 0.5, seed=1)
    assert learned.loss == pytest.approx(found / ideal, rel=1e-3)
    assert learned.gaussian_loss == pytest.approx(gaussian / ideal, rel=1e-3)
    start = init_weights(TAPS, WIDTH, CLASSES, np.random.default_rng(0))
    assert all(np.array_equal(learned.weights[name], start[name]) for name in CONSTANTS)
    assert learned.weights["out"].any() and learned.steps % CHECK_EVERY == 0


def test_the_same_seed_trains_the_same_weights() -> None:
    first, again, other = (train(0.5, steps=60, seed=seed) for seed in (0, 0, 1))
    assert first.loss == again.loss != other.loss
    assert all(np.array_equal(first.weights[name], again.weights[name]) for name in first.weights)


def test_padding_teaches_nothing() -> None:
    used = ALL.copy()
    used[[2, 3, 7]] = False
    found = train(0.8, steps=150, used=used)
    assert found.loss < 0.97 * found.gaussian_loss
    validation = draw_innovations(300, 2, 0.8).innovation[:, None] * used
    error = (validation + 0.5 * used * draw_noise(1, 4, SIZE, seed=1)) / 1.25 - validation
    assert found.gaussian_loss == pytest.approx(np.mean(error[..., used] ** 2) / 0.2, rel=1e-4)  # per used entry
    noised = np.zeros((3, 2, SIZE), np.float32)
    noised[..., used] = np.random.default_rng(0).normal(size=(3, 2, int(used.sum())))
    guide = np.eye(CLASSES, dtype=np.float32)[:3]
    sigma = np.full((3, 2, TAPS), 0.5, np.float32)
    shape = (2, TAPS, WIDTH)
    restored = denoise(found.weights, noised, sigma, guide, shape=shape, label_guidance=1.0, xp=np)
    np.testing.assert_allclose(restored[..., ~used], 0, atol=1e-6)


def learn(clean: LatentSet, mode: Any, steps: int = 300, typical: Any = None) -> Any:
    everything = np.ones(len(clean.latents), bool)
    whole = clean.fit_linear(everything)
    crossed = cross_fit(clean, whole[0], np.random.default_rng(0))
    sigmas = np.full((1, clean.latents.shape[1] // clean.width), 0.5)
    kept = everything if typical is None else typical
    settings = FitSettings(network=mode, training_steps=steps)
    return learn_network(clean, crossed, whole[0], sigmas, settings, ignore_progress, lambda: kept), crossed


def test_the_network_stays_off_where_a_gaussian_says_it_all() -> None:
    clean = make_set(*draw_rows(900, CLASSES, TAPS, WIDTH, seed=0), WIDTH)
    (weights, report), _ = learn(clean, "auto", steps=400)
    assert weights is None and not report.used
    assert report.loss > GAIN * report.gaussian_loss and "no gain" in report.reason
    (weights, report), _ = learn(clean, "on", steps=50)
    assert weights is not None and report.used and "asked for" in report.reason


def test_rows_that_are_left_out_teach_nothing_and_still_judge() -> None:
    clean = make_set(*draw_rows(900, CLASSES, TAPS, WIDTH, seed=0, spread=0.8), WIDTH)
    strange = np.random.default_rng(1).permutation(900) < 45
    (_, every), crossed = learn(clean, "on", steps=50)
    (_, fewer), _ = learn(clean, "on", steps=50, typical=~strange)
    held_out = crossed.folds == 0
    (_, none_held), _ = learn(clean, "on", steps=50, typical=~(strange & held_out))
    assert every.gaussian_loss == fewer.gaussian_loss == none_held.gaussian_loss  # all held-out rows judge
    assert fewer.loss != every.loss == none_held.loss


def find_typical(clean: LatentSet) -> tuple[Any, Any]:
    whole = clean.fit_linear(np.ones(len(clean.latents), bool))
    crossed = cross_fit(clean, whole[0], np.random.default_rng(0))
    size, taps = len(clean.used), len(clean.used) // clean.width
    noise, ladder = np.zeros((2, size)), lay_ladder(np.full((1, taps), 0.3), 1)
    bands = lay_bands(clean.used, clean.width)[0]
    formula = Formula(whole[0], whole[1].transform, bands, noise, ladder, 2, clean.width, 0.0, False)
    return choose_typical(clean, crossed, formula), crossed


@pytest.mark.parametrize("rows", [150, 400, 1250])
def test_a_hundredth_of_the_originals_is_left_out(rows: int) -> None:
    latents, logits = draw_rows(rows, CLASSES, TAPS, WIDTH, seed=0)
    typical, _ = find_typical(make_set(latents, logits, WIDTH))
    assert (~typical).sum() == np.ceil(STRANGEST * (rows - 1))


def test_images_that_the_target_takes_for_another_class_are_left_out_and_so_are_stranger_copies() -> None:
    latents, logits = draw_rows(1000, CLASSES, TAPS, WIDTH, seed=0)
    confused = np.flatnonzero(logits.argmax(axis=1) == 0)[:8]
    latents[confused] = latents[np.flatnonzero(logits.argmax(axis=1) == 1)[:8]]
    source = np.concatenate([np.arange(1000), np.arange(1000)])
    copies = latents.copy()
    copies[500:520] += 30.0
    clean = LatentSet(
        np.concatenate([latents, copies]), logits[source], source, 1000, np.ones(SIZE, bool), WIDTH, "label", False, 0.3
    )
    typical, _ = find_typical(clean)
    assert (~typical[confused]).sum() >= 6  # of 10 that are left out of 1,000
    assert not typical[1500:1520].any()
    assert (~typical[:1000]).sum() == 10
    assert typical[1000:].mean() == pytest.approx(0.97, abs=0.005)  # those copies, and the copies of what is left out


@pytest.mark.parametrize("steps", [0, 10, CHECK_EVERY - 1])
def test_a_training_too_short_for_any_check_is_refused(steps: int) -> None:
    clean = make_set(*draw_rows(450, CLASSES, TAPS, WIDTH, seed=0), WIDTH)
    with pytest.raises(OptionError, match=f"training_steps is {steps}; .* {CHECK_EVERY}"):
        learn(clean, "auto", steps=steps)


def test_the_network_goes_on_where_it_gains() -> None:
    clean = make_set(*draw_rows(900, CLASSES, TAPS, WIDTH, seed=0, spread=0.8), WIDTH)
    (weights, report), _ = learn(clean, "auto")
    assert weights is not None and report.used
    assert report.loss < 0.93 * report.gaussian_loss
    assert f"{report.loss:.3f}" in report.reason and 0 < report.steps <= 300


def test_the_network_stays_off_with_few_images_or_when_told_so() -> None:
    few = make_set(*draw_rows(399, CLASSES, TAPS, WIDTH, seed=0, spread=0.8), WIDTH)
    (weights, report), _ = learn(few, "auto")
    assert weights is None and "399" in report.reason and "400" in report.reason
    (weights, report), _ = learn(few, "off")
    assert weights is None and not report.used and report.loss is None


def test_copies_stay_in_the_fold_of_their_original() -> None:
    latents, logits = draw_rows(60, 3, TAPS, WIDTH, seed=0)
    source = np.concatenate([np.arange(60), np.arange(0, 60, 2)])
    clean = LatentSet(latents[source], logits[source], source, 60, ALL, WIDTH, "label", False, 0.3)
    crossed = cross_fit(clean, clean.fit_linear(np.ones(90, bool))[0], np.random.default_rng(0))
    assert np.array_equal(crossed.folds, crossed.folds[:60][source])
    for fold, part in enumerate(crossed.parts):
        outside = crossed.folds != fold
        expected, expected_chain = clean.fit_linear(outside, clean.fit_linear(np.ones(90, bool))[0])
        np.testing.assert_allclose(part.guidance.means, expected.means)
        np.testing.assert_allclose(part.chain.transform, expected_chain.transform)


@pytest.mark.parametrize("kind", ["label", "logits"])
def test_reference_distances_are_those_of_unseen_rows(kind: str) -> None:
    rows = 150  # few, so that a chain flatters the rows it was fitted on
    clean = make_set(*draw_rows(rows, CLASSES, 3, 8, seed=0), 8, kind)
    whole = clean.fit_linear(np.ones(rows, bool))
    crossed = cross_fit(clean, whole[0], np.random.default_rng(0))
    bands, names = lay_bands(clean.used, 8)
    noise, ladder = np.zeros((2, 24)), lay_ladder(np.full((1, 3), 0.3), 1)
    formula = Formula(whole[0], whole[1].transform, bands, noise, ladder, 2, 8, 0.0, False)
    reference = measure_reference(clean, crossed, formula, None, np.ones(rows, bool))
    assert np.array_equal(reference.rows, np.argsort(crossed.folds, kind="stable"))
    assert reference.strange.shape[1] + reference.mismatch.shape[1] == len(list_evidence(names, 1, list_parts(clean.used, 8)))
    assert len(reference.strange) == len(reference.mismatch) == rows
    assert reference.doubt.shape == (rows, 1) and (reference.doubt >= 0).all()
    own = clean.guide(whole[0], np.ones(rows, bool))[1] @ whole[1].transform
    fresh_set = make_set(*draw_rows(2000, CLASSES, 3, 8, seed=1), 8, kind)
    fresh = fresh_set.guide(whole[0], np.ones(2000, bool))[1] @ whole[1].transform
    strange = np.exp(reference.strange).mean()
    assert (own**2 @ bands).mean() < 0.9 * (fresh**2 @ bands).mean()  # fitted rows look too good
    assert strange == pytest.approx((fresh**2 @ bands).mean(), rel=0.12)


def test_with_a_network_only_the_held_out_fold_is_measured() -> None:
    clean = make_set(*draw_rows(100, CLASSES, TAPS, WIDTH, seed=0), WIDTH)
    whole = clean.fit_linear(np.ones(100, bool))
    crossed = cross_fit(clean, whole[0], np.random.default_rng(0))
    noise = draw_noise(1, 2, SIZE, 0).astype(np.float64)
    formula = Formula(
        whole[0], whole[1].transform, lay_bands(ALL, WIDTH)[0], noise, lay_ladder(SIGMAS, 1), 2, WIDTH, 0.0, False
    )
    seen: list[Any] = []

    def step(noised: Any, sigma: Any, guide: Any) -> Any:
        seen.append(guide)
        return noised

    reference = measure_reference(clean, crossed, formula, step, np.ones(100, bool))
    held_out = crossed.folds == 0
    assert len(reference.strange) == held_out.sum() == 20
    assert len(reference.mismatch) == len(reference.doubt) == 100  # no network has a part in them
    expected = clean.guide(crossed.parts[0].guidance, held_out)[0]
    np.testing.assert_allclose(np.concatenate(seen), expected, rtol=1e-5, atol=1e-6)

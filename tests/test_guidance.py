import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy.special import log_softmax, softmax

from diffense.guidance import (
    FEWEST_PER_CLASS,
    LEAST_LOG,
    LOGIT_DIRECTIONS,
    choose_kind,
    fit_guidance,
    guide_by,
    normalise_logits,
    one_hot,
    split_mean,
)
from diffense.onnx_arrays import OnnxNamespace
from latent_sets import draw_rows, run_graph

LOGITS = hnp.arrays(np.float64, (4, 5), elements=st.floats(-300, 300))


@given(LOGITS)
def test_normalised_logits_are_floored_log_probabilities(logits: NDArray[np.float64]) -> None:
    expected = np.maximum(log_softmax(logits, axis=1), LEAST_LOG)
    np.testing.assert_allclose(normalise_logits(logits, False, np), expected, atol=1e-9)
    np.testing.assert_allclose(normalise_logits(logits + 1000.0, False, np), expected, atol=1e-9)
    from_softmax = normalise_logits(softmax(logits, axis=1).astype(np.float32), True, np)
    assert np.isfinite(from_softmax).all()
    likely = expected > -20
    np.testing.assert_allclose(from_softmax[likely], expected[likely], atol=1e-4)


@given(hnp.arrays(np.float64, (3, 4), elements=st.sampled_from([-1.0, 0.0, 2.0])))
def test_one_hot_is_at_the_first_largest(logits: NDArray[np.float64]) -> None:
    hot = one_hot(logits)
    assert hot.sum() == len(logits)
    assert [list(row).index(1.0) for row in hot] == [list(row).index(max(row)) for row in logits]


def test_label_guidance_is_the_class_mean_by_sureness_and_the_overall_mean_for_classes_never_seen() -> None:
    latents, logits = draw_rows(40, 3, 2, 4, seed=0)
    logits = np.concatenate([logits, np.full((40, 1), -9.0)], axis=1)
    guidance = fit_guidance(latents, logits, "label", False)
    labels = np.arange(40) % 3
    guide, residual = split_mean(guidance, latents, logits, False)
    weights = np.exp(-guide[:, -1])

    def average(rows: NDArray[np.float64], label: int) -> NDArray[np.float64]:
        own = labels == label
        return np.asarray(np.average(rows[own], axis=0, weights=weights[own]))

    for label in range(3):
        np.testing.assert_allclose(guidance.means[label], average(latents, label))
    np.testing.assert_allclose(guidance.means[3], np.average(latents, axis=0, weights=weights))
    assert guidance.seen.tolist() == [True, True, True, False]
    assert np.array_equal(guide[:, :4], np.eye(4)[labels])
    root = np.sqrt(weights / weights.mean())[:, None]
    centred = root * (guide[:, 4:] - np.stack([average(guide[:, 4:], label) for label in range(3)])[labels])
    rest = root * (latents - guidance.means[labels])
    ridge = np.linalg.solve(centred.T @ centred + np.eye(centred.shape[1]), centred.T @ rest)
    np.testing.assert_allclose(root * residual, rest - centred @ ridge, atol=1e-9)
    np.testing.assert_allclose([average(residual, label) for label in range(3)], 0, atol=1e-12)


def test_images_of_another_class_that_the_target_is_not_sure_of_hardly_move_a_mean() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 2
    margins = rng.uniform(4.0, 8.0, 400)
    wrong = np.arange(400) % 20 == 0  # a tenth of class 0, seen as class 0 though of class 1
    margins[wrong] = rng.uniform(0.1, 1.0, np.sum(wrong))
    places = np.where(wrong, 1, labels)[:, None] * [[10.0, 0.0]] + rng.normal(0, 0.1, (400, 2))
    means = fit_guidance(places, np.stack([margins * (labels == 0), margins * (labels == 1)], axis=1), "label", False).means
    assert places[labels == 0, 0].mean() == pytest.approx(1.0, abs=0.05)
    assert means[0, 0] < 0.15 and means[1, 0] == pytest.approx(10.0, abs=0.05)


def test_doubt_is_the_surprise_of_the_margin() -> None:
    rng = np.random.default_rng(0)
    margins = rng.exponential(4.0, 2000)
    logits = np.stack([margins, np.zeros(2000), np.full(2000, -30.0)], axis=1)
    guidance = fit_guidance(rng.normal(size=(2000, 3)), logits, "label", False)
    asked = np.array([0.4, 2.0, 8.0])
    guide = guide_by(guidance, np.stack([asked, 0 * asked, 0 * asked - 30], axis=1), np.eye(3)[[0, 0, 0]], False, np)
    np.testing.assert_allclose(guide[:, -1], [-np.log(np.mean(margins <= margin)) for margin in asked], atol=0.12)
    swapped = guide_by(guidance, np.array([[0.0, 8.0, -30.0]]), np.eye(3)[[1]], False, np)
    assert swapped[0, -1] == pytest.approx(guide[2, -1])


def test_what_lies_between_two_classes_is_explained_where_the_target_is_in_doubt() -> None:
    rng = np.random.default_rng(0)
    place = rng.uniform(0, 1, 3000)  # from class 0 to class 1
    ends = np.array([[-3.0, 0.0], [3.0, 1.0]])
    latents = ends[0] + place[:, None] * (ends[1] - ends[0]) + rng.normal(0, 0.1, (3000, 2))
    logits = np.stack([0.5 - place, place - 0.5], axis=1) * 12
    guidance = fit_guidance(latents, logits, "label", False)
    _, residual = split_mean(guidance, latents, logits, False)
    by_label = latents - guidance.means[logits.argmax(axis=1)]
    assert np.mean(residual**2) < 0.45 * np.mean(by_label**2)


def test_logit_guidance_with_a_thousand_classes_explains_unseen_latents() -> None:
    world = np.random.default_rng(0)
    embedding = world.normal(size=(1000, 12))  # what a penultimate layer looks like: few directions, many classes
    slope = world.normal(size=(12, 8))

    def draw(rows: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        rng = np.random.default_rng(seed)
        features = embedding[rng.integers(0, 1000, rows)] + rng.normal(0, 0.3, (rows, 12))
        return features @ slope + rng.normal(0, 0.5, (rows, 8)), features @ embedding.T

    latents, logits = draw(3000, 1)
    assert np.bincount(logits.argmax(axis=1), minlength=1000).min() < FEWEST_PER_CLASS
    guidance = fit_guidance(latents, logits, "logits", False)
    guide, _ = split_mean(guidance, latents, logits, False)
    assert guide.shape[1] <= LOGIT_DIRECTIONS + 1
    np.testing.assert_allclose(guide[:, :-1].std(axis=0), 1, rtol=1e-6)
    fresh, fresh_logits = draw(500, 2)
    _, residual = split_mean(guidance, fresh, fresh_logits, False)
    assert np.mean(residual**2) < 0.12 * np.mean((fresh - latents.mean(axis=0)) ** 2)
    # The fit itself is exact, by another way: rows scaled by their root weights, the ridge as rows of its own.
    root = np.exp(-guide[:, -1] / 2) / np.sqrt(np.mean(np.exp(-guide[:, -1])))
    centred = [root[:, None] * (rows - np.average(rows, axis=0, weights=root**2)) for rows in (guide, latents)]
    size = guide.shape[1]
    rows, wanted = np.concatenate([centred[0], np.eye(size)]), np.concatenate([centred[1], np.zeros((size, 8))])
    np.testing.assert_allclose(guidance.slope, np.linalg.lstsq(rows, wanted, rcond=None)[0], atol=1e-9)
    assert np.isfinite(guidance.means).all() and guidance.means.shape == (1000, 8)
    labels = logits.argmax(axis=1)
    for label in labels[:20]:
        own = guide[labels == label] @ guidance.slope + guidance.bias
        weights = np.exp(-guide[labels == label, -1])
        np.testing.assert_allclose(guidance.means[label], np.average(own, axis=0, weights=weights), atol=1e-9)
    overall = np.average(latents, axis=0, weights=np.exp(-guide[:, -1]))
    seen = np.bincount(labels, minlength=1000) > 0
    np.testing.assert_allclose(guidance.means[~seen], np.tile(overall, (np.sum(~seen), 1)))
    assert np.array_equal(guidance.seen, seen) and not seen.all()


def test_folds_take_the_projection_of_the_whole() -> None:
    latents, logits = draw_rows(60, 6, 2, 3, seed=0)
    whole = fit_guidance(latents, logits, "logits", False)
    part = fit_guidance(latents[::2], logits[::2], "logits", False, like=whole)
    assert part.projection is whole.projection and part.centre is whole.centre and part.doubt is whole.doubt
    assert not np.allclose(part.slope, whole.slope)


@pytest.mark.parametrize("probabilities", [False, True])
def test_the_graph_makes_the_same_guide(probabilities: bool) -> None:
    latents, logits = draw_rows(60, 6, 2, 3, seed=0)
    logits = softmax(logits * 3, axis=1) if probabilities else logits * 3
    for kind in ("label", "logits"):
        guidance = fit_guidance(latents, logits, kind, probabilities)
        xp = OnnxNamespace()
        x = xp.input("x", ["batch", 6])
        recorded = guide_by(guidance, x, xp.one_hot_argmax(x, 6), probabilities, xp)
        graph = run_graph(xp.build([x], {"guide": (recorded, ["batch", guidance.slope.shape[0]])}), x=logits)
        expected = guide_by(guidance, logits, one_hot(logits), probabilities, np)
        np.testing.assert_allclose(graph, expected, atol=2e-4)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_labels_guide_only_where_every_class_has_enough_images(labels: list[int]) -> None:
    enough = all(labels.count(label) >= FEWEST_PER_CLASS for label in range(4))
    assert choose_kind(np.array(labels), 4) == ("label" if enough else "logits")

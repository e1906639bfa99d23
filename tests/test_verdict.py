"""The verdict as a graph: bit for bit what calibration says, for every float32 score."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from diffense import names
from diffense.graphs import open_session
from diffense.target import TensorSpec
from diffense_export.verdict import build_verdict
from diffense_export.whole import build_features

CLASSES = 3


class Stub:
    """A guard as far as its verdict is concerned."""

    def __init__(self, guard, calibration, alpha):
        formula = guard.scorer.formula
        means = np.zeros((CLASSES, formula.guidance.means.shape[1]))
        formula = replace(formula, guidance=replace(formula.guidance, means=means))
        self.scorer = replace(guard.scorer, formula=formula, calibration=calibration, alpha=alpha)


def judge(session, scores, logits):
    given = {names.RAW_SCORE: scores[:, None], names.LOGITS: logits}
    return [column[:, 0] for column in session.run(list(names.VERDICT_TENSORS), given)]


@pytest.fixture
def sessions(guard):
    """Graphs of calibration sets of some sizes, with ties in them, and the scorers that they are of."""
    made = []
    for size, alpha in ((1, 0.5), (19, 0.05), (99, 0.05), (500, 0.01), (2000, 0.3)):
        drawn = np.sort(np.random.default_rng(size).standard_normal(size).round(2).astype(np.float32))
        stub = Stub(guard, drawn, alpha)
        made.append((stub.scorer, open_session(build_verdict(stub))))
    return made


@settings(max_examples=200, deadline=None)
@given(scores=arrays(np.float32, st.integers(1, 20), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)))
def check_finite(sessions, scores):
    for scorer, session in sessions:
        mixed = np.concatenate([scores, scorer.calibration[:50], np.nextafter(scorer.calibration[:50], np.float32(np.inf))])
        stated, p_values, flagged = judge(session, mixed, np.ones((len(mixed), CLASSES), np.float32))
        known_p, known_flagged = scorer.judge(mixed)
        assert np.array_equal(stated, mixed)
        assert np.array_equal(p_values, known_p.astype(np.float32))
        assert np.array_equal(flagged, known_flagged) and flagged.dtype == np.uint8


def test_finite_scores_are_judged_as_calibration_judges_them(sessions):
    check_finite(sessions)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["score", "logit"])
def test_what_is_no_number_has_no_verdict(sessions, value, where):
    scores, logits = np.zeros(3, np.float32), np.ones((3, CLASSES), np.float32)
    if where == "score":
        scores[1] = value
    else:
        logits[1, 2] = value
    for scorer, session in sessions:
        stated, p_values, flagged = judge(session, scores, logits)
        assert (stated[1], p_values[1], flagged[1]) == (names.NOT_SCORED_VALUE, names.NOT_SCORED_VALUE, names.UNSCORED)
        known_p, known_flagged = scorer.judge(scores[[0, 2]])
        assert np.array_equal(p_values[[0, 2]], known_p.astype(np.float32))
        assert np.array_equal(flagged[[0, 2]], known_flagged)


def test_largest_numbers_are_numbers(sessions):
    largest = np.finfo(np.float32).max
    scores = np.array([largest, -largest], np.float32)
    for scorer, session in sessions:
        flagged = judge(session, scores, np.full((2, CLASSES), largest, np.float32))[2]
        assert np.array_equal(flagged, scorer.judge(scores)[1])


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_a_features_graph_hands_the_logits_through_untouched(guard, clean_images, dtype):
    places = (None, guard.manifest.classes, 1, 1)
    session = open_session(build_features(guard, TensorSpec(names.RAW_LOGITS, dtype, places), scored=True, judged=True))
    image = guard.preprocessing.apply(clean_images[:4])
    logits = np.random.default_rng(0).standard_normal((4, *places[1:])).astype(dtype)
    (passed,) = session.run([names.PASSED_LOGITS], {"image": image, names.RAW_LOGITS: logits})
    assert np.array_equal(passed, logits) and passed.dtype == logits.dtype and passed.shape == logits.shape

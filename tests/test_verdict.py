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
from diffense_export.verdict import LARGEST, NOTHING, build_verdict
from diffense_export.whole import build_features


class Stub:
    """A guard as far as its verdict is concerned."""

    def __init__(self, guard, calibration, alpha):
        self.scorer = replace(guard.scorer, calibration=calibration, alpha=alpha)


def judge(session, scores, nothing=0.0):
    given = {names.RAW_SCORE: scores[:, None], NOTHING: np.full((len(scores), 1), nothing, np.float32)}
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
        stated, p_values, flagged = judge(session, mixed)
        known_p, known_flagged = scorer.judge(mixed)
        assert np.array_equal(stated, mixed)
        assert np.array_equal(p_values, known_p.astype(np.float32))
        assert np.array_equal(flagged, known_flagged) and flagged.dtype == np.uint8


def test_finite_scores_are_judged_as_calibration_judges_them(sessions):
    check_finite(sessions)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_score_that_is_no_number_has_no_verdict(sessions, value):
    scores = np.array([0, value, 0], np.float32)
    for scorer, session in sessions:
        stated, p_values, flagged = judge(session, scores)
        assert (stated[1], p_values[1], flagged[1]) == (names.NOT_SCORED_VALUE, names.NOT_SCORED_VALUE, names.UNSCORED)
        known_p, known_flagged = scorer.judge(scores[[0, 2]])
        assert np.array_equal(p_values[[0, 2]], known_p.astype(np.float32))
        assert np.array_equal(flagged[[0, 2]], known_flagged)
        assert (judge(session, np.zeros(2, np.float32), np.nan)[2] == names.UNSCORED).all()


def test_largest_numbers_are_numbers(sessions):
    scores = np.array([LARGEST, -LARGEST], np.float32)
    for scorer, session in sessions:
        assert np.array_equal(judge(session, scores)[2], scorer.judge(scores)[1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_logit_that_is_no_number_takes_the_verdict_from_its_own_row_alone(guard, clean_images, value):
    given = TensorSpec(names.RAW_LOGITS, "float32", (None, guard.manifest.classes))
    session = open_session(build_features(guard, given, scored=True, judged=True))
    image, logits = guard.preprocessing.apply(clean_images[:3]), guard.run(clean_images[:3])[0].astype(np.float32)
    before = session.run([names.FLAGGED], {"image": image, names.RAW_LOGITS: logits})[0].ravel()
    logits[1, 0] = value
    after = session.run([names.FLAGGED], {"image": image, names.RAW_LOGITS: logits})[0].ravel()
    assert after.tolist() == [before[0], names.UNSCORED, before[2]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_a_features_graph_hands_the_logits_through_untouched(guard, clean_images, dtype):
    places = (None, guard.manifest.classes, 1, 1)
    session = open_session(build_features(guard, TensorSpec(names.RAW_LOGITS, dtype, places), scored=True, judged=True))
    image = guard.preprocessing.apply(clean_images[:4])
    logits = np.random.default_rng(0).standard_normal((4, *places[1:])).astype(dtype)
    (passed,) = session.run([names.PASSED_LOGITS], {"image": image, names.RAW_LOGITS: logits})
    assert np.array_equal(passed, logits) and passed.dtype == logits.dtype and passed.shape == logits.shape

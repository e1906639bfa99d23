"""What the served guard answers, with everything around it real but the server."""

import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffense import names
from diffense.graphs import open_session
from diffense.health import REQUEST_ID
from diffense.serving.meter import HEALTH_LABEL, LABEL_SERIES, Meter
from diffense.serving.verdicts import VerdictRows
from diffense_export.scorer import build_scorer
from fake_triton import FakeBackend, TritonError
from served_family import ALL, WIRING, ServedFamily, fail


@pytest.fixture(scope="module")
def served(guard, clean_images):
    return ServedFamily(guard, clean_images)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, 11), max_size=5))
def test_every_request_of_a_stack_gets_its_own_rows_with_one_call_a_step(served, cuts):
    backend, service = served.guard_service()
    parts = [list(range(a, b)) for a, b in pairwise([0, *sorted(cuts), 12])]
    responses = service.answer([served.ask_guard(rows) for rows in parts])
    assert len(backend.calls) == served.steps
    assert backend.calls[0][1][names.NOISED][0] == 12
    for response, rows in zip(responses, parts, strict=True):
        served.check(response, rows)
        assert np.array_equal(response.arrays()["logits"], served.logits[rows])


@settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.sets(st.sampled_from(ALL)))
def test_only_requested_outputs_are_returned(served, wanted):
    _, service = served.guard_service()
    (response,) = service.answer([served.ask_guard([0, 1], list(wanted))])
    assert set(response.arrays()) == wanted


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_image_fails_its_own_request_alone_and_is_named(served, bad):
    backend, service = served.guard_service()
    latents = served.latents[[3, 4, 5]].copy()
    latents[1, 0] = bad
    first, second, third, fourth = service.answer(
        [
            served.ask_guard([0, 1]),
            served.ask_guard([3, 4, 5], latents=latents),
            served.ask_guard([2]),
            served.ask_guard([3, 4, 5], latents=latents),
        ]
    )
    served.check(first, [0, 1])
    served.check(third, [2])
    assert second.error().code() == TritonError.INVALID_ARG
    assert "image 1 of the request" in second.error().message()
    assert second.error() is not fourth.error()
    assert backend.total("diffense_unscored_total", reason="invalid_arg") == 2


def test_production_outputs_pass_when_the_denoiser_fails(served):
    backend, service = served.guard_service(m_denoiser=fail)
    (response,) = service.answer([served.ask_guard([0, 1, 2])])
    arrays = response.arrays()
    assert np.array_equal(arrays["logits"], served.logits[:3])
    assert (arrays[names.FLAGGED] == names.UNSCORED).all()
    assert (arrays[names.SCORE] == -1).all()
    assert (arrays[names.P_VALUE] == -1).all()
    assert backend.total("diffense_unscored_total", reason="denoiser") == 3
    assert backend.total("diffense_scored_total") == 0
    assert "not healthy" in backend.logged[0]


def test_a_denoiser_that_answers_without_its_output_is_noticed(served):
    backend, service = served.guard_service(m_denoiser=lambda arrays: {})
    service.answer([served.ask_guard([0])])
    assert backend.total("diffense_unscored_total", reason="denoiser") == 1


def test_a_wrong_denoiser_never_takes_production_down(served):
    backend, service = served.guard_service(m_denoiser=lambda arrays: {names.SAMPLE: np.zeros((1, 2), np.float32)})
    (response,) = service.answer([served.ask_guard([0, 1])])
    assert np.array_equal(response.arrays()["logits"], served.logits[:2])
    assert backend.total("diffense_unscored_total", reason="internal") == 2


def test_a_denoiser_that_gives_nan_leaves_the_image_unscored(served):
    backend, service = served.guard_service(m_denoiser=lambda arrays: {names.SAMPLE: arrays[names.NOISED] * np.nan})
    (response,) = service.answer([served.ask_guard([0, 1])])
    assert (response.arrays()[names.FLAGGED] == names.UNSCORED).all()
    assert np.isfinite(response.arrays()[names.SCORE]).all()
    assert backend.total("diffense_unscored_total", reason="score") == 2


def test_logits_that_are_no_numbers_leave_their_row_unscored_and_pass(served):
    _, service = served.guard_service()
    request = served.ask_guard([0, 1, 2])
    request._inputs["diffense_raw_0"] = logits = served.logits[:3].copy()
    logits[1, 0] = np.nan
    arrays = service.answer([request])[0].arrays()
    assert arrays[names.FLAGGED][1, 0] == names.UNSCORED
    assert arrays[names.FLAGGED][[0, 2], 0].tolist() == served.truth.flagged[[0, 2]].tolist()
    assert np.array_equal(arrays["logits"], logits, equal_nan=True)


def test_production_outputs_of_any_memory_layout_are_handed_through(served):
    _, service = served.guard_service()
    request = served.ask_guard([0, 1])
    odd = np.asfortranarray(served.logits[:2])
    request.inputs = lambda: [
        type("T", (), {"name": lambda s: "diffense_raw_0", "as_numpy": lambda s: odd})(),
        type("T", (), {"name": lambda s: names.LATENTS, "as_numpy": lambda s: served.latents[:2]})(),
    ]
    assert np.array_equal(service.answer([request])[0].arrays()["logits"], served.logits[:2])


def test_a_cancelled_request_is_not_scored_and_its_neighbour_is(served):
    backend, service = served.guard_service()
    gone, stays = service.answer([served.ask_guard([0], cancelled=lambda: True), served.ask_guard([1])])
    assert gone.error().code() == TritonError.CANCELLED
    served.check(stays, [1])
    assert backend.calls[0][1][names.NOISED][0] == 1


def test_the_loop_stops_when_nobody_waits_any_more(served):
    asked = []

    def cancelled():
        asked.append(1)
        return len(asked) > 1

    backend, service = served.guard_service()
    (response,) = service.answer([served.ask_guard([0], cancelled=cancelled)])
    assert response.error().code() == TritonError.CANCELLED
    assert backend.calls == []


def test_a_request_whose_time_is_over_keeps_its_production_outputs(served):
    clock = iter([0.0, 0.2, 0.3, 0.4, 0.5, 0.6])
    backend, service = served.guard_service(clock=lambda: next(clock))
    (response,) = service.answer([served.ask_guard([0, 1], timeout_us=100_000)])
    assert (response.arrays()[names.FLAGGED] == names.UNSCORED).all()
    assert np.array_equal(response.arrays()["logits"], served.logits[:2])
    assert backend.total("diffense_unscored_total", reason="timeout") == 2
    assert backend.calls == []


def test_a_call_stands_in_the_trace_of_the_first_request_of_a_stack(served):
    backend, service = served.guard_service()
    bad = served.ask_guard([5], latents=served.latents[[5]] * np.nan, identity="refused")
    service.answer([bad, served.ask_guard([0], identity="first"), served.ask_guard([1], identity="second")])
    assert backend.traces == [("m_denoiser", "trace of first")] * served.steps


def test_a_gateway_traces_the_call_that_cannot_outlive_its_request_alone(served):
    backend, service = served.gateway_service()
    service.answer([served.ask_gateway([0, 1], identity="r")])
    service.close()
    assert backend.traces == [("m", "trace of r"), ("m_features", None), ("m_guard", None)]


def test_what_bears_the_health_checks_id_is_counted_under_a_label_of_its_own(served):
    backend, service = served.guard_service()
    bad = served.ask_guard([5], latents=served.latents[[5]] * np.nan, identity=REQUEST_ID)
    service.answer([served.ask_guard([0], identity=REQUEST_ID), bad, served.ask_guard([1, 2])])
    assert backend.total("diffense_scored_total", model="m") == 3
    assert backend.total("diffense_scored_total", label=HEALTH_LABEL) == 1
    assert backend.total("diffense_unscored_total", reason=HEALTH_LABEL) == backend.total("diffense_unscored_total") == 1


def test_an_empty_or_unreadable_request_is_refused_alone(served):
    _, service = served.guard_service()
    empty = served.ask_guard([])
    broken = served.ask_guard([0])
    broken.inputs = lambda: 1 / 0
    nothing, unreadable, good = service.answer([empty, broken, served.ask_guard([1])])
    assert nothing.error().code() == TritonError.INVALID_ARG and "no image" in nothing.error().message()
    assert unreadable.error().code() == TritonError.INTERNAL and "division" not in unreadable.error().message()
    served.check(good, [1])


def test_metrics_count_images_by_predicted_class(served):
    backend, service = served.guard_service()
    service.answer([served.ask_guard(list(range(12)))])
    labels = served.logits.argmax(axis=1)
    for label in set(labels.tolist()):
        assert backend.total("diffense_scored_total", label=str(label)) == (labels == label).sum()
    histograms = backend.families["diffense_score"].series.values()
    assert sorted(np.float32(v) for s in histograms for v in s.observed) == pytest.approx(sorted(served.truth.scores), rel=1e-5)
    assert backend.total("diffense_flagged_total") == served.truth.flagged.sum()


def test_a_thousand_classes_do_not_make_a_thousand_series():
    backend = FakeBackend()
    meter = Meter(backend, "m")
    scored = VerdictRows(np.ones(1000, np.float32), np.ones(1000, np.float32), np.zeros(1000, np.uint8), [""] * 1000)
    meter.count(scored, np.arange(1000))
    assert len(backend.families["diffense_scored_total"].series) == LABEL_SERIES + 1
    assert backend.total("diffense_scored_total", label="other") == 1000 - LABEL_SERIES


def test_figures_that_wait_arrive_as_sums_and_none_is_lost():
    backend = FakeBackend()
    meter = Meter(backend, "m", every_s=3600)
    scored = VerdictRows(
        np.ones(6, np.float32), np.ones(6, np.float32), np.array([0, 1, 0, 0, 1, 2], np.uint8), [""] * 5 + ["x"]
    )
    for _ in range(3):
        meter.count(scored, np.array([1, 1, 1, 2, 2, 2]))
        meter.observe_time(0.5)
    assert backend.total("diffense_scored_total") == 0
    meter.send()
    assert backend.total("diffense_scored_total", label="1") == 9 and backend.total("diffense_scored_total", label="2") == 6
    assert backend.total("diffense_flagged_total") == 6 and backend.total("diffense_unscored_total", reason="x") == 3
    assert sum(len(s.observed) for s in backend.families["diffense_score"].series.values()) == 15
    meter.send()
    assert backend.total("diffense_scored_total") == 15
    meter.close()


def test_a_series_that_fails_loses_its_own_figure_alone():
    backend = FakeBackend()
    meter = Meter(backend, "m")
    scored = VerdictRows(np.ones(2, np.float32), np.ones(2, np.float32), np.zeros(2, np.uint8), [""] * 2)
    meter.count(scored, np.array([0, 1]))
    broken = next(s for labels, s in backend.families["diffense_scored_total"].series.items() if ("label", "0") in labels)
    broken.increment = None
    meter.count(scored, np.array([0, 1]))
    assert backend.total("diffense_scored_total", label="0") == 1 and backend.total("diffense_scored_total", label="1") == 2
    assert any("diffense_scored_total" in str(line) for line in backend.logged)


def test_a_thread_sends_what_waits():
    backend = FakeBackend()
    meter = Meter(backend, "m", every_s=0.01)
    meter.count_unscored("timeout", 4)
    until = time.monotonic() + 30
    while backend.total("diffense_unscored_total") < 4 and time.monotonic() < until:
        time.sleep(0.01)
    meter.close()
    assert backend.total("diffense_unscored_total", reason="timeout") == 4


def test_the_fused_loop_makes_one_call_and_judges_its_scores(served, guard):
    session = open_session(build_scorer(guard))

    def score(arrays):
        return {names.SCORE: session.run([names.SCORE], arrays)[0]}

    backend, service = served.guard_service(replace(WIRING, loop="fused", callee="m_scorer"), m_scorer=score)
    responses = service.answer([served.ask_guard([0, 1, 2]), served.ask_guard([7])])
    assert [model for model, _ in backend.calls] == ["m_scorer"]
    for response, rows in zip(responses, ([0, 1, 2], [7]), strict=True):
        scores = response.arrays()[names.SCORE][:, 0]
        assert np.allclose(scores, served.truth.scores[rows], atol=1e-4)
        p_values, flagged = guard.scorer.judge(scores)
        assert np.allclose(response.arrays()[names.P_VALUE][:, 0], p_values, atol=1e-6)
        assert np.array_equal(response.arrays()[names.FLAGGED][:, 0], flagged)


def test_a_dead_scorer_leaves_production_outputs(served):
    backend, service = served.guard_service(replace(WIRING, loop="fused", callee="m_scorer"), m_scorer=fail)
    (response,) = service.answer([served.ask_guard([0, 1])])
    assert np.array_equal(response.arrays()["logits"], served.logits[:2])
    assert backend.total("diffense_unscored_total", reason="scorer") == 2

import math
import threading
from itertools import pairwise

import numpy as np
import pytest
from fake_triton import FakeBackend, Request, TritonError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffense import names
from diffense.health import REQUEST_ID
from diffense.serving.budget import REST_S, STRIKES, Budget, OverBudgetError
from diffense.serving.calls import CallError, call_model
from diffense.serving.gateway import GatewayService
from diffense.serving.guard import GuardService
from diffense.serving.meter import LABEL_SERIES, Meter
from diffense.serving.policy import replace_outputs
from diffense.serving.settings import GatewayOptions, Wiring
from diffense.serving.verdicts import VerdictRows

VERDICTS = list(names.VERDICT_TENSORS)
ALL = ["logits", *VERDICTS]


@pytest.fixture(scope="session")
def served(guard, clean_images):
    """Wiring, images and what every model gives for them, from the real guard."""

    class Served:
        pixels = clean_images[:12]
        image = guard.preprocessing.apply(pixels)
        logits, latents = guard.run(pixels)
        truth = guard.score(pixels)
        steps = guard.manifest.sampling.steps
        wiring = Wiring(
            model="m", outputs=("logits",), logits="logits", loop="bls", callee="m_denoiser",
            latents_model="m_features", shared=False, input="image",
        )  # fmt: skip

        @staticmethod
        def denoise(arrays):
            return {names.SAMPLE: guard.denoise(*(arrays[n] for n in (names.NOISED, names.SIGMA, names.RESIDUAL, names.GUIDE)))}

        @classmethod
        def guard_service(cls, clock=None, scorer=guard.scorer, **models):
            backend = FakeBackend(**{"m_denoiser": cls.denoise, **models})
            more = {"clock": clock} if clock else {}
            return backend, GuardService(backend, cls.wiring, scorer, Meter(backend, "m"), **more)

        @classmethod
        def ask_guard(cls, rows, wanted=ALL, latents=None, **more):
            arrays = {"diffense_raw_0": cls.logits[rows], names.LATENTS: cls.latents[rows] if latents is None else latents}
            return Request(arrays, wanted, **more)

        @classmethod
        def find_row(cls, image):
            """Which of the known images this is."""
            found = np.flatnonzero((cls.image == image).all(axis=(1, 2, 3)))
            return int(found[0]) if len(found) else None

        @classmethod
        def gateway_service(cls, options=None, clock=None, wiring=None, **models):
            _, inner = cls.guard_service()

            def look_up(known, unknown, image):
                rows = [cls.find_row(one) for one in image]
                return np.stack([unknown if row is None else known[row] for row in rows])

            def features(arrays):
                return {names.LATENTS: look_up(cls.latents, cls.latents[0] * np.nan, arrays["image"])}

            def production(arrays):
                return {"logits": look_up(cls.logits, cls.logits[0], arrays["image"])}

            def judge(arrays):
                return inner.answer([Request(arrays, VERDICTS)])[0].arrays()

            backend = FakeBackend(**{"m": production, "m_features": features, "m_guard": judge, **models})
            more = {"clock": clock} if clock else {}
            service = GatewayService(backend, wiring or cls.wiring, options or GatewayOptions(), Meter(backend, "m"), **more)
            return backend, service

        @classmethod
        def ask_gateway(cls, rows, wanted=ALL, image=None, **more):
            return Request({"image": cls.image[rows] if image is None else image}, wanted, **more)

    return Served


def fail(*_):
    raise TritonError("Stub process '/srv/secret/m_guard_0_0' is not healthy.", TritonError.INTERNAL)


def check_scores(response, served, rows):
    arrays = response.arrays()
    assert np.allclose(arrays[names.SCORE][:, 0], served.truth.scores[rows], rtol=1e-5, atol=1e-5)
    assert np.allclose(arrays[names.P_VALUE][:, 0], served.truth.p_values[rows], atol=1e-6)
    assert np.array_equal(arrays[names.FLAGGED][:, 0], served.truth.flagged[rows])
    assert [arrays[n].dtype for n in VERDICTS] == [np.float32, np.float32, np.uint8]


# The guard


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.sets(st.integers(1, 11), max_size=5))
def test_every_request_of_a_stack_gets_its_own_rows_with_one_call_a_step(served, cuts):
    backend, service = served.guard_service()
    parts = [list(range(a, b)) for a, b in pairwise([0, *sorted(cuts), 12])]
    responses = service.answer([served.ask_guard(rows) for rows in parts])
    assert len(backend.calls) == served.steps
    assert backend.calls[0][1][names.NOISED][0] == 12
    for response, rows in zip(responses, parts, strict=True):
        check_scores(response, served, rows)
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
    check_scores(first, served, [0, 1])
    check_scores(third, served, [2])
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
    check_scores(stays, served, [1])
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


def test_the_health_check_is_not_counted(served):
    backend, service = served.guard_service()
    service.answer([served.ask_guard([0], identity=REQUEST_ID), served.ask_guard([1, 2])])
    assert backend.total("diffense_scored_total", model="m") == 2


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


# The gateway


def test_the_gateway_gives_production_outputs_and_verdicts(served):
    _, service = served.gateway_service()
    responses = service.answer([served.ask_gateway([0, 1]), served.ask_gateway([5])])
    for response, rows in zip(responses, ([0, 1], [5]), strict=True):
        check_scores(response, served, rows)
        assert np.array_equal(response.arrays()["logits"], served.logits[rows])


def test_the_gateway_names_a_bad_image_and_answers_its_neighbour(served):
    _, service = served.gateway_service()
    image = served.image[[1, 2]].copy()
    image[1, 0, 0, 0] = np.nan
    good, bad = service.answer([served.ask_gateway([0]), served.ask_gateway([], image=image)])
    check_scores(good, served, [0])
    assert bad.error().code() == TritonError.INVALID_ARG
    assert "image 1 of the request" in bad.error().message()


@pytest.mark.parametrize("broken", ["m_features", "m_guard"])
def test_production_answers_when_the_guard_is_dead(served, broken):
    backend, service = served.gateway_service(**{broken: fail})
    (response,) = service.answer([served.ask_gateway([0, 1])])
    assert np.array_equal(response.arrays()["logits"], served.logits[:2])
    assert (response.arrays()[names.FLAGGED] == names.UNSCORED).all()
    assert backend.total("diffense_unscored_total", reason="guard") == 2


def test_production_answers_while_the_guard_hangs(served):
    release = threading.Event()

    def hang(arrays):
        release.wait(30)
        raise TritonError("too late")

    backend, service = served.gateway_service(GatewayOptions(budget_ms=20), m_guard=hang)
    (response,) = service.answer([served.ask_gateway([0])])
    release.set()
    assert np.array_equal(response.arrays()["logits"], served.logits[:1])
    assert response.arrays()[names.FLAGGED].tolist() == [[names.UNSCORED]]
    assert backend.total("diffense_unscored_total", reason="budget") == 1


def test_a_closed_gateway_gives_an_error_without_a_verdict(served):
    _, service = served.gateway_service(GatewayOptions(closed=True), m_guard=fail)
    (response,) = service.answer([served.ask_gateway([0])])
    assert response.error().code() == TritonError.UNAVAILABLE
    assert "/srv" not in response.error().message()


def flag_second(arrays):
    rows = len(arrays[names.LATENTS])
    flagged = (np.arange(rows) == 1).astype(np.uint8)[:, None]
    return {names.SCORE: flagged + np.float32(1), names.P_VALUE: 1 - flagged * np.float32(0.9), names.FLAGGED: flagged}


def test_abstain_withholds_the_flagged_image_alone(served):
    _, service = served.gateway_service(GatewayOptions(policy="abstain"), m_guard=flag_second)
    arrays = service.answer([served.ask_gateway([0, 1, 2])])[0].arrays()
    assert (arrays["logits"][1] == 0).all()
    assert np.array_equal(arrays["logits"][[0, 2]], served.logits[[0, 2]])
    assert arrays[names.FLAGGED][:, 0].tolist() == [0, 1, 0]


def test_reject_refuses_the_request_with_the_flagged_image_alone(served):
    _, service = served.gateway_service(GatewayOptions(policy="reject"), m_guard=flag_second)
    first, second = service.answer([served.ask_gateway([0, 1]), served.ask_gateway([2])])
    assert first.error().code() == TritonError.INVALID_ARG
    assert "image 1 of the request" in first.error().message()
    assert np.array_equal(second.arrays()["logits"], served.logits[[2]])


def test_a_production_error_keeps_its_code_and_tells_nothing_of_the_inside(served):
    _, service = served.gateway_service(m=fail)
    (response,) = service.answer([served.ask_gateway([0])])
    assert response.error().code() == TritonError.INTERNAL
    assert response.error().message() == "m failed"


def test_the_shared_gateway_falls_back_to_the_untouched_model(served):
    shared = Wiring(**{**served.wiring.__dict__, "shared": True, "latents_model": "m_tapped"})
    backend, service = served.gateway_service(wiring=shared, m_tapped=fail, m_features=fail)
    (response,) = service.answer([served.ask_gateway([0])])
    assert np.array_equal(response.arrays()["logits"], served.logits[:1])
    assert backend.calls[1][0] == "m"


def test_the_gateway_answers_a_cancelled_request_with_cancelled(served):
    backend, service = served.gateway_service()
    (response,) = service.answer([served.ask_gateway([0], cancelled=lambda: True)])
    assert response.error().code() == TritonError.CANCELLED
    assert backend.calls == []


# Parts


def test_a_budget_rests_after_failures_in_a_row_and_tries_again():
    now = [0.0]
    budget = Budget(5.0, clock=lambda: now[0])
    tried = []

    def dead(deadline):
        tried.append(deadline)
        raise CallError("m_guard", "dead")

    for _ in range(STRIKES):
        with pytest.raises(OverBudgetError, match="guard"):
            budget.run(dead)
    with pytest.raises(OverBudgetError, match="resting"):
        budget.run(dead)
    assert len(tried) == STRIKES
    now[0] = REST_S
    assert budget.run(lambda deadline: deadline) == REST_S + 5.0
    with pytest.raises(OverBudgetError, match="guard"):
        budget.run(dead)
    assert len(tried) == STRIKES + 1
    budget.close()


DTYPES = st.sampled_from([np.float32, np.float16, np.int64, np.uint8, np.bool_])


@given(array=hnp.arrays(DTYPES, hnp.array_shapes(min_dims=1, max_dims=3)), data=st.data())
def test_replaced_rows_say_nothing_and_the_others_are_untouched(array, data):
    hidden = data.draw(hnp.arrays(np.bool_, len(array)))
    before = array.copy()
    replaced = replace_outputs(array, hidden)
    assert replaced.dtype == array.dtype
    assert np.array_equal(array, before, equal_nan=array.dtype.kind == "f")
    assert np.array_equal(replaced[~hidden], array[~hidden], equal_nan=array.dtype.kind == "f")
    assert len(np.unique(replaced[hidden])) == int(hidden.any())


def test_a_withheld_softmax_favours_no_class():
    replaced = replace_outputs(np.eye(4, dtype=np.float32), np.array([True, False, False, False]), even=True)
    assert replaced[0].tolist() == [0.25] * 4
    assert replaced[1].tolist() == [0, 1, 0, 0]


@given(policy=st.sampled_from(["annotate", "abstain", "reject"]), budget=st.integers(1, 10**6), closed=st.booleans())
def test_gateway_options_survive_the_config(policy, budget, closed):
    options = GatewayOptions(policy, budget, closed)
    assert GatewayOptions.from_parameters(options.to_parameters()) == options


@pytest.mark.parametrize(
    "parameters",
    [{"diffense_policy": "block"}, {"diffense_budget_ms": "soon"}, {"diffense_budget_ms": "0"}, {"diffense_closed": "maybe"}],
)
def test_senseless_gateway_parameters_are_refused(parameters):
    with pytest.raises(ValueError, match=r"policy|budget|closed"):
        GatewayOptions.from_parameters(parameters)


def test_wiring_survives_the_config_and_refuses_strangers(served):
    assert Wiring.from_parameters(served.wiring.to_parameters()) == served.wiring
    with pytest.raises(ValueError, match="diffense_settings"):
        Wiring.from_parameters({})
    with pytest.raises(ValueError, match="another version"):
        Wiring.from_parameters({"diffense_settings": '{"model": "m", "colour": "red"}'})


def test_a_call_reports_the_code_of_the_model_that_failed():
    def refuse(arrays):
        raise TritonError("wrong shape", TritonError.INVALID_ARG)

    with pytest.raises(CallError, match="wrong shape") as caught:
        call_model(FakeBackend(m=refuse), "m", {}, ["y"])
    assert caught.value.code == "INVALID_ARG"
    assert math.isfinite(len(caught.value.public))

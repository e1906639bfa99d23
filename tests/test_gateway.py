"""What the gateway answers."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from diffense import names
from diffense.health import REQUEST_ID
from diffense.serving.settings import GatewayOptions
from fake_triton import TritonError
from served_family import DIRECT, WIRING, ServedFamily, fail


@pytest.fixture(scope="module")
def served(guard, clean_images):
    return ServedFamily(guard, clean_images)


def test_the_gateway_gives_production_outputs_and_verdicts(served):
    _, service = served.gateway_service()
    responses = service.answer([served.ask_gateway([0, 1]), served.ask_gateway([5])])
    for response, rows in zip(responses, ([0, 1], [5]), strict=True):
        served.check(response, rows)
        assert np.array_equal(response.arrays()["logits"], served.logits[rows])


def test_the_gateway_names_a_bad_image_and_answers_its_neighbour(served):
    _, service = served.gateway_service()
    image = served.image[[1, 2]].copy()
    image[1, 0, 0, 0] = np.nan
    good, bad = service.answer([served.ask_gateway([0]), served.ask_gateway([], image=image)])
    served.check(good, [0])
    assert bad.error().code() == TritonError.INVALID_ARG
    assert "image 1 of the request" in bad.error().message()


def test_a_direct_gateway_asks_one_model_and_counts_the_verdicts_itself(served):
    backend, service = served.gateway_service(wiring=DIRECT, m=fail, m_guard=fail, m_tapped=served.judge_directly)
    image = served.image[[1, 2]].copy()
    image[1, 0, 0, 0] = np.nan
    health = served.ask_gateway([3], identity=REQUEST_ID)
    good, bad, _ = service.answer([served.ask_gateway([0, 7]), served.ask_gateway([], image=image), health])
    served.check(good, [0, 7])
    assert np.array_equal(good.arrays()["logits"], served.logits[[0, 7]])
    assert [bad.arrays()[name][1].item() for name in names.VERDICT_TENSORS] == [-1, -1, names.UNSCORED]
    assert bad.arrays()[names.FLAGGED][0] == served.truth.flagged[1]
    assert backend.total("diffense_scored_total") == 4
    assert backend.total("diffense_scored_total", label="health") == 1
    assert backend.total("diffense_unscored_total", reason="score") == 1
    assert backend.total("diffense_flagged_total") == served.truth.flagged[[0, 1, 3, 7]].sum()


def test_the_guard_is_called_under_the_id_of_a_request_that_is_alone(served):
    backend, service = served.gateway_service()
    service.answer([served.ask_gateway([0], identity="a")])
    service.answer([served.ask_gateway([0], identity="a"), served.ask_gateway([1], identity="b")])
    service.close()
    assert [given for model, given in backend.identities if model == "m_guard"] == ["a", ""]


def test_an_empty_or_unreadable_request_is_refused_alone(served):
    _, service = served.gateway_service()
    broken = served.ask_gateway([0])
    broken.inputs = lambda: 1 / 0
    nothing, unreadable, good = service.answer([served.ask_gateway([]), broken, served.ask_gateway([1])])
    assert nothing.error().code() == TritonError.INVALID_ARG and "no image" in nothing.error().message()
    assert unreadable.error().code() == TritonError.INTERNAL and "division" not in unreadable.error().message()
    served.check(good, [1])


def test_an_answer_of_a_direct_graph_that_lacks_a_row_costs_the_verdict_alone(served):
    def lose(arrays):
        found = served.judge_directly(arrays)
        return found | {names.FLAGGED: found[names.FLAGGED][1:]}

    backend, service = served.gateway_service(wiring=DIRECT, m_tapped=lose)
    (response,) = service.answer([served.ask_gateway([0, 1])])
    assert np.array_equal(response.arrays()["logits"], served.logits[:2])
    assert (response.arrays()[names.FLAGGED] == names.UNSCORED).all()
    assert backend.total("diffense_unscored_total", reason="internal") == 2


def test_without_the_verdicts_graph_a_direct_gateway_asks_production(served):
    backend, service = served.gateway_service(wiring=DIRECT, m_tapped=fail)
    (response,) = service.answer([served.ask_gateway([0, 1])])
    assert np.array_equal(response.arrays()["logits"], served.logits[:2])
    assert (response.arrays()[names.FLAGGED] == names.UNSCORED).all()
    assert backend.total("diffense_unscored_total", reason="guard") == 2


@pytest.mark.parametrize("broken", ["m_features", "m_guard"])
def test_production_answers_when_the_guard_is_dead(served, broken):
    backend, service = served.gateway_service(**{broken: fail})
    (response,) = service.answer([served.ask_gateway([0, 1])])
    assert np.array_equal(response.arrays()["logits"], served.logits[:2])
    assert (response.arrays()[names.FLAGGED] == names.UNSCORED).all()
    assert backend.total("diffense_unscored_total", reason="guard") == 2


def refuse_large(served):
    def production(arrays):
        if (arrays["image"] > 50).any():
            raise TritonError("index out of range", TritonError.INVALID_ARG)
        return served.production(arrays)

    return production


def test_a_request_that_production_refuses_is_refused_alone(served):
    _, service = served.gateway_service(m=refuse_large(served))
    image = served.image[[1]] * 0 + 100
    good, bad, other = service.answer([served.ask_gateway([0]), served.ask_gateway([], image=image), served.ask_gateway([5])])
    served.check(good, [0])
    served.check(other, [5])
    assert bad.error().code() == TritonError.INVALID_ARG
    assert "index out of range" in bad.error().message()


def test_the_time_that_production_took_is_the_clients_too(served):
    now = [0.0]

    def production(arrays):
        now[0] += 0.25
        return served.production(arrays)

    def features(arrays):
        raise AssertionError("nobody waits any more")

    backend, service = served.gateway_service(clock=lambda: now[0], m=production, m_features=features)
    (response,) = service.answer([served.ask_gateway([0], timeout_us=250_000)])
    assert np.array_equal(response.arrays()["logits"], served.logits[:1])
    assert response.arrays()[names.FLAGGED].tolist() == [[names.UNSCORED]]
    assert backend.total("diffense_unscored_total", reason="timeout") == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_leave_a_scored_image_its_production_answer(served, value):
    wiring = replace(WIRING, loop="whole", callee="", latents_model="m_tapped", shared=True, raw_logits="")

    def tapped(arrays):
        logits = served.production(arrays)["logits"].copy()
        score = served.look_up(served.truth.scores[:, None], served.truth.scores[:1] * np.nan, arrays["image"])
        logits[1], score[1] = value, np.nan
        return {"logits": logits, names.RAW_SCORE: score.astype(np.float32)}

    _, service = served.gateway_service(wiring=wiring, m=fail, m_tapped=tapped)
    (response,) = service.answer([served.ask_gateway([0, 1, 2])])
    flagged = response.arrays()[names.FLAGGED][:, 0].tolist()
    assert flagged == [served.truth.flagged[0], names.UNSCORED, served.truth.flagged[2]]
    assert not np.isfinite(response.arrays()["logits"][1]).any()


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


def test_a_closed_gateway_calls_a_bad_image_bad_and_asks_to_come_again_where_that_helps(served):
    closed = GatewayOptions(closed=True)
    _, service = served.gateway_service(closed, wiring=DIRECT, m_tapped=served.judge_directly)
    image = served.image[[1]].copy()
    image[0, 0, 0, 0] = np.nan
    (bad,) = service.answer([served.ask_gateway([], image=image)])
    assert bad.error().code() == TritonError.INVALID_ARG
    now = [0.0]
    _, service = served.gateway_service(closed, clock=lambda: now.append(now[-1] + 10) or now[-1])
    (late,) = service.answer([served.ask_gateway([0], timeout_us=1_000_000)])
    assert late.error().code() == TritonError.UNAVAILABLE and "timeout" in late.error().message()


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
    shared = replace(WIRING, shared=True, latents_model="m_tapped", raw_logits="")
    backend, service = served.gateway_service(wiring=shared, m_tapped=fail, m_features=fail)
    (response,) = service.answer([served.ask_gateway([0])])
    assert np.array_equal(response.arrays()["logits"], served.logits[:1])
    assert backend.calls[1][0] == "m"


def test_the_gateway_answers_a_cancelled_request_with_cancelled(served):
    backend, service = served.gateway_service()
    (response,) = service.answer([served.ask_gateway([0], cancelled=lambda: True)])
    assert response.error().code() == TritonError.CANCELLED
    assert backend.calls == []


def test_nonsense_of_production_ends_every_request_with_an_error(served):
    _, service = served.gateway_service(m=lambda arrays: {"logits": np.float32(0)})
    for response in service.answer([served.ask_gateway([0]), served.ask_gateway([1])]):
        assert response.error().code() == TritonError.INTERNAL
        assert "Error" not in response.error().message()


def test_what_the_tapped_graph_refuses_is_not_asked_again(served):
    def refuse_input(arrays):
        raise TritonError("bad shape", TritonError.INVALID_ARG)

    shared = replace(WIRING, shared=True, latents_model="m_tapped", raw_logits="")
    backend, service = served.gateway_service(wiring=shared, m_tapped=refuse_input)
    (response,) = service.answer([served.ask_gateway([0])])
    assert response.error().code() == TritonError.INVALID_ARG
    assert [call[0] for call in backend.calls] == ["m_tapped"]

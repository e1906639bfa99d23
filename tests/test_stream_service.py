"""What the stream sends, and to whom, when the models around it fail."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from diffense import names
from diffense.serving.budget import STRIKES
from diffense.serving.stream import UNDER_WAY
from fake_triton import TritonError
from served_family import DIRECT, VERDICTS, WIRING, ServedFamily, fail


@pytest.fixture(scope="module")
def served(guard, clean_images):
    return ServedFamily(guard, clean_images)


def answer(service, *requests):
    service.answer(requests)
    service.close()
    return [request.sender.wait() for request in requests]


def test_the_prediction_comes_first_and_the_verdict_last(served):
    _, service = served.stream_service()
    for sent, rows in zip(answer(service, served.ask_gateway([0, 1]), served.ask_gateway([5])), ([0, 1], [5]), strict=True):
        prediction, verdict = sent
        assert list(prediction) == ["logits"]
        assert np.array_equal(prediction["logits"], served.logits[rows])
        assert list(verdict) == VERDICTS
        served.check_arrays(verdict, rows)


def test_a_bad_image_costs_its_own_request_the_verdict(served):
    _, service = served.stream_service()
    image = served.image[[1, 2]].copy()
    image[1, 0, 0, 0] = np.nan
    good, bad = answer(service, served.ask_gateway([0]), served.ask_gateway([], image=image))
    served.check_arrays(good[1], [0])
    assert list(bad[0]) == ["logits"]
    assert bad[1].code() == TritonError.INVALID_ARG
    assert "image 1 of the request" in bad[1].message()


def test_an_empty_or_unreadable_request_is_refused_alone(served):
    _, service = served.stream_service()
    broken = served.ask_gateway([0])
    broken.inputs = lambda: 1 / 0
    nothing, unreadable, good = answer(service, served.ask_gateway([]), broken, served.ask_gateway([1]))
    assert nothing[0].code() == TritonError.INVALID_ARG and "no image" in nothing[0].message()
    assert unreadable[0].code() == TritonError.INTERNAL and "division" not in unreadable[0].message()
    served.check_arrays(good[1], [1])


def test_requests_of_unlike_size_are_not_stacked(served):
    shapes = []

    def production(arrays):
        shapes.append(arrays["image"].shape)
        return {"logits": np.zeros((len(arrays["image"]), 4), np.float32)}

    _, service = served.stream_service(m=production, m_features=fail)
    small = np.ascontiguousarray(served.image[:2, :, :8])
    sent = answer(service, served.ask_gateway([0]), served.ask_gateway([], image=small), served.ask_gateway([1]))
    assert shapes == [(2, *served.image.shape[1:]), (2, 3, 8, served.image.shape[-1])]
    assert [len(prediction["logits"]) for prediction, _ in sent] == [1, 2, 1]


def test_a_direct_stream_counts_the_verdicts_itself(served):
    backend, service = served.stream_service(wiring=DIRECT, m=fail, m_guard=fail, m_tapped=served.judge_directly)
    rows = ([0, 7], [5])
    for sent, picked in zip(answer(service, *(served.ask_gateway(part) for part in rows)), rows, strict=True):
        served.check_arrays(sent[1], picked)
    assert backend.total("diffense_scored_total") == 3
    for label in set(served.logits[[0, 7, 5]].argmax(axis=1).tolist()):
        expected = (served.logits[[0, 7, 5]].argmax(axis=1) == label).sum()
        assert backend.total("diffense_scored_total", label=str(label)) == expected


@pytest.mark.parametrize("broken", ["m_features", "m_guard"])
def test_a_dead_guard_leaves_the_prediction_and_an_unscored_verdict(served, broken):
    backend, service = served.stream_service(**{broken: fail})
    ((prediction, verdict),) = answer(service, served.ask_gateway([0, 1]))
    assert np.array_equal(prediction["logits"], served.logits[:2])
    assert verdict[names.FLAGGED].tolist() == [[names.UNSCORED]] * 2
    assert (verdict[names.SCORE] == -1).all()
    assert backend.total("diffense_unscored_total", reason="guard") == 2


def test_a_guard_that_keeps_failing_is_left_alone_for_a_while(served):
    backend, service = served.stream_service(m_guard=fail)
    requests = [served.ask_gateway([0]) for _ in range(STRIKES + 3)]
    for request in requests:
        service.answer([request])
        assert request.sender.wait()[1][names.FLAGGED].tolist() == [[names.UNSCORED]]
    assert [model for model, _ in backend.calls].count("m_guard") < len(requests)
    assert backend.total("diffense_unscored_total", reason="resting") > 0


def test_a_production_error_is_the_only_answer_and_tells_nothing_of_the_inside(served):
    _, service = served.stream_service(m=fail)
    for (error,) in answer(service, served.ask_gateway([0]), served.ask_gateway([1])):
        assert error.code() == TritonError.INTERNAL
        assert error.message() == "m failed"


def test_a_request_that_production_refuses_is_refused_alone(served):
    def production(arrays):
        if (arrays["image"] > 50).any():
            raise TritonError("index out of range", TritonError.INVALID_ARG)
        return served.production(arrays)

    _, service = served.stream_service(m=production)
    requests = [served.ask_gateway([0]), served.ask_gateway([], image=served.image[[1]] * 0 + 100), served.ask_gateway([5])]
    good, bad, other = answer(service, *requests)
    served.check_arrays(good[1], [0])
    served.check_arrays(other[1], [5])
    assert [error.code() for error in bad] == [TritonError.INVALID_ARG]


def test_nonsense_of_production_ends_every_request_with_an_error(served):
    _, service = served.stream_service(m=lambda arrays: {"logits": np.float32(0)})
    for (error,) in answer(service, served.ask_gateway([0]), served.ask_gateway([1])):
        assert error.code() == TritonError.INTERNAL
        assert "Error" not in error.message()


def test_nonsense_of_the_guard_is_no_verdict(served):
    _, service = served.stream_service(m_features=lambda arrays: {names.LATENTS: np.float32(0)})
    ((_, verdict),) = answer(service, served.ask_gateway([0]))
    assert verdict[names.FLAGGED].tolist() == [[names.UNSCORED]]


def test_the_shared_stream_makes_one_call_and_falls_back_to_the_untouched_model(served):
    shared = replace(WIRING, shared=True, latents_model="m_tapped", raw_logits="")
    backend, service = served.stream_service(wiring=shared, m_tapped=served.tapped)
    ((_, verdict),) = answer(service, served.ask_gateway([3], identity="r"))
    served.check_arrays(verdict, [3])
    assert [model for model, _ in backend.calls] == ["m_tapped", "m_guard"]
    assert backend.traces == [("m_tapped", "trace of r"), ("m_guard", None)]  # whose call may outlive the request, is not in it
    _, service = served.stream_service(wiring=shared, m_tapped=fail)
    ((prediction, verdict),) = answer(service, served.ask_gateway([3]))
    assert np.array_equal(prediction["logits"], served.logits[[3]])
    assert verdict[names.FLAGGED].tolist() == [[names.UNSCORED]]


def test_what_nobody_asked_for_is_not_sent_and_not_left_out_of_the_guard(served):
    backend, service = served.stream_service()
    only_logits, only_flags = answer(service, served.ask_gateway([0], ["logits"]), served.ask_gateway([1], [names.FLAGGED]))
    assert [list(part) for part in only_logits] == [["logits"]]
    assert [list(part) for part in only_flags] == [[names.FLAGGED]]
    assert [model for model, _ in backend.calls] == ["m", "m_features", "m_guard"]


def test_cancelled_and_late_requests_cost_no_scoring(served):
    backend, service = served.stream_service()
    cancelled = served.ask_gateway([0], cancelled=lambda: True)
    late = served.ask_gateway([1], timeout_us=1)
    (refused,), (_, verdict) = answer(service, cancelled, late)
    assert refused.code() == TritonError.CANCELLED
    assert verdict[names.FLAGGED].tolist() == [[names.UNSCORED]]
    assert backend.total("diffense_unscored_total", reason="timeout") == 1
    assert "m_guard" not in [model for model, _ in backend.calls]


def test_a_client_that_is_gone_takes_no_neighbour_along(served):
    _, service = served.stream_service()
    gone, here = served.ask_gateway([0]), served.ask_gateway([1])

    def lose(*_, **__):
        raise TritonError("no such client")

    gone.sender.send = lose
    service.answer([gone, here])
    service.close()
    served.check_arrays(here.sender.wait()[1], [1])


def test_predictions_do_not_wait_for_verdicts_but_for_too_many_of_them(served):
    gate = threading.Event()

    def hang(arrays):
        assert gate.wait(30)
        raise TritonError("late")

    _, service = served.stream_service(m_guard=hang)
    requests = [served.ask_gateway([place]) for place in range(UNDER_WAY + 2)]
    caller = threading.Thread(target=lambda: [service.answer([request]) for request in requests])
    caller.start()
    end = time.monotonic() + 30
    while not requests[UNDER_WAY].sender.sent and time.monotonic() < end:
        time.sleep(0.01)
    assert caller.is_alive()
    assert [len(request.sender.sent) for request in requests] == [1] * (UNDER_WAY + 1) + [0]
    gate.set()
    caller.join(30)
    service.close()
    assert all(len(request.sender.wait()) == 2 for request in requests)


def test_a_verdict_that_cannot_be_sent_still_ends_every_request(served, monkeypatch):
    _, service = served.stream_service()
    monkeypatch.setattr("diffense.serving.verdicts.VerdictRows.to_tensors", lambda rows: 1 / 0)
    for _, error in answer(service, served.ask_gateway([0]), served.ask_gateway([1])):
        assert error.code() == TritonError.INTERNAL
        assert "division" not in error.message()

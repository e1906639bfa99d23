"""The parts that gateway and stream are made of: budget, policy, and the settings in their configs."""

import json
import threading
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from diffense.serving.budget import REST_S, STRIKES, WORKERS, Budget, OverBudgetError
from diffense.serving.calls import CallError, call_model
from diffense.serving.policy import replace_outputs
from diffense.serving.settings import GatewayOptions, Wiring
from fake_triton import FakeBackend, TritonError
from served_family import DIRECT, WIRING


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


def test_wiring_survives_the_config_and_refuses_strangers():
    assert Wiring.from_parameters(WIRING.to_parameters()) == WIRING
    with pytest.raises(ValueError, match="diffense_settings"):
        Wiring.from_parameters({})
    with pytest.raises(ValueError, match="another version"):
        Wiring.from_parameters({"diffense_settings": '{"model": "m", "colour": "red"}'})
    stated = json.loads(WIRING.to_parameters()["diffense_settings"])
    with pytest.raises(ValueError, match="another version"):
        Wiring.from_parameters({"diffense_settings": json.dumps(stated | {"loop": "of tomorrow"})})


def test_direct_settings_are_refused_by_code_that_knows_no_such_loop():
    assert Wiring.from_parameters(DIRECT.to_parameters()) == DIRECT
    known = {field.name for field in fields(Wiring)}  # which older code would have taken
    assert set(json.loads(DIRECT.to_parameters()["diffense_settings"])) > known
    assert set(json.loads(WIRING.to_parameters()["diffense_settings"])) == known


def test_a_call_reports_the_code_of_the_model_that_failed():
    def refuse(arrays):
        raise TritonError("wrong shape", TritonError.INVALID_ARG)

    with pytest.raises(CallError, match="wrong shape") as caught:
        call_model(FakeBackend(m=refuse), "m", {}, ["y"])
    assert caught.value.code == "INVALID_ARG"
    assert caught.value.public == "m: wrong shape"


def test_one_clients_short_patience_does_not_switch_the_guard_off():
    budget, release = Budget(30.0), threading.Event()
    for _ in range(STRIKES + 1):
        with pytest.raises(OverBudgetError, match="budget"):
            budget.run(lambda deadline: release.wait(30), seconds=0.001)
    release.set()
    assert budget.run(lambda deadline: "scored") == "scored"
    budget.close()


def test_calls_that_hang_keep_no_images_of_others_in_a_queue():
    budget, release, kept = Budget(30.0), threading.Event(), []
    for _ in range(WORKERS + 20):
        with pytest.raises(OverBudgetError, match="budget"):
            budget.run(lambda deadline: (kept.append(deadline), release.wait(30)), seconds=0.001)
    release.set()
    budget.run(lambda deadline: None)
    budget.close()
    assert len(kept) <= WORKERS

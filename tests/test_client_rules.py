import os
from multiprocessing.shared_memory import SharedMemory
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffense.errors import (
    ClientError,
    DeadlineError,
    ModelNotReadyError,
    OptionError,
    OverloadedError,
    ServerDownError,
)
from diffense_client._core import (
    Settings,
)
from diffense_client._failures import (
    LONGEST_DETAIL,
    Deadline,
    classify_grpc,
    classify_http,
    describe_failure,
    plan_retries,
    shorten,
    split_url,
)
from diffense_client._shared_memory import MOUNT, Region, RegionPool


@given(st.text() | st.sampled_from([code.name for code in grpc.StatusCode]), st.booleans())
def test_every_grpc_status_has_its_error(code: str, reachable: bool) -> None:
    kind = classify_grpc(code, reachable=reachable)
    assert issubclass(kind, ClientError) and kind is not ClientError
    assert (kind is OverloadedError) == (code == "UNAVAILABLE" and reachable)
    assert (kind is ServerDownError) == (code == "UNAVAILABLE" and not reachable)


@given(st.integers(100, 999))
def test_every_http_status_has_its_error(status: int) -> None:
    kind = classify_http(status)
    assert issubclass(kind, ClientError) and kind is not ClientError
    assert (kind is OverloadedError) == (status == 503)
    assert (kind is ModelNotReadyError) == (status == 404)


@given(st.sampled_from(ClientError.__subclasses__()), st.sampled_from(["grpc", "http"]), st.text())
def test_failures_are_told_in_one_printable_line(kind: type[ClientError], protocol: Any, detail: str) -> None:
    line = describe_failure(kind, protocol, "host:1", "'digits'", detail)
    assert line.isprintable()
    assert line.startswith(f"host:1 ({protocol}) ")


def test_a_traceback_is_cut_to_its_last_line() -> None:
    detail = 'Traceback (most recent call last):\n  File "/srv/model.py", line 3\nValueError: bad\n'
    assert shorten(detail) == "ValueError: bad"
    assert len(shorten("x" * 10_000)) == LONGEST_DETAIL


@given(st.sampled_from(["", "grpc://", "http://"]), st.sampled_from(["localhost", "10.0.0.1", "[::1]", "a-b.c"]))
def test_addresses_are_split(scheme: str, host: str) -> None:
    assert split_url(f"{scheme}{host}:8001") == (scheme[:4] or None, host, 8001)


@given(st.text() | st.from_regex(r"(https?://)?[a-z]*:[0-9]{0,7}(/x)?", fullmatch=True))
def test_what_is_no_address_is_an_option_error(text: str) -> None:
    try:
        _, host, port = split_url(text)
    except OptionError:
        return
    assert host in text and 0 < port < 65536


@pytest.mark.parametrize(
    "change",
    [
        {"url": "localhost"},
        {"url": "https://localhost:8000"},
        {"url": "http://localhost:8000"},
        {"protocol": "rest"},
        {"model": ""},
        {"timeout_s": 0.0},
        {"timeout_s": float("inf")},
        {"timeout_s": float("nan")},
        {"retries": -1},
        {"batch_size": 0},
    ],
)
def test_senseless_settings_are_refused(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "url": "grpc://localhost:8001",
        "model": "m",
        "protocol": "grpc",
        "timeout_s": 1.0,
        "retries": 0,
        "batch_size": None,
    }
    assert Settings.check(**good).address == "localhost:8001"
    with pytest.raises(OptionError):
        Settings.check(**(good | change))


def test_a_deadline_that_ran_out_is_told() -> None:
    assert 0 < Deadline(10).remaining() <= 10
    with pytest.raises(DeadlineError, match="0 s"):
        Deadline(0).remaining()


@given(st.integers(0, 20), st.floats(0.01, 100))
def test_waits_between_attempts_stay_within_the_deadline(retries: int, timeout_s: float) -> None:
    plan = plan_retries(retries, timeout_s)
    assert plan["attempts"] == retries + 1
    assert plan["timeout"] == timeout_s
    assert plan["wait_initial"] <= plan["wait_max"]
    assert plan["wait_max"] + plan["wait_jitter"] <= timeout_s / 5 + 1e-9


def test_a_region_holds_what_was_written_and_is_used_again() -> None:
    pool, tensor = RegionPool(), np.random.default_rng(0).random((2, 3), np.float32)
    region = pool.acquire(tensor.nbytes)
    region.write(tensor)
    other = SharedMemory(region.name)
    assert np.array_equal(np.frombuffer(other.buf[: tensor.nbytes], np.float32).copy(), tensor.ravel())
    other.close()
    second = pool.acquire(8)
    assert second.name != region.name
    pool.release(region)
    pool.release(second)
    assert pool.acquire(tensor.nbytes) is region
    region.registered = True
    pool.retire(region)
    pool.retire_all()
    assert pool.take_retired() == [region.name]
    assert not (MOUNT / region.name).exists() and not (MOUNT / second.name).exists()


def test_a_region_that_does_not_fit_is_refused_and_leaves_nothing() -> None:
    before = set(MOUNT.glob(f"diffense-{os.getpid()}-*"))
    with pytest.raises(OptionError, match="shm-size"):
        Region(2**46)
    assert set(MOUNT.glob(f"diffense-{os.getpid()}-*")) == before

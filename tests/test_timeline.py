"""Where a request's time goes: what a trace tells, moment by moment, and the real server's traces."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import records
from benchmarks.serving import networks, table, timeline
from benchmarks.serving.timeline import STEPS, Span, divide, read_trace
from diffense.errors import BenchError
from test_serving_bench import make_tiny

MS = 1_000_000
COMPUTE = ("QUEUE_START", "COMPUTE_START", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START", "COMPUTE_END")


def make_span(model: str, *at_ms: float, children: tuple[Span, ...] = ()) -> Span:
    """A model that was asked at the first of these times and answered at the last."""
    stamps = dict(zip(COMPUTE, (int(at * MS) for at in at_ms), strict=True))
    return Span(model, "r", None, stamps | {"REQUEST_START": stamps["QUEUE_START"]}, list(children))


def make_root(end_ms: float, *children: Span) -> Span:
    stamps = {
        "GRPC_WAITREAD_END": 0,
        "REQUEST_START": MS,
        "GRPC_SEND_START": int((end_ms - 1) * MS),
        "GRPC_SEND_END": int(end_ms * MS),
    }
    return Span("m_guarded", "r", None, stamps, list(children))


def test_each_moment_has_one_owner_and_the_innermost_wins() -> None:
    production = make_span("m", 1, 2, 3, 10, 11)
    features = make_span("m_features", 1, 2, 3, 14, 15)
    denoiser = make_span("m_denoiser", 18, 19, 20, 24, 25)
    guard = make_span("m_guard", 15.5, 16, 17, 30, 31, children=(denoiser,))
    found = divide(make_root(33, production, features, guard), "m")
    assert found == pytest.approx(
        {
            "gRPC": 2,  # 0-1, 32-33
            "production": 7,  # 3-10, the features beside it
            "features": 4,  # 10-14; production's copy of 10-11 waits for nobody
            "denoiser or scorer": 4,  # 20-24
            "guard's loop and scoring": 6,  # 17-18, 25-30
            "copies": 1 + 1 + 1 + 2 + 1,  # 2-3, 14-15, 16-17, the denoiser's 19-20 and 24-25, 30-31
            "queues": 1 + 0.5 + 1,  # 1-2, 15.5-16, the denoiser's 18-19
            "between the models": 0.5 + 1,  # 15-15.5, 31-32
        }
    )


@given(st.lists(st.lists(st.integers(0, 50), min_size=5, max_size=5).map(sorted), min_size=0, max_size=4))
def test_the_steps_add_up_to_the_time_in_the_server(times: list[list[int]]) -> None:
    names = ("m", "m_features", "m_guard", "m_denoiser")
    spans = [make_span(name, *own) for name, own in zip(names, times, strict=False)]
    found = divide(make_root(40, *spans), "m")  # whatever the spans say, also of moments after the end
    assert sum(found.values()) == pytest.approx(40) and min(found.values()) >= 0


def test_no_trace_and_one_of_another_model_are_told(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    with pytest.raises(BenchError, match="wrote no trace"):
        read_trace(file, "m_guarded")
    file.write_text(
        '[{"id": 1, "model_name": "m", "request_id": "r"}, {"id": 1, "timestamps": [{"name": "REQUEST_START", "ns": 1}]}]'
    )
    with pytest.raises(BenchError, match="no request to m_guarded"):
        read_trace(file, "m_guarded")


@pytest.mark.server
def test_a_server_shows_the_denoiser_under_the_guard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFENSE_BENCH", str(tmp_path / "cache"))
    monkeypatch.setitem(networks.NETWORKS, "tiny", networks.Network(16, 3, make_tiny))
    results = tmp_path / records.TIMELINE.name
    monkeypatch.setattr(timeline, "TIMELINE", results)
    seen, divide = [], timeline.divide
    monkeypatch.setattr(timeline, "divide", lambda span, model: seen.append(span) or divide(span, model))
    timeline.main(["--targets", "tiny", "--placements", "separate", "--loops", "bls", "--seconds", "0.5"])
    rows = json.loads(results.read_text())
    assert [row["batch"] for row in rows] == [1, 8] and all(row["traced"] > 0 for row in rows)
    for row in rows:
        steps = row["steps_ms"]
        assert tuple(steps) == STEPS and sum(steps.values()) == pytest.approx(row["server_ms"])
        computing = ("production", "features", "denoiser or scorer", "guard's loop and scoring")
        assert min(steps[step] for step in computing) > 0  # the denoiser too: it was found under the guard
    for span in seen:  # the features wait for production, on the same cores they would only hold it up
        stamps = {child.model: child.stamps for child in span.children}
        plain, features = stamps["tiny_separate_bls"], stamps["tiny_separate_bls_features"]
        assert features["QUEUE_START"] >= plain["COMPUTE_OUTPUT_START"]
    assert "| tiny | separate | bls | 8 |" in capsys.readouterr().out
    figure = table.draw_times(rows)
    assert figure is not None and len(figure.axes) == 2

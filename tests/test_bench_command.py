"""`diffense bench`: its arithmetic, its load on a real server, and what it says when it cannot measure."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tritonclient.grpc as grpc
from hypothesis import given
from hypothesis import strategies as st

from client_codes import BROKEN, BUSY
from client_repository import FIXED, FIXED_BATCH, MAX_BATCH, MODEL, PLAIN, make_pixels, shared_repository, trigger
from diffense.bench.comparison import compare_models, list_scenarios, name_production, pack_requests, read_models
from diffense.bench.load import Load, run_load
from diffense.bench.perf_analyzer import find_perf_analyzer, read_figures, run_perf_analyzer
from diffense.bench.statistics import Statistics, combine, summarise
from diffense.errors import BadInputError, BenchError, OptionError, ServerError
from diffense.serve import Endpoints, TritonServer
from perf_analyzer_on_demand import fetch

Run = Callable[..., tuple[int, str, str]]
FIGURES = """Concurrency,Inferences/Second,Client Send,p50 latency,p90 latency,p95 latency,p99 latency,Avg latency
2,379.5,2,4010,8250,12000,20283,5256
"""


@pytest.fixture(scope="module")
def endpoints(triton_for: Callable[..., TritonServer], tmp_path_factory: pytest.TempPathFactory) -> Endpoints:
    return triton_for(shared_repository(tmp_path_factory)).endpoints


@pytest.fixture
def run_cli(run_cli: Run) -> Run:
    """Run this command."""
    return partial(run_cli, "bench")


@given(st.lists(st.floats(1e-4, 10), min_size=1, max_size=50), st.floats(0.1, 60), st.integers(1, 32))
def test_figures_are_quantiles_of_the_latencies_and_images_a_second(latencies: list[float], span: float, batch: int) -> None:
    found = summarise(latencies, span, batch)
    assert min(latencies) * 1e3 <= found.p50_ms * (1 + 1e-9)
    assert found.p50_ms <= found.p95_ms <= found.p99_ms <= max(latencies) * 1e3 * (1 + 1e-9)
    assert found.throughput * span == pytest.approx(len(latencies) * batch)
    assert found.requests == len(latencies)
    assert summarise([latency * 2 for latency in latencies], span, batch).p95_ms == pytest.approx(2 * found.p95_ms)


def test_rounds_are_combined_by_medians_and_their_counts_summed() -> None:
    parts = [Statistics(p50, p50 * 2, p50 * 3, 100.0 / p50, 10, 1) for p50 in (1.0, 9.0, 2.0)]
    assert combine(parts) == Statistics(2.0, 4.0, 6.0, 50.0, 30, 3)


def test_nothing_answered_is_said() -> None:
    with pytest.raises(BenchError, match=r"no request was answered within 2\.0 s"):
        summarise([], 2.0, 1)


def test_the_figures_of_perf_analyzer_are_read_in_milliseconds() -> None:
    assert read_figures(FIGURES, 8, 2.0) == Statistics(4.01, 12.0, 20.283, 379.5, 95)


@pytest.mark.parametrize("text", ["", "Concurrency\n1\n", FIGURES.replace("379.5", "many"), FIGURES.splitlines()[0]])
def test_other_figures_are_refused(text: str) -> None:
    with pytest.raises(BenchError, match="version 2"):
        read_figures(text, 1, 1.0)


@pytest.mark.parametrize(("guarded", "plain"), [("m_guarded", "m"), ("m_guarded_gateway", "m_guarded")])
def test_the_production_model_is_read_off_the_guarded_ones_name(guarded: str, plain: str) -> None:
    assert name_production(guarded) == plain
    for name in ("m", "_guarded", "m_guard"):
        with pytest.raises(OptionError, match="--beside"):
            name_production(name)


def test_scenarios_are_every_combination() -> None:
    scenarios = list(list_scenarios("http", [1, 8], [1, 4, 16], [False, True]))
    assert len(set(scenarios)) == 12 and {s.protocol for s in scenarios} == {"http"}


@pytest.mark.server
@pytest.mark.parametrize(("protocol", "shared"), [("grpc", False), ("grpc", True), ("http", False), ("http", True)])
def test_both_models_get_the_same_images_in_turns(endpoints: Endpoints, protocol: Any, shared: bool) -> None:
    url = endpoints.grpc if protocol == "grpc" else endpoints.http
    served = read_models(url, protocol, MODEL, PLAIN)
    scenario = next(list_scenarios(protocol, [3], [2], [shared]))
    counts = []

    def count(load: Load, requests: Any) -> Statistics:
        before = count_images(endpoints, requests[0].model)
        found = run_load(load, requests)
        counts.append((requests[0].model, count_images(endpoints, requests[0].model) - before, found.requests))
        return found

    found = compare_models(url, served, PLAIN, scenario, make_pixels(5), tool=("builtin", count), rounds=2, seconds=0.3)
    assert [model for model, *_ in counts] == [PLAIN, MODEL, MODEL, PLAIN]
    assert all(images >= 3 * requests > 0 and images % 3 == 0 for _, images, requests in counts)
    assert found.guarded.requests == sum(requests for model, _, requests in counts if model == MODEL)
    assert found.guarded.rejected == found.unguarded.rejected == 0
    assert found.throughput_ratio > 0 and found.p50_ratio > 0


def count_images(endpoints: Endpoints, model: str) -> int:
    with grpc.InferenceServerClient(endpoints.grpc) as client:
        return int(client.get_inference_statistics(model).model_stats[0].inference_count)


@pytest.mark.server
def test_rejected_requests_are_counted_and_other_failures_end_the_measurement(endpoints: Endpoints) -> None:
    served = read_models(endpoints.grpc, "grpc", MODEL, PLAIN)
    load = Load(endpoints.grpc, "grpc", 2, False, 0.3)
    good, busy, broken = (pack_requests(served, pixels, 1)[0] for pixels in (make_pixels(1), trigger(BUSY), trigger(BROKEN)))
    found = run_load(load, [good, busy])
    assert found.rejected > 0 and found.requests > 0
    with pytest.raises(BenchError, match="no request was answered"):
        run_load(load, [busy])
    with pytest.raises(ServerError):
        run_load(load, [good, broken])


@pytest.mark.server
def test_batches_that_the_server_does_not_take_are_refused(endpoints: Endpoints) -> None:
    served = read_models(endpoints.grpc, "grpc", MODEL, PLAIN)
    with pytest.raises(BadInputError, match=f"at most {MAX_BATCH} images"):
        pack_requests(served, make_pixels(1), MAX_BATCH + 1)
    with pytest.raises(BadInputError, match=f"exactly {FIXED_BATCH} images"):
        pack_requests(read_models(endpoints.grpc, "grpc", FIXED, PLAIN), make_pixels(1), 1)
    with pytest.raises(BadInputError, match="no image"):
        pack_requests(served, make_pixels(0), 1)


def test_a_url_of_one_protocol_is_not_asked_by_another(run_cli: Run) -> None:
    code, _, err = run_cli("--url", "grpc://127.0.0.1:1", "--model", "m_guarded", "--protocol", "http")
    assert code == 2 and "says grpc, but the protocol is http" in err


@pytest.mark.server
def test_the_command_writes_every_finished_scenario(endpoints: Endpoints, tmp_path: Path, run_cli: Run) -> None:
    out = tmp_path / "bench.json"
    code, said, _ = run_cli(
        "--url", endpoints.grpc, "--model", MODEL, "--concurrency", "1,2", "--seconds", "0.2", "--rounds", "1",
        "--tool", "builtin", "--out", out, "--json",
    )  # fmt: skip
    rows = json.loads(out.read_text())
    assert code == 0 and json.loads(said) == rows
    assert [(row["model"], row["guarded_model"], row["concurrency"]) for row in rows] == [(PLAIN, MODEL, 1), (PLAIN, MODEL, 2)]
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.server
def test_a_failure_says_so_in_one_line_and_keeps_what_was_measured(endpoints: Endpoints, tmp_path: Path, run_cli: Run) -> None:
    out = tmp_path / "bench.json"
    common = ("--model", MODEL, "--seconds", "0.2", "--rounds", "1")
    code, _, said = run_cli(
        "--url", endpoints.grpc, *common, "--tool", "builtin", "--batch", f"1,{MAX_BATCH + 1}", "--out", out
    )
    assert code == 2 and len(said.splitlines()) == 1 and "at most" in said
    assert [row["batch"] for row in json.loads(out.read_text())] == [1]
    for url, model, more, expected in (
        ("127.0.0.1:9", MODEL, (), "127.0.0.1:9"),
        (endpoints.grpc, "nothing_guarded", (), "nothing_guarded"),
        (endpoints.grpc, MODEL, ("--beside", "nothing"), "nothing"),
        (endpoints.grpc, MODEL, ("--perf-analyzer", "/bin/false"), "ended with code 1: it said nothing"),
        (endpoints.grpc, MODEL, ("--perf-analyzer", tmp_path), "get_perf_analyzer.sh"),
        (endpoints.grpc, MODEL, ("--batch", "0"), "numbers above 0"),
        (endpoints.grpc, MODEL, ("--tool", "builtin", "--perf-analyzer", "/bin/true"), "leave one out"),
    ):
        code, _, said = run_cli("--url", url, "--model", model, "--seconds", "0.2", "--rounds", "1", *more)
        assert code == 2 and expected in said and len(said.splitlines()) == 1


@pytest.mark.server
@pytest.mark.parametrize("shared", [False, True])
def test_perf_analyzer_sends_our_images_and_its_failure_is_told(endpoints: Endpoints, shared: bool) -> None:
    program = find_perf_analyzer(fetch())
    assert program is not None
    served = read_models(endpoints.grpc, "grpc", MODEL, PLAIN)
    requests = pack_requests(served, make_pixels(4), 2)
    load = Load(endpoints.grpc, "grpc", 2, shared, 1.0)
    before = count_images(endpoints, MODEL)
    found = run_perf_analyzer(program, load, requests)
    assert count_images(endpoints, MODEL) - before >= found.throughput > 0
    assert all(value > 0 for name, value in asdict(found).items() if name != "rejected")
    with pytest.raises(BenchError, match="nothing"):
        run_perf_analyzer(program, load, [replace(request, model="nothing") for request in requests])


@pytest.mark.server
def test_the_command_drives_perf_analyzer(endpoints: Endpoints, tmp_path: Path, run_cli: Run) -> None:
    out = tmp_path / "bench.json"
    asked = ("--perf-analyzer", fetch(), "--seconds", "1", "--rounds", "1", "--batch", "1", "--out", out)
    code, _, said = run_cli("--url", endpoints.grpc, "--model", MODEL, *asked)
    assert code == 0, said
    (row,) = json.loads(out.read_text())
    assert row["tool"] == "perf_analyzer" and row["p50_ratio"] > 0 and row["throughput_ratio"] > 0

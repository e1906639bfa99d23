"""The overload and the memory benchmark on the demo's network, briefly, on a real server; and their arithmetic."""

import itertools
import json

import numpy as np
import pytest

from benchmarks.serving import memory, overload, repeats
from benchmarks.serving.offered import Outcome
from diffense.errors import BenchError
from diffense_client._core import Request


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFENSE_BENCH", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.server
def test_offered_load_is_accounted_for_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overload, "OVERLOAD", tmp_path / "overload.json")
    monkeypatch.setattr(overload, "FACTORS", (1.0, 8.0))
    overload.main(["--targets", "demo", "--fronts", "shared:gateway", "--queue", "4", "--seconds", "0.5"])
    rows = json.loads((tmp_path / "overload.json").read_text())
    assert [row["factor"] for row in rows] == [1.0, 8.0]
    for row in rows:
        assert row["accepted"] + row["refused"] == pytest.approx(1) and row["failed"] == 0
        assert row["production"]["beside"]["requests"] > 0 and row["production"]["beside"]["rejected"] == 0
    assert rows[1]["refused"] > 0 and rows[1]["refusal_p99_ms"] > 0
    assert capsys.readouterr().out.count("| demo | shared | gateway | 4 | 8 |") == 2


@pytest.mark.server
@pytest.mark.usefixtures("stand_in")
def test_memory_is_read_of_every_process_while_good_and_bad_requests_go(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(memory, "MEMORY", tmp_path / "memory.json")
    memory.main(["--target", "demo", "--placement", "shared", "--requests", "400"])
    (row,) = json.loads((tmp_path / "memory.json").read_text())
    assert row["answers"] == {"answered": 384, "bad input": 16}
    models = {f"demo_shared_bls_{kind}_0_0" for kind in ("tapped", "denoiser", "guard", "gateway")} | {"demo_shared_bls_0_0"}
    assert set(row["processes"]) == models | {"server"}
    assert row["samples"]["requests"] == list(range(2, 401, 2))
    assert all(min(sizes) > 10 for sizes in row["samples"]["mb"].values())
    sums = np.sum(list(row["samples"]["mb"].values()), axis=0)
    assert row["total"]["last_mb"] == pytest.approx(sums[-1])
    assert "MB per 100000 requests over the later half of 400" in capsys.readouterr().out


def test_growth_is_told_from_noise():
    generator = np.random.default_rng(0)
    places = np.arange(1000, 200_001, 1000)
    noise = generator.normal(0, 0.5, len(places))
    grown = memory.describe_growth(places.tolist(), (300 + places / 1e5 * 7 + noise).tolist())
    assert grown["slope"] == pytest.approx(7, abs=3 * grown["error"]) and not grown["within_noise"]
    early = np.minimum(places / 1e5, 0.5) * 40  # what grows at the beginning alone
    assert memory.describe_growth(places.tolist(), (300 + early + noise).tolist())["within_noise"]
    flat = memory.describe_growth(places.tolist(), [300.0] * len(places))
    assert (flat["slope"], flat["error"], flat["within_noise"]) == (0, 0, True)


def test_a_request_without_an_answer_is_an_error():
    with pytest.raises(BenchError, match="3 requests, 2 answers"):
        Outcome(sent=3, accepted=[0.1], refused=[0.2]).describe()


def test_unknown_names_are_told():
    with pytest.raises(SystemExit, match="separate:gateway, shared:gateway"):
        overload.main(["--fronts", "separate:guarded"])


@pytest.mark.server
def test_repeats_are_measured_on_both_exports_beside_the_unguarded_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(repeats, "REPEATS", tmp_path / "repeats.json")
    monkeypatch.setattr(repeats, "SHARES", (0.0, 1.0))
    repeats.main(["--targets", "demo", "--requests", "40", "--rounds", "1"])
    rows = json.loads((tmp_path / "repeats.json").read_text())
    assert [row["repeated"] for row in rows] == [0.0, 1.0]
    for row in rows:
        for way in ("guarded", "cached"):
            assert row[f"{way}_ratio"] == pytest.approx(row[f"{way}_ms"] / row["unguarded_ms"])
    assert capsys.readouterr().out.count("| demo |") == 2


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_asked_share_of_images_comes_again(share):
    request = Request("id", "m", "image", "FP32", np.full((1, 3, 4, 4), 0.5, np.float32), 1, 0, ())
    sent = list(itertools.islice(repeats.repeat(request, share, turn=1), 400))
    again = [one is request for one in sent]
    assert np.mean(again) == pytest.approx(share, abs=0.06)
    for turn, other in ((2, share), (1, 0.5)):
        sent += itertools.islice(repeats.repeat(request, other, turn=turn), 400)
    new = [one.tensor.tobytes() for one in sent if one is not request]
    assert len(set(new)) == len(new) and request.tensor.tobytes() not in new
    assert (request.tensor == 0.5).all()

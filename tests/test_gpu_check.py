"""The report of a GPU machine, as far as it goes without one: the same measuring on onnxruntime's CPU provider."""

from itertools import product

import numpy as np
import pytest

from ahead_of_time import AheadOfTime, load
from benchmarks import gpu_check
from benchmarks.gpu_check import LOOPS, measure_runs, render_page
from benchmarks.records import read_rows, write_row
from benchmarks.serving.runtimes import ASIDE, BATCHES, Graphs, open_onnxruntime, open_plans
from diffense import names
from diffense.errors import OptionError
from diffense_export.engine import Device, find_device

CPU = "CPUExecutionProvider"


@pytest.fixture(scope="module")
def graphs(guard, small_target, tmp_path_factory):
    return Graphs(small_target, guard, tmp_path_factory.mktemp("graphs"))


@pytest.mark.parametrize("loop", LOOPS)
def test_the_guarded_path_gives_what_the_guard_gives(loop, graphs, guard, clean_images):
    with open_onnxruntime(graphs, CPU) as runs:
        answer = graphs.ask({**runs, ASIDE: runs["scorer"]}, loop, guard.preprocessing.apply(clean_images[:40]))
    assert np.allclose(answer[names.SCORE][:, 0], guard.score(clean_images[:40]).scores, rtol=1e-4, atol=1e-4)


def test_graphs_whose_tensors_keep_their_place_give_the_same_at_every_size(graphs):
    with open_onnxruntime(graphs, CPU) as runs, open_onnxruntime(graphs, CPU, captured=True) as bound:
        for batch in (3, 8, 3):
            image = graphs.draw(batch) + np.float32(0.01 * batch)
            ours, theirs = graphs.ask(bound, "fused", image), graphs.ask(runs, "fused", image)
            assert ours.keys() == theirs.keys()
            assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert len(bound["scorer"].kept) == 2


def test_a_row_a_batch_with_both_sides_and_their_ratios(graphs):
    with open_onnxruntime(graphs, CPU) as runs:
        rows = measure_runs(graphs, runs, runs, 0.05)
    assert [(row["batch"], row["loop"]) for row in rows] == list(product(BATCHES, LOOPS))
    for row in rows:
        assert row["p50_ratio"] == row["guarded"]["p50_ms"] / row["unguarded"]["p50_ms"] > 0
        assert row["guarded"]["requests"] == row["unguarded"]["requests"] > 0
        assert row["latents_differ"] < 1e-4 and row["scores_differ"] < 1e-3
        assert row["loop"] in ("whole", "direct") or row["latents_differ"] == row["scores_differ"] == 0
    report = {"target": "small", "gpu": "G", "compute_capability": "8.6", "machine": "M", "commit": "c", "onnxruntime": "1"}
    report |= {"tests": "2 passed", "rows": [{"way": "onnxruntime"} | row for row in rows]}
    page = render_page([report | {"failed": ["small, TensorRT: out of luck"]}])
    assert "Did not run: small, TensorRT: out of luck" in page
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(BATCHES) * len(LOOPS)
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_plans_of_every_graph_are_built_for_the_measured_batches(graphs, monkeypatch, precision):
    with open_plans(graphs, AheadOfTime(load(monkeypatch)), precision) as runs, open_onnxruntime(graphs, CPU) as truth:
        image = graphs.draw(8)
        reference = graphs.ask(truth, "fused", image)
        for loop in ("fused", "whole", "direct"):
            moved = np.abs(graphs.ask(runs, loop, image)[names.SCORE] - reference[names.SCORE]).max()
            assert moved < (1e-4 if precision == "fp32" else 0.1)


@pytest.mark.skipif(find_device() is not None, reason="there is a GPU here")
def test_without_a_gpu_one_line_says_what_is_needed():
    with pytest.raises(SystemExit, match="needs a machine with an NVIDIA GPU"):
        gpu_check.main([])


def test_what_is_measured_is_written_before_the_next_target_begins(tmp_path, monkeypatch):
    figures = {"p50_ms": 1.0, "p99_ms": 2.0, "throughput": 3.0}
    row = {"way": "w", "loop": "whole", "batch": 1, "unguarded": figures, "guarded": figures} | dict.fromkeys(
        ("p50_ratio", "throughput_ratio", "latents_differ", "scores_differ"), 1.0
    )

    def measure(name, seconds, progress):
        if name != "demo":
            raise OptionError("the GPU is gone")
        return [row], []

    before = {"target": "resnet18_32", "gpu": "older", "compute_capability": "8.0", "machine": "M", "commit": "c"}
    before |= {"onnxruntime": "1", "tests": "none", "rows": [row], "failed": []}
    write_row(before, tmp_path / "gpu.json")
    for name, value in {
        "JSON": tmp_path / "gpu.json",
        "PAGE": tmp_path / "gpu.md",
        "find_device": lambda: Device("G", "8.6"),
        "run_tests": lambda: "2 passed",
        "measure_target": measure,
    }.items():
        monkeypatch.setattr(gpu_check, name, value)
    with pytest.raises(SystemExit, match="gpu-check: the GPU is gone"):
        gpu_check.main(["--targets", "demo,resnet18_32"])
    now, kept = read_rows(tmp_path / "gpu.json")
    assert (now["target"], now["gpu"], now["rows"]) == ("demo", "G", [row]) and kept == before
    page = (tmp_path / "gpu.md").read_text()
    assert "## demo\n\nG (8.6)" in page and "## resnet18_32\n\nolder (8.0)" in page and page.count("| w | whole | 1 |") == 2

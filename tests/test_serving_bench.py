"""The serving benchmark on a small network, from export to table, on a real server."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from benchmarks import records
from benchmarks.serving import __main__ as command
from benchmarks.serving import networks, table
from diffense.graphs import open_session
from diffense_export.parity import draw_smooth_noise


def make_tiny() -> networks.Pooled:
    """Three convolutions."""
    layers = [
        nn.Conv2d(3, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, 1, 1),
        nn.ReLU(),
    ]
    return networks.Pooled(nn.Sequential(*layers), 16)


@pytest.mark.parametrize("name", ["resnet18_32", "tiny"])
def test_written_networks_use_all_their_classes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(networks.NETWORKS, "tiny", networks.Network(32, 3, make_tiny))
    images = draw_smooth_noise(200, (32, 32), 3)
    networks.write_network(name, images, tmp_path / "target.onnx")
    session = open_session(tmp_path / "target.onnx")
    (logits,) = session.run(None, {"image": images.transpose(0, 3, 1, 2).astype(np.float32) / 255})
    assert len(np.unique(logits.argmax(1))) >= 8
    np.testing.assert_allclose(logits.mean(0), 0, atol=1e-2)
    np.testing.assert_allclose(np.cov(logits.T), np.eye(networks.CLASSES), atol=0.05)  # whitened on these images


@pytest.mark.server
def test_an_export_is_measured_kept_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFENSE_BENCH", str(tmp_path / "cache"))
    monkeypatch.setitem(networks.NETWORKS, "tiny", networks.Network(16, 3, make_tiny))
    results = tmp_path / records.SERVING.name
    for module in (command, table):
        monkeypatch.setattr(module, "SERVING", results)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(table, "TIMELINE", tmp_path / records.TIMELINE.name)  # another command's, tests/test_timeline.py
    options = ["--targets", "tiny", "--placements", "shared", "--loops", "fused", "--rounds", "1", "--seconds", "0.3"]
    command.main([*options, "--scenarios", "1"])
    (first,) = json.loads(results.read_text())
    assert (first["target"], first["placement"], first["loop"], first["gateway"]) == ("tiny", "shared", "fused", False)
    assert first["guarded"]["requests"] > 0 and first["guarded"]["rejected"] == 0
    times = first["time_ms"]
    model = first["model"]
    assert {model + suffix for suffix in ("_tapped", "_guard", "_scorer")} <= set(times) and model not in times  # not asked
    assert times[f"{model}_guard"]["compute_infer"] >= times[f"{model}_scorer"]["compute_infer"] > 0  # it waits for its callee
    command.main([*options, "--scenarios", "2"])
    rows = json.loads(results.read_text())
    assert len(rows) == 2 and first in rows  # what was measured is kept, what was missing was added
    monkeypatch.setattr("sys.argv", ["table"])
    table.main()
    page = (tmp_path / "serving.md").read_text()
    assert page.count("| tiny | shared | fused |") == 2
    assert ("## With the stand-in" in page) == (first["backend"] == "stand-in") and "## On a GPU" not in page
    assert (tmp_path / "serving.png").stat().st_size > 1000 and not (tmp_path / "serving_time.png").exists()
    capsys.readouterr()


def test_two_tools_stand_side_by_side_where_commit_and_machine_are_one() -> None:
    row: dict[str, Any] = {
        "target": "tiny", "placement": "shared", "loop": "direct", "gateway": False, "accelerator": "none", "protocol": "grpc",
        "batch": 8, "concurrency": 1, "shared_memory": False, "backend": "C++", "machine": "m", "commit": "a",
        "tool": "perf_analyzer", "unguarded": {"p50_ms": 2.0}, "guarded": {"p50_ms": 3.0}, "p50_ratio": 1.5,
        "throughput_ratio": 0.7,
    }  # fmt: skip
    twin = row | {"tool": "builtin", "unguarded": {"p50_ms": 2.5}, "p50_ratio": 1.2}
    lines = table.render_tools([row, twin, row | {"commit": "b"}, row | {"batch": 1}])[2:]
    assert lines == ["| tiny | shared | direct | 8 | 1 | 2 | 2.5 | 3 | 3 | 1.50 | 1.20 | 0.70 | 0.70 | C++, a |"]
    assert table.render_tools([row, twin | {"machine": "n"}])[2:] == []


def test_unknown_names_are_told() -> None:
    with pytest.raises(SystemExit, match="resnet18_32, resnet50_224"):
        command.main(["--targets", "alexnet"])
    with pytest.raises(SystemExit, match="separate, shared"):
        command.main(["--placements", "beside"])

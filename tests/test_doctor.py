import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from diffense import doctor
from diffense.cli import app

SHARED_MEMORY = str(Path("/dev", "shm"))
WANTED = {
    "Python", "shared libpython", "numpy", "onnxruntime", "Triton", SHARED_MEMORY, "tritonclient", "torch",
    "perf_analyzer", "NVIDIA driver", "CUDA", "TensorRT",
}  # fmt: skip


def find(name: str) -> doctor.Finding:
    (found,) = [finding for finding in doctor.examine() if finding.name == name]
    return found


def test_everything_is_looked_at_and_what_is_missing_has_a_fix() -> None:
    findings = doctor.examine()
    assert {finding.name for finding in findings} == WANTED
    assert all(finding.fix for finding in findings if finding.value is None)
    assert find("numpy").value == np.__version__
    assert "CPUExecutionProvider" in (find("onnxruntime").value or "")


def test_placeholder_perf_analyzer_is_not_taken_for_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "perf_analyzer"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find("perf_analyzer").value is None
    program.write_bytes(b"\0" * 200_000)
    assert find("perf_analyzer").value == str(program)


def test_little_shared_memory_blocks_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    finding = find(SHARED_MEMORY)
    assert finding.blocks
    assert "shm-size" in (finding.fix or "")
    assert not doctor.can_serve([finding])


def test_only_what_serving_needs_blocks_it() -> None:
    missing = doctor.Finding("torch", None, "install it")
    assert doctor.can_serve([missing])
    assert not doctor.can_serve([missing, doctor.Finding("Triton", None, "install it", needed=True)])


@pytest.mark.server
def test_command_prints_a_table_or_json_with_exit_code_0() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["can_serve"] is True
    assert {entry["name"] for entry in report["findings"]} == WANTED
    shown = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "serving is possible" in shown.stdout


def test_extras_of_packages_are_no_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_package", lambda name: None)
    said = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"}).stdout
    assert "diffense[fit]" in said and "diffense[client]" in said


def test_command_ends_with_1_when_serving_is_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (lambda: doctor.Finding("Triton", None, "install it", needed=True),))
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "install it" in result.stdout

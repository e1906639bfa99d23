"""NVIDIA's perf_analyzer as the project's own script fetches it, once, beside the environment."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "serving" / "get_perf_analyzer.sh"
FETCH_TIMEOUT_S = 200
FAILED: list[str] = []  # why it could not be had; one try is enough


def fetch() -> Path:
    """The program on PATH, or fetched; skips the test where it cannot be had."""
    found = shutil.which("perf_analyzer")
    if found:
        return Path(found)
    if FAILED:
        pytest.skip(FAILED[0])
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "diffense", "perf_analyzer")
    environment = os.environ | {"PYTHON": sys.executable, "PIP_RETRIES": "1", "PIP_TIMEOUT": "15"}
    try:
        command = ["bash", str(SCRIPT), str(folder)]
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=FETCH_TIMEOUT_S, check=True)
    except (subprocess.SubprocessError, OSError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
        FAILED.append(f"perf_analyzer cannot be fetched here: {said.strip().splitlines()[-1]}")
        pytest.skip(FAILED[0])
    return folder / "perf_analyzer"

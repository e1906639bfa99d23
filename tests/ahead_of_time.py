"""TensorRT for RTX, which parses and compiles ahead of time without a GPU; installed on demand, beside the environment."""

import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from diffense.graphs import open_session
from diffense_export.engine import Device, Engine

REQUIREMENTS = ("tensorrt-rtx-cu12==1.7.1.116", "polygraphy==0.53.6", "onnx-graphsurgeon==0.6.1")
INSTALL_TIMEOUT_S = 200
FAILED: list[str] = []  # why it could not be installed; one try is enough


def install() -> Path:
    """Folder of the packages; skips the test where they cannot be had."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "diffense")
    folder = home / f"tensorrt-rtx-1.7.1.116-{sys.implementation.cache_tag}"
    if folder.is_dir():
        return folder
    if FAILED:
        pytest.skip(FAILED[0])
    home.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=home))
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--retries",
        "1",
        "--timeout",
        "15",
        "--no-deps",
        "--target",
        str(work),
        *REQUIREMENTS,
    ]
    command += ["tensorrt-rtx-cu12-libs==1.7.1.116", "tensorrt-rtx-cu12-bindings==1.7.1.116"]
    try:
        subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, check=True)
        work.rename(folder)
    except (subprocess.SubprocessError, OSError) as error:
        shutil.rmtree(work, ignore_errors=True)
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) and error.stderr else str(error)
        FAILED.append(f"tensorrt-rtx cannot be installed here: {said.strip().splitlines()[-1]}")
        pytest.skip(FAILED[0])
    return folder


def load(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module ``tensorrt_rtx``; polygraphy can be imported too until the test ends."""
    monkeypatch.syspath_prepend(str(install()))
    return importlib.import_module("tensorrt_rtx")


class AheadOfTime(Engine):
    """Builds for a GPU that is not there; for want of it a stand-in runs the graph of a plan: onnxruntime."""

    def __init__(self, trt: ModuleType, cache: Path | None = None) -> None:
        def aim(config: Any) -> None:
            config.num_compute_capabilities = 1
            config.set_compute_capability(trt.ComputeCapability.SM86, 0)

        super().__init__(trt, Device("none, ahead of time", "8.6"), cache, aim)
        self.graphs: dict[bytes, bytes] = {}

    def build(self, graph, shapes):
        plan, types = super().build(graph, shapes)
        self.graphs[plan] = graph.read_bytes()
        return plan, types

    @contextmanager
    def open(self, plan):
        session = open_session(self.graphs[plan], optimize=False)
        wanted = [output.name for output in session.get_outputs()]
        yield lambda inputs: dict(zip(wanted, session.run(wanted, dict(inputs)), strict=True))

"""Fixtures that several test modules share."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from numpy.typing import NDArray

import onnx_models
import shapes
from diffense.backends import NATIVE_SETTING
from diffense.cli import main
from diffense.fit import fit_guard
from diffense.guard import Guard
from diffense.serve import TritonServer
from diffense.settings import FitSettings
from diffense.target import Target

# A machine that is busy elsewhere for a moment is no failure.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def triton_for() -> Iterator[Callable[[Path], TritonServer]]:
    """Give a running server for a model repository; one server a repository and session."""
    servers: dict[Path, TritonServer] = {}
    with ExitStack() as stack:

        def start(repository: Path) -> TritonServer:
            path = repository.resolve()
            if path not in servers:
                servers[path] = stack.enter_context(TritonServer(path))
            return servers[path]

        yield start


@pytest.fixture(scope="session")
def small_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of `shapes.draw_shapes` as an ONNX file."""
    return onnx_models.save(shapes.fit_shape_classifier(), tmp_path_factory.mktemp("target") / "target.onnx")


@pytest.fixture(scope="session")
def clean_images() -> NDArray[np.uint8]:
    """(700, 16, 16, 3) clean images that the classifier has not seen."""
    return shapes.draw_shapes(700, seed=1)[0]


@pytest.fixture(scope="session")
def guard(small_target: Path, clean_images: NDArray[np.uint8], tmp_path_factory: pytest.TempPathFactory) -> Guard:
    """A guard with its network on, fitted on `clean_images`."""
    settings = FitSettings(alpha=0.02, network="on", training_steps=200)
    return fit_guard(Target.open(small_target), clean_images, tmp_path_factory.mktemp("guard") / "g", settings=settings)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve with our stand-in also where the tests run on a C++ onnxruntime backend."""
    monkeypatch.delenv(NATIVE_SETTING, raising=False)


@pytest.fixture
def float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Train the bench's targets in float32, so that no machine's number format decides a test."""
    monkeypatch.setattr("benchmarks.precision.probe_bfloat16", lambda: False)


@pytest.fixture
def bench(float32: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The bench with one small image set, in a folder of its own."""
    from bench_world import set_up  # torch and all attacks, which most tests do not need

    set_up(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; its exit code, stdout and stderr."""

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diffense", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as ended:
            main()
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    return run


@pytest.fixture(scope="session")
def fresh() -> NDArray[np.uint8]:
    """(2000, 16, 16, 3) clean images that neither classifier nor guard has seen."""
    return shapes.draw_shapes(2000, seed=7)[0]


@pytest.fixture
def bundle(guard: Guard, tmp_path: Path) -> Path:
    """A copy of the guard's bundle, to be changed."""
    return Path(shutil.copytree(guard.directory, tmp_path / "guard"))

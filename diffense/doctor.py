"""What this machine has for fitting and serving, and what to do where something is missing."""

import ctypes
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from diffense.backends import WHEEL, find_libpython, find_server
from diffense.errors import ServeError
from diffense.templates import find_templates

SHARED_MEMORY: Final = Path("/dev", "shm")
ENOUGH_SHARED_MEMORY: Final = 256 * 2**20  # ten models with a few MB each for their tensors; docker gives 64 MB
SMALLEST_PROGRAM: Final = 100_000  # bytes; the placeholder package's perf_analyzer is a script of 2 kB
SMI_TIMEOUT_S: Final = 20


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    ``value`` is what was found, None where it is missing; ``fix`` says what to do, None where nothing is to be done;
    ``needed`` tells whether serving is impossible without it.
    """

    name: str
    value: str | None
    fix: str | None = None
    needed: bool = False

    @property
    def blocks(self) -> bool:
        """Whether this keeps the machine from serving."""
        return self.needed and self.fix is not None


def examine() -> list[Finding]:
    """Look at everything, in the order in which one would repair it."""
    return [check() for check in CHECKS]


def can_serve(findings: list[Finding]) -> bool:
    """Whether `diffense serve` can work on this machine."""
    return not any(finding.blocks for finding in findings)


def find_package(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_python() -> Finding:
    version = sys.version.split()[0]
    known = (3, 11) <= sys.version_info[:2] <= (3, 12)
    return Finding("Python", f"{version} ({sys.executable})", None if known else "use Python 3.11 or 3.12", needed=True)


def _check_libpython() -> Finding:
    folder = find_libpython()
    # Only the wheel's server loads it from here; a server of the machine brings its own.
    package = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
    fix = None if folder else f"install a Python with a shared library (Debian: apt install {package})"
    return Finding("shared libpython", str(folder) if folder else None, fix)


def _check_numpy() -> Finding:
    version = find_package("numpy")
    old = version is not None and version.startswith("1.")
    fix = None if old else 'pip install "numpy<2": with numpy 2 the wheel\'s Triton gives empty outputs'
    return Finding("numpy", version, fix, needed=find_package(WHEEL) is not None and version is not None)


def _check_onnxruntime() -> Finding:
    version = find_package("onnxruntime") or find_package("onnxruntime-gpu")
    if version is None:
        return Finding("onnxruntime", None, "pip install onnxruntime", needed=True)
    import onnxruntime

    return Finding("onnxruntime", f"{version} ({', '.join(onnxruntime.get_available_providers())})", needed=True)


def _check_server() -> Finding:
    try:
        files = find_server()
        find_templates()
    except ServeError as error:
        return Finding("Triton", None, str(error), needed=True)
    return Finding(
        "Triton",
        f"{files.version} ({files.kind}: {files.binary}; onnxruntime backend: {files.onnxruntime_backend})",
        needed=True,
    )


def _check_shared_memory() -> Finding:
    name = str(SHARED_MEMORY)
    if not SHARED_MEMORY.is_dir():
        return Finding(name, None, f"mount a tmpfs at {name}; Triton's Python models need it", needed=True)
    free = shutil.disk_usage(SHARED_MEMORY).free
    enough = free >= ENOUGH_SHARED_MEMORY and os.access(SHARED_MEMORY, os.W_OK)
    fix = None if enough else "give 256 MB or more, writable (docker run --shm-size 1g)"
    return Finding(name, f"{free / 2**20:.0f} MB free", fix, needed=True)


def _check_torch() -> Finding:
    version = find_package("torch")
    return Finding("torch", version, None if version else 'needed by `fit` only: pip install "diffense[fit]"')


def _check_client() -> Finding:
    version = find_package("tritonclient")
    return Finding("tritonclient", version, None if version else 'needed by `scan`: pip install "diffense[client]"')


def _check_perf_analyzer() -> Finding:
    program = shutil.which("perf_analyzer")
    if program and Path(program).stat().st_size > SMALLEST_PROGRAM:
        return Finding("perf_analyzer", program)
    fix = "needed for load tests only: take it from the wheel tritonclient==2.51.0 (glibc below 2.38) or perf-analyzer"
    return Finding("perf_analyzer", None, fix)


def _check_driver() -> Finding:
    program = shutil.which("nvidia-smi")
    if program is None:
        return Finding("NVIDIA driver", None, "none, and none is needed: everything runs on the CPU")
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=SMI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return Finding("NVIDIA driver", None, "nvidia-smi fails: install the driver again, or use the CPU")
    return Finding("NVIDIA driver", "; ".join(answer.stdout.strip().splitlines()))


def _check_cuda() -> Finding:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Finding("CUDA", None, "no libcuda.so.1; only for a GPU")
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return Finding("CUDA", None, "the driver does not tell its CUDA version; install it again")
    return Finding("CUDA", f"{version.value // 1000}.{version.value % 1000 // 10} (driver)")


def _check_tensorrt() -> Finding:
    for name in ("tensorrt", "tensorrt-cu12", "tensorrt-cu13", "tensorrt-rtx-cu12"):
        if version := find_package(name):
            return Finding("TensorRT", f"{version} ({name})")
    program = shutil.which("trtexec")
    return Finding("TensorRT", program, None if program else "only for engines on a GPU: pip install tensorrt")


CHECKS: Final[tuple[Callable[[], Finding], ...]] = (
    _check_python,
    _check_libpython,
    _check_numpy,
    _check_onnxruntime,
    _check_server,
    _check_shared_memory,
    _check_client,
    _check_torch,
    _check_perf_analyzer,
    _check_driver,
    _check_cuda,
    _check_tensorrt,
)

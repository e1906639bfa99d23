"""Find a Triton server on this machine and lay out what it needs to start."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import diffense
from diffense.errors import ServeError
from diffense.templates import STAND_IN, find_templates

WHEEL: Final = "nvidia-pytriton"
SERVER_IN_WHEEL: Final = {"0.7.0": "2.51.0"}  # stated nowhere inside the wheel
BLAS_THREADS: Final = "OPENBLAS_NUM_THREADS"
INSTALL: Final = 'pip install "diffense[serve]"'
NATIVE_SETTING: Final = "DIFFENSE_ONNXRUNTIME_BACKEND"  # folder of a C++ onnxruntime backend for the wheel's server
NATIVE_LIBRARY: Final = "libtriton_onnxruntime.so"


@dataclass(frozen=True)
class ServerFiles:
    """A Triton server: the wheel's, which needs a backend folder of ours, or an installed one with its own."""

    kind: Literal["wheel", "native"]
    binary: Path
    version: str
    distribution: Path | None = None  # the wheel's tritonserver folder
    libraries: Path | None = None  # the wheel's shared libraries
    onnxruntime: Path | None = None  # folder of a C++ onnxruntime backend for the wheel's server; None: our stand-in

    @property
    def onnxruntime_backend(self) -> Literal["C++", "stand-in"]:
        """Whether Triton's own backend runs the graphs, or ours that is written for the Python backend."""
        return "C++" if self.kind == "native" or self.onnxruntime is not None else "stand-in"


def check_numpy(version: str) -> None:
    """Refuse a NumPy that the Python backend of the wheel's server cannot read.

    Raises:
        ServeError: NumPy 2 or newer; the server would look ready and give outputs of zero bytes.
    """
    if int(version.split(".", 1)[0]) >= 2:
        raise ServeError(
            f"numpy {version} is installed, and with numpy 2 the wheel's Triton loads every Python model, looks ready "
            'and gives empty outputs; pip install "numpy<2"'
        )


def find_server(which: str = "auto") -> ServerFiles:
    """Find a server.

    Args:
        which: ``wheel``; a path of a ``tritonserver`` program; or ``auto``, which takes the program on PATH (in
            NVIDIA's containers) and else the wheel.

    Raises:
        ServeError: there is none, or this Python cannot serve with it.
    """
    if which not in ("auto", "wheel"):
        if not (Path(which).is_file() and os.access(which, os.X_OK)):
            raise ServeError(f"{which} is no program that can be run; give the path of tritonserver, `wheel` or `auto`")
        return _native(Path(which))
    program = shutil.which("tritonserver") if which == "auto" else None
    return _native(Path(program)) if program else _find_wheel()


def _native(binary: Path) -> ServerFiles:
    version = os.environ.get("TRITON_SERVER_VERSION", "")
    stated = binary.resolve().parent.parent / "TRITON_VERSION"
    if not version and stated.is_file():
        version = stated.read_text(encoding="utf-8").strip()
    return ServerFiles("native", binary, version or "unknown")


def _find_wheel() -> ServerFiles:
    try:
        wheel = importlib.metadata.distribution(WHEEL)
    except importlib.metadata.PackageNotFoundError:
        raise ServeError(f"no tritonserver on PATH and {WHEEL} is not installed; {INSTALL}") from None
    check_numpy(importlib.metadata.version("numpy"))
    site = Path(str(wheel.locate_file("")))
    distribution = site / "pytriton" / "tritonserver"
    binary = distribution / "bin" / "tritonserver"
    if not binary.is_file():
        raise ServeError(f"{WHEEL} {wheel.version} has no tritonserver for this machine (it needs Linux on x86-64)")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    if not _stub(distribution).is_file():
        raise ServeError(f"{WHEEL} {wheel.version} has no Python backend for Python {python}; use 3.11 or 3.12")
    if find_libpython() is None:
        raise ServeError(
            f"this Python {python} has no shared library, which Triton's Python backend loads; on Debian and Ubuntu: "
            f"apt install libpython{python}; with pyenv build it with --enable-shared"
        )
    version = SERVER_IN_WHEEL.get(wheel.version, "unknown")
    return ServerFiles("wheel", binary, version, distribution, site / "nvidia_pytriton.libs", _find_onnxruntime())


def _find_onnxruntime() -> Path | None:
    stated = os.environ.get(NATIVE_SETTING, "")
    if not stated:
        return None
    folder = Path(stated).resolve()
    if not (folder / NATIVE_LIBRARY).is_file():
        raise ServeError(f"{NATIVE_SETTING}={stated}: no {NATIVE_LIBRARY} there; unset it to serve with the stand-in")
    return folder


def find_libpython() -> Path | None:
    """Folder of this interpreter's shared library, or None when it was built without one."""
    name = sysconfig.get_config_var("INSTSONAME")
    if not name or ".so" not in str(name):
        return None
    # LIBDIR is the place at build time, which relocated interpreters leave.
    places = [sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib"]
    return next((Path(place) for place in places if place and (Path(place) / name).is_file()), None)


def _stub(distribution: Path) -> Path:
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return distribution / "python_backend_stubs" / python / "triton_python_backend_stub"


def assemble_backends(files: ServerFiles, folder: Path) -> list[str]:
    """Fill ``folder`` with the backends that the wheel's server needs; give the options that name them.

    An installed server has backends of its own, so nothing is written and no option is given.
    """
    if files.distribution is None:
        return []
    python = folder / "python"
    python.mkdir(parents=True)
    source = files.distribution / "backends" / "python"
    # Copies: the server refuses a linked library for backends that are written in Python.
    for part in (source / "libtriton_python.so", source / "triton_python_backend_utils.py", _stub(files.distribution)):
        shutil.copy2(part, python / part.name)
    onnxruntime = folder / "onnxruntime"
    if files.onnxruntime is not None:
        onnxruntime.symlink_to(files.onnxruntime)
    else:
        onnxruntime.mkdir()
        shutil.copyfile(find_templates() / STAND_IN / "model.py", onnxruntime / "model.py")
    return [f"--backend-directory={folder}", f"--cache-directory={files.distribution / 'caches'}"]


def check_package(files: ServerFiles) -> None:
    """Refuse where the Python models of the wheel's server would import another ``diffense`` than this one, or none.

    The wheel's stub starts an isolated interpreter: it reads site-packages, and neither PYTHONPATH nor the current folder.

    Raises:
        ServeError: this package is not the one that is installed.
    """
    if files.kind != "wheel":
        return
    command = [sys.executable, "-I", "-c", "import diffense; print(diffense.__file__)"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    own, installed = Path(diffense.__file__).resolve(), found.stdout.strip()
    if found.returncode or Path(installed).resolve() != own:
        raise ServeError(
            f"Triton's Python models would import {installed or 'no diffense at all'} and not {own}, since they see what is "
            f"installed for {sys.executable}, whatever PYTHONPATH says; pip install --editable {own.parents[1]}"
        )


def server_environment(files: ServerFiles) -> dict[str, str]:
    """Environment in which the server's Python models run under this interpreter."""
    environment = dict(os.environ)
    # Idle BLAS threads spin on the cores that the classifier needs, and the guard's products are small (docs/decisions/0009).
    environment.setdefault(BLAS_THREADS, "1")
    # The stub takes the first python3 on PATH, and with it that interpreter's site-packages.
    _prepend(environment, "PATH", Path(sys.executable).parent)
    if files.kind == "wheel":
        for library in (find_libpython(), files.libraries):
            if library is not None:
                _prepend(environment, "LD_LIBRARY_PATH", library)
    return environment


def _prepend(environment: dict[str, str], name: str, folder: Path) -> None:
    before = environment.get(name)
    environment[name] = f"{folder}{os.pathsep}{before}" if before else str(folder)

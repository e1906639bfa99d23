"""Where the bench finds its data and keeps its cache: two environment variables, nothing else reads a path."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Final

from diffense.backends import find_server
from diffense.errors import OptionError
from diffense_export.engine import find_device

SHARED: Final = "DIFFENSE_SHARED"
CACHE: Final = "DIFFENSE_BENCH"
ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / "benchmarks" / "results"


def find_shared() -> Path:
    """Folder that holds ``data/load.py`` and the image sets: ``DIFFENSE_SHARED``, else ``shared`` beside the checkout.

    Raises:
        OptionError: it is not there.
    """
    folder = Path(os.environ.get(SHARED, ROOT.parent / "shared"))
    if not (folder / "data" / "load.py").is_file():
        raise OptionError(
            f"the bench's image sets belong in {folder}/data (its load.py is missing); set {SHARED} to their folder"
        )
    return folder


def find_cache() -> Path:
    """Folder for trained targets and latents, outside git: ``DIFFENSE_BENCH``, else ``runs/bench`` of the checkout."""
    folder = Path(os.environ.get(CACHE, ROOT / "runs" / "bench"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def describe_machine() -> str:
    """Processor, cores and GPU, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    device = find_device()
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {device.name if device else 'no GPU'}"


def describe_run() -> dict[str, str]:
    """What every row of a served measurement says of its place: machine, the server's onnxruntime backend, commit.

    Raises:
        ServeError: there is no server.
    """
    return {"machine": describe_machine(), "backend": find_server().onnxruntime_backend, "commit": find_commit()}


def find_commit() -> str:
    """Short hash of the checkout's commit, with ``+`` where files differ from it."""
    run = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run(
        ["git", "-C", str(ROOT), "status", "--porcelain", "--", "diffense", "benchmarks/peers", "benchmarks/attacks"],
        capture_output=True,
        text=True,
        check=False,
    )
    return (run.stdout.strip() or "unknown") + ("+" if dirty.stdout.strip() else "")

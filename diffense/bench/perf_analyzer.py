"""Drives NVIDIA's perf_analyzer: the same load, real images instead of its random ones, its CSV read back."""

import csv
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from diffense.bench.load import Load
from diffense.bench.statistics import Statistics
from diffense.errors import BenchError, OptionError
from diffense_client._core import Request

PROGRAM: Final = "perf_analyzer"
INSTALL: Final = "`benchmarks/serving/get_perf_analyzer.sh DIR` puts one there"
WINDOWS: Final = 3  # it measures until three windows in a row agree; every window agrees here, rounds are compared instead
ANY_SPREAD: Final = "100000"  # percent
GRACE_S: Final = 60.0
MOST_IMAGES: Final = 8  # its input is JSON text, which it keeps in memory


def find_perf_analyzer(path: Path | None) -> Path | None:
    """Find the program: the given one, else on PATH, else None.

    Raises:
        OptionError: the given one cannot be run.
    """
    if path is not None:
        if not path.is_file() or not os.access(path, os.X_OK):
            raise OptionError(f"{path} is no program that can be run; {INSTALL}")
        return path
    found = shutil.which(PROGRAM)
    return Path(found) if found else None


def run_perf_analyzer(program: Path, load: Load, requests: Sequence[Request]) -> Statistics:
    """Have perf_analyzer send the images of these requests, and read its figures.

    Args:
        program: perf_analyzer.
        load: how; the measurement is cut into `WINDOWS` windows, and it warms up by itself.
        requests: of one model that stacks requests along its first dimension; all of the same number of images.

    Raises:
        BenchError: it failed; the message holds the first line that it said.
    """
    with tempfile.TemporaryDirectory(prefix="diffense-bench-") as name:
        images, figures = Path(name) / "images.json", Path(name) / "figures.csv"
        images.write_text(json.dumps(_list_images(requests)))
        command = [
            str(program),
            *("-m", requests[0].model, "-u", load.url, "-i", load.protocol, "-b", str(requests[0].rows)),
            *("--concurrency-range", f"{load.concurrency}:{load.concurrency}", "--input-data", str(images)),
            *("--measurement-interval", str(round(load.seconds * 1e3 / WINDOWS)), "--stability-percentage", ANY_SPREAD),
            *("--shared-memory", "system" if load.shared_memory else "none", "-f", str(figures)),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=load.seconds + GRACE_S, check=False)
        except subprocess.TimeoutExpired:
            raise BenchError(f"{program.name} did not end within {load.seconds + GRACE_S:.0f} s") from None
        except OSError as error:
            raise BenchError(f"{program} cannot be run ({error.strerror}); {INSTALL}") from None
        if done.returncode or not figures.is_file():
            said = [line.strip() for line in (done.stderr + "\n" + done.stdout).splitlines() if line.strip()]
            raise BenchError(f"{program.name} ended with code {done.returncode}: {said[0] if said else 'it said nothing'}")
        return read_figures(figures.read_text(), requests[0].rows, load.seconds)


def read_figures(text: str, batch: int, seconds: float) -> Statistics:
    """Read the CSV of one load; latencies there are microseconds.

    Raises:
        BenchError: it is not the CSV of perf_analyzer 2.
    """
    rows = list(csv.DictReader(text.splitlines()))
    try:
        row = rows[0]
        p50, p95, p99 = (float(row[f"p{share} latency"]) / 1e3 for share in (50, 95, 99))
        throughput = float(row["Inferences/Second"])
    except (IndexError, KeyError, TypeError, ValueError):
        raise BenchError(
            "perf_analyzer wrote no figures that can be read; use version 2 (2.44 to 2.60), or --tool builtin"
        ) from None
    return Statistics(p50, p95, p99, throughput, round(throughput * seconds / batch))


def _list_images(requests: Sequence[Request]) -> dict[str, object]:
    first = requests[0]
    images = [image for request in requests for image in request.tensor][:MOST_IMAGES]
    return {"data": [{first.input_name: {"content": image.ravel().tolist(), "shape": list(image.shape)}} for image in images]}

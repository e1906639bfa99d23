"""What onnxruntime's own settings are worth: the whole graph in one process, one setting changed at a time, in turns.

usage: python -m benchmarks.serving.session_settings [--targets resnet18_32,resnet50_224] [--rounds 60]

Writes benchmarks/results/session_settings.json. The guarded path is one graph (`--placement shared --loop whole`), so that
nothing but the session stands between image and score. No thread spins, or it would take the cores from the form that comes
next (decision 0009). A CPU is measured; a GPU's sessions are `make gpu-check`'s.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from benchmarks.records import SESSIONS, write_row
from benchmarks.serving.exports import IMAGES, choose, prepare_guard
from benchmarks.serving.floor import Run, open_session, time_in_turns, write_graphs
from benchmarks.serving.networks import NETWORKS, draw_images
from benchmarks.serving.runtimes import Bound
from benchmarks.settings import describe_machine, find_commit
from diffense.errors import DiffenseError

BATCHES: Final = (1, 8)
DEFAULT: Final = "default"
Change = Callable[[ort.SessionOptions], None]


def set_option(name: str, value: Any, options: ort.SessionOptions) -> None:
    """Change one attribute of a session's options."""
    setattr(options, name, value)


def run_parallel(options: ort.SessionOptions) -> None:
    """Independent nodes at the same time, by threads that do not spin either."""
    options.execution_mode = ort.ExecutionMode.ORT_PARALLEL
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")


CHANGES: Final[dict[str, Change]] = {
    DEFAULT: lambda options: None,
    "no memory arena": partial(set_option, "enable_cpu_mem_arena", False),
    "no memory pattern": partial(set_option, "enable_mem_pattern", False),
    "basic optimisation": partial(set_option, "graph_optimization_level", ort.GraphOptimizationLevel.ORT_ENABLE_BASIC),
    "no optimisation": partial(set_option, "graph_optimization_level", ort.GraphOptimizationLevel.ORT_DISABLE_ALL),
    "one thread": partial(set_option, "intra_op_num_threads", 1),
    "parallel execution": run_parallel,
}


def list_forms(path: Path, image: dict[str, NDArray[Any]]) -> dict[str, Run]:
    """A run of the graph for each setting, and one through bound inputs and outputs."""
    sessions = {name: open_session(path, 0, change) for name, change in CHANGES.items()}
    forms: dict[str, Run] = {name: partial(session.run, None, image) for name, session in sessions.items()}
    return forms | {"I/O binding": partial(Bound(sessions[DEFAULT], "cpu"), image)}


def measure_target(name: str, rounds: int) -> None:
    """Time one target at every batch; a row is written as soon as it is there."""
    images = draw_images(name, IMAGES)
    target, guard = prepare_guard(name, images)
    with tempfile.TemporaryDirectory() as folder:
        graph = write_graphs(guard, target, Path(folder))["whole"]
        for batch in BATCHES:
            inputs = guard.preprocessing.apply(images[:batch])
            times = time_in_turns(list_forms(graph, {guard.manifest.input.name: inputs}), rounds)
            row = {"target": name, "batch": batch, "rounds": rounds, "settings_ms": times}
            write_row(row | {"machine": describe_machine(), "commit": find_commit()}, SESSIONS)
            shares = {form: f"{np.divide(ms, times[DEFAULT]):.3f}" for form, ms in times.items()}
            print(f"{name} batch {batch}, {times[DEFAULT]:.2f} ms: {shares}", flush=True)


def main(arguments: Sequence[str]) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", default="resnet18_32,resnet50_224")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args(arguments)
    try:
        for name in choose(options.targets, NETWORKS):
            measure_target(name, options.rounds)
    except DiffenseError as error:
        sys.exit(f"session_settings: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])

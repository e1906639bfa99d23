"""The floor: the work of production and guard, and the time of the same graphs in one onnxruntime process.

usage: python -m benchmarks.serving.floor [--targets resnet50_224] [--rounds 20]

Writes benchmarks/results/floor.json. Each round runs every form once, one after the other, so that their ratios hold.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from benchmarks.records import FLOOR, SERVING, Row, read_rows, write_row
from benchmarks.serving.exports import IMAGES, choose, prepare_guard
from benchmarks.serving.networks import NETWORKS, draw_images
from benchmarks.serving.work import Work, count_work
from benchmarks.settings import describe_machine, find_commit
from diffense.errors import DiffenseError
from diffense.graphs import save_graph
from diffense.guard import Guard
from diffense.names import GUARD_SUFFIX, GUIDE, LATENTS, LOGITS, NOISED, RAW_LOGITS, SAMPLE, SIGMA
from diffense.target import TensorSpec
from diffense_export.scorer import build_scorer
from diffense_export.whole import build_features, build_whole

BATCHES: Final = (1, 8, 32)
COUNTED: Final[tuple[str, ...]] = ("production", "tapped", "features", "denoiser")
HEAD: Final = (
    "target", "placement", "loop", "batch", "guarded GFLOP", "of production", "guarded MB", "of production",
    "production, one process, ms", "guarded", "of production", "served p50, ms", "of one process", "guard's model, ms",
    "of its scoring in one process",
)  # fmt: skip
Run = Callable[[], Any]


def main(arguments: Sequence[str]) -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--targets", default=",".join(NETWORKS))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args(arguments)
    try:
        with threadpool_limits(1, "blas"):  # as the server's Python models are started
            for name in choose(options.targets, NETWORKS):
                measure_target(name, options.rounds)
        print("\n".join(render_table(read_rows(FLOOR), read_rows(SERVING))))
    except DiffenseError as error:
        sys.exit(f"floor: {error}")


def measure_target(name: str, rounds: int) -> None:
    """Count and time one target at every batch; a row is written as soon as it is there."""
    images = draw_images(name, IMAGES)
    target, guard = prepare_guard(name, images)
    with tempfile.TemporaryDirectory() as folder:
        graphs = write_graphs(guard, target, Path(folder))
        sessions = {key: open_session(path, 1 if key in ("denoiser", "scorer") else 0) for key, path in graphs.items()}
        for batch in BATCHES:
            works = {key: count_work(graphs[key], batch, NETWORKS[name].side) for key in COUNTED if key in graphs}
            forms = list_forms(guard, sessions, guard.preprocessing.apply(images[:batch]))
            sums = add_works(works)
            times = time_in_turns(forms, rounds)
            row = {
                "target": name,
                "batch": batch,
                "rounds": rounds,
                "flops": {form: work.flops for form, work in sums.items()},
                "bytes": {form: work.bytes for form, work in sums.items()},
                "ms": times,
                "machine": describe_machine(),
                "commit": find_commit(),
            }
            write_row(row, FLOOR)
            print(f"{name} batch {batch}: " + ", ".join(f"{form} {ms:.2f} ms" for form, ms in times.items()), flush=True)


def write_graphs(guard: Guard, target: Path, folder: Path) -> dict[str, Path]:
    """The graphs of every placement and loop."""
    graphs = {"production": target, "tapped": guard.tapped_path}
    logits = next(output for output in guard.manifest.outputs if output.name == guard.manifest.logits)
    given = TensorSpec(RAW_LOGITS, logits.dtype, logits.shape)
    made = {
        "features": build_features(guard, given, scored=False),
        "scored features": build_features(guard, given, scored=True),
        "scorer": build_scorer(guard),
        "whole": build_whole(guard),
        "direct": build_whole(guard, judged=True),
        "judged features": build_features(guard, given, scored=True, judged=True),
    }
    for name, model in made.items():
        graphs[name] = folder / f"{name.replace(' ', '_')}.onnx"
        save_graph(model, graphs[name])
    if guard.denoiser_path is not None:
        graphs["denoiser"] = guard.denoiser_path
    return graphs


def open_session(
    path: Path, threads: int, change: Callable[[ort.SessionOptions], None] = lambda options: None
) -> ort.InferenceSession:
    """A session as the stand-in backend opens it, threads that wait do not spin; `change` may set the options otherwise."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    change(options)
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def list_forms(guard: Guard, sessions: dict[str, ort.InferenceSession], inputs: NDArray[Any]) -> dict[str, Run]:
    """What is timed, each on the same images: the classifier, the scoring alone by loop, and both by placement."""
    manifest, scorer = guard.manifest, guard.scorer
    image = {manifest.input.name: inputs}

    def denoise(noised: Any, sigma: Any, guide: Any) -> Any:
        return sessions["denoiser"].run([SAMPLE], {NOISED: noised, SIGMA: sigma, GUIDE: guide})[0]

    def run(name: str) -> list[NDArray[Any]]:
        return list(sessions[name].run(None, image))

    def loop() -> None:
        scorer.score(logits, latents, denoise if scorer.needs_denoiser else None)

    def fused() -> None:
        sessions["scorer"].run(None, {LATENTS: latents, LOGITS: logits})

    def chain(*steps: Run) -> None:
        for step in steps:
            step()

    names = [output.name for output in sessions["tapped"].get_outputs()]
    found = dict(zip(names, run("tapped"), strict=True))
    logits, latents = found[manifest.logits], found[LATENTS]
    production, tapped = (partial(run, name) for name in ("production", "tapped"))
    features, scored, judged = (
        partial(sessions[name].run, None, {**image, RAW_LOGITS: logits})
        for name in ("features", "scored features", "judged features")
    )
    forms: dict[str, Run] = {"production": production}
    for name, score in (("bls", loop), ("fused", fused)):
        forms[f"scoring {name}"] = score
        forms[f"shared {name}"] = partial(chain, tapped, score)
        forms[f"separate {name}"] = partial(chain, production, features, score)
    for name, behind in (("whole", scored), ("direct", judged)):
        forms[f"shared {name}"] = partial(run, name)
        forms[f"separate {name}"] = partial(chain, production, behind)
    return forms


def add_works(works: dict[str, Work]) -> dict[str, Work]:
    """Work of production and of both placements; a batch of one step calls the denoiser once."""
    scoring = works.get("denoiser", Work(0.0, 0.0))
    return {
        "production": works["production"],
        "shared": works["tapped"] + scoring,
        "separate": works["production"] + works["features"] + scoring,
    }


def time_in_turns(forms: dict[str, Run], rounds: int) -> dict[str, float]:
    """Median milliseconds of each form."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(rounds + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            if turn:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: round(float(np.median(found)) * 1e3, 4) for name, found in times.items()}


def render_table(floors: Sequence[Row], served: Sequence[Row]) -> list[str]:
    """Markdown: what was served, one gRPC request under way, over the same graphs in one process."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- " * len(HEAD) + "|"]
    return lines + [render_row(row, floor) for row, floor in match_rows(floors, served)]


def match_rows(floors: Sequence[Row], served: Sequence[Row]) -> list[tuple[Row, Row]]:
    """What was served, one gRPC request under way, each with its floor on the same machine; rows without one are left out."""
    by_key = {(row["target"], row["batch"], row["machine"]): row for row in floors}
    pairs = []
    for row in served:
        floor = by_key.get((row["target"], row["batch"], row["machine"]))
        plain = (row["protocol"], row["concurrency"], row["shared_memory"], row["gateway"]) == ("grpc", 1, False, False)
        if floor and plain:
            pairs.append((row, floor))
    return pairs


def render_row(row: Row, floor: Row) -> str:
    """One line."""
    work, moved, times = floor["flops"], floor["bytes"], floor["ms"]
    guarded = times[f"{row['placement']} {row['loop']}"]
    own = row["time_ms"].get(f"{row['model']}{GUARD_SUFFIX}", {}).get("compute_infer")
    scoring = times.get(f"scoring {row['loop']}")
    cells = [
        row["target"],
        row["placement"],
        row["loop"],
        str(row["batch"]),
        f"{work[row['placement']] / 1e9:.3g}",
        f"{work[row['placement']] / work['production']:.3f}",
        f"{moved[row['placement']] / 1e6:.3g}",
        f"{moved[row['placement']] / moved['production']:.3f}",
        f"{times['production']:.4g}",
        f"{guarded:.4g}",
        f"{guarded / times['production']:.2f}",
        f"{row['guarded']['p50_ms']:.4g}",
        f"{row['guarded']['p50_ms'] / guarded:.2f}",
        "–" if own is None else f"{own:.3g}",
        "–" if own is None or scoring is None else f"{own / scoring:.2f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main(sys.argv[1:])

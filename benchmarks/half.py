"""What half precision does to detection: the graphs that TensorRT gets, emulated on the CPU, on cells measured before.

usage: python -m benchmarks.half --cells mnist-wanet,gtsrb-wanet [--images 1000]
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from benchmarks.evaluation import prepare_cell
from benchmarks.figures import show
from benchmarks.metrics import measure_detection
from benchmarks.records import Row, read_rows, write_row
from benchmarks.settings import RESULTS, describe_machine, find_cache, find_commit
from benchmarks.targets import Cell, read_cell
from diffense.errors import DiffenseError
from diffense.graphs import load_model, open_session, run_batched
from diffense.guard import Guard
from diffense.names import LATENTS, LOGITS, SCORE
from diffense_export.half import convert_half
from diffense_export.scorer import build_scorer

HALF: Final = RESULTS / "half.json"
BATCH: Final = 256


def measure_cell(cell: Cell, most: int, progress: Callable[[str], None]) -> Row:
    """One row: AUROC and TPR of both precisions, on at most so many clean and triggered images.

    Raises:
        DiffenseError: the cell has no guard in the cache, or one of another version; `diffense evaluate` makes it.
    """
    found = prepare_cell(cell, None, progress)
    guard = Guard.load(find_cache() / "guards" / f"{cell.name}-all-0-auto", found.target.path)
    clean, triggered = found.evaluation.pixels[:most], found.triggered[:most]
    image = guard.preprocessing.apply(np.concatenate([clean, triggered]))
    tapped, scorer = load_model(guard.tapped_path), build_scorer(guard)
    logits, latents, scores = run_path(guard, tapped, scorer, image)
    half_logits, half_latents, half_scores = run_path(
        guard, emulate(convert_half(tapped)), emulate(convert_half(scorer)), image
    )
    labels, half_labels = logits.argmax(1), half_logits.argmax(1)
    right = labels[: len(clean)] == found.evaluation.labels[:most]
    reached = labels[len(clean) :] == found.target.attack.target
    row: dict[str, Any] = {
        **cell.describe(guard_seed=0),
        "clean": len(clean),
        "triggered": len(triggered),
    }
    for name, values in (("fp32", scores), ("fp16", half_scores)):
        rows, attacked = values[: len(clean)], values[len(clean) :]
        detection = measure_detection(guard.scorer.calibration, rows, right, attacked, reached)
        row[name] = {key: getattr(detection, key) for key in ("auroc", "tpr_at_fpr1", "fpr_at_1")}
    return row | {
        "latents_rms": float(np.sqrt(np.mean(latents**2))),
        "latents_moved_rms": float(np.sqrt(np.mean((half_latents - latents) ** 2))),
        "latents_moved_most": float(np.abs(half_latents - latents).max()),
        "labels_changed": int((labels != half_labels).sum()),
        "commit": find_commit(),
        "machine": describe_machine(),
    }


def emulate(model: ir.Model) -> ir.Model:
    """A half-precision graph that onnxruntime rounds on the CPU as it is written; the model is left unchanged.

    For want of float16 operators onnxruntime computes a row of them in float32 and leaves out the roundings between, casts of
    the graph's own included; only where two nodes that compute nothing stand together does it keep float16.
    """
    model = model.clone()
    typed = ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    halves = {v.name for node in typed.graph for v in node.outputs if v.dtype == ir.DataType.FLOAT16}
    for node in list(model.graph):
        for value in node.outputs:
            if value.name not in halves:
                continue
            users = list(value.uses())
            first = ir.node("Identity", [value], name=f"{value.name}/first")
            second = ir.node("Identity", [first.outputs[0]], name=f"{value.name}/second")
            for added in (first, second):
                added.outputs[0].name = added.name
            model.graph.insert_after(node, [first, second])
            for user, place in users:
                user.replace_input_with(place, second.outputs[0])
    return model


def run_path(
    guard: Guard, tapped: ir.Model, scorer: ir.Model, image: NDArray[Any]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Logits (N, C), latents (N, W) and scores (N,), as a served family makes them."""
    # Unoptimised, or onnxruntime would take away what `emulate` puts in.
    session = open_session(tapped, optimize=False)
    logits, latents = run_batched(session, image, [guard.manifest.logits, LATENTS], guard.manifest.batch, BATCH)
    flat = logits.reshape(len(image), -1).astype(np.float32)
    session = open_session(scorer, optimize=False)
    parts = [
        session.run([SCORE], {LATENTS: latents[i : i + BATCH], LOGITS: flat[i : i + BATCH]})[0][:, 0]
        for i in range(0, len(image), BATCH)
    ]
    return flat, latents, np.concatenate(parts)


def render_line(row: Row) -> str:
    """A line of a Markdown table."""
    figures = [show(row[name][key]) for key in ("auroc", "tpr_at_fpr1") for name in ("fp32", "fp16")]
    cells = [f"{row['dataset']} {row['attack']}", *figures, f"{row['latents_moved_rms']:.4f} of {row['latents_rms']:.2f}"]
    return "| " + " | ".join([*cells, str(row["labels_changed"])]) + " |"


def render_table(rows: Sequence[Row]) -> str:
    """All measured cells."""
    head = "| cell | AUROC fp32 | fp16 | TPR at 1 % FPR fp32 | fp16 | latents moved (rms) | labels changed |"
    return "\n".join([head, "| --- |" + " --- |" * 6, *map(render_line, rows)])


def main(arguments: Sequence[str]) -> None:
    """Read the options, measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.half", description="Detection in half precision.")
    parser.add_argument("--cells", required=True, help="dataset-attack, comma-separated; measured before")
    parser.add_argument("--images", type=int, default=1000, help="most clean and most triggered images")
    options = parser.parse_args(arguments)
    try:
        for name in options.cells.split(","):
            write_row(measure_cell(read_cell(name), options.images, print), HALF)
        print(render_table(read_rows(HALF)))
    except DiffenseError as error:
        sys.exit(f"half: {error}")
    except KeyboardInterrupt:
        sys.exit("half: interrupted; cells that are finished are kept")


if __name__ == "__main__":
    main(sys.argv[1:])

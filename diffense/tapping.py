"""The target with its latents: run at fit time for pooled features, written as one graph with one more output."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from diffense.clean import CleanSet, Run, count_independent
from diffense.graphs import open_session, run_batched, save_graph
from diffense.guidance import Kind, average_by_label, fit_guidance, one_hot, split_mean
from diffense.images import Preprocessing
from diffense.latent import GRID, Whitening, append_latents, append_pooling, fit_whitening
from diffense.taps import Tap
from diffense.target import Target


def open_pooling(target: Target, taps: Sequence[Tap], preprocessing: Preprocessing, grid: int = GRID) -> Run:
    """Give a function from pixels to float64 logits and pooled features of each tap; `grid` as `append_pooling` has it."""
    model = target.load_graph()
    pooled = _pool(model.graph, taps, grid)
    for value in pooled:
        value.dtype = ir.DataType.FLOAT
        if not value.is_graph_output():
            model.graph.outputs.append(value)
    names = [target.logits, *(str(value.name) for value in pooled)]
    session = open_session(model)

    def run(images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
        preprocessing.check(images)
        logits, *features = run_batched(session, images, names, target.batch, prepare=preprocessing.apply)
        return logits.reshape(len(images), -1).astype(np.float64), [f.astype(np.float64) for f in features]

    return run


def _pool(graph: ir.Graph, taps: Sequence[Tap], grid: int = GRID) -> list[ir.Value]:
    """Append the pooling of the taps, each with the batch brought to the front."""
    values = ir.convenience.create_value_mapping(graph, include_subgraphs=False)
    fronted = []
    for tap in taps:
        value = values[tap.name]
        if tap.batch_axis:
            node = ir.node("Transpose", [value], {"perm": [1, 0, 2]}, name=f"diffense/batch_first/{tap.name}")
            node.outputs[0].name = node.name
            graph.append(node)
            value = node.outputs[0]
        fronted.append(value)
    return append_pooling(graph, taps, fronted, grid)


def whiten(clean: CleanSet, kind: Kind, probabilities: bool) -> tuple[list[Whitening], NDArray[np.float64]]:
    """Fit each tap's whitening and give the (n, K d) latents of the clean set, padded to the widest tap."""
    whitenings = fit_whitenings(clean, kind, probabilities)
    return whitenings, project_taps(whitenings, clean.pooled)


def fit_whitenings(clean: CleanSet, kind: Kind, probabilities: bool, widths: Sequence[int] | None = None) -> list[Whitening]:
    """Fit the whitening of each of the K taps.

    Args:
        clean: what is fitted on.
        kind: what guides the latents.
        probabilities: whether the logits are a softmax.
        widths: most directions of each tap, at least one, instead of as many as so many rows bear.
    """
    whitenings = []
    hot = one_hot(clean.logits)
    most: Sequence[int | None] = widths or [None] * len(clean.pooled)
    for pooled, width in zip(clean.pooled, most, strict=True):
        if kind == "label":  # not the doubt: directions that doubt explains away here would be blown up for sure inputs
            centred = pooled - hot @ average_by_label(pooled, hot, pooled.mean(axis=0))
        else:
            guidance = fit_guidance(pooled, clean.logits, kind, probabilities)
            centred = split_mean(guidance, pooled, clean.logits, probabilities)[1]
        whitenings.append(fit_whitening(pooled, centred, width, count_independent(clean.source)))
    return whitenings


def whiten_by(
    clean: CleanSet, rows: NDArray[np.bool_], widths: Sequence[int], width: int, kind: Kind, probabilities: bool
) -> NDArray[np.float64]:
    """(n, K d) latents of the whole clean set, whitened by these rows alone.

    Args:
        clean: all rows.
        rows: (n,) which are fitted on; they hold the original of each of their copies.
        widths: most directions of each tap, at least one and at most d.
        width: d.
        kind: what guides the latents.
        probabilities: whether the logits are a softmax.
    """
    return project_taps(fit_whitenings(clean.take(rows), kind, probabilities, widths), clean.pooled, width)


def project_taps(
    whitenings: Sequence[Whitening], pooled: Sequence[NDArray[np.float64]], width: int | None = None
) -> NDArray[np.float64]:
    """Pooled features of each tap, (N, P) -> (N, K d) latents, padded to d, the width of the widest tap by default."""
    width = max(w.directions.shape[1] for w in whitenings) if width is None else width
    latents = np.zeros((len(pooled[0]), len(whitenings) * width))
    for tap, (features, w) in enumerate(zip(pooled, whitenings, strict=True)):
        latents[:, tap * width : tap * width + w.directions.shape[1]] = (features - w.mean) @ w.directions
    return latents


def write_tapped(target: Target, taps: Sequence[Tap], whitenings: Sequence[Whitening], width: int, path: Path) -> None:
    """Write the whole target with the latents as one more output."""
    model = target.load_graph()
    pooled = _pool(model.graph, taps)
    append_latents(model.graph, pooled, whitenings, width, target)
    save_graph(model, path)


def compare_shared(
    target: Target, tapped: Path, preprocessing: Preprocessing, images: NDArray[np.uint8]
) -> tuple[bool, float, bool]:
    """Say whether the extra output moved the logits on the clean images: bit-identical, largest difference, same labels."""
    before, after = (
        run_batched(open_session(path), images, [target.logits], target.batch, prepare=preprocessing.apply)[0]
        for path in (target.path, tapped)
    )
    same = bool(np.array_equal(before.reshape(len(images), -1).argmax(1), after.reshape(len(images), -1).argmax(1)))
    return bool(np.array_equal(before, after)), float(np.abs(before - after).max()), same

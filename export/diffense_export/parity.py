"""The parity gate: exported graphs are run beside their sources before anything is installed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from diffense import names
from diffense.errors import ParityError
from diffense.guard import Guard, open_denoiser
from diffense.target import open_session, run_batched

MOST_IMAGES: Final = 256
NOISE_IMAGES: Final = 32
NOISE_CELLS: Final = 4  # corners of the coarse grid that is blown up to smooth noise
LATENT_TOLERANCE: Final = 1e-4  # whitened latents have unit variance
OUTPUT_TOLERANCE: Final = 1e-5  # design.md: beyond it the shared graph is no stand-in for the target
SCORE_TOLERANCE: Final = 1e-4


class Comparison(BaseModel):
    """One exported graph against its source; differences are relative to ``1 + |source|``."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    graph: str
    source: str
    tensor: str
    tolerance: float
    largest_difference: float
    identical: bool


class Neutrality(BaseModel):
    """What export does to the ranking of scores, hence to AUROC, and to verdicts."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rank_correlation: float
    largest_p_value_change: float
    verdict_flips: int


class ParityReport(BaseModel):
    """Everything that the gate measured."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    images: int
    origin: Literal["clean images", "smooth noise"]
    comparisons: tuple[Comparison, ...]
    neutrality: Neutrality


@dataclass(frozen=True)
class Exported:
    """The graphs of one export.

    Attributes:
        target: the untouched classifier.
        latents: the graph that gives the latents.
        shared: whether it gives the target's outputs too.
        denoiser: one guided step, or None.
        scorer: the fused graph, or None.
        scored: whether the latents' graph gives the score as well.
        judged: whether it gives the verdict too.
    """

    target: Path
    latents: Path
    shared: bool
    denoiser: Path | None
    scorer: Path | None
    scored: bool
    judged: bool


def draw_smooth_noise(count: int, size: tuple[int, int], channels: int, seed: int = 0) -> NDArray[np.uint8]:
    """Draw images of smooth random colour fields, for want of clean ones: (count, height, width, channels) uint8."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (count, NOISE_CELLS, NOISE_CELLS, channels))
    rows, columns = (_interpolate(length) for length in size)
    fields = np.einsum("hi,wj,nijc->nhwc", rows, columns, coarse)
    return np.asarray(np.rint(fields), np.uint8)


def check_parity(guard: Guard, exported: Exported, clean: NDArray[np.uint8] | None = None) -> ParityReport:
    """Compare every exported graph with its source, on at most `MOST_IMAGES` images.

    Args:
        guard: the source.
        exported: the graphs.
        clean: (N, height, width, channels) uint8 clean images; None for smooth noise.

    Raises:
        ParityError: a difference beyond its tolerance, or an image whose predicted class changes.
    """
    manifest = guard.manifest
    preprocessing = guard.preprocessing
    pixels = draw_smooth_noise(NOISE_IMAGES, preprocessing.size, preprocessing.channels) if clean is None else clean
    pixels = pixels[:MOST_IMAGES]
    images = preprocessing.apply(pixels)
    outputs = [output.name for output in manifest.outputs]

    def run(
        graph: Path, wanted: list[str], others: Mapping[str, NDArray[Any]] = MappingProxyType({})
    ) -> dict[str, NDArray[Any]]:
        return dict(zip(wanted, run_batched(open_session(graph), images, wanted, manifest.batch, others=others), strict=True))

    source = run(guard.tapped_path, [*outputs, names.LATENTS])
    production = run(exported.target, outputs)
    scored = [names.RAW_SCORE] if exported.scored and not exported.judged else []
    if exported.judged:
        scored += [*names.VERDICT_TENSORS, *(() if exported.shared else (names.PASSED_LOGITS,))]
    given = {} if exported.shared else {names.RAW_LOGITS: production[manifest.logits]}
    served = run(exported.latents, [*(outputs if exported.shared else ()), names.LATENTS, *scored], given)
    comparisons = [_compare("latents", "guard bundle", names.LATENTS, served, source, LATENT_TOLERANCE)]
    if exported.shared:
        comparisons += [_compare("tapped", "target", name, served, production, OUTPUT_TOLERANCE) for name in outputs]
        production = {name: served[name] for name in outputs}
        _check_labels(production[manifest.logits], run(exported.target, [manifest.logits])[manifest.logits])
    logits = _flatten(production[manifest.logits])
    reference = guard.score(pixels)
    scores, p_values, flagged = _score(guard, exported, logits, served)
    ours, theirs = {names.SCORE: scores}, {names.SCORE: reference.scores}
    comparisons.append(_compare("whole path", "Guard.score", names.SCORE, ours, theirs, SCORE_TOLERANCE))
    if exported.judged:
        stated: dict[str, NDArray[Any]] = {names.P_VALUE: p_values.astype(np.float32), names.FLAGGED: flagged}
        columns = {name: served[name].reshape(-1) for name in stated}
        comparisons += [_compare("verdict", "calibration", name, columns, stated, 0.0) for name in stated]
    if exported.judged and not exported.shared:
        passed = {names.PASSED_LOGITS: given[names.RAW_LOGITS]}
        comparisons.append(_compare("features", "target", names.PASSED_LOGITS, served, passed, 0.0))
    report = ParityReport(
        images=len(pixels),
        origin="smooth noise" if clean is None else "clean images",
        comparisons=tuple(comparisons),
        neutrality=Neutrality(
            rank_correlation=correlate_ranks(scores, reference.scores),
            largest_p_value_change=float(np.abs(p_values - reference.p_values).max(initial=0)),
            verdict_flips=int((flagged != reference.flagged).sum()),
        ),
    )
    for comparison in report.comparisons:
        if not comparison.largest_difference <= comparison.tolerance:
            raise ParityError(
                f"{comparison.tensor} of the exported graph ({comparison.graph}) differs from {comparison.source} by "
                f"{comparison.largest_difference:.2g}, more than {comparison.tolerance:g}; nothing was installed"
            )
    return report


def correlate_ranks(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; 1 for two constant rows."""
    a, b = (_rank(values) for values in (left, right))
    spread = float(a.std() * b.std())
    return 1.0 if spread == 0 else float(((a - a.mean()) * (b - b.mean())).mean() / spread)


def _rank(values: NDArray[np.float32]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return np.asarray((ends - (counts - 1) / 2)[inverse], np.float64)


def _score(
    guard: Guard, exported: Exported, logits: NDArray[np.float32], served: dict[str, NDArray[Any]]
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.uint8]]:
    """Score as the served models will."""
    if exported.scored:
        scores = served[names.SCORE if exported.judged else names.RAW_SCORE].reshape(-1)
        return scores, *guard.scorer.judge(scores)
    latents = served[names.LATENTS]
    if exported.scorer is not None:
        session = open_session(exported.scorer)
        scores = session.run([names.SCORE], {names.LATENTS: latents, names.LOGITS: logits})[0].reshape(-1)
        return scores, *guard.scorer.judge(scores)
    scored = guard.scorer.score(logits, latents, open_denoiser(exported.denoiser) if exported.denoiser else None)
    return scored.scores, scored.p_values, scored.flagged


def _compare(
    graph: str,
    source: str,
    tensor: str,
    ours: dict[str, NDArray[Any]],
    theirs: dict[str, NDArray[Any]],
    tolerance: float,
) -> Comparison:
    mine, reference = ours[tensor], theirs[tensor]
    identical = bool(np.array_equal(mine, reference, equal_nan=mine.dtype.kind == "f"))
    if identical:
        largest = 0.0
    elif mine.dtype.kind == "f" and np.isfinite(mine).all() and np.isfinite(reference).all():
        wide = reference.astype(np.float64)
        largest = float((np.abs(mine - wide) / (1 + np.abs(wide))).max())
    else:
        largest = float("inf")  # whole numbers and NaN are equal or they are not
    return Comparison(
        graph=graph, source=source, tensor=tensor, tolerance=tolerance, largest_difference=largest, identical=identical
    )


def _check_labels(ours: NDArray[Any], theirs: NDArray[Any]) -> None:
    changed = int((_flatten(ours).argmax(axis=1) != _flatten(theirs).argmax(axis=1)).sum())
    if changed:
        raise ParityError(
            f"the shared graph changes the predicted class of {changed} of {len(ours)} images; use the separate placement"
        )


def _flatten(logits: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(logits.reshape(len(logits), -1), np.float32)


def _interpolate(length: int) -> NDArray[np.float64]:
    """Matrix (length, NOISE_CELLS) of linear interpolation between the coarse grid's corners."""
    places = np.linspace(0, NOISE_CELLS - 1, length)
    return np.maximum(0, 1 - np.abs(places[:, None] - np.arange(NOISE_CELLS)))

"""The scorer: the formula with its clean statistics, on NumPy alone; what the served guard computes with."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from diffense.calibration import find_threshold, flag, rank_p_values
from diffense.errors import TamperedError
from diffense.guidance import Guidance, one_hot
from diffense.manifest import Manifest, check_files, read_manifest
from diffense.names import ARRAYS_FILE, FLAGGED_YES, PASSED
from diffense.rule import Rule, combine, group_evidence
from diffense.sampling import Denoise, in_float32
from diffense.scoring import (
    Allowance,
    Evidence,
    Formula,
    lay_bands,
    list_evidence,
    list_parts,
    measure,
)
from diffense.surprise import Surprise


class Scored(NamedTuple):
    """Verdicts on N inputs: scores float32, p_values float64, flagged uint8 (1 = flagged), labels int64, each (N,)."""

    scores: NDArray[np.float32]
    p_values: NDArray[np.float64]
    flagged: NDArray[np.uint8]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Scorer:
    """Scores latents, calibrated.

    Attributes:
        formula: constants of the score.
        rule: clean statistics of the evidence, and how it is combined.
        used: (W,) False where a latent entry is padding.
        calibration: (n,) ascending float32 scores of clean images used for nothing else.
        alpha: false-alarm rate.
        needs_denoiser: False when the guard is the closed-form chain alone.
    """

    formula: Formula
    rule: Rule
    used: NDArray[np.bool_]
    calibration: NDArray[np.float32]
    alpha: float
    needs_denoiser: bool

    @classmethod
    def load(cls, folder: Path) -> "Scorer":
        """Read manifest and arrays from a bundle, or from the version folder of a served guard.

        Raises:
            TamperedError: a file is missing or changed.
            SchemaError: the manifest cannot be used.
        """
        manifest = read_manifest(folder)
        check_files(folder, manifest, frozenset({ARRAYS_FILE}))
        try:
            arrays = load_file(folder / ARRAYS_FILE)
            return unpack_scorer(arrays, manifest)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise TamperedError(f"{folder}: {ARRAYS_FILE} does not fit its manifest; fit the guard again") from error

    @property
    def classes(self) -> int:
        """C."""
        return self.formula.guidance.means.shape[0]

    @cached_property
    def evidence(self) -> list[Evidence]:
        """The E pieces of evidence, in the order of `measure`."""
        return name_evidence(self.formula, self.used, self.needs_denoiser)

    @property
    def threshold(self) -> float:
        """The largest score that passes at alpha."""
        return find_threshold(self.calibration, self.alpha)

    def measure(self, logits: NDArray[Any], latents: NDArray[Any], denoise: Denoise | None) -> NDArray[np.float64]:
        """(N, C) logits and (N, W) latents -> (N, E) log distances."""
        if self.needs_denoiser and denoise is None:
            raise ValueError("this guard has a network and scores with its denoiser; hand it over")
        flat = np.asarray(logits, np.float64).reshape(len(logits), self.classes)
        step = in_float32(denoise) if self.needs_denoiser and denoise is not None else None
        result = measure(self.formula, flat, np.asarray(latents, np.float64), one_hot(flat), step, np)
        return np.asarray(result, np.float64)

    def weigh(self, log_distances: NDArray[np.float64]) -> NDArray[np.float32]:
        """(N, E) log distances -> (N,) scores."""
        return np.asarray(combine(self.rule, log_distances, np), np.float32)

    def judge(self, scores: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        """(N,) scores -> p-values and flags."""
        p_values = rank_p_values(self.calibration, scores)
        flagged = flag(p_values, self.alpha, len(self.calibration))
        return p_values, np.where(flagged, FLAGGED_YES, PASSED).astype(np.uint8)

    def score(self, logits: NDArray[Any], latents: NDArray[Any], denoise: Denoise | None) -> Scored:
        """Score N inputs.

        Args:
            logits: (N, C) or (N, C, 1, 1) of the target.
            latents: (N, W) float32, finite (the caller checks).
            denoise: one guided step; may be None when `needs_denoiser` is False.
        """
        scores = self.weigh(self.measure(logits, latents, denoise))
        p_values, flagged = self.judge(scores)
        return Scored(scores, p_values, flagged, np.asarray(logits).reshape(len(scores), self.classes).argmax(axis=1))


def name_evidence(formula: Formula, used: NDArray[np.bool_], networked: bool) -> list[Evidence]:
    """The columns of `measure`; without a network there are no levels."""
    _, names = lay_bands(used, formula.width)
    levels = formula.ladder.shape[1] if networked else 1
    return list_evidence(names, levels, list_parts(used, formula.width))


def pack_scorer(scorer: Scorer) -> bytes:
    """The scorer's arrays as a safetensors file, the same bytes for the same scorer."""
    guidance, formula = scorer.formula.guidance, scorer.formula
    allowance = formula.allowance or Allowance(np.zeros((3, formula.chosen_parts.shape[1])))
    arrays: dict[str, NDArray[Any]] = {
        "projection": guidance.projection,
        "centre": guidance.centre,
        "slope": guidance.slope,
        "bias": guidance.bias,
        "doubt_knots": guidance.doubt.knots,
        "doubt_slopes": guidance.doubt.slopes,
        "allowance": allowance.lines,
        "means": guidance.means,
        "seen": guidance.seen.astype(np.uint8),
        "transform": formula.transform,
        "noise": formula.noise,
        "ladder": formula.ladder,
        "knots": scorer.rule.pieces.knots,
        "slopes": scorer.rule.pieces.slopes,
        "tap_knots": scorer.rule.taps.knots,
        "tap_slopes": scorer.rule.taps.slopes,
        "used": scorer.used.astype(np.uint8),
        "calibration": scorer.calibration,
    }
    floats = {k: v if v.dtype == np.uint8 else v.astype(np.float32) for k, v in arrays.items()}
    return save({k: np.ascontiguousarray(v) for k, v in sorted(floats.items())})


def unpack_scorer(arrays: dict[str, NDArray[Any]], manifest: Manifest) -> Scorer:
    """Arrays of `pack_scorer` and the manifest -> scorer; statistics in float64 from here on.

    Raises:
        KeyError, ValueError: an array is missing, has a wrong shape, or holds what no fit writes.
    """
    wide = {k: v.astype(np.float64) for k, v in arrays.items() if v.dtype == np.float32}
    size, classes = manifest.latent_dim, manifest.classes
    used = arrays["used"].astype(bool)
    sampling = manifest.sampling
    if size != manifest.tap_width * len(manifest.taps):
        raise ValueError(f"{len(manifest.taps)} taps of width {manifest.tap_width} do not make {size} latents")
    if used.shape != (size,):
        raise ValueError(f"used has shape {used.shape}, not {(size,)}")
    parts = len(list_parts(used, manifest.tap_width))
    shapes = {
        "slope": (manifest.denoiser.guide, size),
        "bias": (size,),
        "allowance": (3, parts),
        "means": (classes, size),
        "seen": (classes,),
        "transform": (size, size),
        "noise": (manifest.denoiser.rows, size),
    }
    for name, shape in shapes.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, not {shape}")
    broken = [name for name, array in wide.items() if not np.isfinite(array).all()]
    calibration = arrays["calibration"]
    if broken or calibration.ndim != 1 or not len(calibration) or (np.diff(calibration) < 0).any():
        raise ValueError(f"{(broken or ['calibration'])[0]} holds what no fit writes")
    guidance = Guidance(
        manifest.clean.guide,
        wide["projection"],
        wide["centre"],
        Surprise(wide["doubt_knots"], wide["doubt_slopes"]),
        wide["slope"],
        wide["bias"],
        wide["means"],
        arrays["seen"].astype(bool),
    )
    formula = Formula(
        guidance,
        wide["transform"],
        lay_bands(used, manifest.tap_width)[0],
        wide["noise"],
        wide["ladder"],
        sampling.draws,
        manifest.tap_width,
        sampling.data_guidance,
        manifest.probabilities,
        Allowance(wide["allowance"]),
    )
    evidence = name_evidence(formula, used, manifest.network.used)
    groups, weights = group_evidence(evidence)
    pieces, taps = Surprise(wide["knots"], wide["slopes"]), Surprise(wide["tap_knots"], wide["tap_slopes"])
    for surprise, count in ((pieces, len(evidence)), (taps, len(weights))):
        if surprise.knots.shape != surprise.slopes.shape or len(surprise.knots) != count:
            raise ValueError(f"knots of {len(surprise.knots)} numbers, not {count}")
    return Scorer(formula, Rule(pieces, groups, taps, weights), used, calibration, manifest.alpha, manifest.network.used)

"""From clean images, seen through the taps, to a scorer: chain, network and clean statistics."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from diffense.clean import CleanSet
from diffense.crosscalibration import Score
from diffense.crossfit import (
    FEWEST_ROWS,
    CrossFit,
    LatentSet,
    Reference,
    Rewhiten,
    cross_fit,
    learn_network,
    measure_reference,
)
from diffense.denoiser import build_denoiser
from diffense.guard import open_denoiser
from diffense.guidance import Kind
from diffense.manifest import NetworkReport
from diffense.rule import Rule, combine, fit_rule
from diffense.sampling import draw_noise, lay_ladder
from diffense.scorer import Scorer, name_evidence
from diffense.scoring import Allowance, Formula, allow, fit_allowance, lay_bands
from diffense.settings import FitSettings, ignore_progress
from diffense.tapping import project_taps, whiten, whiten_by
from diffense.target import Target

STRANGEST: Final = 0.01  # of the clean images; the network does not learn from them (docs/decisions/0033)


def fit_scorer(
    clean: CleanSet,
    latents: NDArray[np.float64],
    kind: Kind,
    probabilities: bool,
    sigmas: NDArray[np.float64],
    settings: FitSettings,
    generator: np.random.Generator,
    report: Callable[[int, int], None],
) -> tuple[LatentSet, Scorer, dict[str, NDArray[np.float32]] | None, NetworkReport]:
    """Fit chain, network and clean statistics; the scorer is not calibrated yet."""
    width = latents.shape[1] // len(sigmas[0])
    used = latents.any(axis=0)
    latent_set = LatentSet(
        latents, clean.logits, clean.source, clean.originals, used, width, kind, probabilities, settings.chain_sigma
    )
    whole = latent_set.fit_linear(np.ones(len(latents), bool))
    rewhiten: Rewhiten | None = None
    if clean.originals < FEWEST_ROWS and settings.network != "on":  # a network learns in one set of directions
        widths = [max(1, int(directions.sum())) for directions in used.reshape(-1, width)]
        rewhiten = partial(whiten_by, clean, widths=widths, width=width, kind=kind, probabilities=probabilities)
    crossed = cross_fit(latent_set, whole[0], generator, rewhiten)
    # A network learns the scenes that it has seen by heart, so it is judged, and used, by rows of others. The closed form does
    # not; and without one of a label's two or three groups it is less sure of the label than the guard will be.
    judged = crossed
    if clean.groups is not None and settings.network != "off" and rewhiten is None:
        judged = cross_fit(latent_set, whole[0], generator, groups=clean.groups)
    noise = draw_noise(len(sigmas), settings.draws, latents.shape[1], settings.seed) * used
    formula = Formula(
        guidance=whole[0],
        transform=whole[1].transform,
        bands=lay_bands(used, width)[0],
        noise=noise.astype(np.float64),
        ladder=lay_ladder(sigmas, settings.steps),
        draws=settings.draws,
        width=width,
        data_guidance=settings.data_guidance,
        probabilities=probabilities,
    )
    weights, network = learn_network(
        latent_set,
        judged,
        whole[0],
        sigmas,
        settings,
        report,
        partial(choose_typical, latent_set, judged, formula),
    )
    denoise = None if weights is None else open_denoiser(build_network(weights, sigmas, width, settings))
    originals = np.arange(len(latents)) < clean.originals
    reference = measure_reference(latent_set, judged if network.used else crossed, formula, denoise, originals)
    allowance, rule = fit_statistics(reference, formula, network.used)
    formula = replace(formula, allowance=allowance)
    scorer = Scorer(formula, rule, used, np.zeros(1, np.float32), settings.alpha, network.used)
    return latent_set, scorer, weights, network


def fit_statistics(reference: Reference, formula: Formula, networked: bool) -> tuple[Allowance, Rule]:
    """Fit what doubt excuses and the rule on clean evidence.

    Args:
        reference: of originals; (n, M) mismatch and (n_s, L B) or, without a network, (n, B) strangeness.
        formula: whose bands name the evidence.
        networked: whether a network had a part in the strangeness.
    """
    allowance = fit_allowance(reference.mismatch, reference.doubt)
    mismatch = allow(allowance, reference.mismatch, reference.doubt, np)
    evidence = name_evidence(formula, formula.bands.any(axis=1), networked)
    return allowance, fit_rule([reference.strange, mismatch], evidence)


def choose_typical(latent_set: LatentSet, crossed: CrossFit, formula: Formula) -> NDArray[np.bool_]:
    """Choose what the network learns from: (n,) False for rows that the closed form finds strangest.

    Each row is scored by the guidance and chain that were fitted without it. A network learns any cluster that there is, also
    that of the few clean images which the target takes for another class, and then finds nothing strange in inputs that a
    trigger puts there (docs/decisions/0033). At least one original is left out, and every copy that is as strange.
    """
    seen = measure_reference(latent_set, crossed, formula, None, np.ones(len(latent_set.source), bool))
    originals = seen.rows < latent_set.originals
    allowance, rule = fit_statistics(seen.take(originals), formula, False)
    mismatch = allow(allowance, seen.mismatch, seen.doubt, np)
    scores = combine(rule, np.concatenate([seen.strange, mismatch], axis=1), np)
    typical = np.ones(len(latent_set.source), bool)
    typical[seen.rows] = scores <= np.quantile(scores[originals], 1.0 - STRANGEST)
    return typical


def fit_part(
    clean: CleanSet,
    kind: Kind,
    target: Target,
    sigmas: NDArray[np.float64],
    settings: FitSettings,
    network: NetworkReport,
) -> Score:
    """Fit whitening and scorer on a part of the clean images as they are fitted on all, with a network if those have one."""
    whitenings, latents = whiten(clean, kind, target.probabilities)
    same = replace(settings, network="on" if network.used else "off")
    generator = np.random.default_rng(settings.seed)
    latent_set, scorer, weights, _ = fit_scorer(
        clean, latents, kind, target.probabilities, sigmas, same, generator, ignore_progress
    )
    denoise = None if weights is None else open_denoiser(build_network(weights, sigmas, latent_set.width, settings))
    return lambda logits, pooled: scorer.score(logits, project_taps(whitenings, pooled), denoise).scores


def build_network(
    weights: dict[str, NDArray[np.float32]], sigmas: NDArray[np.float64], width: int, settings: FitSettings
) -> ir.Model:
    """Build the denoiser's graph for the settings' draws and label guidance."""
    shape = (len(sigmas) * settings.draws, sigmas.shape[1], width)
    return build_denoiser(weights, shape, settings.label_guidance)

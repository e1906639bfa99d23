"""From clean images to a guard: `fit_guard` is the list of steps, the rest are the steps."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

import diffense
from diffense.bundle import calibrate_bundle, check_place, write_bundle, write_scorer
from diffense.calibration import bound_false_alarms, check_rate
from diffense.clean import CleanSet
from diffense.crosscalibration import FOLDS, Score, score_crossed
from diffense.crossfit import FEWEST_ROWS, LatentSet, Rewhiten, cross_fit, learn_network, measure_reference
from diffense.denoiser import build_denoiser
from diffense.errors import OptionError
from diffense.graphs import save_graph
from diffense.guard import Guard, open_denoiser
from diffense.guidance import Kind
from diffense.images import Preprocessing
from diffense.manifest import (
    SCHEMA,
    CleanReport,
    DenoiserEntry,
    Manifest,
    NetworkReport,
    Sampling,
    TapEntry,
    Tensor,
)
from diffense.names import DENOISER_FILE, TAPPED_FILE
from diffense.preparation import prepare_clean
from diffense.rule import fit_rule
from diffense.sampling import draw_noise, lay_ladder
from diffense.scorer import Scorer, name_evidence
from diffense.scoring import Formula, allow, fit_allowance, lay_bands
from diffense.tapping import compare_shared, project_taps, whiten, whiten_by, write_tapped
from diffense.target import Target


@dataclass(frozen=True)
class FitSettings:
    """How a guard is fitted.

    Attributes:
        alpha: false-alarm rate that is asked for.
        network: whether the learned part is used; ``auto`` asks held-out clean latents.
        guide: by predicted label, or by logits where clean images per class are few.
        seed: of the split, the copies, the noise bank and the training.
        chain_sigma: noise at which the shallower taps are seen.
        sigmas: noise levels of the inspected tap; one number a level, or a row of one number a tap.
        steps: denoiser calls in sequence.
        draws: noises a level, even.
        label_guidance: w; 1 is the conditional denoiser.
        data_guidance: pull towards the inspected innovation at each step; 0 is none.
        training_steps: most steps of the denoiser's training; it stops early on held-out clean latents.

    Raises:
        OptionError: a setting that makes no sense; sigmas wait for the taps (`spread_sigmas`).
    """

    alpha: float = 0.01
    network: Literal["auto", "on", "off"] = "auto"
    guide: Literal["auto", "label", "logits"] = "auto"
    seed: int = 0
    chain_sigma: float = 1.0
    sigmas: tuple[float | tuple[float, ...], ...] = (0.7,)
    steps: int = 1
    draws: int = 2
    label_guidance: float = 1.0
    data_guidance: float = 0.0
    training_steps: int = 1000

    def __post_init__(self) -> None:
        check_rate(self.alpha)
        rules = (
            ("network", self.network in ("auto", "on", "off"), "auto, on or off"),
            ("guide", self.guide in ("auto", "label", "logits"), "auto, label or logits"),
            ("seed", self.seed >= 0, "0 or more"),
            ("chain_sigma", 0 < self.chain_sigma < math.inf, "a number above 0"),
            ("steps", self.steps >= 1, "1 or more"),
            ("draws", self.draws >= 2 and self.draws % 2 == 0, "2 or more and even"),
            ("label_guidance", math.isfinite(self.label_guidance), "a finite number"),
            ("data_guidance", 0 <= self.data_guidance < math.inf, "a finite number, 0 or more"),
        )
        for name, fits, wanted in rules:
            if not fits:
                raise OptionError(f"{name} is {getattr(self, name)}, it must be {wanted}")


def ignore_progress(step: int, steps: int) -> None:
    """Show nothing."""


def fit_guard(
    target: Target,
    images: NDArray[np.uint8],
    out: Path,
    *,
    preprocessing: Preprocessing | None = None,
    taps: Sequence[str] | None = None,
    settings: FitSettings | None = None,
    notify: Callable[[str], None] = lambda message: None,
    report: Callable[[int, int], None] = ignore_progress,
) -> Guard:
    """Fit a guard on clean images and write its bundle.

    Args:
        target: the classifier.
        images: (N, H, W, C) uint8 clean images that the defender trusts; their labels are not needed.
        out: folder of the bundle; an older bundle there is replaced.
        preprocessing: how pixels become the target's input; pixels/255 by default.
        taps: tensors to tap, instead of those that are found.
        settings: of the method.
        notify: told, in one line each, what the user should know.
        report: told (step, steps) of the training.

    Raises:
        TooFewImagesError: too few clean images for alpha or for a class.
        ImageError: images of a wrong size or type, or one on which the target overflows.
        TargetError: the taps cannot be used.
        OptionError: settings that make no sense.
        BundleError: `out` cannot be written.
    """
    settings = settings or FitSettings()
    check_place(out)
    preprocessing = preprocessing or default_preprocessing(target)
    chosen = target.choose_taps(taps)
    sigmas = spread_sigmas(settings.sigmas, len(chosen))
    prepared = prepare_clean(target, images, chosen, preprocessing, settings.alpha, settings.guide, settings.seed, notify)
    clean, latents, whitenings, kind = prepared.clean, prepared.latents, prepared.whitenings, prepared.kind
    all_labels, calibration_rows = prepared.labels, prepared.calibration_rows
    calibration_size = len(calibration_rows)
    low, high = bound_false_alarms(calibration_size, settings.alpha)
    low = 0.0 if prepared.crossed else low  # a fold's scorer has seen less than the guard and tends to score higher
    latent_set, scorer, weights, network = fit_scorer(
        clean, latents, kind, target.probabilities, sigmas, settings, prepared.generator, report
    )
    notify(f"network {'on' if network.used else 'off'}: {network.reason}")
    with write_bundle(out) as folder:
        write_tapped(target, chosen, whitenings, latent_set.width, folder / TAPPED_FILE)
        if weights is not None:
            save_graph(_build_denoiser(weights, sigmas, latent_set.width, settings), folder / DENOISER_FILE)
        shared = compare_shared(target, folder / TAPPED_FILE, preprocessing, images)
        manifest = Manifest(
            schema_version=SCHEMA,
            diffense_version=diffense.__version__,
            target_name=target.path.name,
            target_sha256=target.sha256,
            input=Tensor(name=target.input.name, dtype=target.input.dtype, shape=target.input.shape),
            outputs=tuple(Tensor(name=o.name, dtype=o.dtype, shape=o.shape) for o in target.outputs),
            logits=target.logits,
            probabilities=target.probabilities,
            classes=target.classes,
            batch=target.batch,
            preprocessing=preprocessing,
            taps=tuple(
                TapEntry(name=t.name, kind=t.kind, shape=t.shape, depth=round(t.depth, 6), width=w.directions.shape[1])
                for t, w in zip(chosen, whitenings, strict=True)
            ),
            tap_width=latent_set.width,
            latent_dim=latents.shape[1],
            chain_sigma=settings.chain_sigma,
            sampling=Sampling(
                sigmas=tuple(tuple(float(s) for s in row) for row in sigmas),
                steps=settings.steps,
                draws=settings.draws,
                label_guidance=settings.label_guidance,
                data_guidance=settings.data_guidance,
                seed=settings.seed,
            ),
            denoiser=DenoiserEntry(
                rows=len(sigmas) * settings.draws,
                taps=len(chosen),
                tap_width=latent_set.width,
                width=latents.shape[1],
                guide=scorer.formula.guidance.slope.shape[0],
            ),
            network=network,
            clean=CleanReport(
                given=len(images),
                fitted=clean.originals,
                copies=len(clean.source) - clean.originals,
                calibrated=calibration_size,
                per_class_fewest=int(np.bincount(all_labels, minlength=target.classes).min()),
                classes_never_predicted=tuple(
                    int(c) for c in np.flatnonzero(np.bincount(all_labels, minlength=target.classes) == 0)
                ),
                guide=kind,
            ),
            alpha=settings.alpha,
            calibration_size=calibration_size,
            crossed=prepared.crossed,
            false_alarm_interval=(low, high),
            shared_exact=shared[0],
            shared_max_difference=shared[1],
            shared_same_labels=shared[2],
            seed=settings.seed,
            files={},
        )
        if prepared.crossed:
            notify(f"few images: calibrating by {FOLDS} fits, each without some of them")
            parts = partial(fit_part, kind=kind, target=target, sigmas=sigmas, settings=settings, network=network)
            scores = score_crossed(clean, parts, prepared.generator)
            write_scorer(folder, replace(scorer, calibration=np.sort(scores)), manifest)
        else:
            write_scorer(folder, scorer, manifest)
            calibrate_bundle(folder, images[calibration_rows], settings.alpha)
    how = ", each scored by a fit without it" if prepared.crossed else ""
    notify(
        f"calibrated on {calibration_size} images{how}: at alpha {settings.alpha:g} the false-alarm rate will lie between "
        f"{low:.2%} and {high:.2%} (90 % interval)"
    )
    return Guard.load(out)


def default_preprocessing(target: Target) -> Preprocessing:
    """Pixels/255 in the layout of the target's input; raw pixels for uint8 inputs."""
    return Preprocessing(
        size=target.size,
        channels=3 if target.channels == 3 else 1,
        layout=target.layout,
        dtype="uint8" if target.input.dtype == "uint8" else "float32",
    )


def spread_sigmas(sigmas: tuple[float | tuple[float, ...], ...], taps: int) -> NDArray[np.float64]:
    """Levels as given -> (L, K).

    Raises:
        OptionError: no level, a level that is not positive, or a row whose length is not the number of taps.
    """
    rows = [(level,) * taps if isinstance(level, int | float) else tuple(level) for level in sigmas]
    if not rows or any(len(row) != taps or not all(0 < level < math.inf for level in row) for row in rows):
        raise OptionError(f"sigmas {sigmas} must be positive, one a level, or {taps} (one a tap) a level")
    return np.array(rows, np.float64)


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
    weights, network = learn_network(
        latent_set, crossed, whole[0], sigmas, settings.network, settings.training_steps, settings.seed, report
    )
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
    denoise = None if weights is None else open_denoiser(_build_denoiser(weights, sigmas, width, settings))
    reference = measure_reference(latent_set, crossed, formula, denoise)
    allowance = fit_allowance(reference.mismatch, reference.doubt)
    formula = replace(formula, allowance=allowance)
    mismatch = allow(allowance, reference.mismatch, reference.doubt, np)
    rule = fit_rule([reference.strange, mismatch], name_evidence(formula, used, network.used))
    scorer = Scorer(formula, rule, used, np.zeros(1, np.float32), settings.alpha, network.used)
    return latent_set, scorer, weights, network


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
    denoise = None if weights is None else open_denoiser(_build_denoiser(weights, sigmas, latent_set.width, settings))
    return lambda logits, pooled: scorer.score(logits, project_taps(whitenings, pooled), denoise).scores


def _build_denoiser(
    weights: dict[str, NDArray[np.float32]], sigmas: NDArray[np.float64], width: int, settings: FitSettings
) -> ir.Model:
    shape = (len(sigmas) * settings.draws, sigmas.shape[1], width)
    return build_denoiser(weights, shape, settings.label_guidance)

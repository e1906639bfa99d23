"""From clean images to a guard: the list of steps, and the bundle that they make."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import diffense
from diffense.bundle import calibrate_bundle, check_place, write_bundle, write_scorer
from diffense.calibration import bound_false_alarms, count_groups_once
from diffense.clean import check_groups, drop_repeats
from diffense.crosscalibration import FOLDS, score_crossed
from diffense.graphs import save_graph
from diffense.guard import Guard
from diffense.images import Preprocessing
from diffense.manifest import (
    SCHEMA,
    CleanReport,
    DenoiserEntry,
    Manifest,
    Sampling,
    TapEntry,
    Tensor,
)
from diffense.names import DENOISER_FILE, TAPPED_FILE
from diffense.preparation import prepare_clean
from diffense.scorer_fit import build_network, fit_part, fit_scorer
from diffense.settings import FitSettings, ignore_progress, spread_sigmas
from diffense.tapping import compare_shared, write_tapped
from diffense.target import Target


def fit_guard(
    target: Target,
    images: NDArray[np.uint8],
    out: Path,
    *,
    preprocessing: Preprocessing | None = None,
    taps: Sequence[str] | None = None,
    groups: NDArray[np.int64] | None = None,
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
        groups: (N,) integers, the same for images that belong together: frames of one scene, crops of one picture, images of
            one patient. No image is scored by what was fitted on its group, or false alarms on new groups would come
            several times as often as asked for (docs/decisions/0036). None where each image stands alone.
        settings: of the method.
        notify: told, in one line each, what the user should know.
        report: told (step, steps) of the training, then of the fits that calibrate.

    Raises:
        TooFewImagesError: too few clean images for alpha or for a class, or too few groups.
        ImageError: images of a wrong size or type, or one on which the target overflows.
        TargetError: the taps cannot be used.
        OptionError: settings that make no sense.
        BundleError: `out` cannot be written.
    """
    settings = settings or FitSettings()
    check_place(out)
    if groups is not None:
        check_groups(groups, len(images))
    images, groups = drop_repeats(images, groups, notify)
    preprocessing = preprocessing or default_preprocessing(target)
    chosen = target.choose_taps(taps)
    sigmas = spread_sigmas(settings.sigmas, len(chosen))
    prepared = prepare_clean(
        target, images, chosen, preprocessing, settings.alpha, settings.guide, settings.seed, notify, groups=groups
    )
    clean, latents, whitenings, kind = prepared.clean, prepared.latents, prepared.whitenings, prepared.kind
    all_labels, calibration_rows = prepared.labels, prepared.calibration_rows
    calibration_size = len(calibration_rows)
    calibration_groups = None if groups is None else groups[calibration_rows]
    group_count = None if calibration_groups is None else len(np.unique(calibration_groups))
    low, high = bound_false_alarms(calibration_size, settings.alpha, groups=group_count)
    low = 0.0 if prepared.crossed else low  # a fold's scorer has seen less than the guard and tends to score higher
    latent_set, scorer, weights, network = fit_scorer(
        clean, latents, kind, target.probabilities, sigmas, settings, prepared.generator, report
    )
    notify(f"network {'on' if network.used else 'off'}: {network.reason}")
    with write_bundle(out) as folder:
        write_tapped(target, chosen, whitenings, latent_set.width, folder / TAPPED_FILE)
        if weights is not None:
            save_graph(build_network(weights, sigmas, latent_set.width, settings), folder / DENOISER_FILE)
        shared = compare_shared(target, folder / TAPPED_FILE, preprocessing, images)
        if not shared[2]:
            notify("the graph with the latents gives some clean images another label than the classifier's own file does")
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
                calibrated_groups=group_count,
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
            few = "images" if groups is None else "groups of images"
            notify(f"too few {few} to set some aside: calibrating by {FOLDS} fits, each without a tenth of them")
            parts = partial(fit_part, kind=kind, target=target, sigmas=sigmas, settings=settings, network=network)
            scores = score_crossed(clean, parts, prepared.generator, report)
            calibration = count_groups_once(scores, calibration_groups)
            manifest = manifest.model_copy(update={"calibration_size": len(calibration)})
            write_scorer(folder, replace(scorer, calibration=calibration), manifest)
        else:
            write_scorer(folder, scorer, manifest)
            calibrate_bundle(folder, images[calibration_rows], settings.alpha, calibration_groups)
    how = "" if group_count is None else f" of {group_count} groups"
    how += ", each scored by a fit without it" if prepared.crossed else ""
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

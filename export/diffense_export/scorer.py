"""The fused loop: steps, distances, score and p-value as one ONNX graph, recorded from the formulas of `diffense`."""

from functools import partial

import onnx_ir as ir

from diffense.denoiser import denoise, read_weights
from diffense.graphs import load_model
from diffense.guard import Guard
from diffense.names import LATENTS, LOGITS, P_VALUE, SCORE
from diffense.onnx_arrays import OnnxNamespace
from diffense.rule import combine
from diffense.scoring import measure


def build_scorer(guard: Guard) -> ir.Model:
    """Write a guard's scorer as a graph: latents (N, W), logits (N, C) -> score (N, 1), p-value (N, 1), all float32."""
    manifest, scorer = guard.manifest, guard.scorer
    xp = OnnxNamespace()
    latents = xp.input(LATENTS, ["batch", manifest.latent_dim])
    logits = xp.input(LOGITS, ["batch", manifest.classes])
    step = None
    if guard.denoiser_path is not None:
        step = partial(
            denoise,
            {name: xp.weight(name, array) for name, array in read_weights(load_model(guard.denoiser_path)).items()},
            shape=(manifest.denoiser.rows, manifest.denoiser.taps, manifest.denoiser.tap_width),
            label_guidance=manifest.sampling.label_guidance,
            xp=xp,
        )
    label = xp.one_hot_argmax(logits, manifest.classes)
    distances = measure(scorer.formula, logits, latents, label, step, xp)
    score = combine(scorer.rule, distances, xp)
    p_value = (xp.count_at_least(scorer.calibration, score) + 1.0) / (len(scorer.calibration) + 1.0)
    outputs = {SCORE: xp.reshape(score, (-1, 1)), P_VALUE: xp.reshape(p_value, (-1, 1))}
    return xp.build([latents, logits], {name: (array, ["batch", 1]) for name, array in outputs.items()})

"""The learned part: a network that restores noised innovations under the guide: the label and how sure the target is of it.

``D(u + sigma n; sigma, k, guide) = c_skip x + c_out F``. It does not see the other taps: shown the shallower ones, it explains
the anomaly of the deep taps by theirs (docs/decisions/0005). The last layer starts at zero, so the untrained denoiser is
the best one for a standard Gaussian, and the guard then is the closed-form chain.

Shapes: N images, M rows (levels times draws), K taps of width d, W = K d, G guide entries, H hidden units.
"""

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from diffense.names import GUIDE, NOISED, SAMPLE, SIGMA
from diffense.onnx_arrays import WEIGHT_PREFIX, OnnxNamespace
from diffense.precond import scale

HIDDEN: Final = 128
BLOCKS: Final = 2
BY_TAP: Final = "nmka->nkma"  # rows of a tap side by side, so that each tap's own matrix meets all of them
BY_ROW: Final = "nkma->nmka"
NOISE_FREQUENCIES: Final = tuple(2.0**i for i in range(-2, 4))  # of c_noise, enough to tell sigma .1 from .12
CONSTANTS: Final = frozenset({"frequencies", "phases"})  # stored with the weights, never trained


def init_weights(
    taps: int, width: int, guide: int, generator: np.random.Generator, units: int = HIDDEN
) -> dict[str, NDArray[np.float32]]:
    """Draw the starting weights; ``out`` and the modulations are zero.

    Args:
        taps: K.
        width: d, width of one tap.
        guide: G, entries of the label guide.
        generator: source of the random numbers.
        units: H.

    Returns:
        Name -> float32 array, the order of names is fixed.
    """

    def dense(rows: int, columns: int, gain: float = 1.0) -> NDArray[np.float32]:
        return np.asarray(generator.standard_normal((rows, columns)) * gain / np.sqrt(rows), np.float32)

    def zeros(*shape: int) -> NDArray[np.float32]:
        return np.zeros(shape, np.float32)

    weights = {
        "frequencies": np.repeat(np.array(NOISE_FREQUENCIES, np.float32), 2),
        "phases": np.tile(np.array([0, 1], np.float32), len(NOISE_FREQUENCIES)),
        "context_guide": dense(guide, units, np.sqrt(guide)),
        "context_tap": dense(taps, units, np.sqrt(taps)),
        "context": dense(units, units),
        "noise": dense(2 * len(NOISE_FREQUENCIES), units),
        "in": np.stack([dense(width, units) for _ in range(taps)]),
        "in_bias": zeros(units),
    }
    for block in range(BLOCKS):
        weights[f"up_{block}"] = dense(units, units)
        weights[f"shift_{block}"] = dense(units, units, 0.5)
        weights[f"gain_{block}"] = zeros(units, units)
        weights[f"down_{block}"] = dense(units, units, 0.5)
    weights["out"] = zeros(taps, units, width)
    weights["out_bias"] = zeros(taps, width)
    return weights


def denoise(
    weights: Mapping[str, Any],
    noised: Any,
    sigma: Any,
    guide: Any,
    *,
    shape: tuple[int, int, int],
    label_guidance: float,
    xp: Any,
) -> Any:
    """Restore noised innovations: ``D(none) + w (D(label) - D(none))``.

    Args:
        weights: as from `init_weights`, arrays of ``xp``.
        noised: (N, M, W) innovations with noise added.
        sigma: (N, M, K) standard deviation of that noise, per row and tap; (1, M, K) where all images share it.
        guide: (N, G) label guide.
        shape: (M, K, d).
        label_guidance: w; 1 is the conditional denoiser itself.
        xp: array namespace.

    Returns:
        (N, M, W) restored innovations.
    """
    rows, taps, width = shape
    x = xp.einsum(BY_TAP, xp.reshape(noised, (-1, rows, taps, width)))
    s = xp.einsum(BY_TAP, xp.reshape(sigma, (-1, rows, taps, 1)))
    c_skip, c_out, c_in, c_noise = scale(s, xp)
    hidden = embed_rows(weights, x * c_in, c_noise, xp)

    def restore(label: Any) -> Any:
        context = embed_context(weights, label, taps, xp)
        return c_skip * x + c_out * predict(weights, hidden, context, xp)

    restored = restore(guide)
    if label_guidance != 1.0:
        unguided = restore(guide * 0.0)
        restored = unguided + label_guidance * (restored - unguided)
    return xp.reshape(xp.einsum(BY_ROW, restored), (-1, rows, taps * width))


def embed_rows(weights: Mapping[str, Any], scaled: Any, c_noise: Any, xp: Any) -> Any:
    """(N, K, M, d) scaled input and (N, K, M, 1) c_noise -> (N, K, M, H)."""
    phases = xp.tanh(c_noise * weights["frequencies"] + weights["phases"])
    return scaled @ weights["in"] + (phases @ weights["noise"] + weights["in_bias"])


def embed_context(weights: Mapping[str, Any], guide: Any, taps: int, xp: Any) -> Any:
    """(N, G) guide -> (N, K, 1, H), what each tap's rows are modulated by."""
    units = weights["in_bias"].shape[0]
    context = xp.reshape(guide @ weights["context_guide"], (-1, 1, units)) + weights["context_tap"]
    context = silu(silu(context, xp) @ weights["context"], xp)
    return xp.reshape(context, (-1, taps, 1, units))


def predict(weights: Mapping[str, Any], hidden: Any, context: Any, xp: Any) -> Any:
    """(N, K, M, H) rows and (N, K, 1, H) context -> (N, K, M, d): the network F, residual blocks modulated by the context."""
    for block in range(BLOCKS):
        gain = context @ weights[f"gain_{block}"] + 1.0
        shift = context @ weights[f"shift_{block}"]
        inner = silu(hidden @ weights[f"up_{block}"] * gain + shift, xp)
        hidden = hidden + inner @ weights[f"down_{block}"]
    bias = xp.reshape(weights["out_bias"], (-1, 1, weights["out_bias"].shape[1]))
    return silu(hidden, xp) @ weights["out"] + bias


def silu(x: Any, xp: Any) -> Any:
    """``x sigmoid(x)``; NumPy, which has no sigmoid, gets it through tanh, which does not overflow."""
    return x * (0.5 * np.tanh(0.5 * x) + 0.5 if xp is np else xp.sigmoid(x))


def build_denoiser(weights: Mapping[str, NDArray[np.float32]], shape: tuple[int, int, int], label_guidance: float) -> ir.Model:
    """Write the denoiser as an ONNX graph: noised, sigma, guide -> sample, float32, N dynamic."""
    rows, taps, width = shape
    guide_size = weights["context_guide"].shape[0]
    xp = OnnxNamespace()
    inputs = [
        xp.input(NOISED, ["batch", rows, taps * width]),
        xp.input(SIGMA, ["batch", rows, taps]),
        xp.input(GUIDE, ["batch", guide_size]),
    ]
    noised, sigma, guide = inputs
    named = {name: xp.weight(name, array) for name, array in weights.items()}
    restored = denoise(named, noised, sigma, guide, shape=shape, label_guidance=label_guidance, xp=xp)
    return xp.build(inputs, {SAMPLE: (restored, ["batch", rows, taps * width])})


def read_weights(model: ir.Model) -> dict[str, NDArray[np.float32]]:
    """Take the weights out of a graph that `build_denoiser` made."""
    values = model.graph.initializers.items()
    tensors = {name.removeprefix(WEIGHT_PREFIX): v.const_value for name, v in values if name.startswith(WEIGHT_PREFIX)}
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}

"""The verdict in the graph that gives the score: what the guard's model would say of it, without that model."""

import numpy as np
import onnx_ir as ir

from diffense.calibration import count_allowed
from diffense.guard import Guard
from diffense.names import FLAGGED, FLAGGED_YES, LOGITS, NOT_SCORED_VALUE, P_VALUE, PASSED, RAW_SCORE, SCORE, UNSCORED
from diffense.onnx_arrays import OnnxNamespace

LARGEST = np.finfo(np.float32).max


def build_verdict(guard: Guard) -> ir.Model:
    """Write calibration and threshold as a graph, to the last bit those of `diffense.calibration` for float32 scores.

    Raw score (N, 1) and logits (N, C), both float32 -> ``diffense_score`` (N, 1) and ``diffense_p_value`` (N, 1) float32,
    ``diffense_flagged`` (N, 1) uint8. A row with a score or a logit that is no finite number gets no verdict: -1, -1 and 2.
    """
    scorer, xp = guard.scorer, OnnxNamespace()
    raw = xp.input(RAW_SCORE, ["batch", 1])
    logits = xp.input(LOGITS, ["batch", scorer.classes])
    count = len(scorer.calibration)
    p_value = xp.reshape((xp.count_at_least(scorer.calibration, raw) + 1.0) / (count + 1.0), (-1, 1))
    # p-values are fractions k / (count + 1): half a step above the last that is flagged lies far from any of them.
    low = xp.is_at_most(p_value, (count_allowed(scorer.alpha, count) + 0.5) / (count + 1.0))
    # A product with zeros is NaN where a logit is no number; TensorRT compiles it, and fails on a product and a sum.
    usable = xp.is_at_most(xp.abs(raw + logits @ np.zeros((scorer.classes, 1), np.float32)), LARGEST)
    flagged = xp.where(usable, xp.where(low, float(FLAGGED_YES), float(PASSED)), float(UNSCORED))
    outputs = {
        SCORE: xp.where(usable, raw, NOT_SCORED_VALUE),
        P_VALUE: xp.where(usable, p_value, NOT_SCORED_VALUE),
        FLAGGED: xp.to_uint8(flagged),
    }
    return xp.build([raw, logits], {name: (array, ["batch", 1]) for name, array in outputs.items()})

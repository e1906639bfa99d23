"""The verdict in the graph that gives the score: what the guard's model would say of it, without that model."""

from typing import Final

import numpy as np
import onnx_ir as ir

from diffense.calibration import count_allowed
from diffense.guard import Guard
from diffense.names import FLAGGED, FLAGGED_YES, NOT_SCORED_VALUE, P_VALUE, PASSED, RAW_SCORE, SCORE, UNSCORED
from diffense.onnx_arrays import OnnxNamespace

LARGEST: Final = np.finfo(np.float32).max
NOTHING: Final = "nothing"  # (N, 1) float32, 0, or NaN for a row without a verdict


def build_verdict(guard: Guard) -> ir.Model:
    """Write calibration and threshold as a graph, to the last bit those of `diffense.calibration` for float32 scores.

    Raw score (N, 1) float32 and `NOTHING` -> ``diffense_score`` (N, 1) and ``diffense_p_value`` (N, 1) float32,
    ``diffense_flagged`` (N, 1) uint8. A row of which one is no finite number gets no verdict: -1, -1 and 2.
    """
    scorer, xp = guard.scorer, OnnxNamespace()
    raw = xp.input(RAW_SCORE, ["batch", 1])
    nothing = xp.input(NOTHING, ["batch", 1])
    count = len(scorer.calibration)
    p_value = xp.reshape((xp.count_at_least(scorer.calibration, raw) + 1.0) / (count + 1.0), (-1, 1))
    # p-values are fractions k / (count + 1): half a step above the last that is flagged lies far from any of them.
    low = xp.is_at_most(p_value, (count_allowed(scorer.alpha, count) + 0.5) / (count + 1.0))
    usable = xp.is_at_most(xp.abs(raw - nothing), LARGEST)
    flagged = xp.where(usable, xp.where(low, float(FLAGGED_YES), float(PASSED)), float(UNSCORED))
    outputs = {
        SCORE: xp.where(usable, raw, NOT_SCORED_VALUE),
        P_VALUE: xp.where(usable, p_value, NOT_SCORED_VALUE),
        FLAGGED: xp.to_uint8(flagged),
    }
    return xp.build([raw, nothing], {name: (array, ["batch", 1]) for name, array in outputs.items()})

"""Every tensor name, model suffix and config key that two parts of Diffense share.

The exporter, the configs, the served models and the clients read them from here, so none can drift.
"""

from typing import Final

# Tensors of the exported graphs.
LATENTS: Final = "diffense_latents"  # (N, D) float32, output of features and tapped graphs
NOISED: Final = "noised"  # (N, M, W) float32, denoiser input: noised innovations
SIGMA: Final = "sigma"  # (N, M, K) float32, denoiser input: noise level of each row and tap
GUIDE: Final = "guide"  # (N, G) float32, denoiser input: one-hot label or projected logits, and doubt
SAMPLE: Final = "sample"  # (N, M, W) float32, denoiser output
LOGITS: Final = "diffense_logits"  # (N, C) float32, scorer input
RAW_LOGITS: Final = "diffense_raw_logits"  # as the target gives them, input of a features graph, which runs after the target
RAW_SCORE: Final = "diffense_raw_score"  # (N, 1) float32, inside a graph that scores; its output where a guard judges it
PASSED_LOGITS: Final = "diffense_passed_logits"  # RAW_LOGITS untouched, output of a features graph that judges

# Tensors that clients see beside the target's own outputs.
SCORE: Final = "diffense_score"  # (N, 1) float32; -1 when not scored
P_VALUE: Final = "diffense_p_value"  # (N, 1) float32; -1 when not scored
FLAGGED: Final = "diffense_flagged"  # (N, 1) uint8: PASSED, FLAGGED_YES or UNSCORED
VERDICT_TENSORS: Final = (SCORE, P_VALUE, FLAGGED)

PASSED: Final = 0
FLAGGED_YES: Final = 1
UNSCORED: Final = 2
NOT_SCORED_VALUE: Final = -1.0  # NaN is not JSON, so it never leaves the server

# Model names in a Triton repository are the production name plus one of these.
FEATURES_SUFFIX: Final = "_features"
TAPPED_SUFFIX: Final = "_tapped"
DENOISER_SUFFIX: Final = "_denoiser"
SCORER_SUFFIX: Final = "_scorer"
GUARD_SUFFIX: Final = "_guard"
GUARDED_SUFFIX: Final = "_guarded"
GATEWAY_SUFFIX: Final = "_gateway"
STREAM_SUFFIX: Final = "_stream"

# `parameters` of the guarded ensemble, the gateway and the stream, read by the clients.
GUARD_ID_PARAMETER: Final = "diffense_guard_id"  # first 16 hex digits of the manifest's SHA-256
PREPROCESSING_PARAMETER: Final = "diffense_preprocessing"  # JSON of images.Preprocessing
LOGITS_PARAMETER: Final = "diffense_logits_output"  # which production output holds the logits
ALPHA_PARAMETER: Final = "diffense_alpha"

# Files of a guard bundle.
MANIFEST_FILE: Final = "manifest.json"
ARRAYS_FILE: Final = "guard.safetensors"
TAPPED_FILE: Final = "tapped.onnx"
DENOISER_FILE: Final = "denoiser.onnx"

"""A small Triton repository whose models answer like guarded ensembles, and fail on demand."""

import json
import shutil
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from google.protobuf import text_format
from numpy.typing import NDArray
from tritonclient.grpc import model_config_pb2

from diffense import names

MODEL: Final = "digits_guarded"
FIXED: Final = "fixed_guarded"
BYTES: Final = "bytes_guarded"
PLAIN: Final = "digits"
SHAPE: Final = (8, 8, 3)  # height, width, channels
MAX_BATCH: Final = 8
FIXED_BATCH: Final = 4
CLASSES: Final = 4
GUARD_ID: Final = "0123456789abcdef"


def make_pixels(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return (count, 8, 8, 3) uint8 images that trigger none of the failures."""
    rng = np.random.default_rng(seed)
    # A level per image, so that scores lie on both sides of the threshold and differ between images.
    level = rng.integers(20, 220, size=(count, 1, 1, 1))
    return (level + rng.integers(-20, 20, size=(count, *SHAPE))).astype(np.uint8)


def trigger(code: int, count: int = 1) -> NDArray[np.uint8]:
    """Return images of which the first makes the model misbehave as ``code`` says."""
    pixels = make_pixels(count)
    pixels[0, 0, 0, 0] = code
    return pixels


def expect_scores(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Scores (N,) float32 that the served model gives: the mean of the preprocessed image."""
    return np.asarray((pixels.astype(np.float64) / 255).mean(axis=(1, 2, 3)), np.float32)


def expect_logits(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Logits (N, 4) float32 that the served model gives: means of the image's rows in pairs."""
    rows = (pixels.astype(np.float64) / 255).mean(axis=(2, 3))
    return np.asarray(rows.reshape(len(pixels), CLASSES, -1).mean(axis=2), np.float32)


def shared_repository(factory: pytest.TempPathFactory) -> Path:
    """The one repository of a test session, so that all modules share one server."""
    folder = factory.getbasetemp() / "clients"
    return folder if folder.exists() else write_repository(folder)


def write_repository(folder: Path) -> Path:
    """Write the models below ``folder`` and return it."""
    float_input, byte_input = model_config_pb2.TYPE_FP32, model_config_pb2.TYPE_UINT8
    _write_model(folder, MODEL, float_input, (3, 8, 8), MAX_BATCH)
    _write_model(folder, FIXED, float_input, (FIXED_BATCH, 3, 8, 8), 0)
    _write_model(folder, BYTES, byte_input, (8, 8, 3), MAX_BATCH)
    _write_model(folder, PLAIN, float_input, (3, 8, 8), MAX_BATCH)
    return folder


def _write_model(folder: Path, name: str, data_type: int, shape: tuple[int, ...], max_batch: int) -> None:
    guarded = name != PLAIN
    rows = () if max_batch else shape[:1]
    config = model_config_pb2.ModelConfig(name=name, backend="python", max_batch_size=max_batch)
    config.instance_group.add(count=1, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    config.input.add(name="image", data_type=data_type, dims=shape)
    config.output.add(name="logits", data_type=model_config_pb2.TYPE_FP32, dims=(*rows, CLASSES))
    config.output.add(name="calls", data_type=model_config_pb2.TYPE_INT64, dims=(*rows, 1))
    if guarded:
        config.output.add(name=names.SCORE, data_type=model_config_pb2.TYPE_FP32, dims=(*rows, 1))
        config.output.add(name=names.P_VALUE, data_type=model_config_pb2.TYPE_FP32, dims=(*rows, 1))
        config.output.add(name=names.FLAGGED, data_type=model_config_pb2.TYPE_UINT8, dims=(*rows, 1))
        floating = data_type == model_config_pb2.TYPE_FP32
        preprocessing = {
            "size": SHAPE[:2],
            "channels": SHAPE[2],
            "layout": "NCHW" if floating else "NHWC",
            "dtype": "float32" if floating else "uint8",
        }
        config.parameters[names.GUARD_ID_PARAMETER].string_value = GUARD_ID
        config.parameters[names.LOGITS_PARAMETER].string_value = "logits"
        config.parameters[names.ALPHA_PARAMETER].string_value = "0.01"
        config.parameters[names.PREPROCESSING_PARAMETER].string_value = json.dumps(preprocessing)
    if max_batch:
        config.dynamic_batching.SetInParent()
    version = folder / name / "1"
    version.mkdir(parents=True)
    (folder / name / "config.pbtxt").write_text(text_format.MessageToString(config), encoding="utf-8")
    for source, target in (("client_model.py", "model.py"), ("client_codes.py", "client_codes.py")):
        shutil.copyfile(Path(__file__).parent / source, version / target)

"""Pixels and encoded images for the tests of what reads them."""

import io

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

BATCHES = hnp.arrays(np.uint8, st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3])))


def encode(array: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def ramp(height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    image = np.random.default_rng(3).integers(0, 256, (height, width, channels), np.uint8)
    return image[..., 0] if channels == 1 else image

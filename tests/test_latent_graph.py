from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto
from scipy import stats
from sklearn.covariance import ledoit_wolf

from diffense.graphs import open_session
from diffense.latent import GRID_UP_TO, Whitening, append_latents, append_pooling, find_directions, fit_whitening
from diffense.names import LATENTS
from diffense.signature import TensorSpec
from diffense.taps import Tap
from diffense.target import Target
from onnx_models import Builder

Array = NDArray[Any]
CHANNELS, WIDTH = 5, 6


def pool_map(x: Array) -> Array:
    """(N, C, H, W): means of the four overlapping quarters, then the maximum; the mean alone for wide and thin maps."""
    channels, height, width = x.shape[1:]
    if height == width == 1:
        return x[:, :, 0, 0]
    if channels > GRID_UP_TO or min(height, width) == 1:
        return np.concatenate([x.mean(axis=(2, 3)), x.max(axis=(2, 3))], axis=1)
    tops = (slice(0, -(-height // 2)), slice(height // 2, height))
    lefts = (slice(0, -(-width // 2)), slice(width // 2, width))
    quarters = np.stack([x[:, :, top, left].mean(axis=(2, 3)) for top in tops for left in lefts], axis=2)
    return np.concatenate([quarters.reshape(len(x), -1), x.max(axis=(2, 3))], axis=1)


def pool(x: Array, kind: str) -> Array:
    if kind == "vector":
        return x
    if kind == "tokens":
        return np.concatenate([x[:, 0], x.mean(axis=1)], axis=1)
    return pool_map(x.transpose(0, 3, 1, 2) if kind == "map_nhwc" else x)


def build(opset: int, height: int, width: int, channels: int, layout: str, dtype: int) -> tuple[ir.Model, list[Tap]]:
    """A graph with a tap of every kind, all finite whatever the input is (comparison swallows NaN)."""
    b = Builder(0, opset)
    x = b.node("Cast", "image", to=TensorProto.FLOAT) if dtype != TensorProto.FLOAT else "image"
    x = b.node("Transpose", x, perm=[0, 3, 1, 2]) if layout == "NHWC" else x
    half = b.constant(np.float32(0.5))
    bright = b.node("Cast", b.node("Greater", x, half), to=TensorProto.FLOAT)
    x = b.node("Conv", bright, b.random(CHANNELS, channels, 3, 3), pads=[1] * 4, name="map")
    b.node("Transpose", x, perm=[0, 2, 3, 1], name="nhwc")
    b.node("Cast", x, to=TensorProto.FLOAT16, name="half")
    b.node("GlobalMaxPool", x, name="one")
    b.node("Transpose", b.node("Reshape", x, b.ints(0, CHANNELS, height * width)), perm=[0, 2, 1], name="tokens")
    vector = b.node("Flatten", b.node("GlobalAveragePool", x), name="vector")
    b.head(vector, CHANNELS)
    shape = (channels, height, width) if layout == "NCHW" else (height, width, channels)
    model = ir.from_proto(b.model(("N", *shape), {"logits": ("N", 7)}, dtype=dtype))
    taps = [
        Tap("map", "map", (CHANNELS, height, width), 0.1),
        Tap("nhwc", "map_nhwc", (height, width, CHANNELS), 0.2),
        Tap("half", "map", (CHANNELS, height, width), 0.3, "float16"),
        Tap("one", "map", (CHANNELS, 1, 1), 0.4),
        Tap("tokens", "tokens", (height * width, CHANNELS), 0.5),
        Tap("vector", "vector", (CHANNELS,), 0.6),
    ]
    return model, taps


def target_of(
    model: ir.Model, layout: Any, dtype: str, size: tuple[int, int], channels: int, batch: int | None = None
) -> Target:
    spec = TensorSpec("image", dtype, ())
    return Target(Path("x"), "", spec, (), "logits", 7, False, layout, channels, size, batch, model.opset_imports[""])


def append(model: ir.Model, taps: list[Tap], target: Target, seed: int = 0) -> list[Whitening]:
    """Append pooling and latents with made-up whitenings; every tensor that is pooled becomes an output too."""
    rng = np.random.default_rng(seed)
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    pooled = append_pooling(model.graph, taps, [values[tap.name] for tap in taps])
    whitenings = []
    for tap in taps:
        entries = pool(np.zeros((1, *tap.shape)), tap.kind).shape[1]
        directions = rng.normal(size=(entries, int(rng.integers(1, WIDTH + 1))))
        whitenings.append(Whitening(rng.normal(size=entries), directions))
    append_latents(model.graph, pooled, whitenings, WIDTH, target)
    for tap in taps:
        values[tap.name].dtype = ir.DataType.FLOAT16 if tap.dtype == "float16" else ir.DataType.FLOAT
        values[tap.name].shape = ir.Shape(["N", *tap.shape])
        model.graph.outputs.append(values[tap.name])
    return whitenings


def draw_images(shape: tuple[int, ...], dtype: str) -> Array:
    rng = np.random.default_rng(1)
    return rng.integers(0, 3, shape, np.uint8) if dtype == "uint8" else rng.random(shape, np.float32)


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
@pytest.mark.parametrize(
    ("size", "channels", "layout", "dtype"),
    [
        ((7, 7), 3, "NCHW", "float32"),
        ((8, 6), 1, "NHWC", "float32"),
        ((1, 1), 3, "NCHW", "uint8"),
        ((5, 1), 3, "NHWC", "uint8"),
        ((3, 2), 1, "NCHW", "float32"),
    ],
)
def test_the_graph_computes_the_latents(opset: int, size: tuple[int, int], channels: int, layout: str, dtype: str) -> None:
    model, taps = build(opset, *size, channels, layout, TensorProto.UINT8 if dtype == "uint8" else TensorProto.FLOAT)
    whitenings = append(model, taps, target_of(model, layout, dtype, size, channels))
    assert model.opset_imports[""] == opset
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    images = draw_images((4, channels, *size) if layout == "NCHW" else (4, *size, channels), dtype)
    session = open_session(model, threads=1)
    latents, *raw = session.run([LATENTS, *(tap.name for tap in taps)], {"image": images})
    assert latents.shape == (4, len(taps) * WIDTH) and latents.dtype == np.float32
    for i, (tap, values, w) in enumerate(zip(taps, raw, whitenings, strict=True)):
        found = latents[:, i * WIDTH : (i + 1) * WIDTH]
        kept = w.directions.shape[1]
        expected = (pool(values.astype(np.float64), tap.kind) - w.mean) @ w.directions
        np.testing.assert_allclose(found[:, :kept], expected, rtol=1e-3, atol=1e-4)
        assert not found[:, kept:].any()


@cache
def open_swallowing(layout: str) -> Any:
    model, taps = build(17, 4, 6, 3, layout, TensorProto.FLOAT)
    append(model, taps, target_of(model, layout, "float32", (4, 6), 3))
    return open_session(model, threads=1)


@settings(max_examples=40)
@given(
    st.sampled_from(["NCHW", "NHWC"]),
    st.dictionaries(
        st.integers(0, 4),
        st.tuples(st.integers(0, 71), st.sampled_from([np.nan, np.inf, -np.inf])),
        max_size=3,
    ),
)
def test_one_pixel_that_is_no_number_spoils_the_latents_of_its_image_only(layout: str, broken: dict[int, Any]) -> None:
    images = draw_images((5, 3, 4, 6) if layout == "NCHW" else (5, 4, 6, 3), "float32") * 1e30
    for row, (pixel, value) in broken.items():
        images[row].reshape(-1)[pixel] = value
    latents, tap = open_swallowing(layout).run([LATENTS, "map"], {"image": images})
    assert np.isfinite(tap).all()  # the target itself swallows it
    assert np.isnan(latents[list(broken)]).all()
    assert np.isfinite(np.delete(latents, list(broken), axis=0)).all()


def test_a_fixed_batch_stays_and_names_meet_none_of_the_targets() -> None:
    model, taps = build(17, 4, 4, 3, "NCHW", TensorProto.FLOAT)
    before = {value.name for node in model.graph for value in node.outputs}
    append(model, taps[:2], target_of(model, "NCHW", "float32", (4, 4), 3, batch=8))
    latents = next(value for value in model.graph.outputs if value.name == LATENTS)
    assert list(latents.shape) == [8, 2 * WIDTH]
    names = [value.name for node in model.graph for value in node.outputs] + list(model.graph.initializers)
    assert len(names) == len(set(names))
    added = [name for name in names if name not in before and not name.startswith("w")]
    assert all(str(name).startswith("diffense") for name in added)


def draw_features(rows: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    turn = stats.ortho_group.rvs(9, random_state=7)
    return (rng.gamma(1.0, size=(rows, 9)) * np.geomspace(4, 1, 9)) @ turn + 5.0


def test_unseen_features_come_out_white_and_leaning_to_the_positive_side() -> None:
    fitted, fresh = draw_features(20000), draw_features(20000, seed=1)
    w = fit_whitening(fitted, fitted - fitted.mean(axis=0))
    latents = (fresh - w.mean) @ w.directions
    np.testing.assert_allclose(np.cov(latents.T), np.eye(9), atol=0.1)
    assert (((fitted - w.mean) @ w.directions) ** 3).sum(axis=0).min() > 0


@given(st.integers(8, 60), st.integers(2, 40), st.sampled_from([None, 5]), st.integers(0, 99))
def test_directions_are_eigenvectors_of_the_ledoit_wolf_covariance(
    rows: int, columns: int, width: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    pooled = rng.normal(size=(rows, columns)) * np.geomspace(1, 0.2, columns)
    centred = pooled - pooled.mean(axis=0)
    w = fit_whitening(pooled, centred, width)
    covariance, _ = ledoit_wolf(centred, assume_centered=True)
    kept = w.directions.shape[1]
    assert kept == min(width or rows // 4, columns)
    np.testing.assert_allclose(w.directions.T @ covariance @ w.directions, np.eye(kept), atol=1e-6)
    values = np.sort(np.linalg.eigvalsh(covariance))[::-1][:kept]
    np.testing.assert_allclose(np.linalg.norm(w.directions, axis=0) ** -2, values, rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 70), st.integers(2, 70), st.integers(0, 99))
def test_leading_directions_are_those_of_a_singular_value_decomposition(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    centred = rng.normal(size=(rows, columns)) * np.geomspace(1, 0.1, columns)
    most = min(rows, columns, 6)
    variances, directions, squares = find_directions(centred, most)
    _, singular, expected = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(variances, (singular**2 / rows)[:most], rtol=1e-8, atol=1e-14)
    assert squares == pytest.approx(np.sum((singular**2 / rows) ** 2), rel=1e-8)
    np.testing.assert_allclose(directions.T @ directions, np.eye(most), atol=1e-6)
    # The same up to sign, however near two variances are: what is projected has the variance that it should.
    np.testing.assert_allclose(np.mean((centred @ directions) ** 2, axis=0), variances, rtol=1e-8, atol=1e-14)
    leading = expected[:1].T
    assert abs(float(directions[:, 0] @ leading[:, 0])) == pytest.approx(1, abs=1e-4) or singular[1] > 0.999 * singular[0]


def test_features_that_never_move_give_zeros() -> None:
    w = fit_whitening(np.full((50, 4), 0.3), np.zeros((50, 4)))
    assert np.isfinite(w.directions).all()
    assert not ((np.full((3, 4), 0.9) - w.mean) @ w.directions).any()

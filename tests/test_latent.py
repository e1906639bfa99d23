import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffense.chain import fit_chain
from diffense.graphs import open_session
from diffense.latent import GRID, append_pooling, fit_whitening
from diffense.taps import Tap
from shapes import draw_shapes

RNG = np.random.default_rng(0)


def pool(array, kind, opset, dtype="float32", grid=GRID):
    shape = ("N", *array.shape[1:])
    declared = ir.DataType.FLOAT16 if dtype == "float16" else ir.DataType.FLOAT
    image = ir.val("x", dtype=declared, shape=shape)
    node = ir.node("Identity", [image])
    node.outputs[0].name = "tap"
    graph = ir.Graph([image], [], nodes=[node], opset_imports={"": opset})
    pooled = append_pooling(graph, [Tap("tap", kind, array.shape[1:], 0.5, dtype)], [node.outputs[0]], grid)[0]
    pooled.dtype = ir.DataType.FLOAT
    graph.outputs.append(pooled)
    return open_session(ir.Model(graph, ir_version=8)).run(None, {"x": array.astype(dtype)})[0]


def halves(n):
    return slice(0, -(-n // 2)), slice(n // 2, n)


def pool_map(x):
    h, w = x.shape[2:]
    if h == w == 1:
        return x[:, :, 0, 0]
    largest = x.max(axis=(2, 3))
    if min(h, w) == 1:
        return np.concatenate([x.mean(axis=(2, 3)), largest], axis=1)
    means = np.stack([[x[:, :, a, b].mean(axis=(2, 3)) for b in halves(w)] for a in halves(h)])
    return np.concatenate([means.transpose(2, 3, 0, 1).reshape(len(x), -1), largest], axis=1)


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
@pytest.mark.parametrize("sides", [(8, 8), (7, 7), (5, 4), (1, 1), (1, 6), (2, 2)])
def test_maps_give_quarter_means_and_maximum(sides, opset):
    x = RNG.normal(size=(3, 4, *sides)).astype(np.float32)
    np.testing.assert_allclose(pool(x, "map", opset), pool_map(x), atol=1e-6)
    np.testing.assert_allclose(pool(x.transpose(0, 2, 3, 1), "map_nhwc", opset), pool_map(x), atol=1e-6)


@pytest.mark.parametrize(("grid", "side"), [(1, 8), (3, 9), (4, 8), (4, 4), (4, 6), (4, 3)])
def test_maps_may_be_read_in_coarser_or_finer_grids(grid, side):
    x = RNG.normal(size=(2, 3, side, side)).astype(np.float32)
    count = min(grid, side)
    starts = [place * (side // count) for place in range(count)]
    parts = [slice(start, start + side - starts[-1]) for start in starts]
    means = np.stack([[x[:, :, a, b].mean(axis=(2, 3)) for b in parts] for a in parts]).transpose(2, 3, 0, 1)
    want = np.concatenate([means.reshape(2, -1), x.max(axis=(2, 3))], axis=1)
    np.testing.assert_allclose(pool(x, "map", 18, grid=grid), want, atol=1e-6)


@pytest.mark.parametrize("opset", [11, 18])
def test_wide_maps_give_their_mean_and_maximum(opset):
    x = RNG.normal(size=(2, 600, 4, 4)).astype(np.float32)
    want = np.concatenate([x.mean(axis=(2, 3)), x.max(axis=(2, 3))], axis=1)
    np.testing.assert_allclose(pool(x, "map", opset), want, atol=1e-6)


@pytest.mark.parametrize("opset", [11, 13, 18, 21])
def test_tokens_give_class_token_and_mean(opset):
    x = RNG.normal(size=(3, 5, 6)).astype(np.float32)
    want = np.concatenate([x[:, 0], x.mean(axis=1)], axis=1)
    np.testing.assert_allclose(pool(x, "tokens", opset), want, atol=1e-6)
    assert np.array_equal(pool(x[:, 0], "vector", opset), x[:, 0])


def test_half_precision_taps_are_pooled_in_single():
    x = RNG.normal(size=(3, 4, 6, 6)).astype(np.float16)
    np.testing.assert_allclose(pool(x, "map", 17, "float16"), pool_map(x.astype(np.float32)), atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_image_that_is_not_finite_has_no_latents_and_its_neighbours_have(guard, value):
    x = guard.preprocessing.apply(draw_shapes(4, seed=3)[0])
    x[2, 1, 5, 5] = value
    latents = open_session(guard.tapped_path).run(["diffense_latents"], {guard.manifest.input.name: x})[0]
    assert np.isnan(latents[2]).all()
    assert np.isfinite(latents[[0, 1, 3]]).all()


def test_latents_are_white_and_ordered_by_variance():
    mixed = RNG.normal(size=(4000, 12)) @ RNG.normal(size=(12, 12))
    whitening = fit_whitening(mixed, mixed - mixed.mean(axis=0))
    z = (mixed - whitening.mean) @ whitening.directions
    covariance = z.T @ z / len(z)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-9)
    # Shrinking lifts the smallest variances, so their directions come out below one and never above.
    assert np.diag(covariance)[0] == pytest.approx(1, abs=0.02)
    assert (np.diff(np.diag(covariance)) < 1e-6).all()
    spreads = np.linalg.norm(whitening.directions, axis=0)
    assert (np.diff(spreads) > 0).all()


def test_directions_without_variance_are_left_out():
    mixed = RNG.normal(size=(400, 3)) @ RNG.normal(size=(3, 10))
    assert fit_whitening(mixed, mixed - mixed.mean(axis=0)).directions.shape == (10, 3)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31))
def test_innovations_do_not_change_when_a_tap_is_turned(seed):
    rng = np.random.default_rng(seed)
    mixes = [np.linalg.qr(rng.normal(size=(9, 9)))[0] * np.geomspace(0.1, 2, 9) for _ in range(2)]
    features = [rng.gamma(2, size=(300, 9)) @ mix for mix in mixes]
    turn, _ = np.linalg.qr(rng.normal(size=(9, 9)))

    def innovate(taps):
        whitenings = [fit_whitening(p, p - p.mean(axis=0)) for p in taps]
        z = np.concatenate([(p - w.mean) @ w.directions for p, w in zip(taps, whitenings, strict=True)], axis=1)
        return z @ fit_chain(z, 9, np.ones(18, bool), 0.3).transform

    before, after = innovate(features), innovate([features[0] @ turn, features[1]])
    # Eigenvectors of the chain's error keep a free sign, which no distance sees.
    np.testing.assert_allclose(before**2, after**2, rtol=1e-5, atol=1e-6)

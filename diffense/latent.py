"""Latents: pooled taps, centred and whitened with clean statistics; fitted here and appended to the target as ONNX nodes.

Only operators whose form is the same from opset 7 to 23 are appended, so that the target's own opset can stay.

The last tap's nodes come first: onnxruntime runs, of what a node needs, the part that stands last in the file first, and so
pools each tap while it is in the cache and gives its memory back (docs/decisions/0025).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from diffense.names import LATENTS
from diffense.taps import Tap
from diffense.target import Target

Matrix = NDArray[np.float64]

WIDTH: Final = 64  # directions kept of one tap
GRID: Final = 2  # parts of a map each way; the mean of each is read
GRID_UP_TO: Final = 512  # channels; wider maps give one mean, or a covariance would not fit
LEAST_VARIANCE: Final = 1e-6  # of the largest; below it float32 activations are rounding noise
ROWS_PER_DIRECTION: Final = 4


@dataclass(frozen=True)
class Whitening:
    """``latent = (pooled - mean) @ directions``.

    Attributes:
        mean: (P,) of the clean pooled features.
        directions: (P, d_k), ordered by within-class variance, largest first, each of unit variance and fixed sign.
    """

    mean: Matrix
    directions: Matrix


class LatentGraph:
    """Appends nodes to a graph under construction; names start with ``diffense/`` so that they meet none of the target's."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph, self.count = graph, 0

    def add(self, op: str, inputs: Sequence[ir.Value], **attributes: int | list[int]) -> ir.Value:
        """Append one node and give its output."""
        self.count += 1
        node = ir.node(op, inputs, attributes, name=f"diffense/{op}_{self.count}")
        node.outputs[0].name = f"diffense/value_{self.count}"
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, array: NDArray[np.generic]) -> ir.Value:
        """Register an initializer."""
        self.count += 1
        name = f"diffense/constant_{self.count}"
        value = ir.val(name, const_value=ir.tensor(np.array(array, order="C"), name=name))
        self.graph.register_initializer(value)
        return value


def append_pooling(graph: ir.Graph, taps: Sequence[Tap], values: Sequence[ir.Value], grid: int = GRID) -> list[ir.Value]:
    """Pool each tap to (N, P) float32: means and maximum of maps, class token and token mean of tokens, vectors as is.

    Args:
        graph: of the target.
        taps: to pool.
        values: of the taps, in the graph, batch first.
        grid: parts of a map each way, of each of which a channel's mean is taken; fewer where the map has fewer pixels.
    """
    nodes = LatentGraph(graph)
    pooled: list[ir.Value] = []
    for tap, value in reversed(list(zip(taps, values, strict=True))):
        x = nodes.add("Cast", [value], to=int(ir.DataType.FLOAT)) if tap.dtype != "float32" else value
        if tap.kind == "vector":
            pooled.append(x)
        elif tap.kind == "tokens":
            first = nodes.add("Gather", [x, nodes.constant(np.array(0, np.int64))], axis=1)
            mean = nodes.add("GlobalAveragePool", [nodes.add("Transpose", [x], perm=[0, 2, 1])])
            pooled.append(nodes.add("Concat", [first, nodes.add("Flatten", [mean], axis=1)], axis=1))
        else:
            x = nodes.add("Transpose", [x], perm=[0, 3, 1, 2]) if tap.kind == "map_nhwc" else x
            pooled.append(_pool_map(nodes, x, tap, grid))
    return pooled[::-1]


def _pool_map(nodes: LatentGraph, x: ir.Value, tap: Tap, grid: int) -> ir.Value:
    channels, height, width = tap.shape if tap.kind == "map" else (tap.shape[2], *tap.shape[:2])
    if height == width == 1:
        return nodes.add("Flatten", [x], axis=1)
    grid = min(grid, height, width)
    if channels <= GRID_UP_TO and grid > 1:
        # Windows at stride floor(n/grid), as short as they may be to cover n: of two, overlapping by one where n is odd.
        strides = [height // grid, width // grid]
        kernel = [height - (grid - 1) * strides[0], width - (grid - 1) * strides[1]]
        means = nodes.add("AveragePool", [x], kernel_shape=kernel, strides=strides)
    else:
        means = nodes.add("GlobalAveragePool", [x])
    parts = [nodes.add("Flatten", [part], axis=1) for part in (means, nodes.add("GlobalMaxPool", [x]))]
    return nodes.add("Concat", parts, axis=1)


def append_latents(
    graph: ir.Graph, pooled: Sequence[ir.Value], whitenings: Sequence[Whitening], width: int, target: Target
) -> ir.Value:
    """Append centring, whitening and the join of all taps.

    Args:
        graph: whose nodes made `pooled`.
        pooled: (N, P) of each tap.
        whitenings: of each tap.
        width: d; a tap with fewer directions is filled with zeros.
        target: whose graph it is.

    Returns:
        `names.LATENTS`, (N, K d) float32; non-finite in every entry for an image that holds NaN or infinity.
    """
    nodes = LatentGraph(graph)
    nodes.count = len(graph)  # names go on where append_pooling stopped
    latents: list[ir.Value] = []
    for value, whitening in reversed(list(zip(pooled, whitenings, strict=True))):
        directions = np.zeros((whitening.directions.shape[0], width), np.float32)
        directions[:, : whitening.directions.shape[1]] = whitening.directions
        centred = nodes.add("Sub", [value, nodes.constant(whitening.mean.astype(np.float32))])
        latents.append(nodes.add("MatMul", [centred, nodes.constant(directions)]))
    joined = nodes.add("Concat", latents[::-1], axis=1)
    if target.input.dtype == "float32":
        # A classifier may swallow NaN (maximum, clip); x - x is 0 for what is finite and NaN for what is not.
        source = next(value for value in graph.inputs if value.name == target.input.name)
        nothing = nodes.add("GlobalAveragePool", [nodes.add("Sub", [source, source])])
        ones = nodes.constant(np.ones((target.channels if target.layout == "NCHW" else target.size[0], 1), np.float32))
        joined = nodes.add("Add", [joined, nodes.add("MatMul", [nodes.add("Flatten", [nothing], axis=1), ones])])
    joined.name = LATENTS
    joined.dtype = ir.DataType.FLOAT
    joined.shape = ir.Shape([target.batch or "batch", len(latents) * width])
    graph.outputs.append(joined)
    return joined


def fit_whitening(pooled: Matrix, centred: Matrix, width: int | None = None, independent: int | None = None) -> Whitening:
    """Whiten a tap with the Ledoit–Wolf shrunk within-class covariance.

    An orthogonal map of the pooled features leaves the latents as they are: the directions turn along, and their sign is the
    one that makes the third moment on clean data positive.

    Args:
        pooled: (n, P) of clean images.
        centred: (n, P) the same minus each row's guided mean.
        width: most directions to keep, at least one; by default `WIDTH`, and no more than one for `ROWS_PER_DIRECTION` rows.
        independent: how many of the rows count as independent, all by default.
    """
    n, p = centred.shape
    most = min(n, p, max(1, min(WIDTH, n // ROWS_PER_DIRECTION)) if width is None else width)
    variances, directions, squares = find_directions(centred, most)
    norms = np.sum(centred**2, axis=1)
    scale = np.mean(norms) / p
    spread = squares - p * scale**2  # ||S - scale I||^2
    noise = (np.mean(norms**2) - squares) / min(n, independent or n)
    weight = min(1.0, noise / spread) if spread > 0.0 else 1.0
    kept = max(1, int(np.sum(variances > LEAST_VARIANCE * max(variances[0], 1e-30))))
    shrunk = (1.0 - weight) * variances[:kept] + weight * scale
    moves = shrunk > 1e-30  # a tap that is the same on every image gives zeros
    matrix = directions[:, :kept] * np.where(moves, 1.0 / np.sqrt(np.where(moves, shrunk, 1.0)), 0.0)
    mean = pooled.mean(axis=0)
    signs = np.where(np.sum(((pooled - mean) @ matrix) ** 3, axis=0) < 0.0, -1.0, 1.0)
    return Whitening(mean, matrix * signs)


def find_directions(centred: Matrix, most: int) -> tuple[Matrix, Matrix, float]:
    """Leading eigenvectors of the covariance of centred rows, from the smaller of its two Gram matrices.

    LAPACK's divide-and-conquer SVD takes several times as long, and on some rows it does not converge.

    Args:
        centred: (n, P).
        most: how many, at most n and P.

    Returns:
        (most,) variances, largest first; (P, most) directions, of unit length where there is a variance; the sum of the squares
        of all of the covariance's entries.
    """
    from scipy.linalg import eigh

    n, p = centred.shape
    gram = (centred.T @ centred if p <= n else centred @ centred.T) / n
    size = len(gram)
    values, vectors = eigh(gram, subset_by_index=(size - most, size - 1))
    variances, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    if p > n:
        vectors = centred.T @ vectors / np.sqrt(n * np.maximum(variances, 1e-30))
    return variances, vectors, float(np.sum(gram**2))

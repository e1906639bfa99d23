from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from diffense.graphs import open_session
from diffense.guidance import one_hot
from diffense.onnx_arrays import OPSET, WEIGHT_PREFIX, OnnxNamespace
from latent_sets import run_graph

MATRIX = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
ROW = np.array([0.5, -1.0, 2.0, 3.0], np.float32)
# Formulas of a (N, 4) array x and its square root-able twin y = |x| + 1.
FORMULAS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "array + x": lambda xp, x, y: ROW + x,
    "x + array": lambda xp, x, y: x + ROW,
    "array - x": lambda xp, x, y: ROW - x,
    "x - number": lambda xp, x, y: x - 1.5,
    "number - x": lambda xp, x, y: 1.5 - x,
    "float64 scalar * x": lambda xp, x, y: np.float64(3.0) * x,
    "x * y": lambda xp, x, y: x * y,
    "x / y": lambda xp, x, y: x / y,
    "array / y": lambda xp, x, y: ROW / y,
    "x @ array": lambda xp, x, y: x @ MATRIX,
    "array @ column": lambda xp, x, y: MATRIX.T @ xp.reshape(x, (-1, 4, 1)),
    "x @ column": lambda xp, x, y: xp.reshape(x, (-1, 1, 4)) @ xp.reshape(y, (-1, 4, 1)),
    "log": lambda xp, x, y: xp.log(y),
    "sqrt": lambda xp, x, y: xp.sqrt(y),
    "tanh": lambda xp, x, y: xp.tanh(x),
    "exp": lambda xp, x, y: xp.exp(-1.0 * y),
    "maximum": lambda xp, x, y: xp.maximum(x, 0.25),
    "maximum of arrays": lambda xp, x, y: xp.maximum(x, y - 2.0),
    "reshape": lambda xp, x, y: xp.reshape(x, (-1, 2, 2)),
    "concatenate": lambda xp, x, y: xp.concatenate([x, y, x], axis=1),
    "axes moved": lambda xp, x, y: xp.einsum("nab->nba", xp.reshape(x, (-1, 2, 2))),
    "axes of numbers moved": lambda xp, x, y: x @ xp.einsum("kc->ck", MATRIX.T),
    "numbers reshaped": lambda xp, x, y: x + xp.reshape(np.array([[0.5], [0.25], [2.0], [1.0]]), (1, 4)),
    "sum": lambda xp, x, y: xp.sum(x, axis=1),
    "mean": lambda xp, x, y: xp.mean(xp.reshape(x, (-1, 2, 2)), axis=2),
    "amin": lambda xp, x, y: xp.amin(x, axis=1),
    "amax": lambda xp, x, y: xp.amax(x, axis=1),
    "asarray": lambda xp, x, y: x + xp.asarray(ROW.astype(np.float64)),
}


def record(formula: Callable[[OnnxNamespace, Any], Any], rank: int = 2, columns: int = 4) -> ir.Model:
    xp = OnnxNamespace()
    x = xp.input("x", ["batch", columns])
    return xp.build([x], {"out": (formula(xp, x), ["batch", *(f"side{i}" for i in range(rank - 1))])})


def magnitude(xp: Any, x: Any) -> Any:
    return xp.maximum(x, 0.0 - x) + 1.0


@pytest.mark.parametrize("name", FORMULAS)
def test_the_graph_computes_what_numpy_computes(name: str) -> None:
    x = np.random.default_rng(1).normal(0, 2, (6, 4)).astype(np.float32)
    expected = np.asarray(FORMULAS[name](np, x, magnitude(np, x)))
    model = record(lambda xp, v: FORMULAS[name](xp, v, magnitude(xp, v)), expected.ndim)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for rows in (6, 1):
        out = run_graph(model, x=x[:rows])
        assert out.dtype == np.float32
        np.testing.assert_allclose(out, expected[:rows], rtol=2e-5, atol=1e-5)


HOT = open_session(record(lambda xp, x: xp.one_hot_argmax(x, 4)), threads=1)
SORTED = np.array([-2, -1, -1, 0, 0.5, 0.5, 0.5, 3], np.float32)
COUNT = open_session(record(lambda xp, x: xp.count_at_least(SORTED, x), 1, 1), threads=1)
FEW_VALUES = st.sampled_from([-3.0, -2.0, -1.0, 0.0, 0.25, 0.5, 3.0, 7.0])


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 5), st.just(4)), elements=FEW_VALUES))
def test_one_hot_takes_the_first_of_equal_ones(x: NDArray[np.float32]) -> None:
    (hot,) = HOT.run(None, {"x": x})
    assert np.array_equal(hot, one_hot(x))
    assert all(row[: row.argmax()].max(initial=-9) < row.max() == row[int(h.argmax())] for row, h in zip(x, hot, strict=True))


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 9), st.just(1)), elements=FEW_VALUES))
def test_counting_includes_ties(x: NDArray[np.float32]) -> None:
    (counts,) = COUNT.run(None, {"x": x})
    assert counts.tolist() == [sum(1 for value in SORTED if value >= v) for v in x[:, 0]]


def test_a_graph_is_of_the_widely_known_opset_and_gives_its_weights_back() -> None:
    xp = OnnxNamespace()
    x = xp.input("x", ["batch", 4])
    model = xp.build([x], {"out": (x @ xp.weight("layer", MATRIX), ["batch", 3]), "twice": (x * 2.0, ["batch", 4])})
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", OPSET)]
    assert [o.name for o in proto.graph.output] == ["out", "twice"]
    assert np.array_equal(model.graph.initializers[WEIGHT_PREFIX + "layer"].const_value.numpy(), MATRIX)
    assert ir.to_proto(model).SerializeToString() == proto.SerializeToString()

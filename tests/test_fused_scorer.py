from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

import onnx_models
from diffense.fit import fit_guard
from diffense.graphs import open_session
from diffense.guard import Guard
from diffense.names import LATENTS, LOGITS, P_VALUE, SCORE
from diffense.onnx_arrays import IR_VERSION, OPSET
from diffense.settings import FitSettings
from diffense.target import Target
from diffense_export.scorer import build_scorer
from shapes import draw_shapes

TOLERANCE = 1e-4
SETTINGS: dict[str, dict[str, Any]] = {
    "closed form": {"network": "off"},
    "closed form by logits": {"network": "off", "guide": "logits"},
    "steps, levels, guidance, by logits": {
        "network": "on",
        "guide": "logits",
        "sigmas": (0.3, 1.5),
        "steps": 3,
        "draws": 2,
        "label_guidance": 2.0,
        "data_guidance": 0.5,
    },
}
Run = Callable[[NDArray[Any], NDArray[Any]], tuple[NDArray[np.float32], NDArray[np.float32]]]


@pytest.fixture(scope="module", params=["as the other tests'", *SETTINGS])
def fused(request: Any, small_target: Path, clean_images: NDArray[np.uint8], tmp_path_factory: Any) -> tuple[Guard, Run]:
    if request.param not in SETTINGS:
        guard = request.getfixturevalue("guard")
        return guard, open_scorer(guard)
    settings = FitSettings(alpha=0.05, training_steps=60, **SETTINGS[request.param])
    folder = tmp_path_factory.mktemp("fused") / "guard"
    guard = fit_guard(Target.open(small_target), clean_images[:500], folder, settings=settings)
    return guard, open_scorer(guard)


def open_scorer(guard: Guard) -> Run:
    session = open_session(build_scorer(guard), threads=1)

    def run(latents: NDArray[Any], logits: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        score, p_value = session.run([SCORE, P_VALUE], {LATENTS: latents, LOGITS: logits})
        assert score.shape == p_value.shape == (len(latents), 1)
        return score[:, 0], p_value[:, 0]

    return run


def test_the_graph_scores_as_numpy_does(fused: tuple[Guard, Run], clean_images: NDArray[np.uint8]) -> None:
    guard, run = fused
    clean = draw_shapes(150, seed=7)[0]
    strange = np.concatenate([np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), np.uint8), 255 - clean[:30]])
    images = np.concatenate([clean, strange])
    logits, latents = guard.run(images)
    expected = guard.scorer.score(logits, latents, guard.denoise)
    scores, p_values = run(latents, logits)
    np.testing.assert_allclose(scores, expected.scores, atol=TOLERANCE, rtol=TOLERANCE)
    assert expected.scores[150:].mean() > expected.scores[:150].mean() + 0.5
    calibration = guard.scorer.calibration
    # Where no calibration score is within the rounding of the score, the p-values are equal.
    clear = np.abs(calibration[None] - expected.scores[:, None]).min(axis=1) > 2 * TOLERANCE * (1 + expected.scores)
    assert clear.mean() > 0.8
    np.testing.assert_allclose(p_values[clear], expected.p_values[clear], rtol=1e-6)
    assert (p_values >= np.float32(1 / (len(calibration) + 1))).all() and (p_values <= 1).all()


def test_an_image_scores_alike_in_every_batch(fused: tuple[Guard, Run]) -> None:
    guard, run = fused
    logits, latents = guard.run(draw_shapes(40, seed=8)[0])
    whole = run(latents, logits)[0]
    for rows in ([3], [5, 3, 39], list(range(39, -1, -1))):
        np.testing.assert_allclose(run(latents[rows], logits[rows])[0], whole[rows], atol=TOLERANCE / 10)


def test_the_graph_is_a_valid_one_of_the_widely_known_opset(fused: tuple[Guard, Run]) -> None:
    guard, _ = fused
    proto = ir.to_proto(build_scorer(guard))
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", OPSET)] and proto.ir_version == IR_VERSION
    assert {node.domain for node in proto.graph.node} == {""}
    dimensions = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*proto.graph.input, *proto.graph.output)
    }
    m = guard.manifest
    assert dimensions == {
        LATENTS: ["batch", m.latent_dim],
        LOGITS: ["batch", m.classes],
        SCORE: ["batch", 1],
        P_VALUE: ["batch", 1],
    }
    assert ir.to_proto(build_scorer(guard)).SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)


def test_ties_between_logits_go_to_the_first_class_as_in_numpy(fused: tuple[Guard, Run]) -> None:
    guard, run = fused
    logits, latents = guard.run(draw_shapes(20, seed=9)[0])
    logits = np.round(logits / 20)  # many equal ones
    assert (np.sort(logits)[:, -1] == np.sort(logits)[:, -2]).any()
    expected = guard.scorer.score(logits, latents, guard.denoise)
    np.testing.assert_allclose(run(latents, logits)[0], expected.scores, atol=TOLERANCE, rtol=TOLERANCE)


def test_softmax_outputs_and_a_class_that_is_never_predicted(tmp_path: Path) -> None:
    path = onnx_models.save(onnx_models.plain_cnn(end="Softmax"), tmp_path / "softmax.onnx")
    images = draw_shapes(400, seed=3)[0]
    guard = fit_guard(Target.open(path), images, tmp_path / "g", settings=FitSettings(alpha=0.05, network="off"))
    assert guard.manifest.probabilities and guard.manifest.clean.classes_never_predicted
    logits, latents = guard.run(draw_shapes(60, seed=4)[0])
    never = guard.manifest.clean.classes_never_predicted[0]
    logits[:5] = np.eye(logits.shape[1], dtype=np.float32)[never]
    expected = guard.scorer.score(logits, latents, None)
    assert np.isfinite(expected.scores).all()
    np.testing.assert_allclose(open_scorer(guard)(latents, logits)[0], expected.scores, atol=TOLERANCE, rtol=TOLERANCE)

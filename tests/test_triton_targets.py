"""Classifiers unlike the usual one, through the real server: fixed batch, uint8, several outputs, unusual names, open sizes."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from tritonclient.utils import InferenceServerException

import onnx_models
from diffense import names
from diffense.fit import fit_guard
from diffense.serve import TritonServer
from diffense.settings import FitSettings
from diffense.target import Target
from diffense_export.repository import export_guard
from triton_calls import CLIENTS, ask, check_verdict

pytestmark = pytest.mark.server

FIXED = 4
ODD_NAME = "0.Resnet-v1.5"


def fit(model, folder, images):
    target = onnx_models.save(model, folder / "target.onnx")
    settings = FitSettings(alpha=0.1, network="off")
    return target, fit_guard(Target.open(target), images, folder / "guard", settings=settings)


def leave_places():
    """Logits of one place, (N, C, 1, 1), whose sizes the graph does not state."""
    model = onnx_models.plain_cnn(end="Softmax")
    last = model.graph.node[-1]
    axes = numpy_helper.from_array(np.array([2, 3]), "axes")
    model.graph.initializer.append(axes)
    last.CopyFrom(helper.make_node("Unsqueeze", [last.input[0], "axes"], ["logits"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", "c", "h", "w"]))
    return model


@pytest.fixture(scope="module", params=["bls", "direct"])
def odd(request, tmp_path_factory, odd_images):
    """One server for the odd targets, and each target's guard; once with every model of a family, once with the fewest."""
    models = {
        "fixed": onnx_models.add_outputs(onnx_models.plain_cnn(batch=FIXED), FIXED),
        ODD_NAME: onnx_models.add_outputs(onnx_models.plain_cnn(), "N"),
        "bytes": onnx_models.uint8_input(),
        "open": onnx_models.plain_cnn(),
    }
    models["open"].graph.output[0].type.tensor_type.shape.dim[1].dim_param = "classes"
    models["places"] = leave_places()
    repository = tmp_path_factory.mktemp("odd") / "repository"
    guards = {}
    for name, model in models.items():
        folder = tmp_path_factory.mktemp("target")
        target, guards[name] = fit(model, folder, odd_images)
        placement = "shared" if name == ODD_NAME else "separate"
        export_guard(guards[name], target, repository, name, placement=placement, loop=request.param, threads=1)
    with TritonServer(repository) as server:
        yield server, guards


@pytest.fixture(scope="module")
def odd_images():
    coarse = np.random.default_rng(1).integers(0, 256, (240, 4, 4, 3)).astype(np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2)


@pytest.mark.parametrize("protocol", CLIENTS)
@pytest.mark.parametrize("front", ["guarded", "gateway"])
@pytest.mark.parametrize("name", ["fixed", ODD_NAME, "bytes", "open", "places"])
def test_an_odd_classifier_is_guarded_like_any_other(odd, odd_images, name, front, protocol):
    server, guards = odd
    guard = guards[name]
    pixels = odd_images[:FIXED]
    image = guard.preprocessing.apply(pixels)
    production = ask(server, protocol, name, image)
    result = ask(server, protocol, f"{name}_{front}", image)
    check_verdict(result, guard.score(pixels), slice(None))
    for output in guard.manifest.outputs:
        ours, theirs = result.as_numpy(output.name), production.as_numpy(output.name)
        assert ours.dtype == theirs.dtype == np.dtype(output.dtype)
        assert ours.shape == theirs.shape
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("front", ["guarded", "gateway"])
def test_parts_of_the_outputs_of_a_classifier_with_several(odd, odd_images, front):
    server, guards = odd
    image = guards[ODD_NAME].preprocessing.apply(odd_images[:3])
    result = ask(server, "grpc", f"{ODD_NAME}_{front}", image, ["label", names.FLAGGED])
    assert {output.name for output in result.get_response().outputs} == {"label", names.FLAGGED}
    assert result.as_numpy("label").shape == (3, 1)  # Triton knows no (N,) in models with a batch


@pytest.mark.parametrize("rows", [1, FIXED + 1])
def test_another_batch_than_the_fixed_one_is_the_clients_error(odd, odd_images, rows):
    server, guards = odd
    image = guards["fixed"].preprocessing.apply(odd_images[:rows])
    for front in ("guarded", "gateway"):
        with pytest.raises(InferenceServerException, match=r"\[4,3,16,16\]"):
            ask(server, "grpc", f"fixed_{front}", image)

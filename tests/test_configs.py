import re

import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2

from diffense import names
from diffense.errors import ExportError
from diffense.target import TensorSpec
from diffense_export.configs import ConfigWriter, Step, format_config, parse_config

SPECS = st.builds(
    TensorSpec,
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1),
    st.sampled_from(["float32", "float16", "int64", "uint8", "bool"]),
    st.lists(st.one_of(st.none(), st.integers(1, 4096)), max_size=3).map(lambda rest: (None, *rest)),
)


@given(st.lists(SPECS, min_size=1, max_size=3), st.lists(SPECS, min_size=1, max_size=3), st.sampled_from([0, 1, 32]))
def test_configs_survive_the_text_and_the_reader(tmp_path_factory, inputs, outputs, batch):
    writer = ConfigWriter("m", batch)
    for config in (writer.make_onnx("m", inputs, outputs), writer.make_python("p", inputs, outputs, {"a": 'b"\n'})):
        path = tmp_path_factory.getbasetemp() / "config.pbtxt"
        path.write_text(format_config(config), encoding="utf-8")
        assert parse_config(path) == config
        assert re.search(rf"^max_batch_size: {batch}$", path.read_text(encoding="utf-8"), re.MULTILINE)
        for spec, entry in zip(outputs, config.output, strict=True):
            whole = [-1 if size is None else size for size in spec.shape]
            assert list(entry.dims) == (whole[1:] or [1] if batch else whole)


def test_a_number_an_image_is_reshaped_for_the_backend():
    config = ConfigWriter("m", 8).make_onnx("m", [TensorSpec("x", "float32", (None, 3))], [TensorSpec("y", "int64", (None,))])
    assert text_format.Parse(format_config(config), model_config_pb2.ModelConfig()).output[0].HasField("reshape")


@pytest.mark.parametrize("name", ["x", names.SCORE, names.LATENTS, "diffense_raw_0"])
def test_tensors_of_an_ensemble_that_share_a_name_are_refused(name):
    x, y = TensorSpec("x", "float32", (None, 3)), TensorSpec(name, "float32", (None, 2))
    steps = [
        Step("m", {"x": "x"}, {name: "diffense_raw_0"}),
        Step("m_features", {"x": "x"}, {names.LATENTS: names.LATENTS}),
        Step("m_guard", {}, {tensor: tensor for tensor in (name,)} | {}),
    ]
    verdicts = Step("m_verdicts", {}, {tensor: tensor for tensor in names.VERDICT_TENSORS})
    with pytest.raises(ExportError, match=name):
        ConfigWriter("m", 8).make_ensemble("m_guarded", [x], [y], [*steps, verdicts], {})


def test_a_type_that_the_python_backend_lacks_is_refused():
    with pytest.raises(ExportError, match="bfloat16"):
        ConfigWriter("m", 8).make_python("m", [TensorSpec("x", "bfloat16", (None, 3))], [], {})

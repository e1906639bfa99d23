"""Exports beside a production model that stands in the repository already."""

import re
import shutil

import pytest

import onnx_models
from diffense.errors import ExportError
from diffense_export.configs import CONFIG_FILE, parse_config
from diffense_export.repository import export_guard
from repositories import hash_tree, list_models, read_configs_of


def place_production(repository, target, config):
    (repository / "m" / "7").mkdir(parents=True)
    shutil.copyfile(target, repository / "m" / "7" / "model.onnx")
    if config is not None:
        (repository / "m" / "config.pbtxt").write_text(config)


@pytest.mark.parametrize(("config", "batch"), [('name: "m" backend: "onnxruntime" max_batch_size: 6', 6), (None, 4)])
def test_a_standing_production_model_is_left_alone_and_its_batch_kept(guard, small_target, tmp_path, config, batch):
    repository = tmp_path / "r"
    place_production(repository, small_target, config)
    before = hash_tree(repository / "m")
    export_guard(guard, small_target, repository, "m", production=False)
    assert hash_tree(repository / "m") == before
    written = [name for name in list_models(repository) if name != "m"]
    assert {made.max_batch_size for _, made in read_configs_of(repository, written)} == {batch}


def test_without_batching_in_production_no_model_of_the_family_has_it(guard, small_target, tmp_path):
    inputs = 'input [{name: "image" data_type: TYPE_FP32 dims: [-1, 3, 16, 16]}]'
    outputs = 'output [{name: "logits" data_type: TYPE_FP32 dims: [-1, 5]}]'
    place_production(tmp_path / "r", small_target, f'backend: "onnxruntime" {inputs} {outputs}')
    export_guard(guard, small_target, tmp_path / "r", "m", production=False)
    guarded = parse_config(tmp_path / "r" / "m_guarded" / CONFIG_FILE)
    assert guarded.max_batch_size == 0
    assert [tuple(tensor.dims) for tensor in guarded.input] == [(-1, 3, 16, 16)]
    assert tuple(guarded.output[-1].dims) == (-1, 1)
    assert "max_batch_size: 0" in (tmp_path / "r" / "m_guarded" / CONFIG_FILE).read_text()


def test_a_standing_model_with_other_weights_is_refused(guard, small_target, tmp_path):
    other = onnx_models.save(onnx_models.plain_cnn(), tmp_path / "other.onnx")
    place_production(tmp_path / "r", other, None)
    with pytest.raises(ExportError, match="another classifier"):
        export_guard(guard, small_target, tmp_path / "r", "m", production=False)


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("latest {}", "8"),
        ("latest { num_versions: 1 }", "8"),
        ("specific { versions: [8] }", "8"),
        ("specific { versions: [7] }", "another"),
        ("latest { num_versions: 2 }", "several versions, or none (7, 8)"),
        ("all {}", "several versions, or none (7, 8)"),
        ("specific { versions: [] }", "several versions, or none (none)"),
    ],
)
def test_the_version_that_a_standing_model_serves_is_compared(guard, small_target, tmp_path, policy, served):
    other = onnx_models.save(onnx_models.plain_cnn(), tmp_path / "other.onnx")
    place_production(tmp_path / "r", other, f'backend: "onnxruntime" max_batch_size: 6 version_policy {{ {policy} }}')
    (tmp_path / "r" / "m" / "8").mkdir()
    shutil.copyfile(small_target, tmp_path / "r" / "m" / "8" / "model.onnx")
    if served == "8":
        export_guard(guard, small_target, tmp_path / "r", "m", production=False)
        return
    with pytest.raises(ExportError, match=re.escape(served)):
        export_guard(guard, small_target, tmp_path / "r", "m", production=False)


@pytest.mark.parametrize(
    ("config", "words"), [('backend: "tensorrt"', "tensorrt"), ("colour: red", "no model config"), (None, "does not exist")]
)
def test_a_standing_model_that_cannot_be_compared_is_refused(guard, small_target, tmp_path, config, words):
    if config:
        place_production(tmp_path / "r", small_target, config)
    with pytest.raises(ExportError, match=words):
        export_guard(guard, small_target, tmp_path / "r", "m", production=False)

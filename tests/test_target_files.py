"""Classifiers whose weights lie in files of their own, and graphs on their way to a file."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import onnx_models as models
from diffense.errors import TargetError
from diffense.graphs import EXTERNAL_TENSOR_BYTES
from diffense.target import Target, hash_target, open_session, run_batched, save_graph


def pixels(rows: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(5).random((rows, *shape), np.float32)


def test_external_data_is_read_and_is_part_of_the_hash(tmp_path: Path) -> None:
    path = models.save(models.plain_cnn(), tmp_path / "target.onnx", external="weights.bin")
    target, images = Target.open(path), pixels(3, 3, 16, 16)
    (external,) = run_batched(open_session(path), images, None, None)
    (embedded,) = run_batched(open_session(models.plain_cnn().SerializeToString()), images, None, None)
    (in_memory,) = run_batched(open_session(target.load_graph()), images, None, None)
    assert np.array_equal(external, embedded)
    assert np.array_equal(external, in_memory)
    assert len(target.choose_taps()) == 7
    weights = bytearray((tmp_path / "weights.bin").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "weights.bin").write_bytes(weights)
    assert hash_target(path) != target.sha256


def test_missing_or_short_external_data_is_named(tmp_path: Path) -> None:
    path = models.save(models.plain_cnn(), tmp_path / "target.onnx", external="weights.bin")
    data = tmp_path / "weights.bin"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(TargetError, match=r"tensor 'w\d+' is in 'weights.bin', which has \d+ bytes and needs"):
        Target.open(path)
    data.unlink()
    with pytest.raises(TargetError, match=r"target\.onnx: .*'weights\.bin', which is missing"):
        Target.open(path)


@pytest.mark.parametrize("way", ["dots", "absolute", "link"])
def test_external_data_outside_the_folder_is_refused(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = models.save(models.plain_cnn(), folder / "target.onnx", external="weights.bin")
    outside = (folder / "weights.bin").rename(tmp_path / "weights.bin")
    if way == "link":
        (folder / "weights.bin").symlink_to(outside)
    else:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            entry = next(entry for entry in tensor.external_data if entry.key == "location")
            entry.value = "../weights.bin" if way == "dots" else str(outside)
        path.write_bytes(model.SerializeToString())
    told = "a link that leads out of the folder" if way == "link" else "outside the folder"
    with pytest.raises(TargetError, match=told):
        Target.open(path)


def test_external_data_of_a_constant_outside_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = models.save(models.plain_cnn(), folder / "target.onnx")
    model = onnx.load(path)
    moved = model.graph.initializer[0]
    outside = tmp_path / "secret.bin"
    outside.write_bytes(onnx.numpy_helper.to_array(moved).tobytes())
    held = onnx.TensorProto(name=moved.name, data_type=moved.data_type, dims=moved.dims)
    held.data_location = onnx.TensorProto.EXTERNAL
    held.external_data.add(key="location", value="../secret.bin")
    model.graph.initializer.remove(moved)
    model.graph.node.insert(0, onnx.helper.make_node("Constant", [], [moved.name], value=held))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(TargetError, match="outside the folder"):
        Target.open(path)


def test_save_graph_writes_the_same_bytes_and_leaves_the_model_alone(tmp_path: Path) -> None:
    target = Target.open(models.save(models.vit(), tmp_path / "target.onnx"))
    for name in ("a", "b"):
        save_graph(target.load_graph(), tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.onnx", "b.onnx", "target.onnx"]


def test_save_graph_above_the_threshold_writes_one_data_file(tmp_path: Path) -> None:
    target = Target.open(models.save(models.plain_cnn(), tmp_path / "target.onnx"))
    graph = target.load_graph()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        save_graph(graph, tmp_path / name / "tapped.onnx", external_above=1000)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["tapped.onnx", "tapped.onnx.data"]
    for file in ("tapped.onnx", "tapped.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    large = [v for v in graph.graph.initializers.values() if v.const_value.nbytes > EXTERNAL_TENSOR_BYTES]
    assert (tmp_path / "a" / "tapped.onnx.data").stat().st_size == sum(v.const_value.nbytes for v in large)
    assert not any(isinstance(value.const_value, ir.ExternalTensor) for value in graph.graph.initializers.values())
    images = pixels(3, 3, 16, 16)
    expected = run_batched(open_session(target.path), images, None, None)
    again = run_batched(open_session(tmp_path / "a" / "tapped.onnx"), images, None, None)
    assert np.array_equal(expected[0], again[0])
    reopened = Target.open(tmp_path / "a" / "tapped.onnx")
    save_graph(reopened.load_graph(), tmp_path / "whole.onnx")
    assert np.array_equal(expected[0], run_batched(open_session(tmp_path / "whole.onnx"), images, None, None)[0])


def test_a_save_that_fails_leaves_the_graph_and_its_data_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Target.open(models.save(models.plain_cnn(), tmp_path / "first.onnx")).load_graph()
    second = Target.open(models.save(models.preact_resnet(), tmp_path / "second.onnx")).load_graph()
    folder = tmp_path / "saved"
    folder.mkdir()
    save_graph(first, folder / "graph.onnx", external_above=1000)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"graph.onnx", "graph.onnx.data"}

    def fail(model: ir.Model) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(ir, "to_proto", fail)
        with pytest.raises(TargetError, match=r"cannot be written .*No space left"):
            save_graph(second, folder / "graph.onnx", external_above=1000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_graph(second, folder / "graph.onnx", external_above=1000)
    assert {path.name for path in folder.iterdir()} == set(before)
    assert all((folder / name).read_bytes() != content for name, content in before.items())


def test_a_file_name_that_is_not_utf_8_asks_for_another(tmp_path: Path) -> None:
    path = models.save(models.plain_cnn(), tmp_path / os.fsdecode(b"\xff.onnx"))
    with pytest.raises(TargetError, match="not UTF-8; rename the file"):
        Target.open(path)

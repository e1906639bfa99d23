"""A bundle on disk: what was changed in it is refused, and writing one leaves the old or the new."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from diffense.bundle import recalibrate, write_bundle
from diffense.errors import (
    BundleError,
    ImageError,
    SchemaError,
    TamperedError,
    TargetError,
)
from diffense.guard import Guard
from diffense.manifest import SCHEMA
from diffense.names import ARRAYS_FILE, DENOISER_FILE, MANIFEST_FILE, TAPPED_FILE


def change_manifest(bundle, **changes):
    manifest = json.loads((bundle / MANIFEST_FILE).read_text())
    (bundle / MANIFEST_FILE).write_text(json.dumps(manifest | changes))


def sign(bundle, name):
    """Put the file's hash into the manifest, as one who tampers would."""
    files = json.loads((bundle / MANIFEST_FILE).read_text())["files"]
    change_manifest(bundle, files=files | {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest()})


@pytest.mark.parametrize("name", [TAPPED_FILE, ARRAYS_FILE, DENOISER_FILE])
def test_a_changed_byte_is_refused_by_name(bundle, name):
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(TamperedError, match=name):
        Guard.load(bundle)


@pytest.mark.parametrize("name", [TAPPED_FILE, ARRAYS_FILE, DENOISER_FILE])
def test_a_missing_file_is_refused_by_name(bundle, name):
    (bundle / name).unlink()
    with pytest.raises(TamperedError, match=name):
        Guard.load(bundle)


def test_a_file_that_leads_out_of_the_bundle_is_refused(bundle, tmp_path):
    outside = tmp_path / "outside.onnx"
    (bundle / TAPPED_FILE).rename(outside)
    (bundle / TAPPED_FILE).symlink_to(outside)
    with pytest.raises(TamperedError, match="leads out"):
        Guard.load(bundle)


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/hostname", "a/b.onnx", ".."])
def test_a_path_that_leads_out_of_the_bundle_is_refused(bundle, name):
    files = json.loads((bundle / MANIFEST_FILE).read_text())["files"]
    change_manifest(bundle, files=files | {name: "0" * 64})
    with pytest.raises(TamperedError, match="leads out"):
        Guard.load(bundle)


def test_a_manifest_that_lists_no_files_is_refused(bundle):
    change_manifest(bundle, files={})
    with pytest.raises(TamperedError, match="does not list"):
        Guard.load(bundle)


def test_a_newer_schema_is_refused_with_both_versions(bundle):
    change_manifest(bundle, schema_version=99, something_new=1)
    with pytest.raises(SchemaError, match=rf"99.* {SCHEMA};"):
        Guard.load(bundle)


def test_an_unknown_key_is_refused_by_name(bundle):
    change_manifest(bundle, surprise_me=1)
    with pytest.raises(SchemaError, match="surprise_me"):
        Guard.load(bundle)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": "x"}', "\x00\xff", "[" * 100_000])
def test_a_broken_manifest_is_refused(bundle, text):
    (bundle / MANIFEST_FILE).write_text(text)
    with pytest.raises(SchemaError):
        Guard.load(bundle)


@pytest.mark.parametrize("changes", [{"latent_dim": 1}, {"classes": 10**9}, {"tap_width": 0}, {"tap_width": 10**9}])
def test_sizes_that_do_not_fit_the_arrays_are_refused(bundle, changes):
    change_manifest(bundle, **changes)
    with pytest.raises(BundleError):
        Guard.load(bundle)


@pytest.mark.parametrize("changes", [{"alpha": 0}, {"alpha": 1.5}, {"batch": 0}, {"batch": 10**12}])
def test_numbers_that_make_no_sense_are_refused_by_name(bundle, changes):
    change_manifest(bundle, **changes)
    with pytest.raises(SchemaError, match=next(iter(changes))):
        Guard.load(bundle)


def spoil_nan(array):
    return np.where(np.arange(array.size).reshape(array.shape) == 0, np.nan, array).astype(array.dtype)


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("calibration", spoil_nan),
        ("calibration", lambda array: array[:0]),
        ("calibration", lambda array: array[::-1].copy()),
        ("transform", spoil_nan),
        ("knots", lambda array: array[1:]),
        ("seen", lambda array: array[1:]),
        ("allowance", lambda array: array[:, 1:].copy()),
        ("doubt_slopes", spoil_nan),
    ],
)
def test_arrays_that_no_fit_writes_are_refused_although_their_hash_fits(bundle, name, spoil):
    arrays = load_file(bundle / ARRAYS_FILE)
    arrays[name] = np.ascontiguousarray(spoil(arrays[name]))
    save_file(arrays, bundle / ARRAYS_FILE)
    sign(bundle, ARRAYS_FILE)
    with pytest.raises(TamperedError, match=ARRAYS_FILE):
        Guard.load(bundle)


def test_a_manifest_that_does_not_tell_how_it_calibrated_is_read(bundle):
    manifest = json.loads((bundle / MANIFEST_FILE).read_text())
    del manifest["crossed"]
    (bundle / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert not Guard.load(bundle).manifest.crossed


@pytest.mark.parametrize("name", [TAPPED_FILE, DENOISER_FILE])
def test_weights_outside_the_bundle_are_refused_although_the_hash_fits(bundle, fresh, name):
    model = onnx.load(bundle / name)
    onnx.save(model, bundle / name, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (bundle / "weights.bin").rename(bundle.parent / "weights.bin")
    model = onnx.load(bundle / name, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "../weights.bin" if entry.key == "location" else entry.value
    (bundle / name).write_bytes(model.SerializeToString())
    sign(bundle, name)
    guard = Guard.load(bundle)
    with pytest.raises(TargetError, match="outside the folder of the model; only files inside it are read"):
        guard.score(fresh[:2])


def test_an_older_schema_asks_for_a_new_fit(bundle):
    change_manifest(bundle, schema_version=SCHEMA - 1)
    with pytest.raises(SchemaError, match="fit the guard again"):
        Guard.load(bundle)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(TamperedError, match="no guard bundle"):
        Guard.load(tmp_path)
    with pytest.raises(TamperedError, match="nowhere: there is no such folder"):
        Guard.load(tmp_path / "nowhere")


def test_a_failed_write_leaves_no_trace(tmp_path):
    with pytest.raises(RuntimeError), write_bundle(tmp_path / "g") as folder:
        (folder / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stop", "told"), [(OSError(28, "No space left on device"), BundleError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_replacement_that_is_stopped_leaves_the_old_guard_in_place(guard, bundle, fresh, monkeypatch, stop, told):
    rename = Path.rename

    def refuse(path, place):
        if path.suffix == ".partial":
            raise stop
        return rename(path, place)

    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(told, match="cannot be written: .*No space" if told is BundleError else None):
        recalibrate(guard, fresh[:200], 0.05, bundle)
    assert [path.name for path in bundle.parent.iterdir()] == ["guard"]
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_a_folder_of_something_else_is_not_overwritten(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("")
    with pytest.raises(BundleError, match="precious"), write_bundle(tmp_path / "precious"):
        pass
    assert (tmp_path / "precious" / "thesis.txt").exists()


def spoil_logits(bundle):
    """Multiply the logits by brightness / brightness, which is NaN for a black image; latents stay as they are."""
    model = onnx.load(bundle / TAPPED_FILE)
    for node in model.graph.node:
        node.output[:] = ["finite" if name == "logits" else name for name in node.output]
    model.graph.node.extend(
        [
            onnx.helper.make_node("GlobalMaxPool", [model.graph.input[0].name], ["brightest"]),
            onnx.helper.make_node("Flatten", ["brightest"], ["colours"]),
            onnx.helper.make_node("ReduceMax", ["colours"], ["bright"], axes=[1]),
            onnx.helper.make_node("Div", ["bright", "bright"], ["one"]),
            onnx.helper.make_node("Mul", ["finite", "one"], ["logits"]),
        ]
    )
    onnx.save(model, bundle / TAPPED_FILE)
    sign(bundle, TAPPED_FILE)


def test_logits_that_are_no_numbers_are_refused_like_latents(bundle, fresh):
    whole = Guard.load(bundle).run(fresh[:3])
    spoil_logits(bundle)
    guard = Guard.load(bundle)
    logits, latents = guard.run(fresh[:3])
    assert np.array_equal(latents, whole[1]) and np.array_equal(logits, whole[0])
    images = np.concatenate([fresh[:200], np.zeros_like(fresh[:1])])
    before = (bundle / MANIFEST_FILE).read_bytes()
    for attempt in (
        lambda: guard.score(images),
        lambda: guard.explain(images[-1]),
        lambda: recalibrate(guard, images, 0.05, bundle),
    ):
        with pytest.raises(ImageError, match=r"image (200|0) makes the target's features overflow"):
            attempt()
    assert (bundle / MANIFEST_FILE).read_bytes() == before

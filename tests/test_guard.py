import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from scipy.stats import binom, kstest

import onnx_models
from diffense.bundle import recalibrate, write_bundle
from diffense.errors import (
    BundleError,
    ImageError,
    SchemaError,
    TamperedError,
    TargetError,
    TooFewImagesError,
    WrongTargetError,
)
from diffense.fit import FitSettings, fit_guard
from diffense.guard import Guard
from diffense.manifest import SCHEMA
from diffense.names import ARRAYS_FILE, DENOISER_FILE, MANIFEST_FILE, TAPPED_FILE
from diffense.rule import name_groups, share_score
from diffense.target import Target
from shapes import draw_shapes, fit_shape_classifier


@pytest.fixture(scope="module")
def fresh():
    return draw_shapes(2000, seed=7)[0]


@pytest.fixture
def bundle(guard, tmp_path):
    return Path(shutil.copytree(guard.directory, tmp_path / "guard"))


def change_manifest(bundle, **changes):
    manifest = json.loads((bundle / MANIFEST_FILE).read_text())
    (bundle / MANIFEST_FILE).write_text(json.dumps(manifest | changes))


def sign(bundle, name):
    """Put the file's hash into the manifest, as one who tampers would."""
    files = json.loads((bundle / MANIFEST_FILE).read_text())["files"]
    change_manifest(bundle, files=files | {name: hashlib.sha256((bundle / name).read_bytes()).hexdigest()})


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


def test_verdicts_unpack_to_three_arrays(guard, fresh):
    scores, p_values, flagged = guard.score(fresh[:5])
    assert (scores.dtype, p_values.dtype, flagged.dtype) == (np.float32, np.float64, np.uint8)
    assert scores.shape == p_values.shape == flagged.shape == (5,)
    assert np.array_equal(flagged == 1, p_values <= guard.manifest.alpha)


def test_no_images_give_no_verdicts(guard, fresh):
    assert all(len(column) == 0 for column in guard.score(fresh[:0]))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 63), min_size=1, max_size=40), st.integers(1, 40))
def test_a_score_depends_on_its_image_alone(guard, fresh, rows, cut):
    alone = np.concatenate([guard.score(fresh[i : i + 1]).scores for i in rows])
    together = guard.score(fresh[rows]).scores
    split = np.concatenate([guard.score(fresh[rows[:cut]]).scores, guard.score(fresh[rows[cut:]]).scores])
    np.testing.assert_allclose(together, alone, rtol=2e-5)
    np.testing.assert_allclose(split, alone, rtol=2e-5)


def test_clean_p_values_are_uniform(guard, fresh):
    p_values = guard.score(fresh).p_values
    # n calibration scores make the p-values of one guard uniform up to their own sampling error, so both samples count.
    n, m = guard.manifest.calibration_size, len(fresh)
    statistic = kstest(p_values, "uniform").statistic
    assert statistic < 1.95 * np.sqrt(1 / n + 1 / m)  # 0.1 % point of the two-sample KS statistic
    k = int(0.02 * (n + 1))
    assert guard.score(fresh).flagged.sum() <= binom.ppf(0.9999, m, 0.02) + m * 3 * np.sqrt(k) / (n + 1)


def test_images_unlike_any_clean_one_are_flagged(guard, fresh):
    foreign = np.random.default_rng(0).integers(0, 256, fresh[:200].shape, np.uint8)
    assert guard.score(foreign).flagged.mean() > 0.95


def test_the_same_inputs_and_seed_give_the_same_bytes(small_target, clean_images, tmp_path):
    settings_ = FitSettings(alpha=0.05, network="on", training_steps=50, seed=3)
    for name in ("a", "b"):
        fit_guard(Target.open(small_target), clean_images[:300], tmp_path / name, settings=settings_)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert Guard.load(tmp_path / "a").guard_id == Guard.load(tmp_path / "b").guard_id


def test_the_bundle_survives_a_move(guard, bundle, fresh):
    assert np.array_equal(Guard.load(bundle).score(fresh[:8]).scores, guard.score(fresh[:8]).scores)


def test_explain_names_the_evidence_behind_the_score(guard, fresh):
    explanation = guard.explain(fresh[3])
    scores, p_values, _ = guard.score(fresh[3:4])
    assert explanation.score == pytest.approx(float(scores[0]), rel=2e-5)
    assert explanation.p_value == pytest.approx(float(p_values[0]))
    assert explanation.tap in {tap.name for tap in guard.manifest.taps}
    found = {
        ([t.name for t in guard.manifest.taps].index(row.tap), row.kind, row.band, row.level): row.surprise
        for row in explanation.rows
    }
    surprises = np.array([[found[e.tap, e.kind, e.band, e.level] for e in guard.scorer.evidence]])
    shares = share_score(guard.scorer.rule, surprises, np)[0]
    assert explanation.score == pytest.approx(shares.sum(), rel=1e-5)
    names = [guard.manifest.taps[tap].name for _, tap in name_groups(guard.scorer.evidence)]
    totals = {name: sum(share for share, n in zip(shares, names, strict=True) if n == name) for name in names}
    assert totals[explanation.tap] == max(totals.values())
    assert list(explanation.rows) == sorted(explanation.rows, key=lambda row: -row.surprise)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 16, 16, 3), np.float32), np.zeros((2, 8, 8, 3), np.uint8), np.zeros((16, 16), np.uint8)]
)
def test_images_of_the_wrong_kind_are_refused(guard, images):
    with pytest.raises(ImageError):
        guard.score(images)


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


def test_another_target_is_refused_by_name(guard, small_target, tmp_path):
    Guard.load(guard.directory, small_target)
    other = onnx_models.save(onnx_models.plain_cnn(), tmp_path / "other.onnx")
    with pytest.raises(WrongTargetError, match=r"other\.onnx"):
        Guard.load(guard.directory, other)


def test_recalibration_keeps_the_scores_and_moves_the_threshold(guard, fresh, tmp_path):
    renewed = recalibrate(guard, fresh[:999], 0.1, tmp_path / "renewed")
    assert np.array_equal(renewed.score(fresh[:50]).scores, guard.score(fresh[:50]).scores)
    assert renewed.manifest.calibration_size == 999
    assert renewed.score(fresh[:999]).flagged.mean() == pytest.approx(0.1, abs=0.002)
    assert renewed.guard_id != guard.guard_id


def test_recalibration_refuses_an_alpha_out_of_reach_and_leaves_the_guard_alone(guard, bundle, fresh):
    before = (bundle / MANIFEST_FILE).read_bytes()
    with pytest.raises(TooFewImagesError, match="999"):
        recalibrate(Guard.load(bundle), fresh[:50], 0.001, bundle)
    assert (bundle / MANIFEST_FILE).read_bytes() == before
    assert [path.name for path in bundle.parent.iterdir()] == ["guard"]


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


def test_shared_placement_was_compared_at_fit_time(guard):
    assert guard.manifest.shared_same_labels
    assert guard.manifest.shared_exact or guard.manifest.shared_max_difference <= 1e-5


def test_the_classifier_of_the_fixture_is_credible(small_target, fresh, guard):
    kinds = draw_shapes(2000, seed=7)[1]
    assert (guard.score_all(fresh).labels == kinds).mean() > 0.65
    assert fit_shape_classifier().SerializeToString() == small_target.read_bytes()

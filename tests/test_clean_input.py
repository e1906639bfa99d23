"""Clean images as people have them: with repeats, behind links, of classifiers that see nothing in them."""

import io
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

import onnx_models
import shapes
from diffense.bundle import recalibrate, write_bundle
from diffense.clean import drop_repeats
from diffense.errors import BundleError, ImageError, TooFewImagesError
from diffense.fit import fit_guard
from diffense.guard import Guard
from diffense.images import Preprocessing, load_images
from diffense.settings import FitSettings
from diffense.target import Target


def test_repeats_are_left_out_and_counted():
    images = shapes.draw_shapes(50, seed=3)[0]
    said: list[str] = []
    groups = np.arange(103)
    kept, left = drop_repeats(np.concatenate([images, images[::-1], images[:3]]), groups, said.append)
    assert np.array_equal(kept, images) and left is not None and left.tolist() == list(range(50))
    assert said == ["53 of 103 clean images repeat others pixel by pixel and are left out"]
    assert drop_repeats(images, None, said.append)[0] is images and len(said) == 1
    assert len(drop_repeats(images[:0], None, said.append)[0]) == 0


def test_images_that_are_given_twice_change_nothing(small_target, tmp_path):
    images = shapes.draw_shapes(120, seed=3)[0]
    settings = FitSettings(alpha=0.05)
    once, twice = (
        fit_guard(Target.open(small_target), given, tmp_path / name, settings=settings)
        for name, given in (("once", images), ("twice", np.concatenate([images, images])))
    )
    assert np.array_equal(once.scorer.calibration, twice.scorer.calibration)
    assert twice.manifest.clean.fitted == 120
    with pytest.raises(TooFewImagesError, match="1 clean images are too few"):
        fit_guard(Target.open(small_target), np.repeat(images[:1], 300, 0), tmp_path / "g")


def test_a_classifier_without_a_view_of_the_images_is_named_and_not_the_first_image(tmp_path, clean_images):
    settings = FitSettings(alpha=0.05, network="off")
    target = Target.open(onnx_models.save(onnx_models.plain_cnn(), tmp_path / "m.onnx"))
    shape = (*target.size, target.channels)
    images = np.random.default_rng(0).integers(0, 256, (60, *shape), np.uint8)
    blind = Preprocessing(size=target.size, channels=3, layout=target.layout, dtype="float32", scale=0.0)
    with pytest.raises(ImageError, match="features are the same on all clean images"):
        fit_guard(target, images, tmp_path / "g", preprocessing=blind, settings=settings)
    model = onnx_models.plain_cnn()
    for weight in model.graph.initializer:
        values = onnx.numpy_helper.to_array(weight)
        if values.dtype == np.float32:
            weight.CopyFrom(onnx.numpy_helper.from_array(values * np.float32(np.nan), weight.name))
    spoilt = onnx_models.save(model, tmp_path / "nan.onnx")
    with pytest.raises(ImageError, match="no numbers on any clean image"):
        fit_guard(Target.open(spoilt), images, tmp_path / "g", settings=settings)


def test_memory_follows_the_batch_and_not_the_list(guard, monkeypatch):
    rows: list[int] = []
    apply = Preprocessing.apply
    monkeypatch.setattr(Preprocessing, "apply", lambda self, images: rows.append(len(images)) or apply(self, images))
    images = shapes.draw_shapes(300, seed=3)[0]
    whole = guard.score(images)
    assert sum(rows) == 300 and max(rows) <= 64
    assert np.array_equal(whole.scores[:64], guard.score(images[:64]).scores)


def test_linked_and_locked_folders_are_told(tmp_path: Path) -> None:
    (tmp_path / "clean" / "a").mkdir(parents=True)
    (tmp_path / "store").mkdir()
    for folder in (tmp_path / "clean" / "a", tmp_path / "store"):
        Image.new("RGB", (4, 4)).save(folder / "x.png")
    (tmp_path / "clean" / "b").symlink_to(tmp_path / "store")
    (tmp_path / "clean" / "c.png").symlink_to(tmp_path / "store" / "x.png")
    found = load_images(tmp_path / "clean", (4, 4), 3)
    assert found.names == ("a/x.png", "c.png")
    assert [(item.name, "link to a folder" in item.reason) for item in found.skipped] == [("b", True)]


def test_archives_that_numpy_cannot_open_are_refused_in_words(tmp_path: Path) -> None:
    data = io.BytesIO()
    np.save(data, np.zeros((3, 4, 4, 3), np.uint8))
    place = tmp_path / "x.npz"
    with zipfile.ZipFile(place, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("x.npy", data.getvalue())
    raw = bytearray(place.read_bytes())
    raw[60:70] = b"\xff" * 10
    place.write_bytes(raw)
    with pytest.raises(ImageError, match="not a readable"):
        load_images(place, (4, 4), 3)
    np.savez(place, x=np.zeros((1, 4, 4, 3), np.uint8), y=np.array([2**63], np.uint64))
    with pytest.raises(ImageError, match="no label"):
        load_images(place, (4, 4), 3)


def test_a_guard_behind_a_link_is_changed_where_it_lies(guard, bundle, fresh, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(bundle)
    renewed = recalibrate(Guard.load(link), fresh, 0.05, link)
    assert link.is_symlink()
    assert Guard.load(bundle).guard_id == renewed.guard_id != guard.guard_id
    assert renewed.manifest.clean.calibrated == renewed.manifest.calibration_size == len(fresh)
    with pytest.raises(BundleError, match="mount point"), write_bundle(Path("/proc")):
        pass


def test_alpha_alone_can_be_changed(bundle, tmp_path):
    before = Guard.load(bundle)
    after = recalibrate(before, None, 0.1, tmp_path / "g")
    assert after.manifest.alpha == 0.1
    assert np.array_equal(after.scorer.calibration, before.scorer.calibration)
    assert after.scorer.threshold < before.scorer.threshold
    assert after.manifest.model_copy(update={"alpha": before.manifest.alpha}).clean == before.manifest.clean
    with pytest.raises(TooFewImagesError):
        recalibrate(before, None, 1e-4, tmp_path / "h")


def test_a_guard_with_a_network_does_not_score_without_it(guard, fresh):
    assert guard.scorer.needs_denoiser
    with pytest.raises(ValueError, match="hand it over"):
        guard.scorer.score(*guard.run(fresh[:2]), None)

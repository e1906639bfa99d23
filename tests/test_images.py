import io
from pathlib import Path

import numpy as np
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from diffense import images as images_module
from diffense.errors import ImageError
from diffense.images import Preprocessing, Skipped, fit_image, load_images, read_image
from pictures import BATCHES, encode, ramp

EXIF_ORIENTATION = 0x0112


def preprocessing(images: np.ndarray, **options: object) -> Preprocessing:
    height, width, channels = images.shape[1:]
    settings = {"size": (height, width), "channels": channels, "layout": "NHWC", "dtype": "float32", **options}
    return Preprocessing.model_validate(settings)


@given(images=BATCHES)
def test_default_is_pixels_over_255(images: np.ndarray) -> None:
    values = preprocessing(images).apply(images)
    assert values.dtype == np.float32
    np.testing.assert_allclose(values, images / 255, atol=1e-7)


@given(images=BATCHES, scale=st.floats(1e-3, 10))
def test_apply_is_linear_in_scale(images: np.ndarray, scale: float) -> None:
    once = preprocessing(images, scale=scale).apply(images)
    twice = preprocessing(images, scale=2 * scale).apply(images)
    np.testing.assert_array_equal(twice, 2 * once)


@given(images=BATCHES, data=st.data())
def test_nchw_is_nhwc_transposed(images: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([1, images.shape[3]]))
    mean = tuple(data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count)))
    std = tuple(data.draw(st.lists(st.floats(0.1, 1), min_size=count, max_size=count)))
    last = preprocessing(images, mean=mean, std=std).apply(images)
    first = preprocessing(images, mean=mean, std=std, layout="NCHW").apply(images)
    np.testing.assert_array_equal(first, last.transpose(0, 3, 1, 2))
    assert first.flags.c_contiguous
    assert last.flags.c_contiguous


def test_mean_and_std_are_applied_to_each_channel() -> None:
    images = np.full((1, 2, 2, 3), 255, np.uint8)
    values = preprocessing(images, mean=(0.5, 0.25, 0), std=(0.5, 0.25, 2)).apply(images)
    np.testing.assert_allclose(values[0, 0, 0], [1, 3, 0.5], rtol=1e-6)


@given(images=BATCHES)
def test_uint8_targets_get_the_pixels_themselves(images: np.ndarray) -> None:
    values = preprocessing(images, dtype="uint8").apply(images)
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values, images)


@given(images=BATCHES, scale=st.floats(1e-3, 10))
def test_preprocessing_survives_json(images: np.ndarray, scale: float) -> None:
    before = preprocessing(images, scale=scale, std=(0.3,))
    assert Preprocessing.model_validate_json(before.model_dump_json()) == before


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), "float32; hand over pixels"),
        (np.zeros((4, 4, 3), np.uint8), r"\(4, 4, 3\); this target takes \(N, 4, 4, 3\)"),
        (np.zeros((2, 4, 5, 3), np.uint8), "takes"),
        (np.zeros((2, 4, 4, 1), np.uint8), "takes"),
    ],
)
def test_wrong_arrays_are_refused(images: np.ndarray, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        preprocessing(np.zeros((1, 4, 4, 3), np.uint8)).apply(images)


@pytest.mark.parametrize(
    "options",
    [
        {"mean": (0, 0)},
        {"std": (0.0,)},
        {"std": ()},
        {"channels": 2},
        {"size": (0, 4)},
        {"scale": float("nan")},
        {"gamma": 2},
    ],
)
def test_preprocessing_that_makes_no_sense_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(pydantic.ValidationError):
        preprocessing(np.zeros((1, 4, 4, 3), np.uint8), **options)


@settings(max_examples=25)
@given(
    array=hnp.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))),
    form=st.sampled_from(["PNG", "BMP"]),
)
def test_lossless_files_give_their_pixels(array: np.ndarray, form: str) -> None:
    size = (array.shape[0], array.shape[1])
    np.testing.assert_array_equal(fit_image(read_image(encode(array, form)), size, 3), array)


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_lossy_files_come_close(form: str) -> None:
    array = np.tile(np.linspace(0, 255, 32).astype(np.uint8)[:, None, None], (1, 32, 3))
    decoded = fit_image(read_image(encode(array, form, quality=95)), (32, 32), 3)
    assert np.abs(decoded.astype(int) - array).max() <= 8


def test_grey_and_colour_are_turned_into_each_other() -> None:
    grey = ramp(channels=1)
    colour = fit_image(read_image(encode(grey)), (6, 8), 3)
    np.testing.assert_array_equal(colour, np.repeat(grey[..., None], 3, axis=2))
    rgb = ramp()
    luma = rgb @ np.array([0.299, 0.587, 0.114])
    back = fit_image(read_image(encode(rgb)), (6, 8), 1)
    assert back.shape == (6, 8, 1)
    assert np.abs(back[..., 0] - luma).max() <= 1


def test_palette_alpha_bilevel_and_16_bit_files() -> None:
    colours = np.array([[255, 0, 0], [0, 128, 255]], np.uint8)
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8), mode="L")
    palette.putpalette(colours.tobytes())
    for options in ({}, {"transparency": bytes([0, 255])}, {"transparency": bytes([7, 128])}):
        buffer = io.BytesIO()
        palette.save(buffer, "PNG", **options)
        np.testing.assert_array_equal(fit_image(read_image(buffer.getvalue()), (2, 2), 3), colours[np.array([[0, 1], [1, 0]])])
    with_alpha = np.dstack([ramp(), np.arange(48, dtype=np.uint8).reshape(6, 8)])
    np.testing.assert_array_equal(fit_image(read_image(encode(with_alpha)), (6, 8), 3), with_alpha[..., :3])
    bilevel = np.array([[True, False], [False, True]])
    np.testing.assert_array_equal(fit_image(read_image(encode(bilevel)), (2, 2), 1)[..., 0], bilevel * 255)
    deep = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    np.testing.assert_array_equal(fit_image(read_image(encode(deep)), (2, 3), 1)[..., 0], deep >> 8)


def test_exif_orientation_is_applied() -> None:
    upright = ramp()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # to be turned clockwise by a quarter
    stored = np.rot90(upright, 1)
    np.testing.assert_array_equal(fit_image(read_image(encode(stored, exif=exif)), (6, 8), 3), upright)


def test_other_sizes_are_resized_bilinearly() -> None:
    array = ramp()
    expected = np.asarray(Image.fromarray(array).resize((5, 12), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(fit_image(read_image(encode(array)), (12, 5), 3), expected)


def test_folder_is_read_sorted_and_says_what_it_skipped(tmp_path: Path) -> None:
    good = ramp()
    (tmp_path / "b.png").write_bytes(encode(good))
    (tmp_path / "a.bmp").write_bytes(encode(good[::-1].copy(), "BMP"))
    (tmp_path / "cut.png").write_bytes(encode(good)[:60])
    (tmp_path / "cut.jpg").write_bytes(encode(good, "JPEG")[:300])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "moving.gif").write_bytes(encode(good, "GIF"))
    (tmp_path / ".hidden.png").write_bytes(b"x")
    images = load_images(tmp_path, (6, 8), 3)
    assert images.names == ("a.bmp", "b.png")
    np.testing.assert_array_equal(images.pixels, np.stack([good[::-1], good]))
    assert images.labels is None
    reasons = {skipped.name: skipped.reason for skipped in images.skipped}
    assert set(reasons) == {"cut.png", "cut.jpg", "empty.png", "notes.txt", "moving.gif"}
    assert reasons["empty.png"] == "an empty file"
    assert reasons["notes.txt"] == reasons["moving.gif"] == "no PNG, JPEG, WebP or BMP"
    assert reasons["cut.png"].startswith("damaged")


def test_sub_folders_one_deep_are_labels(tmp_path: Path) -> None:
    for name in ("dog/1.png", "cat/1.png", "cat/2.png", "a_notes/readme.txt", "bird/broken.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(ramp()) if path.name[0].isdigit() else b"no image")
    (tmp_path / "readme.txt").write_text("three classes")
    images = load_images(tmp_path, (6, 8), 3)
    assert images.names == ("cat/1.png", "cat/2.png", "dog/1.png")
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1], "a folder of which no image was read is no class"
    assert images.labels.dtype == np.int64


@pytest.mark.parametrize("stray", ["top.png", "cat/deeper/1.png"])
def test_other_depths_are_no_labels(stray: str, tmp_path: Path) -> None:
    for name in ("cat/1.png", stray):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(ramp()))
    images = load_images(tmp_path, (6, 8), 3)
    assert len(images.names) == 2
    assert images.labels is None


def test_decompression_bombs_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bomb.png").write_bytes(encode(np.zeros((60, 60), np.uint8)))
    (tmp_path / "good.png").write_bytes(encode(ramp()))
    monkeypatch.setattr(images_module, "MAX_PIXELS", 3599)
    assert load_images(tmp_path, (6, 8), 3).skipped == (Skipped("bomb.png", "60 x 60 pixels are more than 3599"),)
    for limit in (3000, 1000):  # Pillow warns above its limit and raises above twice its limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert load_images(tmp_path, (6, 8), 3).skipped[0].reason == "more than 3599 pixels"


def test_sources_that_do_not_exist_or_are_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "none.npz", x=np.zeros((0, 2, 2, 3), np.uint8))
    for name, message in (
        ("nowhere", "no such file or folder"),
        ("list.csv", "give a folder"),
        ("empty", "there are no images in it; put PNG, JPEG, WebP or BMP files there"),
        ("none.npz", "there are no images in it$"),
    ):
        with pytest.raises(ImageError, match=message):
            load_images(tmp_path / name, (2, 2), 3)

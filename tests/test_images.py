import io
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from pyarrow import parquet

from diffense import images as images_module
from diffense.errors import ImageError, OptionError
from diffense.images import Preprocessing, Skipped, fit_image, load_images, read_image

BATCHES = hnp.arrays(np.uint8, st.tuples(st.integers(0, 4), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 3])))
EXIF_ORIENTATION = 0x0112


def preprocessing(images: np.ndarray, **options: object) -> Preprocessing:
    height, width, channels = images.shape[1:]
    settings = {"size": (height, width), "channels": channels, "layout": "NHWC", "dtype": "float32", **options}
    return Preprocessing.model_validate(settings)


def encode(array: np.ndarray, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def ramp(height: int = 6, width: int = 8, channels: int = 3) -> np.ndarray:
    image = np.random.default_rng(3).integers(0, 256, (height, width, channels), np.uint8)
    return image[..., 0] if channels == 1 else image


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
    values = preprocessing(images, dtype="uint8", scale=7, mean=(3,)).apply(images)
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
    for name in ("dog/1.png", "cat/1.png", "cat/2.png", "bird/broken.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(ramp()) if "broken" not in name else b"broken")
    (tmp_path / "readme.txt").write_text("three classes")
    images = load_images(tmp_path, (6, 8), 3)
    assert images.names == ("cat/1.png", "cat/2.png", "dog/1.png")
    assert images.labels is not None
    assert images.labels.tolist() == [1, 1, 2]
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


@settings(max_examples=20)
@given(images=BATCHES.filter(len), labelled=st.booleans())
def test_npz_gives_its_pixels_names_and_labels(
    tmp_path_factory: pytest.TempPathFactory, images: np.ndarray, labelled: bool
) -> None:
    path = tmp_path_factory.mktemp("npz") / "digits.npz"
    labels = np.arange(len(images), dtype=np.uint8)
    np.savez(path, x=images, **({"y": labels} if labelled else {}))
    loaded = load_images(path, images.shape[1:3], images.shape[3])
    np.testing.assert_array_equal(loaded.pixels, images)
    assert loaded.names == tuple(f"digits.npz#{i}" for i in range(len(images)))
    assert (loaded.labels is not None and loaded.labels.tolist() == labels.tolist()) or not labelled


def test_grey_npz_without_channel_axis_becomes_colour_by_repetition(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (4, 5, 6), np.uint8)
    np.savez_compressed(tmp_path / "grey.npz", x=grey)
    loaded = load_images(tmp_path / "grey.npz", (5, 6), 3)
    np.testing.assert_array_equal(loaded.pixels, np.repeat(grey[..., None], 3, axis=3))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((1, 2, 2, 3), np.uint8)}, "no array 'x'"),
        ({"x": np.zeros((1, 2, 2, 3), np.float32)}, "x is float32"),
        ({"x": np.zeros((1, 2, 2, 4), np.uint8)}, r"\(1, 2, 2, 4\)"),
        ({"x": np.zeros((4,), np.uint8)}, r"\(4,\)"),
        ({"x": np.zeros((0, 2, 2, 3), np.uint8)}, "no image could be read"),
        ({"x": np.array([{"a": 1}], object)}, "plain arrays"),
        ({"x": np.zeros((1, 2, 2, 3), np.uint8), "y": np.array([None], object)}, "plain arrays"),
        ({"x": np.zeros((2, 2, 2, 3), np.uint8), "y": np.zeros(3, int)}, r"y is int64 \(3,\)"),
        ({"x": np.zeros((2, 2, 2, 3), np.uint8), "y": np.zeros(2)}, "y is float64"),
    ],
)
def test_npz_that_cannot_be_used_is_refused(arrays: dict[str, np.ndarray], message: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(ImageError, match=message):
        load_images(tmp_path / "bad.npz", (2, 2), 3)


@pytest.mark.parametrize("name", ["bad.npz", "bad.parquet"])
@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 cut short"])
def test_damaged_tables_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=f"{name}.*not a readable"):
        load_images(tmp_path / name, (2, 2), 3)


def test_npy_that_is_called_npz_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "bad.npz").open("wb") as file:
        np.save(file, np.zeros((1, 2, 2, 3), np.uint8))
    with pytest.raises(ImageError, match="not a readable"):
        load_images(tmp_path / "bad.npz", (2, 2), 3)


@pytest.mark.parametrize("nested", [False, True])
def test_parquet_gives_decoded_rows_and_skips_damaged_ones(nested: bool, tmp_path: Path) -> None:
    arrays = [np.full((3, 4, 3), value, np.uint8) for value in range(300)]
    cells: list[object] = [encode(array) for array in arrays]
    cells[7], cells[8] = b"broken", None
    column = [{"bytes": cell, "path": None} for cell in cells] if nested else cells
    table = pyarrow.table({"image": column, "label": [i % 5 for i in range(300)], "other": list("abc") * 100})
    parquet.write_table(table, tmp_path / "set.parquet")
    loaded = load_images(tmp_path / "set.parquet", (3, 4), 3)
    kept = [i for i in range(300) if i not in (7, 8)]
    assert loaded.pixels[:, 0, 0, 0].tolist() == [i % 256 for i in kept]
    assert loaded.labels is not None
    assert loaded.labels.tolist() == [i % 5 for i in kept]
    assert loaded.names[-1] == "set.parquet#299"
    assert [skipped.name for skipped in loaded.skipped] == ["set.parquet#7", "set.parquet#8"]


def test_parquet_without_labels_or_with_missing_ones_has_none(tmp_path: Path) -> None:
    cells = [encode(ramp())] * 2
    parquet.write_table(pyarrow.table({"image": cells}), tmp_path / "a.parquet")
    parquet.write_table(pyarrow.table({"image": cells, "label": [1, None]}), tmp_path / "b.parquet")
    assert load_images(tmp_path / "a.parquet", (6, 8), 3).labels is None
    assert load_images(tmp_path / "b.parquet", (6, 8), 3).labels is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"x"]}, "no column 'image'; the columns are picture"),
        ({"image": [b"x"], "label": ["cat"]}, "'label' is string"),
        ({"image": ["text"]}, "no image could be read of 1.*no encoded bytes"),
    ],
)
def test_parquet_that_cannot_be_used_is_refused(columns: dict[str, list[object]], message: str, tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table(columns), tmp_path / "bad.parquet")
    with pytest.raises(ImageError, match=message):
        load_images(tmp_path / "bad.parquet", (2, 2), 3)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "set.parquet").write_bytes(b"PAR1")
    with pytest.raises(OptionError, match=r"pip install 'diffense\[parquet\]'"):
        load_images(tmp_path / "set.parquet", (2, 2), 3)


def test_sources_that_do_not_exist_or_are_of_no_known_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("a,b")
    (tmp_path / "empty").mkdir()
    for name, message in (("nowhere", "no such file or folder"), ("list.csv", "give a folder"), ("empty", "no image")):
        with pytest.raises(ImageError, match=message):
            load_images(tmp_path / name, (2, 2), 3)

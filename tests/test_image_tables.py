import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from diffense.errors import ImageError, OptionError
from diffense.images import load_images
from pictures import BATCHES, encode, ramp


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
        ({"x": np.zeros((0, 2, 2, 3), np.uint8)}, "no images in it"),
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


@pytest.mark.parametrize("name", ["x", "y"])
def test_npz_that_claims_more_than_the_memory_is_refused(name: str, tmp_path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,)}\n" % 10**17
    claimed = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header
    np.savez(tmp_path / "small.npz", x=np.zeros((1, 2, 2, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w") as bomb, zipfile.ZipFile(tmp_path / "small.npz") as small:
        members = {"x.npy": small.read("x.npy")} | {f"{name}.npy": claimed}
        for member, content in members.items():
            bomb.writestr(member, content)
    with pytest.raises(ImageError, match=r"bomb\.npz: more than this machine's memory"):
        load_images(tmp_path / "bomb.npz", (2, 2), 3)

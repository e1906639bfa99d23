"""Images on their way to the target: read from folders, Parquet and npz, and preprocessed as stored with the guard."""

import io
import lzma
import os
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from diffense.errors import ImageError, OptionError
from diffense.options import MAX_PIXELS

FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP")
PARQUET_ROWS: Final = 256  # decoded at a time
TOO_LARGE: Final = "more than this machine's memory can hold; split it into several"
MODES: Final = {1: "L", 3: "RGB"}
LINKED: Final = "a link to a folder, which is not followed; copy what it holds, or give that folder itself"

Row = tuple[str, int | None, Callable[[], Image.Image]]  # name, label, what reads the image


class Preprocessing(BaseModel):
    """How pixels become the input of the target.

    Attributes:
        size: height and width that the target takes.
        channels: 1 or 3.
        layout: of the graph's input.
        dtype: of the graph's input; uint8 takes the pixels as they are.
        scale: each pixel is multiplied by it.
        mean: then subtracted, for each channel or one for all.
        std: then divided by, for each channel or one for all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    size: tuple[int, int]
    channels: Literal[1, 3]
    layout: Literal["NCHW", "NHWC"]
    dtype: Literal["float32", "uint8"]
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = Field(default=(1.0,))

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if min(self.size) < 1:
            raise ValueError(f"size is {self.size}; height and width are at least 1")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, self.channels):
                raise ValueError(f"{name} has {len(values)} numbers; give one, or one for each of {self.channels} channels")
        if min(self.std) <= 0:
            raise ValueError(f"std is {self.std}; its numbers must be above 0")
        return self

    def check(self, images: NDArray[np.uint8]) -> None:
        """Refuse what `apply` does not take, before anything is computed.

        Raises:
            ImageError: another dtype or shape.
        """
        expected = (*self.size, self.channels)
        if images.dtype != np.uint8:
            raise ImageError(f"images are {images.dtype}; hand over pixels from 0 to 255 as uint8")
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ImageError(f"images have shape {images.shape}; this target takes (N, {', '.join(map(str, expected))})")

    def apply(self, images: NDArray[np.uint8]) -> NDArray[Any]:
        """Turn pixels into the target's input.

        Args:
            images: (N, H, W, C) uint8 of this size and channel count; N may be 0.

        Returns:
            (N, C, H, W) or (N, H, W, C) of `dtype`, contiguous.

        Raises:
            ImageError: another dtype or shape.
        """
        self.check(images)
        values: NDArray[Any] = images
        if self.dtype == "float32":
            values = images.astype(np.float32)
            values *= np.float32(self.scale)
            values -= np.asarray(self.mean, np.float32)
            values /= np.asarray(self.std, np.float32)
        return np.ascontiguousarray(values.transpose(0, 3, 1, 2) if self.layout == "NCHW" else values)


@dataclass(frozen=True)
class Skipped:
    """An item that could not be read, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Images:
    """Images that could be read, in the order of their source.

    Attributes:
        pixels: (N, H, W, C) uint8.
        names: of each: the path below the folder, or ``file.npz#12`` for a row of a table.
        labels: (N,) int64, or None where some image has none. In a folder whose images lie in sub-folders exactly one
            level deep, the label is the index of the sub-folder in sorted order, among those of which an image was read.
        skipped: what could not be read.
    """

    pixels: NDArray[np.uint8]
    names: tuple[str, ...]
    labels: NDArray[np.int64] | None
    skipped: tuple[Skipped, ...]


def load_images(source: Path, size: tuple[int, int], channels: int) -> Images:
    """Read images and bring them to one size (Pillow's bilinear) and channel count.

    Args:
        source: a folder (read recursively, sorted; PNG, JPEG, WebP, BMP), a ``.parquet`` table with a column ``image``
            (encoded bytes, or a struct with ``bytes``) and perhaps ``label``, or an ``.npz`` with ``x`` (N, H, W, C) or
            (N, H, W) uint8 and perhaps ``y``.
        size: height and width.
        channels: 1 or 3; colour becomes grey by Pillow's luma, grey becomes colour by repetition.

    Raises:
        ImageError: the source is missing or no such table, or nothing in it can be read.
        OptionError: Parquet is asked for without pyarrow.
    """
    if source.is_dir():
        rows = _list_folder(source)
    elif not source.is_file():
        raise ImageError(f"{source}: there is no such file or folder")
    elif source.suffix == ".npz":
        rows = _list_npz(source)
    elif source.suffix == ".parquet":
        rows = _list_parquet(source)
    else:
        raise ImageError(f"{source}: give a folder of images, a .parquet table or an .npz file")
    pixels: list[NDArray[np.uint8]] = []
    names: list[str] = []
    labels: list[int | None] = []
    skipped: list[Skipped] = []
    for name, label, read in rows:
        try:
            pixels.append(fit_image(read(), size, channels))
        except ImageError as error:
            skipped.append(Skipped(name, str(error)))
            continue
        names.append(name)
        labels.append(label)
    if not pixels and not skipped:
        wanted = "; put PNG, JPEG, WebP or BMP files there" if source.is_dir() else ""
        raise ImageError(f"{source}: there are no images in it{wanted}")
    if not pixels:
        first = f"the first, {skipped[0].name}: {skipped[0].reason}"
        raise ImageError(f"{source}: no image could be read of {len(skipped)}; {first}")
    known = np.array([label for label in labels if label is not None], np.int64)
    if source.is_dir():
        known = np.unique(known, return_inverse=True)[1]  # a folder of which no image was read is no class
    return Images(np.stack(pixels), tuple(names), known if len(known) == len(names) else None, tuple(skipped))


def read_image(source: Path | bytes) -> Image.Image:
    """Decode one PNG, JPEG, WebP or BMP, turned upright as its EXIF says; grey (mode L) or colour (RGB), alpha dropped.

    Raises:
        ImageError: it is no such image, it is damaged, or it has more than 64 million pixels.
    """
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            return _simplify(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        reason = "no PNG, JPEG, WebP or BMP" if data else "an empty file"
        raise ImageError(reason) from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ImageError(f"more than {MAX_PIXELS} pixels") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, KeyError, IndexError, TypeError) as error:
        raise ImageError(f"damaged ({error})") from error


def fit_image(image: Image.Image, size: tuple[int, int], channels: int) -> NDArray[np.uint8]:
    """(H, W, C) uint8 of this height and width, resized bilinearly; grey by luma, colour by repetition."""
    height, width = size
    image = image.convert(MODES[channels])
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(height, width, channels)


def _simplify(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow's own conversion cuts off at 255
    if image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")


def _list_folder(folder: Path) -> Iterator[Row]:
    files, passed = [], {}
    for place, folders, names in os.walk(folder, onerror=lambda error: passed.update({Path(error.filename): error.strerror})):
        folders[:] = [name for name in folders if not name.startswith(".")]
        passed.update({Path(place, name): LINKED for name in folders if Path(place, name).is_symlink()})
        files += [Path(place, name) for name in names if not name.startswith(".") and Path(place, name).is_file()]
    classes = sorted({file.parent.name for file in files if file.parent.parent == folder})
    for file in sorted((*files, *passed)):
        name = str(file.relative_to(folder))
        if file in passed:
            yield name, None, partial(_refuse, passed[file] or "cannot be opened")
            continue
        label = classes.index(file.parent.name) if file.parent.parent == folder else None
        yield name, label, partial(read_image, file)


def _refuse(reason: str) -> Image.Image:
    raise ImageError(reason)


def _list_npz(source: Path) -> Iterator[Row]:
    try:
        with source.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            pixels, labels = archive["x"], archive.get("y")
    except KeyError as error:
        raise ImageError(f"{source}: no array 'x'; store the images as x, (N, H, W, C) uint8") from error
    except MemoryError as error:
        raise ImageError(f"{source}: {TOO_LARGE}") from error
    except (OSError, TypeError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError) as error:
        raise ImageError(f"{source}: not a readable .npz file of plain arrays ({error})") from error
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] not in MODES or 0 in pixels.shape[1:]:
        raise ImageError(
            f"{source}: x is {pixels.dtype} {pixels.shape}; it must be uint8 (N, H, W), (N, H, W, 1) or (N, H, W, 3)"
        )
    if labels is not None and (labels.shape != (len(pixels),) or labels.dtype.kind not in "iu"):
        raise ImageError(f"{source}: y is {labels.dtype} {labels.shape}; it must hold one integer for each image")
    if labels is not None and len(labels) and labels.max() > np.iinfo(np.int64).max:
        raise ImageError(f"{source}: y holds {labels.max()}, which is no label")
    for i, image in enumerate(pixels):
        label = int(labels[i]) if labels is not None else None
        yield f"{source.name}#{i}", label, partial(Image.fromarray, image.squeeze(2) if image.shape[2] == 1 else image)


def _list_parquet(source: Path) -> Iterator[Row]:
    try:
        from pyarrow import parquet, types
    except ModuleNotFoundError as error:
        raise OptionError(f"{source}: reading Parquet needs pyarrow: pip install 'diffense[parquet]'") from error
    try:
        with parquet.ParquetFile(source) as table:
            schema = table.schema_arrow
            if "image" not in schema.names:
                raise ImageError(f"{source}: no column 'image'; the columns are {', '.join(schema.names)}")
            labelled = "label" in schema.names
            if labelled and not types.is_integer(schema.field("label").type):
                raise ImageError(f"{source}: column 'label' is {schema.field('label').type}; it must hold integers")
            row = 0
            for batch in table.iter_batches(PARQUET_ROWS, columns=["image", "label"] if labelled else ["image"]):
                for item in batch.to_pylist():
                    yield f"{source.name}#{row}", item.get("label"), partial(_read_cell, item["image"])
                    row += 1
    except MemoryError as error:
        raise ImageError(f"{source}: {TOO_LARGE}") from error
    except (OSError, ValueError, NotImplementedError) as error:
        raise ImageError(f"{source}: not a readable Parquet table ({error})") from error


def _read_cell(cell: Any) -> Image.Image:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise ImageError("the column 'image' holds no encoded bytes here")
    return read_image(data)

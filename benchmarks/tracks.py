"""Recording tracks of GTSRB's training images: frames of one sign, which no split may part.

usage: python -m benchmarks.tracks FOLDER

FOLDER holds the official training images at 32x32 under their own names, ``CLASS/TRACK_FRAME.ppm``; the image set as it is read
here has lost the names. Each image is found again by its pixels, and the numbers are written to ``gtsrb_tracks.json``.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffense.errors import OptionError

TRACKS: Final = Path(__file__).with_name("gtsrb_tracks.json")
PER_CLASS: Final = 100  # more than the tracks of a class, which the official names count from 0


def read_tracks(pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Read the track of each training image: (N, 32, 32, 3), (N,) -> (N,), a number of its own for each track.

    Raises:
        OptionError: these are not the images, in the order, that the numbers were written for.
    """
    stored = json.loads(TRACKS.read_text())
    if hash_pixels(pixels) != stored["pixels_sha256"]:
        raise OptionError(f"{TRACKS.name} is of other training images of GTSRB; write it anew with python -m benchmarks.tracks")
    return labels * PER_CLASS + np.array(stored["tracks"], np.int64)


def find_tracks(pixels: NDArray[np.uint8], labels: NDArray[np.int64], folder: Path) -> list[int]:
    """Find each image in the folder by its pixels and class; gives the track in the file's name.

    Raises:
        OptionError: an image is not there, or in several tracks.
    """
    known: dict[tuple[int, str], set[int]] = {}
    for path in sorted(folder.glob("*/*_*.ppm")):
        with Image.open(path) as image:
            key = int(path.parent.name), hash_pixels(np.asarray(image.convert("RGB")))
        known.setdefault(key, set()).add(int(path.name.split("_")[0]))
    tracks: list[int] = []
    for row, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        found = known.get((int(label), hash_pixels(image)), set())
        if len(found) != 1:
            raise OptionError(f"training image {row} of class {label} is in {len(found)} tracks of {folder}, not in one")
        tracks += found
    return tracks


def hash_pixels(pixels: NDArray[np.uint8]) -> str:
    """SHA-256 of the pixels, in hexadecimal."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def pick_groups(
    labels: NDArray[np.int64], groups: NDArray[np.int64], count: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Row numbers of whole groups drawn of each class, as near to `count` images a class as they come, ascending."""
    rows: list[NDArray[np.int64]] = []
    for label in np.unique(labels):
        ours = np.flatnonzero(labels == label)
        numbers, sizes = np.unique(groups[ours], return_counts=True)
        order = generator.permutation(len(numbers))
        total = np.cumsum(sizes[order])
        taken = numbers[order[: int(np.abs(total - count).argmin()) + 1]]
        rows.append(ours[np.isin(groups[ours], taken)])
    return np.sort(np.concatenate(rows))


def main(arguments: list[str]) -> None:
    """Write the file."""
    from benchmarks.datasets import load_official

    if len(arguments) != 1:
        sys.exit(__doc__)
    try:
        train, _ = load_official("gtsrb")
        tracks = find_tracks(train.pixels, train.labels, Path(arguments[0]))
    except (OptionError, OSError, ValueError) as error:  # a damaged image, or a name that is none of theirs
        sys.exit(f"tracks: {error}")
    work = TRACKS.with_suffix(".partial")
    work.write_text(json.dumps({"pixels_sha256": hash_pixels(train.pixels), "tracks": tracks}, separators=(",", ":")) + "\n")
    work.replace(TRACKS)


if __name__ == "__main__":
    main(sys.argv[1:])

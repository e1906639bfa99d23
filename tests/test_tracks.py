"""Recording tracks: found by pixels, never parted."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from benchmarks import tracks
from benchmarks.datasets import SPECS, TRACKED, Images, load_official, load_split
from benchmarks.settings import find_shared
from diffense.errors import OptionError


@given(
    frames=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=200),
    count=st.integers(1, 60),
    seed=st.integers(0, 9),
)
def test_whole_tracks_are_picked_as_near_to_the_count_as_they_come(
    frames: list[tuple[int, int]], count: int, seed: int
) -> None:
    labels, numbers = (np.array(column, np.int64) for column in zip(*frames, strict=True))
    rows = tracks.pick_groups(labels, numbers, count, np.random.default_rng(seed))
    assert (np.diff(rows) > 0).all()
    left = np.setdiff1d(np.arange(len(labels)), rows)
    assert not {(labels[i], numbers[i]) for i in rows} & {(labels[i], numbers[i]) for i in left}
    for label in np.unique(labels):
        longest = np.unique(numbers[labels == label], return_counts=True)[1].max()
        taken, there = (labels[rows] == label).sum(), (labels == label).sum()
        assert 0 < taken <= count + longest and (taken == there or taken >= count - longest)


def draw_tracks(folder: Path) -> Images:
    """Three tracks of two classes, two frames each, in the official naming; a frame of one track occurs in the other class."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    pixels[5] = pixels[0]
    labels = np.array([0, 0, 0, 0, 1, 1])
    for image, label, name in zip(pixels, labels, ("0_0", "0_1", "7_0", "7_1", "0_0", "0_1"), strict=True):
        track, frame = name.split("_")
        path = folder / f"{label:05d}" / f"{int(track):05d}_{int(frame):05d}.ppm"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(path)
    return Images(pixels, labels)


def test_tracks_are_found_by_pixels_and_class_and_belong_to_these_images_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = draw_tracks(tmp_path)
    order = np.array([3, 5, 0, 4, 2, 1])
    shuffled = images.take(order)
    monkeypatch.setattr(tracks, "TRACKS", tmp_path / "tracks.json")
    monkeypatch.setattr("benchmarks.datasets.load_official", lambda name: (shuffled, images))
    tracks.main([str(tmp_path)])
    assert tracks.read_tracks(shuffled.pixels, shuffled.labels).tolist() == [7, 100, 0, 100, 7, 0]
    with pytest.raises(OptionError, match=r"tracks\.json is of other training images"):
        tracks.read_tracks(images.pixels, images.labels)
    with pytest.raises(OptionError, match=r"training image 1 of class 0 is in 0 tracks"):
        tracks.find_tracks(images.pixels[[0, 4]], np.array([0, 0]), tmp_path)
    Image.fromarray(images.pixels[0]).save(tmp_path / "00000" / "00007_00002.ppm")
    with pytest.raises(SystemExit, match=r"tracks: training image 2 of class 0 is in 2 tracks"):
        tracks.main([str(tmp_path)])
    (tmp_path / "00000" / "00000_00000.ppm").write_bytes(b"P6 damaged")
    with pytest.raises(SystemExit, match="tracks: "):
        tracks.main([str(tmp_path)])
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.shared
def test_no_track_of_the_signs_is_in_two_parts() -> None:
    try:
        find_shared()
    except OptionError as error:
        pytest.skip(str(error))
    train, _ = load_official(TRACKED)
    numbers = tracks.read_tracks(train.pixels, train.labels)
    track_of = {image.tobytes(): number for image, number in zip(train.pixels, numbers, strict=True)}
    split = load_split(TRACKED)
    ours, theirs = ({track_of[image.tobytes()] for image in part.pixels} for part in (split.clean, split.train))
    assert len(ours) + len(theirs) == 1307 and not ours & theirs, "the official training images are of so many tracks"
    assert split.clean.groups is not None and ours == set(split.clean.groups.tolist())
    assert len(split.train) + len(split.clean) == len(train) and len(split.evaluation) == 6480
    assert np.bincount(split.clean.labels).min() >= SPECS[TRACKED].held_out - 15


def test_the_stored_numbers_are_of_tracks_within_classes() -> None:
    stored = json.loads(tracks.TRACKS.read_text())
    assert len(stored["pixels_sha256"]) == 64 and len(stored["tracks"]) == 12330
    assert min(stored["tracks"]) == 0 and max(stored["tracks"]) == 74

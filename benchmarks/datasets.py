"""The six image sets, each split once: what trains the target, what the defender has, what is evaluated."""

import importlib.util
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from benchmarks.settings import find_shared
from benchmarks.tracks import pick_groups, read_tracks
from diffense.errors import OptionError

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Spec:
    """What is known of an image set before it is read.

    Attributes:
        name: as in the data folder.
        title: as in the tables.
        stand_in: whether the set stands in for another one that could not be had.
        side: height and width in pixels.
        channels: 1 or 3.
        classes: number of classes.
        mirrored: whether training may mirror images; digits and signs change their meaning.
        lit: whether training changes brightness and contrast; signs are seen by day and by night.
        held_out: training images a class that the defender gets instead of test images, whole recording tracks where there
            are such; 0 where the test split is large.
        defender: most images of the defender.
        epochs: of the target's training.
        network: the target's usual architecture.
    """

    name: str
    title: str
    stand_in: bool
    side: int
    channels: int
    classes: int
    mirrored: bool
    lit: bool
    held_out: int
    defender: int
    epochs: int
    network: str


TRACKED: Final = "gtsrb"  # its images are frames of recording tracks
SPECS: Final = {
    spec.name: spec
    for spec in (
        Spec("mnist", "MNIST", False, 28, 1, 10, False, False, 0, 5000, 9, "small_cnn"),
        Spec("cifar10", "CIFAR-10", False, 32, 3, 10, True, False, 0, 5000, 12, "staged_resnet"),
        Spec("gtsrb", "GTSRB (reduced)", False, 32, 3, 43, False, True, 75, 3225, 16, "staged_resnet"),
        Spec("imagenet10", "ImageNet-10 (64x64)", False, 64, 3, 10, True, False, 0, 1888, 12, "efficientnet_lite"),
        Spec(
            "lsun_object_standin",
            "LSUN Object (stand-in: Tiny-ImageNet)",
            True,
            64,
            3,
            10,
            True,
            False,
            120,
            1200,
            32,
            "efficientnet_lite",
        ),
        Spec(
            "lsun_scene_standin",
            "LSUN Scene (stand-in: MiniPlaces)",
            True,
            64,
            3,
            10,
            True,
            False,
            120,
            1200,
            16,
            "efficientnet_lite",
        ),
    )
}


@dataclass(frozen=True)
class Images:
    """``pixels`` (N, H, W, C) uint8, ``labels`` (N,) int64, and perhaps ``groups`` (N,) int64: which belong together."""

    pixels: Pixels
    labels: Labels
    groups: Labels | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: NDArray[np.int64]) -> "Images":
        """These rows."""
        return Images(self.pixels[rows], self.labels[rows], None if self.groups is None else self.groups[rows])


@dataclass(frozen=True)
class Split:
    """Three disjoint parts of an image set.

    Attributes:
        train: what the attacker trains the target on.
        clean: what the defender has; the target never saw it.
        evaluation: what the figures are measured on; neither target nor guard ever saw it.
    """

    train: Images
    clean: Images
    evaluation: Images


def find_spec(name: str) -> Spec:
    """Look an image set up by name.

    Raises:
        OptionError: there is none of that name.
    """
    if name not in SPECS:
        raise OptionError(f"unknown data set {name!r}; known: {', '.join(SPECS)}")
    return SPECS[name]


@lru_cache(maxsize=2)
def load_split(name: str) -> Split:
    """Read and split an image set; always the same split.

    The defender's images come from the official test split; where that is small, or made of recording tracks that it does not
    name (GTSRB), from training images that the target is not shown. No track is in two parts: the official splits share none,
    and the training split is parted by whole tracks.

    Raises:
        OptionError: unknown name, or the data is missing or damaged.
    """
    spec = find_spec(name)
    train, test = load_official(name)
    generator = np.random.default_rng(20240917)
    if spec.held_out:
        if name == TRACKED:
            train = Images(train.pixels, train.labels, read_tracks(train.pixels, train.labels))
        chosen = (
            pick_per_class(train.labels, spec.held_out, generator)
            if train.groups is None
            else pick_groups(train.labels, train.groups, spec.held_out, generator)
        )
        rest = np.setdiff1d(np.arange(len(train)), chosen)
        return Split(train.take(rest), train.take(chosen), test)
    chosen = np.sort(generator.permutation(len(test))[: min(spec.defender, len(test) // 2)])
    return Split(train, test.take(chosen), test.take(np.setdiff1d(np.arange(len(test)), chosen)))


def load_official(name: str) -> tuple[Images, Images]:
    """Read the official training and test images.

    Raises:
        OptionError: the data is missing or damaged.
    """
    loader = _load_module()
    try:
        train, test = (Images(*loader.load(name, part)[:2]) for part in ("train", "test"))
    except loader.DataError as error:
        raise OptionError(str(error)) from error
    return train, test


def pick_per_class(labels: Labels, count: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """Row numbers of at most `count` rows of each class, ascending."""
    rows = [generator.permutation(np.flatnonzero(labels == label))[:count] for label in np.unique(labels)]
    return np.sort(np.concatenate(rows))


@lru_cache(maxsize=1)
def _load_module() -> ModuleType:
    path = find_shared() / "data" / "load.py"
    spec = importlib.util.spec_from_file_location("diffense_shared_load", path)
    if spec is None or spec.loader is None:
        raise OptionError(f"{path} cannot be read as Python")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

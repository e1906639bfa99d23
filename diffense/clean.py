"""The defender's clean images: how many there must be, which calibrate, and what the target makes of the rest."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from diffense.calibration import check_rate, check_reach, needed_images
from diffense.chain import shuffle_groups
from diffense.copies import make_copies
from diffense.errors import OptionError, TooFewImagesError
from diffense.guidance import FEWEST_PER_CLASS, Kind, choose_kind

CALIBRATION_SHARE: Final = 0.4
MOST_CALIBRATION_SHARE: Final = 0.6  # what a small alpha may take of a split
FEWEST_FIT_IMAGES: Final = 20  # that a split leaves
FEWEST_IMAGES: Final = 34  # a split's usual share leaves FEWEST_FIT_IMAGES of them; where all are fitted on, the same floor
FEWEST_GROUPS: Final = 20  # twice the folds that calibrate few images
FEW_IMAGES: Final = 300  # below it all images are fitted on and calibrate, whatever alpha is (docs/decisions/0023)
FEW_GROUPS: Final = 400  # likewise of groups: a label of two or three is not to lose one (docs/decisions/0037)
FEW_COPIES: Final = 6  # of each image where there are few

Run = Callable[[NDArray[np.uint8]], tuple[NDArray[np.float64], list[NDArray[np.float64]]]]
"""(N, H, W, C) pixels -> (N, classes) logits and the (N, P) pooled features of each tap."""


@dataclass(frozen=True)
class CleanSet:
    """What is fitted on: originals first, then their changed copies.

    Attributes:
        logits: (n, C).
        pooled: (n, P) of each tap.
        source: (n,) index of the original a row comes from; its own for the originals.
        originals: how many rows are originals.
        groups: (originals,) which of them belong together; None where each stands alone.
    """

    logits: NDArray[np.float64]
    pooled: list[NDArray[np.float64]]
    source: NDArray[np.int64]
    originals: int
    groups: NDArray[np.int64] | None = None

    @property
    def labels(self) -> NDArray[np.int64]:
        """(n,) predicted labels."""
        return np.asarray(self.logits.argmax(axis=1), np.int64)

    def take(self, rows: NDArray[np.bool_]) -> "CleanSet":
        """These (n,) rows, which hold the original of each of their copies."""
        kept = rows[: self.originals]
        source = (np.cumsum(kept) - 1)[self.source[rows]]
        groups = None if self.groups is None else self.groups[kept]
        return CleanSet(self.logits[rows], [tap[rows] for tap in self.pooled], source, int(kept.sum()), groups)


def count_independent(source: NDArray[np.int64]) -> int:
    """How many rows count as independent when a covariance is shrunk: an image and its first copy, not the further ones."""
    return min(len(source), 2 * len(np.unique(source)))


def drop_repeats(
    images: NDArray[np.uint8], groups: NDArray[np.int64] | None, notify: Callable[[str], None]
) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
    """Leave out images (N, H, W, C) that repeat an earlier one pixel by pixel, and their places in the groups (N,).

    A repeat stands on both sides of a split, or in a fold and outside it: calibration would see what was fitted on, and
    false alarms would come several times as often as asked for.
    """
    digests = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    first = np.unique(np.array(digests, np.str_), return_index=True)[1]
    if len(first) < len(images):
        notify(f"{len(images) - len(first)} of {len(images)} clean images repeat others pixel by pixel and are left out")
        kept = np.sort(first)
        return images[kept], None if groups is None else groups[kept]
    return images, groups


def check_groups(groups: NDArray[np.int64], images: int) -> None:
    """Refuse groups that are not one for each image, or cannot be set aside.

    Raises:
        OptionError: not (N,) integers.
        TooFewImagesError: fewer than `FEWEST_GROUPS`, or more than half of the images are of one.
    """
    if groups.shape != (images,) or groups.dtype.kind not in "iu":
        raise OptionError(f"groups is {groups.dtype} {groups.shape}; give one integer for each of {images} images")
    sizes = np.unique(groups, return_counts=True)[1]
    if len(sizes) < FEWEST_GROUPS or 2 * sizes.max() > images:
        raise TooFewImagesError(
            f"the clean images are of {len(sizes)} groups, the largest of {sizes.max()} images, and whole groups are set aside "
            f"to calibrate; give images of at least {FEWEST_GROUPS}, none with more than half of them"
        )


def count_split(images: int, alpha: float) -> int:
    """How many clean images a split would let calibrate: two fifths, more where alpha needs more, never above three fifths."""
    most = min(int(MOST_CALIBRATION_SHARE * images), images - FEWEST_FIT_IMAGES)
    return min(max(round(CALIBRATION_SHARE * images), needed_images(alpha)), most)


def count_calibration(images: int, alpha: float, groups: int | None = None) -> int:
    """How many clean images calibrate: all of them, by folds, where they or their groups are few or a split cannot reach alpha.

    Args:
        images: how many there are.
        alpha: false-alarm rate.
        groups: how many groups they are of; None where each stands alone.

    Raises:
        TooFewImagesError: alpha cannot be reached with so few images or groups, or a guard cannot be fitted on them.
        OptionError: alpha is not between 0 and 1.
    """
    check_rate(alpha)
    if images < FEWEST_IMAGES:
        fewest = max(needed_images(alpha), FEWEST_IMAGES)
        raise TooFewImagesError(f"{images} clean images are too few for a guard; give at least {fewest}, and five a class")
    check_reach(alpha, images, groups)
    few = images < FEW_IMAGES or (groups is not None and groups < min(images, FEW_GROUPS))
    split = count_split(images, alpha)
    return images if few or split < needed_images(alpha) else split


def split_rows(
    labels: NDArray[np.int64], calibration: int, generator: np.random.Generator, groups: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split row numbers into fit and calibration rows, each label in about the same share; both ascending.

    No group is in both, so those that calibrate are a few more than asked for where the last group asks for it. A group stands
    where its middle row does: where less than half calibrates, the only group of a label is fitted on.
    """
    place = np.empty(len(labels))
    for members in shuffle_groups(labels, groups, generator):
        ends = np.cumsum([len(rows) for rows in members])
        shift = generator.random()
        for rows, end in zip(members, ends, strict=True):
            place[rows] = (end - (len(rows) + 1) / 2 + shift) / ends[-1]
    order = np.argsort(place, kind="stable")
    if groups is not None and calibration:
        calibration += int((groups[order[calibration:]] == groups[order[calibration - 1]]).sum())
    return np.sort(order[calibration:]), np.sort(order[:calibration])


def decide_guide(
    labels: NDArray[np.int64], classes: int, wanted: Literal["auto", "label", "logits"], notify: Callable[[str], None]
) -> Kind:
    """Choose what guides the latents, and say what is missing.

    Raises:
        TooFewImagesError: label guidance was asked for and a class has too few images.
    """
    counts = np.bincount(labels, minlength=classes)
    never, few = np.flatnonzero(counts == 0), np.flatnonzero((counts > 0) & (counts < FEWEST_PER_CLASS))
    if wanted == "label" and len(few) + len(never):
        rare = np.concatenate([few, never])
        raise TooFewImagesError(
            f"label guidance needs {FEWEST_PER_CLASS} clean images of every class, {len(rare)} classes have fewer "
            f"({_name_some(rare, counts)}); add images of them, or guide by logits (--guide logits)"
        )
    kind = choose_kind(labels, classes) if wanted == "auto" else wanted
    if len(few):
        notify(
            f"{len(few)} of {classes} classes have fewer than {FEWEST_PER_CLASS} clean images to fit on, beside those that "
            f"calibrate ({_name_some(few, counts)}); the guard is guided by logits instead of labels"
        )
    if len(never):
        notify(
            f"{len(never)} of {classes} classes are never predicted on the clean images ({_name_some(never, counts)}); inputs "
            f"that get these labels are judged by what the logits say; {FEWEST_PER_CLASS} images of each would mend it"
        )
    return kind


def collect_clean(
    images: NDArray[np.uint8],
    logits: NDArray[np.float64],
    pooled: list[NDArray[np.float64]],
    run: Run,
    generator: np.random.Generator,
    copies: int = 1,
    groups: NDArray[np.int64] | None = None,
) -> CleanSet:
    """Add, to what the target makes of the images to fit on, what it makes of so many copies that keep their label."""

    def predict(changed: NDArray[np.uint8]) -> NDArray[np.int64]:
        seen.append(run(changed))
        return np.asarray(seen[-1][0].argmax(axis=1), np.int64)

    seen: list[tuple[Any, Any]] = []
    rows = np.arange(len(images))
    parts = [(logits, pooled, rows)]
    for _, kept in make_copies(images, logits.argmax(axis=1), predict, generator, copies):
        copy_logits, copy_pooled = seen[-1]
        source = kept[find_finite([copy_logits[kept], *(tap[kept] for tap in copy_pooled)])]
        parts.append((copy_logits[source], [tap[source] for tap in copy_pooled], source))
    every, taps, sources = zip(*parts, strict=True)
    joined = [np.concatenate(tap) for tap in zip(*taps, strict=True)]
    return CleanSet(np.concatenate(every), joined, np.concatenate(sources), len(images), groups)


def find_finite(arrays: Sequence[NDArray[np.float64]]) -> NDArray[np.bool_]:
    """(N,) where all the (N, ...) arrays hold numbers."""
    return np.asarray(np.isfinite(np.concatenate(arrays, axis=1)).all(axis=1), np.bool_)


def _name_some(classes: NDArray[np.int64], counts: NDArray[np.int64]) -> str:
    named = ", ".join(f"class {c}: {counts[c]}" for c in classes[:3])
    return named + (", …" if len(classes) > 3 else "")

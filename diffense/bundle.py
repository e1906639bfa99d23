"""Writing a guard bundle: into a temporary sibling folder first, then moved into place."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffense.calibration import bound_false_alarms, check_reach, count_groups_once
from diffense.clean import check_groups, drop_repeats
from diffense.errors import BundleError
from diffense.guard import Guard
from diffense.manifest import Manifest, hash_file, write_manifest
from diffense.names import ARRAYS_FILE, MANIFEST_FILE
from diffense.scorer import Scorer, pack_scorer


def check_place(directory: Path) -> None:
    """Refuse a place where no bundle can be written; the folders above it are made.

    Raises:
        BundleError: as `write_bundle`.
    """
    _make_partial(_resolve(directory)).rmdir()


@contextmanager
def write_bundle(directory: Path) -> Iterator[Path]:
    """Give a temporary sibling folder to write a bundle into, and move it into place when the block ends without an error.

    An older bundle in that place is replaced; a folder that is no bundle is left alone.

    Raises:
        BundleError: something else than a bundle stands there, or the place cannot be written.
    """
    directory = _resolve(directory)
    partial = _make_partial(directory)
    try:
        yield partial
        partial.chmod(0o755)
        for path in partial.iterdir():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        if directory.exists():
            _replace(directory, partial)
        else:
            partial.rename(directory)
    except OSError as error:
        raise BundleError(f"{directory} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_scorer(folder: Path, scorer: Scorer, manifest: Manifest) -> Manifest:
    """Write the arrays, and the manifest with the hashes of all files."""
    (folder / ARRAYS_FILE).write_bytes(pack_scorer(scorer))
    names = sorted(path.name for path in folder.iterdir() if path.suffix in (".onnx", ".data", ".safetensors"))
    manifest = manifest.model_copy(update={"files": {name: hash_file(folder / name) for name in names}})
    write_manifest(manifest, folder)
    return manifest


def calibrate_bundle(folder: Path, images: NDArray[np.uint8], alpha: float, groups: NDArray[np.int64] | None = None) -> None:
    """Calibrate the bundle in `folder`, in place, with clean images that were used for nothing else, each group counted once.

    The scores come from the bundle as it will be loaded, so that later ones compare with them exactly.

    Raises:
        TooFewImagesError: alpha is below ``1 / (n + 1)`` for n images, or groups.
        OptionError: alpha is not between 0 and 1.
        ImageError: images of a wrong size.
    """
    count = None if groups is None else len(np.unique(groups))
    check_reach(alpha, len(images), count)
    guard = Guard.load(folder)
    scorer = replace(guard.scorer, calibration=count_groups_once(guard.score(images).scores, groups))
    changes = {
        "alpha": alpha,
        "calibration_size": len(scorer.calibration),
        "crossed": False,
        "clean": guard.manifest.clean.model_copy(update={"calibrated": len(images), "calibrated_groups": count}),
        "false_alarm_interval": bound_false_alarms(len(images), alpha, groups=count),
    }
    write_scorer(folder, scorer, guard.manifest.model_copy(update=changes))


def recalibrate(
    guard: Guard,
    images: NDArray[np.uint8] | None,
    alpha: float,
    out: Path,
    notify: Callable[[str], None] = lambda message: None,
    groups: NDArray[np.int64] | None = None,
) -> Guard:
    """Copy a guard to `out` (or over itself) with a new calibration and nothing refitted.

    Args:
        guard: the guard.
        images: (N, H, W, C) clean images that it was not fitted on; None keeps its calibration, for another alpha.
        alpha: false-alarm rate that is asked for.
        out: folder of the new bundle.
        notify: told, in one line, how many images repeat others and are left out.
        groups: (N,) which images belong together, as in `fit_guard`; each counts once.

    Raises:
        TooFewImagesError, OptionError, ImageError: as `calibrate_bundle` and `check_groups`.
        BundleError: `out` cannot be written.
    """
    if images is not None and groups is not None:
        check_groups(groups, len(images))
    with write_bundle(out) as folder:
        for name in (*guard.manifest.files, MANIFEST_FILE):
            shutil.copyfile(guard.directory / name, folder / name)
        if images is None:
            set_alpha(folder, alpha)
        else:
            images, groups = drop_repeats(images, groups, notify)
            calibrate_bundle(folder, images, alpha, groups)
    return Guard.load(out)


def set_alpha(folder: Path, alpha: float) -> None:
    """Set another threshold in the bundle in `folder`, in place, among the calibration scores that it holds.

    Raises:
        TooFewImagesError: alpha is below ``1 / (n + 1)``.
        OptionError: alpha is not between 0 and 1.
    """
    guard = Guard.load(folder)
    size = guard.manifest.calibration_size
    groups = guard.manifest.clean.calibrated_groups
    check_reach(alpha, size, groups)
    low, high = bound_false_alarms(size, alpha, groups=groups)
    interval = (0.0 if guard.manifest.crossed else low, high)
    changes = {"alpha": alpha, "false_alarm_interval": interval}
    write_scorer(folder, guard.scorer, guard.manifest.model_copy(update=changes))


def _resolve(directory: Path) -> Path:
    """The place itself where a link leads to it.

    Raises:
        BundleError: it is a mount point, which cannot be moved aside, or a path that onnxruntime cannot open.
    """
    place = directory.resolve()
    try:
        str(place).encode()
    except UnicodeEncodeError:
        raise BundleError(f"{place} is no path in UTF-8, and onnxruntime opens no other; choose another place") from None
    if place.is_mount():
        raise BundleError(f"{place} is a mount point and cannot be replaced at one stroke; choose a folder inside it")
    return place


def _make_partial(directory: Path) -> Path:
    """Make the temporary sibling of a place where a bundle may be written."""
    try:
        bundle = (directory / MANIFEST_FILE).is_file()
        if directory.exists() and not bundle and (not directory.is_dir() or any(directory.iterdir())):
            raise BundleError(f"{directory} exists and is no guard bundle; choose another place or remove it")
        directory.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=directory.parent))
    except OSError as error:
        raise BundleError(f"{directory} cannot be written: {error.strerror}; choose another place") from error


def _replace(directory: Path, partial: Path) -> None:
    """Put a bundle in the place of another; whatever is raised, one of the two stands there.

    A process that is killed between the two moves leaves the old one in a sibling that ends in ``.old``.
    """
    old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".old", dir=directory.parent))
    kept = old / directory.name
    try:
        directory.rename(kept)
        partial.rename(directory)
    except BaseException:
        if not directory.exists():
            kept.rename(directory)
        raise
    finally:
        if directory.exists():  # else `old` holds the only guard there is
            shutil.rmtree(old, ignore_errors=True)

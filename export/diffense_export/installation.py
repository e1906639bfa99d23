"""Moves finished model folders into a repository: each at one stroke, all or none, and never over a stranger's."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from diffense import names
from diffense.errors import ExportError
from diffense_export.configs import read_family

FRONTS: Final = (names.GUARDED_SUFFIX, names.GATEWAY_SUFFIX, names.STREAM_SUFFIX)  # what clients ask
STAGE_PREFIX: Final = ".diffense-stage-"


@contextlib.contextmanager
def open_stage(repository: Path) -> Iterator[Path]:
    """Make an empty folder, gone afterwards: beside the repository where that is on its file system, else a temporary one.

    Never inside: a server takes every folder there for a model, and does not start where one is none.

    Raises:
        ExportError: nothing can be written there.
    """
    try:
        repository.mkdir(parents=True, exist_ok=True)
        home = repository.resolve()
        beside = home.parent.stat().st_dev == home.stat().st_dev and os.access(home.parent, os.W_OK)
        stage = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=home.parent if beside else None))
    except OSError as error:
        raise ExportError(f"cannot write to {repository}: {error.strerror}") from None
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def list_family(repository: Path, family: str) -> list[str]:
    """Model folders in the repository that earlier exports wrote for this production model."""
    return sorted(folder.name for folder in repository.iterdir() if folder.is_dir() and read_family(folder) == family)


def check_free(repository: Path, family: str, models: Sequence[str]) -> None:
    """Make sure that every folder about to be replaced is one that an export for this production model wrote.

    Raises:
        ExportError: a folder of that name is somebody else's.
    """
    for model in models:
        place = repository / model
        if (place.exists() or place.is_symlink()) and read_family(place) != family:
            hint = "--no-production to leave it alone, or " if model == family else ""
            raise ExportError(
                f"{place} exists and was not written by `diffense export --model {family}`; choose {hint}another --model"
            )


def install_models(stage: Path, repository: Path, models: Sequence[str], stale: Sequence[str]) -> None:
    """Move models from the stage into the repository, in order, and take stale ones away.

    The old fronts go first and the new ones come last: whatever ends the process, no front is left that asks models of two
    exports. From another file system they are copied into a hidden folder of the repository first, which is there for as long
    as that takes.

    Raises:
        ExportError: a folder could not be moved; what stood there before stands there again, or the message says where it lies.
    """
    inside: Path | None = None
    try:
        if _can_move(stage, repository):
            _move_models(stage, repository, models, stale)
            return
        inside = Path(tempfile.mkdtemp(prefix=STAGE_PREFIX, dir=repository))
        for model in models:
            shutil.copytree(stage / model, inside / model)
        _move_models(inside, repository, models, stale)
    except shutil.Error as error:  # its arguments are the failures: from where, to where, why
        raise ExportError(f"cannot write to {repository}: {error.args[0][0][2]}") from None
    except OSError as error:
        raise ExportError(f"cannot write to {repository}: {error.strerror}") from None
    finally:
        if inside is not None:
            shutil.rmtree(inside, ignore_errors=True)


def _move_models(stage: Path, repository: Path, models: Sequence[str], stale: Sequence[str]) -> None:
    # Beside the stage and not inside: whatever ends the installation, and however, nobody clears what it still holds.
    attic = stage.with_name(f"{stage.name}-replaced")
    staged = _list_names(stage)
    fronts = [model for model in (*stale, *models) if not _is_behind(model)]
    try:
        attic.mkdir()
        for model in (*reversed(fronts), *models, *stale):
            if (repository / model).exists():
                (repository / model).rename(attic / model)
            if model in models and model not in fronts:
                (stage / model).rename(repository / model)
        for model in models:
            if model in fronts:
                (stage / model).rename(repository / model)
    except BaseException as error:
        try:
            # By what lies where, since an interrupt may come between a move and a note of it.
            for model in sorted(staged - _list_names(stage), key=_is_behind):
                (repository / model).rename(stage / model)
            for model in sorted(_list_names(attic), key=_is_behind, reverse=True):
                (attic / model).rename(repository / model)
        except BaseException as failure:
            raise ExportError(
                f"cannot write to {repository}: {_explain(error)}; putting back what stood there failed too "
                f"({_explain(failure)}): it lies in {attic}, move the folders there back by hand"
            ) from None
        with contextlib.suppress(OSError):
            attic.rmdir()
        if isinstance(error, OSError):
            raise ExportError(f"cannot write to {repository}: {error.strerror}; it is as it was before") from None
        raise
    shutil.rmtree(attic, ignore_errors=True)


def _is_behind(model: str) -> bool:
    """Whether a model works behind the fronts, which are put first where models are sorted by this."""
    return not model.endswith(FRONTS)


def _can_move(stage: Path, repository: Path) -> bool:
    """Try it: two mounts of one file system have the same device number, and nothing can be renamed from one to the other."""
    handle, probe = tempfile.mkstemp(prefix=STAGE_PREFIX, dir=stage)
    os.close(handle)
    place = repository / Path(probe).name
    try:
        Path(probe).rename(place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    finally:
        Path(probe).unlink(missing_ok=True)
        place.unlink(missing_ok=True)
    return True


def _list_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _explain(error: BaseException) -> str:
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from diffense.errors import ExportError
from diffense_export.installation import install_models, open_stage
from repositories import hash_tree

# "a" and the front replace older ones, "c" is new, "d" and its front have no place any more.
MODELS, STALE = ["a", "c", "a_guarded"], ["d", "d_stream"]
OLD = ["a", "a_guarded", "d", "d_stream"]
MOVES = 7  # two for each of "a" and "a_guarded", one for each of the others


def write(folder: Path, models: list[str], text: str) -> None:
    for model in models:
        (folder / model).mkdir(parents=True)
        (folder / model / "file").write_text(text)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write(tmp_path / "r", OLD, "old")
    return tmp_path / "r"


def install(repository: Path) -> None:
    with open_stage(repository) as stage:
        write(stage, MODELS, "new")
        install_models(stage, repository, MODELS, STALE)


def break_moves(monkeypatch: pytest.MonkeyPatch, faults: dict[int, BaseException], after: bool) -> list[int]:
    """Have some moves, counted from 1, end in a fault, before or after they are made; the last number that was reached."""
    rename, count = Path.rename, [0]

    def move(source: Path, target: Path) -> Path:
        count[0] += 1
        fault = faults.get(count[0])
        if fault is not None and not after:
            raise fault
        moved = rename(source, target)
        if fault is not None:
            raise fault
        return moved

    monkeypatch.setattr(Path, "rename", move)
    return count


def test_models_are_replaced_added_and_taken_away(repository: Path) -> None:
    install(repository)
    assert {path.name: (path / "file").read_text() for path in repository.iterdir()} == dict.fromkeys(MODELS, "new")
    assert list(repository.parent.iterdir()) == [repository]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("move", range(1, MOVES + 1))
@pytest.mark.parametrize("fault", [KeyboardInterrupt(), SystemExit(1), OSError(28, "No space left on device")])
def test_whatever_ends_an_installation_leaves_what_was_there(
    repository: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, move: int, after: bool
) -> None:
    before = hash_tree(repository)
    count = break_moves(monkeypatch, {1 + move: fault}, after)  # the first is a probe
    with pytest.raises(ExportError if isinstance(fault, OSError) else type(fault)) as raised:
        install(repository)
    assert count[0] >= 1 + move
    assert hash_tree(repository) == before
    assert list(repository.parent.iterdir()) == [repository]
    if isinstance(fault, OSError):
        assert "No space left on device; it is as it was before" in str(raised.value)


@pytest.mark.parametrize("second", [KeyboardInterrupt(), OSError(30, "Read-only file system")])
def test_what_cannot_be_put_back_is_kept_and_the_message_says_where(
    repository: Path, monkeypatch: pytest.MonkeyPatch, second: BaseException
) -> None:
    break_moves(monkeypatch, {5: KeyboardInterrupt(), 7: second}, after=False)
    with pytest.raises((ExportError, KeyboardInterrupt)) as raised:
        install(repository)
    (attic,) = [path for path in repository.parent.iterdir() if path != repository]
    assert f"it lies in {attic}, move the folders there back by hand" in str(raised.value)
    old = [folder / model for folder in (repository, attic) for model in OLD if (folder / model).exists()]
    assert sorted((path.name, (path / "file").read_text()) for path in old) == [(model, "old") for model in OLD]
    assert any(path.parent == attic for path in old)


def test_an_interrupt_in_the_middle_of_the_last_cleaning_leaves_the_new_models(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "rmdir", interrupt)
    with pytest.raises(KeyboardInterrupt):
        install(repository)
    assert {path.name: (path / "file").read_text() for path in repository.iterdir()} == dict.fromkeys(MODELS, "new")


def test_at_no_moment_a_front_stands_before_models_of_two_exports(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, seen = Path.rename, []

    def move_and_look(source: Path, target: Path) -> Path:
        moved = rename(source, target)
        seen.append({path.name: (path / "file").read_text() for path in repository.iterdir() if path.is_dir()})
        return moved

    monkeypatch.setattr(Path, "rename", move_and_look)
    install(repository)
    assert len(seen) == 1 + MOVES  # the first is a probe
    for found in seen:
        fronts = {text for name, text in found.items() if name.endswith(("_guarded", "_stream"))}
        behind = {text for name, text in found.items() if name in MODELS[:2] + STALE[:1]}
        assert not fronts or behind <= fronts, found


def test_across_file_systems_nothing_unfinished_lies_in_the_repository(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere, rename = tmp_path_factory.mktemp("elsewhere"), Path.rename

    def move(source: Path, target: Path) -> Path:
        if source.is_relative_to(elsewhere):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", move)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    with open_stage(repository) as stage:
        assert stage.parent == elsewhere
        write(stage, MODELS, "new")
        assert sorted(path.name for path in repository.iterdir()) == OLD
        install_models(stage, repository, MODELS, STALE)
    assert {path.name: (path / "file").read_text() for path in repository.iterdir()} == dict.fromkeys(MODELS, "new")
    assert not list(elsewhere.iterdir())


def test_a_full_file_system_is_told_in_words(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object, **__: object) -> None:
        raise shutil.Error([("from", "to", "[Errno 28] No space left on device")])

    monkeypatch.setattr("diffense_export.installation._can_move", lambda *_: False)
    monkeypatch.setattr(shutil, "copytree", fill)
    before = hash_tree(repository)
    with pytest.raises(ExportError, match="No space left on device"):
        install(repository)
    assert hash_tree(repository) == before

"""Cache entries on disk: a folder that is complete and unchanged, or is made again."""

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from diffense.manifest import hash_file

META: Final = "meta.json"


def read_entry(folder: Path, recipe: dict[str, Any], progress: Callable[[str], None]) -> dict[str, Any] | None:
    """Give the facts of a cache entry, or None when it must be made (again).

    Args:
        folder: of the entry.
        recipe: what it must have been made from.
        progress: told why an entry that exists is not used.
    """
    if not (folder / META).is_file():
        return None
    try:
        meta = json.loads((folder / META).read_text())
        if meta["recipe"] != json.loads(json.dumps(recipe)):
            progress(f"{folder.name}: made by another recipe, made again")
            return None
        wrong = [name for name, digest in meta["files"].items() if hash_file(folder / name) != digest]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        progress(f"{folder.name}: cannot be read ({type(error).__name__}), made again")
        return None
    if wrong:
        progress(f"{folder.name}: {wrong[0]} is damaged, made again")
        return None
    facts: dict[str, Any] = meta["facts"]
    return facts


def write_entry(folder: Path, recipe: dict[str, Any], fill: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Make a cache entry in a temporary folder, then rename it into place.

    Args:
        folder: of the entry; an older one is replaced.
        recipe: what it is made from, JSON.
        fill: writes the files into the folder it is given and returns the facts, JSON.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        facts = fill(work)
        files = {path.name: hash_file(path) for path in sorted(work.iterdir())}
        (work / META).write_text(json.dumps({"recipe": recipe, "facts": facts, "files": files}, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        work.rename(folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return facts

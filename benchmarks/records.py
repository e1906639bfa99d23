"""The results in git: one JSON list a file, one row a cell, replaced row by row."""

import fcntl
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.settings import RESULTS
from diffense.errors import OptionError

DETECTION: Final = RESULTS / "detection.json"
VARIANTS: Final = RESULTS / "detection_variants.json"
ABLATION: Final = RESULTS / "ablation.json"
SHIFT: Final = RESULTS / "shift.json"
COPIED: Final = RESULTS / "copied.json"
SERVING: Final = RESULTS / "serving.json"
OVERLOAD: Final = RESULTS / "overload.json"
STREAM: Final = RESULTS / "stream.json"
MEMORY: Final = RESULTS / "memory.json"
REPEATS: Final = RESULTS / "repeats.json"
TIMELINE: Final = RESULTS / "timeline.json"
CASCADE: Final = RESULTS / "cascade.json"
FLOOR: Final = RESULTS / "floor.json"
PEERS_COST: Final = RESULTS / "peers_cost.json"
SESSIONS: Final = RESULTS / "session_settings.json"
KEYS: Final = ("dataset", "attack", "target", "seed", "guard_seed")
MORE_KEYS: Final = ("clean_per_class", "again", "variant", "shift", "cleared_above")  # each in one kind of file
SERVING_KEYS: Final = (
    "target", "placement", "loop", "gateway", "accelerator", "backend", "protocol", "batch", "concurrency", "shared_memory",
    "tool", "machine",
)  # fmt: skip
FLOOR_KEYS: Final = ("target", "batch", "machine")  # of session settings too
COST_KEYS: Final = ("peer", "dataset", "attack", "batch", "machine")
STREAM_KEYS: Final = ("target", "placement", "batch", "backend", "machine")
REPEATS_KEYS: Final = ("target", "repeated", "backend", "machine")
TIMELINE_KEYS: Final = ("target", "placement", "loop", "batch", "backend", "machine")
OVERLOAD_KEYS: Final = ("target", "placement", "front", "queue", "max_batch_size", "factor", "backend", "machine")
MEMORY_KEYS: Final = ("target", "placement", "loop", "backend", "machine")
GPU_KEYS: Final = ("target",)

Row = dict[str, Any]
# What only rows of one kind have -> the keys of that kind.
KINDS: Final = {
    "factor": OVERLOAD_KEYS, "processes": MEMORY_KEYS, "prediction_ratio": STREAM_KEYS,
    "repeated": REPEATS_KEYS, "steps_ms": TIMELINE_KEYS, "placement": SERVING_KEYS,
    "flops": FLOOR_KEYS, "settings_ms": FLOOR_KEYS, "forward_ms": COST_KEYS, "compute_capability": GPU_KEYS,
}  # fmt: skip


def choose_file(row: Row) -> Path:
    """Rows at the default setting make the matrix.

    Other guard seeds, fewer clean images and targets trained again (``again``, given by hand) stand in a file of their own.
    """
    usual = row["guard_seed"] == 0 and row["clean_per_class"] is None and not row.get("again")
    return DETECTION if usual else VARIANTS


def read_rows(path: Path) -> list[Row]:
    """All rows; none where the file does not exist yet.

    Raises:
        OptionError: the file is no list of rows.
    """
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
        if all(all(key in row for key in choose_keys(row)) for row in rows):
            return list(rows)
    except (ValueError, TypeError):
        pass
    raise OptionError(f"{path} is not a list of results; restore it with git checkout, or remove it to start anew")


def write_detection(row: Row) -> None:
    """Put a row of the matrix in its file in place of the one with the same key.

    Peers that the new row lacks are kept where the target is the same; each names the commit it was measured at.
    """
    write_row(row, choose_file(row), keep_peers)


def keep_peers(old: Row, new: Row) -> Row:
    """The new row, with the old one's peers that it lacks where the target is the same; older rows have no hash."""
    same = old.get("target_sha256") == new["target_sha256"]
    return new | {"peers": (old["peers"] if same else {}) | new["peers"]}


def take_new(old: Row, new: Row) -> Row:
    """Keep nothing of the old row."""
    return new


def choose_keys(row: Row) -> tuple[str, ...]:
    """Keys that every row of its kind has; a cell's where nothing tells another kind."""
    return next((keys for mark, keys in KINDS.items() if mark in row), KEYS)


def find_key(row: Row) -> tuple[Any, ...]:
    """What tells the rows of a file apart."""
    return tuple(row.get(name) for name in (*choose_keys(row), *MORE_KEYS))


def write_row(row: Row, path: Path, merge: Callable[[Row, Row], Row] = take_new) -> None:
    """Put a row in a file in place of the one with the same key, all or nothing; two runs at once lose none.

    Args:
        row: the new one.
        path: the file.
        merge: (old, new) -> what is written where there is an old one; both are of the same moment, under the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = []
        for old in read_rows(path):
            if find_key(old) == find_key(row):
                row = merge(old, row)
            else:
                rows.append(old)
        rows.append(row)
        rows.sort(key=lambda r: tuple(str(value) for value in find_key(r)))
        handle, work = tempfile.mkstemp(dir=path.parent, suffix=".partial")
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(rows, indent=1, allow_nan=False) + "\n")
        Path(work).replace(path)

"""Measurements on disk."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from diffense.bench.comparison import Comparison
from diffense.errors import OptionError


def write_comparisons(found: Sequence[Comparison], path: Path) -> None:
    """Write a JSON list, all or nothing.

    Raises:
        OptionError: the file cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps([asdict(comparison) for comparison in found], indent=1) + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error.strerror}") from None
    finally:
        partial.unlink(missing_ok=True)

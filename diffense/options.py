"""Texts of the command line -> values; a wrong one names its option."""

import math
import re
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from diffense.errors import OptionError

MAX_PIXELS: Final = 64_000_000  # of one image; a photograph of 64 megapixels is 8,000 x 8,000


def parse_size(text: str) -> tuple[int, int]:
    """``"224x224"`` or ``"224"`` -> (height, width).

    Raises:
        OptionError: not one or two positive whole numbers, or more pixels than an image may have.
    """
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise OptionError(f"--size is {text!r}, it must be HEIGHTxWIDTH, for example 224x224")
    height, width = int(parts[0]), int(parts[-1])
    if height * width > MAX_PIXELS:
        raise OptionError(f"--size is {text!r}, more than {MAX_PIXELS} pixels")
    return height, width


def parse_floats(option: str, text: str | None) -> tuple[float, ...] | None:
    """``"0.5,0.5,0.5"`` -> numbers; None stays None.

    Raises:
        OptionError: not comma-separated, finite numbers.
    """
    if text is None:
        return None
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = (math.nan,)
    if not all(math.isfinite(number) for number in numbers):
        raise OptionError(f"{option} is {text!r}, it must be numbers separated by commas")
    return numbers


def parse_counts(option: str, text: str) -> list[int]:
    """``"1,8,32"`` -> numbers.

    Raises:
        OptionError: not comma-separated, positive whole numbers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise OptionError(f"{option} is {text!r}, it must be numbers above 0 separated by commas")
    return [int(part) for part in parts]


def parse_names(text: str | None) -> list[str] | None:
    """``"a,b"`` -> names; None stays None."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def group_names(pattern: str, names: Sequence[str]) -> NDArray[np.int64]:
    """Number names by a part of each: (N,), the same for those that agree in it.

    Args:
        pattern: regular expression, searched in each name; its first group, or all that it matches, is the part.
        names: of the images.

    Raises:
        OptionError: it is no regular expression, or a name has no such part.
    """
    try:
        found = [re.search(pattern, name) for name in names]
    except (re.error, OverflowError, RecursionError) as error:
        raise OptionError(f"--groups {pattern!r} is no regular expression ({error})") from error
    parts = [match and (match[1] if match.re.groups else match[0]) for match in found]
    if None in parts:
        raise OptionError(f"--groups {pattern!r} is not found in {names[parts.index(None)]!r}; every image needs a group")
    return np.unique(np.array(parts, np.str_), return_inverse=True)[1].astype(np.int64)

"""What stands in the place of a production answer that the policy ``abstain`` withholds."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def replace_outputs(array: NDArray[Any], hidden: NDArray[np.bool_], *, even: bool = False) -> NDArray[Any]:
    """Replace the rows of one production output by values that say nothing.

    Args:
        array: (N, ...) of any dtype.
        hidden: (N,) which rows.
        even: the output is a softmax: its rows get the same probability for every class.

    Returns:
        The same array when no row is hidden, else a copy: 0 for real numbers (equal logits favour no class; NaN is not
        JSON), -1 for signed integers, the largest value for unsigned ones, False, or an empty string.
    """
    if not hidden.any():
        return array
    if array.dtype.kind == "f":
        value: Any = array.dtype.type(1 / array[0].size if even else 0)
    elif array.dtype.kind == "i":
        value = -1
    elif array.dtype.kind == "u":
        value = np.iinfo(array.dtype).max
    else:
        value = False if array.dtype.kind == "b" else b""
    replaced = array.copy()
    replaced[hidden] = value
    return replaced

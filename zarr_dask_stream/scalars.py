"""What counts as a number where a caller gives one: Python's, NumPy's, and nothing that merely looks like one."""

from __future__ import annotations

import math
import numbers
from operator import index
from typing import Any

__all__ = ["as_real", "as_whole"]


def as_whole(value: Any) -> int | None:
    """Return a whole number as an int, None for what is none: booleans, text, fractions, arrays, classes.

    Examples
    --------
    >>> import numpy as np
    >>> as_whole(3), as_whole(np.int64(3)), as_whole(True), as_whole(3.0), as_whole(np.array([1, 2])), as_whole(int)
    (3, 3, None, None, None, None)
    """
    if isinstance(value, bool):
        return None
    try:
        return index(value)
    except TypeError:  # arrays and classes have the method, and refuse
        return None


def as_real(value: Any) -> float | None:
    """Return a number as a float, None for what is none: booleans, text, NaN, arrays, what no float can hold.

    Examples
    --------
    >>> import numpy as np
    >>> as_real(3), as_real(np.float32(0.5)), as_real("3"), as_real(float("nan")), as_real(True)
    (3.0, 0.5, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number

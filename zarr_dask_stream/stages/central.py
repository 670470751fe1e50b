"""Sums of powers of deviations from a mean: made block by block, joined group by group."""

from __future__ import annotations

from typing import Any

import numpy as np

from zarr_dask_stream.stages.values import Values, valid_sum, wide

__all__ = ["Central", "central", "central_along", "joined"]

_BLOCK = 8192  # elements: a block in double precision (64 KiB) stays in the cache between its passes


# Count, mean and the sums of the powers of the deviations from it: the second, or the second to fourth. A plain tuple,
# because a checkpoint keeps partials as JSON.
Central = tuple[Any, Any, tuple[Any, ...]]


def _about(count: Any, powers: tuple[Any, ...], d: Any) -> tuple[Any, ...]:
    """Take sums of powers of deviations from a mean over to a centre that lies `d` below that mean."""
    square = d * d
    m2 = powers[0]
    if len(powers) == 1:
        return (m2 + count * square,)
    m3, m4 = powers[1:]
    return (
        m2 + count * square,
        m3 + d * (3 * m2 + count * square),
        m4 + d * (4 * m3 + d * (6 * m2 + count * square)),
    )


def joined(left: Central, right: Central) -> Central:
    """Join what is known of two groups."""
    (our_count, our_mean, our_powers), (their_count, their_mean, their_powers) = left, right
    n = our_count + their_count
    here, there = our_count / np.maximum(n, 1), their_count / np.maximum(n, 1)
    delta = their_mean - our_mean
    ours = _about(our_count, our_powers, -delta * there)
    theirs = _about(their_count, their_powers, delta * here)
    powers = tuple(a + b for a, b in zip(ours, theirs, strict=True))
    # Weighing is symmetrical, but rounds: a constant has to keep its mean, and with it a variance of 0.
    mean = np.where(delta == 0, our_mean, our_mean * here + their_mean * there)[()]
    return n, mean, powers


def central(flat: Values, order: int) -> Central:
    """Centre block by block: each is read from memory once and stays in the cache."""
    dtype = wide(flat.dtype)
    if flat.size == 0:
        return 0, dtype.type(0), (dtype.type(0),) * (order - 1)
    scratch, squares = np.empty((2, min(flat.size, _BLOCK)), dtype)
    starts = range(0, flat.size, _BLOCK)
    mean = np.empty(len(starts), dtype)
    powers = np.empty((order - 1, len(starts)), dtype)
    for i, start in enumerate(starts):
        block = flat[start : start + _BLOCK]
        d = scratch[: block.size]
        np.copyto(d, block)
        mean[i] = middle = d.sum() / block.size
        d -= middle
        powers[0, i] = d @ d
        if order > 2:
            square = np.multiply(d, d, out=squares[: block.size])
            powers[1, i] = square @ d
            powers[2, i] = square @ square
    if len(starts) == 1:
        return flat.size, mean[0], tuple(powers[:, 0])
    count = np.full(len(starts), _BLOCK, dtype)
    count[-1] = flat.size - starts[-1]
    middle = mean[0] + count @ (mean - mean[0]) / flat.size
    if not np.isfinite(middle):
        middle = count @ mean / flat.size
    return flat.size, middle, tuple(p.sum() for p in _about(count, tuple(powers), mean - middle))


def central_along(values: Values, axes: tuple[int, ...], order: int, *, skipna: bool) -> Central:
    """Centre each line along `axes` on its own mean; `order` is the highest power that is summed."""
    n, total, nans = valid_sum(values, axes, skipna=skipna, keepdims=True)
    mean = total / np.maximum(n, 1)
    d = np.subtract(values, mean, dtype=wide(values.dtype))
    if nans is not None:
        d[nans] = 0
        n = np.squeeze(n, axes)
    if order == 2:
        d *= d
        powers = [d.sum(axis=axes)]
    else:
        square = d * d
        powers = [square.sum(axis=axes), (square * d).sum(axis=axes), (square * square).sum(axis=axes)]
    return n, np.squeeze(mean, axes), tuple(powers)

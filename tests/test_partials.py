"""Partial results as JSON: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import zarr_dask_stream as zds
from zarr_dask_stream.engine.partials import decode_value, encode_value

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=12,
)


@given(PLAIN)
def test_plain_values_come_back(value: Any) -> None:
    assert decode_value(json.loads(json.dumps(encode_value(value)))) == value


@pytest.mark.parametrize(
    "value",
    [
        np.float32(1.1),
        np.arange(6, dtype=">i2").reshape(2, 3),
        np.array([1 + 2j]),
        np.datetime64("2020-01-01"),
        np.zeros((0, 3)),
        np.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")]),
        np.bool_(True),
    ],
)
def test_numpy_values_come_back(value: Any) -> None:
    again = decode_value(json.loads(json.dumps(encode_value(value))))
    assert type(again) is type(value)
    assert np.asarray(again).dtype == np.asarray(value).dtype
    np.testing.assert_array_equal(again, value)


def test_odd_floats_come_back() -> None:
    again = decode_value(json.loads(json.dumps(encode_value([math.inf, -math.inf, math.nan, -0.0]))))
    assert again[:2] == [math.inf, -math.inf]
    assert math.isnan(again[2])
    assert math.copysign(1, again[3]) == -1


@pytest.mark.parametrize("value", [object(), lambda: 1, np.array([None])])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(zds.UsageError, match="checkpoint"):
        encode_value(value)


@pytest.mark.parametrize("value", [{"a": 1, "b": 2}, {"pickle": "gASV"}, {"array": ["|O", [1], "AAAA"]}, {"int": "x"}])
def test_hostile_values_are_refused(value: Any) -> None:
    with pytest.raises(zds.StoreError):
        decode_value(value)

"""Regions and conditions as text."""

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarr_dask_stream.cli.expression import IndexExpression, parse_region_text
from zarr_dask_stream.errors import UsageError


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("0:10,5,...", (slice(0, 10), 5, ...)),
        ("[2:4, :]", (slice(2, 4), slice(None))),
        ("-3:", (slice(-3, None),)),
        (" ... , +1 ", (..., 1)),
        ("::2", (slice(None, None, 2),)),
        ("7,", (7,)),
    ],
)
def test_regions_read_as_numpy_writes_them(text: str, region: object) -> None:
    assert parse_region_text(text) == region


@pytest.mark.parametrize("text", ["", "a", "1 2", "1:2:3:4", "0x3", "1,,2", "1.5", "None", "x for x in y", "٣"])
def test_what_is_no_region_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="region"):
        parse_region_text(text)


@pytest.mark.parametrize(
    ("text", "index", "wanted"),
    [
        ("i0 < 3", (2, 0), True),
        ("i0 % 2 == 0 and i1 // 3 > 1", (4, 6), True),
        ("not (i0 == 1 or index[-1] == 2)", (0, 2), False),
        ("1 < i0 <= 3 != i1", (3, 3), False),
        ("i0 in (1, 5, 9)", (5, 0), True),
        ("index[0] not in [1, -2]", (1, 0), False),
        ("-i0 + 3 * i1", (3, 1), False),
        ("i1", (0, 7), True),
    ],
)
def test_conditions(text: str, index: tuple[int, ...], wanted: bool) -> None:
    where = IndexExpression(text)
    where.check(2)
    assert where(index) is wanted
    assert pickle.loads(pickle.dumps(where)) == where


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "(lambda: 1)()",
        "i0.real",
        "index.__class__",
        "index",
        "index[i0]",
        "index[0:1]",
        "[i for i in index]",
        "open",
        "i0 ** 9 ** 9",
        "i0 << 99999",
        "i0 / 2",
        "'text'",
        "True",
        "1.5",
        "i0 is 1",
        "i0 in index",
        "i0 if i1 else 2",
        "(x := 3)",
        "f'{i0}'",
        "i0 <",
        "i0; i1",
        "\0",
        "(" * 400 + "1" + ")" * 400,
        "-" * 5000 + "1",
        "await i0",
        "",
    ],
)
def test_everything_else_is_refused_and_nothing_runs(text: str) -> None:
    with pytest.raises(UsageError, match="where"):
        IndexExpression(text)


@pytest.mark.parametrize("text", ["i2 == 0", "index[-3] == 0", "i99 > 1"])
def test_an_axis_that_the_array_lacks_is_named(text: str) -> None:
    with pytest.raises(UsageError, match="the array has 2"):
        IndexExpression(text).check(2)


def test_a_condition_without_axes_goes_with_every_array() -> None:
    IndexExpression("1 < 2").check(0)


OPERATORS = ["+", "-", "*", "<", "<=", "==", "!=", ">", ">=", "and", "or"]


@given(
    st.recursive(
        st.sampled_from(["i0", "i1", "index[0]", "3", "7"]),
        lambda inner: st.tuples(inner, st.sampled_from(OPERATORS), inner).map(
            lambda parts: f"({parts[0]} {parts[1]} {parts[2]})"
        ),
        max_leaves=6,
    ),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
)
def test_conditions_mean_what_python_means(text: str, index: tuple[int, int]) -> None:
    expected = bool(eval(text, {"__builtins__": {}}, {"i0": index[0], "i1": index[1], "index": index}))
    assert IndexExpression(text)(index) is expected

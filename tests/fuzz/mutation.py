"""Documents and bytes that are nearly right: taken from real ones, and then changed in a few places."""

from __future__ import annotations

import copy
import json
import os
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from zarr_dask_stream.errors import ZdsError

#: Inputs for each test. By hand, many more: ZDS_FUZZ=3000 pytest --timeout 0 tests/fuzz
COUNT = int(os.environ.get("ZDS_FUZZ", "15"))
fuzzed = settings(
    max_examples=COUNT,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)

#: Words that mean something in the documents read here.
WORDS = (
    "", "..", "/", "\0", "c/0", "zarr.json", "array", "group", "regular", "rectangular", "default", "v2", ".", "bytes",
    "little", "big", "zstd", "gzip", "blosc", "crc32c", "transpose", "sharding_indexed", "vlen-utf8", "vlen-bytes",
    "numcodecs.delta", "numcodecs.pickle", "pickle", "delta", "zlib", "lzma", "shuffle", "start", "end", "NaN",
    "Infinity", "bool", "int8", "uint64", "float16", "float32", "complex64", "string", "r8", "r99999999",
    "numpy.datetime64", "<f4", ">i2", "|b1", "|S5", "|S2147483647", "<U9", "<U2147483647", "<M8[ns]", "<M8[99999Y]",
    "|O", "|V3", "|V0", "O", "bzip3", "1", "-1", "0x10", "x" * 5000,
)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from(NUMBERS),
    st.integers(-4, 40),
    st.floats(),
    st.sampled_from(WORDS),
    st.text(max_size=8),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(WORDS) | st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _places(item, (*path, key))
    elif isinstance(value, list):
        for at, item in enumerate(value):
            yield from _places(item, (*path, at))


def _parent(document: Any, path: tuple[Any, ...]) -> Any:
    for step in path[:-1]:
        document = document[step]
    return document


@st.composite
def changed(draw: st.DrawFn, document: Any, *, most: int = 3) -> Any:
    """Draw a JSON document like `document`, with up to `most` changes."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(list(_places(document))))
        if not path:
            if draw(st.integers(0, 20)) == 0:
                return draw(values)
            continue
        parent, last = _parent(document, path), path[-1]
        kind = draw(st.sampled_from(("value", "value", "value", "drop", "again", "nest", "swap")))
        if kind == "value":
            parent[last] = draw(values)
        elif kind == "drop":
            del parent[last]
        elif kind == "again" and isinstance(parent, list):
            parent.extend([parent[last]] * draw(st.integers(1, 40)))
        elif kind == "nest":
            for _ in range(draw(st.sampled_from((1, 2, 40)))):
                parent[last] = [parent[last]] if draw(st.booleans()) else {"configuration": parent[last]}
        else:
            other = draw(st.sampled_from(list(_places(document))))
            if other:
                parent[last] = copy.deepcopy(_parent(document, other)[other[-1]])
    return document


@st.composite
def spliced(draw: st.DrawFn, raw: bytes, *, most: int = 4) -> bytes:
    """Draw bytes like `raw`: some overwritten, cut out, doubled, put in, or cut off at the end."""
    out = bytearray(raw)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, len(out)))
        length = draw(st.integers(0, 9))
        kind = draw(st.sampled_from(("over", "over", "flip", "cut", "double", "put", "end")))
        if kind == "over":
            out[at : at + length] = draw(st.binary(min_size=length, max_size=length))[: len(out) - at]
        elif kind == "flip" and at < len(out):
            out[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del out[at : at + length]
        elif kind == "double":
            out[at:at] = out[at : at + length]
        elif kind == "put":
            out[at:at] = draw(st.binary(max_size=9) | st.sampled_from((b"\xff" * 8, b"\x00" * 8, b"\xff\xff\xff\x7f")))
        else:
            del out[at:]
    return bytes(out)


def as_json(document: Any) -> bytes:
    """Return a document as the bytes of a store; what JSON has no word for is written as Python does."""
    return json.dumps(document).encode()


@contextmanager
def bounded(nbytes: int) -> Iterator[None]:
    """Fail where the block holds more than so many bytes at once, beyond what was there before."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        yield
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert peak <= nbytes, f"{peak:,} bytes at once"


@contextmanager
def fine_or_refused(nbytes: int) -> Iterator[None]:
    """Let the block go well, or fail with a sentence of ours; anything else is a failure, and so is much memory."""
    said = "fine"
    try:
        with bounded(nbytes):
            yield
    except ZdsError as error:
        said = str(error)
    assert 0 < len(said) < 2000

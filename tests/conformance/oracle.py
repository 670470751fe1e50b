"""What the conformance tests share: sample data of any dtype, reading an array whole, and comparing to the bit."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from zarr_dask_stream.source.array import ArraySpec, open_array
from zarr_dask_stream.source.codec import compile_chain, compile_fallback
from zarr_dask_stream.source.reader import read_chunks

Array = npt.NDArray[Any]

PLAIN = ["bool", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "c16"]
TIMES = ["M8[s]", "M8[ns]", "M8[D]", "M8[10us]", "m8[ms]", "m8[D]"]
FIXED_TEXT = ["S5", "U3", "V6"]


def sample(dtype: Any, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Return data of `dtype` with all the awkward values it has."""
    dtype = np.dtype(dtype)
    rng = np.random.default_rng(seed)
    count = int(np.prod(shape))
    if dtype.kind == "b":
        flat: Array = rng.integers(0, 2, count).astype(bool)
    elif dtype.kind in "SU":
        words = np.array(["", "a", "xyz", "é∂", "long text"])
        flat = rng.choice(words if dtype.kind == "U" else words[:3], count).astype(dtype)
    else:
        flat = np.frombuffer(rng.bytes(count * dtype.itemsize), dtype).copy()
    return flat.reshape(shape)


def smooth(dtype: Any, shape: tuple[int, ...]) -> Array:
    """Return data that compress well and survive rounding filters."""
    return (np.arange(int(np.prod(shape))) % 50).astype(dtype).reshape(shape)


def assemble(spec: ArraySpec, **options: Any) -> Array:
    """Read all chunks and put them together; any failure is the test's."""
    out = np.empty(spec.shape, spec.dtype)
    seen = []
    for read in read_chunks(spec, range(len(spec.grid)), **options):
        assert read.error is None, read.error
        assert read.data is not None
        assert read.data.dtype == spec.dtype
        assert read.data.flags.writeable
        out[spec.grid.region(read.number)] = read.data
        seen.append(read.number)
    assert sorted(seen) == list(range(len(spec.grid)))
    return out


def expected(array: Any) -> Array:
    """Return what zarr-python reads, in native byte order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data: Array = np.asarray(array[...])
    return data if data.dtype.kind == "T" else data.astype(data.dtype.newbyteorder("="))


def same_bits(got: Array, want: Array) -> None:
    """Fail unless both are equal: dtype, shape and every bit (NaN payloads and signed zeros included)."""
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    if got.dtype.kind == "T" or got.dtype.hasobject:
        assert got.tolist() == want.tolist()
    else:
        assert got.tobytes() == want.tobytes()


def check(source: Any, path: str = "", *, compiled: bool | None = None) -> ArraySpec:
    """Compare one array with what zarr-python reads; `compiled` also says which decoder must have been used."""
    spec = open_array(source, path=path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        array = source if isinstance(source, zarr.Array) and not path else zarr.open(source, path=path, mode="r")
    same_bits(assemble(spec), expected(array))
    if compiled is not None:
        assert is_compiled(spec) is compiled
    return spec


def is_compiled(spec: ArraySpec) -> bool:
    """Whether the chain of `spec` is decoded without zarr-python."""
    inner = compile_chain(spec).__closure__
    assert inner is not None
    return all("_fallback" not in cell.cell_contents.__qualname__ for cell in inner)


def compare_paths(spec: ArraySpec, raw: bytes) -> None:
    """Decode the same bytes compiled and through zarr-python; both must agree."""
    same_bits(np.ascontiguousarray(compile_chain(spec)(raw)), np.ascontiguousarray(compile_fallback(spec)(raw)))

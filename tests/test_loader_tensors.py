"""Batches as tensors of PyTorch and arrays of JAX: the same numbers, in the same memory, or a clear refusal."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

import zarr_dask_stream as zds
from zarr_dask_stream.stages.samples import aligned_empty
from zarr_dask_stream.tensors import JaxBatches, torch_batches

NUMBERS = ["?", "i1", "i2", "i4", "u1", "u2", "u4", "f2", "f4", "c8"]
WIDE = ["i8", "u8", "f8", "c16"]
NONE = ["M8[s]", "S3", [("a", "i2")]]


def part(name: str) -> Any:
    """Import an optional package, or say that it is missing: under CI, whatever is asked for is there."""
    if find_spec(name) is None:
        reason = f"{name} is not installed: pip install -c constraints.txt {name}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return import_module(name)


@pytest.fixture
def torch() -> Any:
    return part("torch")


@pytest.fixture
def jax() -> Any:
    return part("jax")


def stream(dtype: Any = "f4", shape: tuple[int, ...] = (20, 3), **options: Any) -> zds.ChunkStream:
    array = zarr.create_array({}, shape=shape, chunks=(4, *shape[1:]), dtype=dtype, zarr_format=2)
    if np.dtype(dtype).kind in "biufc":
        array[:] = (np.arange(np.prod(shape)).reshape(shape) % 100).astype(dtype)
    return zds.stream_chunks(array, concurrency=1, **options)


class Recorder:
    """A loader that keeps the batches that it gave, to be compared with what became of them."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def passes(self) -> int | None:
        return 1

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


# -- PyTorch ------------------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize("dtype", NUMBERS + WIDE)
def test_tensors_hold_the_same_numbers(torch: Any, dtype: str) -> None:
    def loader() -> zds.Loader:
        return zds.Loader(stream(dtype), 6, 10, seed=1)

    tensors = list(loader().torch())
    for tensor, batch in zip(tensors, loader(), strict=True):
        assert isinstance(tensor, torch.Tensor)
        assert tensor.is_contiguous()
        np.testing.assert_array_equal(tensor.numpy(), batch)


@pytest.mark.torch
def test_tensors_lie_in_the_memory_of_the_batches(torch: Any) -> None:
    batches = list(zds.Loader((stream(), stream("i8", (20,))), 6, 10, seed=1))
    for (x, y), (a, b) in zip(torch_batches(Recorder(batches)), batches, strict=True):
        assert (x.data_ptr(), y.data_ptr()) == (a.ctypes.data, b.ctypes.data)
    named = [{"x": a, "y": b} for a, b in batches]
    assert [sorted(batch) for batch in torch_batches(Recorder(named))] == [["x", "y"]] * 4


@pytest.mark.torch
def test_a_data_loader_takes_whole_batches(torch: Any) -> None:
    loader = zds.Loader(stream(), 6, 10, seed=1, epochs=2)
    dataset = loader.torch()
    assert isinstance(dataset, torch.utils.data.IterableDataset)
    rows = list(torch.utils.data.DataLoader(dataset, batch_size=None))
    expected = list(zds.Loader(stream(), 6, 10, seed=1, epochs=2))
    assert len(dataset) == len(rows) == len(expected) == 2 * len(loader)
    for row, batch in zip(rows, expected, strict=True):
        np.testing.assert_array_equal(row.numpy(), batch)
    assert loader.epoch == 2


@pytest.mark.torch
def test_a_data_set_shares_the_place_of_its_loader(torch: Any) -> None:
    loader = zds.Loader(stream(), 3, 10, seed=1)
    dataset = loader.torch()
    batches = iter(dataset)
    next(batches)
    state = json.loads(json.dumps(dataset.state_dict()))
    assert state == loader.state_dict()
    rest = [batch.tolist() for batch in batches]
    again = zds.Loader(stream(), 3, 10, seed=9).torch()
    again.load_state_dict(state)
    assert len(again) == 7
    assert [batch.tolist() for batch in again] == rest
    with pytest.raises(TypeError, match="no length"):
        len(zds.Loader(stream(), 3, epochs=None).torch())


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:.*fork")  # Python and JAX warn of it too
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_are_refused_and_nothing_is_forked(
    torch: Any, method: str, tmp_path: Path, client: Any
) -> None:
    """A live client, in a child: the child ends with a sentence, the parent goes on."""
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=(20, 3), chunks=(4, 3), dtype="f4")
    array[:] = 1
    dataset = zds.Loader(zds.stream_chunks(str(tmp_path / "a.zarr")), 6).torch()
    assert len(list(dataset)) == 4
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=1, multiprocessing_context=multiprocessing.get_context(method)
    )
    with pytest.raises(zds.UsageError, match="use num_workers=0"):
        list(loader)
    assert len(list(dataset)) == 4


@pytest.mark.torch
def test_a_data_set_travels(torch: Any, tmp_path: Path) -> None:
    array = zarr.create_array(str(tmp_path / "a.zarr"), shape=(20, 3), chunks=(4, 3), dtype="f4")
    array[:] = np.arange(60).reshape(20, 3)
    dataset = zds.Loader(zds.stream_chunks(str(tmp_path / "a.zarr"), concurrency=1), 6, 9, seed=1).torch()
    there = pickle.loads(pickle.dumps(dataset))
    assert type(there) is type(dataset)
    assert [batch.tolist() for batch in there] == [batch.tolist() for batch in dataset]


@pytest.mark.torch
@pytest.mark.parametrize("dtype", NONE, ids=str)
def test_what_pytorch_has_no_tensors_of_is_refused_before_anything_is_read(torch: Any, dtype: Any) -> None:
    with pytest.raises(zds.UsageError, match="PyTorch has no tensors of"):
        zds.Loader(stream(dtype), 6).torch()
    mapped = zds.Loader(stream().map(lambda chunk: chunk.data.astype(dtype)), 6).torch()
    with pytest.raises(zds.UsageError, match="PyTorch has no tensors of"):
        next(iter(mapped))


# -- JAX ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", NUMBERS)
def test_jax_arrays_hold_the_same_numbers(jax: Any, dtype: str) -> None:
    def loader() -> zds.Loader:
        return zds.Loader(stream(dtype), 6, 10, seed=1)

    for array, batch in zip(loader().jax(), loader(), strict=True):
        assert isinstance(array, jax.Array)
        assert array.dtype == batch.dtype
        np.testing.assert_array_equal(np.asarray(array), batch)


def test_jax_arrays_lie_in_the_memory_of_the_batches(jax: Any) -> None:
    batches = list(zds.Loader((stream(), stream("i4", (20,))), 6, 10, seed=1))
    for (x, y), (a, b) in zip(JaxBatches(Recorder(batches)), batches, strict=True):
        assert (x.unsafe_buffer_pointer(), y.unsafe_buffer_pointer()) == (a.ctypes.data, b.ctypes.data)
    across = list(zds.Loader(stream("f4", (20, 30)).rechunk(-1), 7, axis=1))
    for array, batch in zip(JaxBatches(Recorder(across)), across, strict=True):
        assert array.unsafe_buffer_pointer() == batch.ctypes.data
    named = [{"x": a, "y": b} for a, b in batches]
    assert [sorted(batch) for batch in JaxBatches(Recorder(named))] == [["x", "y"]] * 4


@pytest.mark.parametrize("dtype", WIDE)
def test_jax_narrows_nothing_in_silence(jax: Any, dtype: str) -> None:
    with pytest.raises(zds.UsageError, match=r'jax.config.update\("jax_enable_x64", True\)'):
        zds.Loader(stream(dtype), 6).jax()
    mapped = zds.Loader(stream().map(lambda chunk: chunk.data.astype(dtype)), 6).jax()
    with pytest.raises(zds.UsageError, match="JAX would turn"):
        next(iter(mapped))
    jax.config.update("jax_enable_x64", True)
    try:
        for array, batch in zip(zds.Loader(stream(dtype), 6).jax(), zds.Loader(stream(dtype), 6), strict=True):
            assert array.dtype == batch.dtype
            np.testing.assert_array_equal(np.asarray(array), batch)
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.parametrize("dtype", NONE, ids=str)
def test_what_jax_has_no_arrays_of_is_refused_before_anything_is_read(jax: Any, dtype: Any) -> None:
    with pytest.raises(zds.UsageError, match="JAX has no arrays of"):
        zds.Loader(stream(dtype), 6).jax()


def test_the_memory_is_what_jax_takes_over(jax: Any) -> None:
    """The reason for the alignment: a batch that begins elsewhere would be copied."""
    for offset in (0, 16):
        array = aligned_empty((100,), np.dtype("f4"))[offset // 4 :]
        view = jax.dlpack.from_dlpack(array)
        assert (view.unsafe_buffer_pointer() == array.ctypes.data) is (offset == 0)


# -- neither ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "method"), [("torch", "torch"), ("jax", "jax")])
def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, module: str, method: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(zds.UsageError, match=rf"pip install 'zarr-dask-stream\[{module}\]'"):
        getattr(zds.Loader(stream(), 6), method)()


def test_neither_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, zarr, zarr_dask_stream as zds\n"
        "array = zarr.create_array({}, shape=(8,), chunks=(4,), dtype='f4')\n"
        "assert len(list(zds.Loader(zds.stream_chunks(array, concurrency=1), 3))) == 3\n"
        "print(sorted({'torch', 'jax'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

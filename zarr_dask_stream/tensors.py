"""Batches of a loader as tensors of PyTorch and arrays of JAX, in the memory of the NumPy batches.

Neither is imported before somebody asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any, Protocol

import numpy as np

from zarr_dask_stream.errors import UsageError

__all__ = ["JaxBatches", "torch_batches"]

_CONVERT = 'Convert in a .map(...) of the stream, as in .map(lambda chunk: chunk.data.astype("f4"))'


class _Source(Protocol):
    """What a loader is to this module."""

    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...
    def passes(self) -> int | None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def _each(batch: Any, convert: Callable[[Any], Any]) -> Any:
    if isinstance(batch, dict):
        return {name: convert(array) for name, array in batch.items()}
    return tuple(map(convert, batch)) if isinstance(batch, tuple) else convert(batch)


def _import(name: str, said: str, method: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        extra = name.partition(".")[0]
        raise UsageError(f"{method} needs {said}: pip install 'zarr-dask-stream[{extra}]' ({error})") from error


# -- PyTorch ------------------------------------------------------------------------------------------


def torch_batches(loader: _Source, dtypes: Iterable[np.dtype[Any]] = ()) -> Any:
    """Return the batches of a loader as an ``IterableDataset``; see ``Loader.torch``."""
    torch = _import("torch", "PyTorch", "loader.torch()")
    for dtype in dtypes:
        _tensor(torch, np.empty(0, dtype))
    return _dataset_class()(loader)


@functools.cache
def _dataset_class() -> type[Any]:
    torch, data = import_module("torch"), import_module("torch.utils.data")

    class TorchBatches(data.IterableDataset):  # type: ignore[name-defined, misc]  # known only where PyTorch is
        """The batches of a loader as tensors; made by ``Loader.torch()``."""

        def __init__(self, loader: _Source) -> None:
            super().__init__()
            self.loader = loader

        def __iter__(self) -> Iterator[Any]:
            if data.get_worker_info() is not None:
                # Forked, it would share the connections of a client that lives in another process.
                raise UsageError(
                    "a worker process of a DataLoader can't use the Dask client of its parent: use num_workers=0. "
                    "The reading is parallel already, and work on samples goes to the Dask workers with .map(...) "
                    "on the stream"
                )
            for batch in self.loader:
                yield _each(batch, functools.partial(_tensor, torch))

        def __len__(self) -> int:
            passes = self.loader.passes()
            if passes is None:
                raise TypeError("with epochs=None there is no end, and no length; len(loader) is that of one epoch")
            return passes * len(self.loader)

        def state_dict(self) -> dict[str, Any]:
            return self.loader.state_dict()

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            self.loader.load_state_dict(state)

        def __reduce__(self) -> Any:
            return torch_batches, (self.loader,)

    return TorchBatches


def _tensor(torch: Any, array: Any) -> Any:
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise UsageError(f"PyTorch has no tensors of {array.dtype}: {error}. {_CONVERT}") from error


# -- JAX ----------------------------------------------------------------------------------------------


class JaxBatches:
    """The batches of a loader as JAX arrays; made by ``Loader.jax()``."""

    def __init__(self, loader: _Source, dtypes: Iterable[np.dtype[Any]] = ()) -> None:
        self.loader = loader
        jax = _import("jax", "JAX", "loader.jax()")
        for dtype in dtypes:
            _check_jax_dtype(jax, dtype)

    def __iter__(self) -> Iterator[Any]:
        jax = import_module("jax")
        for batch in self.loader:
            yield _each(batch, functools.partial(_jax_array, jax))


def _check_jax_dtype(jax: Any, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biufc" or not dtype.isnative or dtype.itemsize > 16:
        raise UsageError(f"JAX has no arrays of {dtype}. {_CONVERT}")
    kept = jax.dtypes.canonicalize_dtype(dtype)
    if kept != dtype:
        raise UsageError(
            f"JAX would turn {dtype} into {kept}: allow 64 bits with "
            f'jax.config.update("jax_enable_x64", True), or narrow it yourself. {_CONVERT}'
        )


def _jax_array(jax: Any, array: Any) -> Any:
    _check_jax_dtype(jax, array.dtype)
    return jax.dlpack.from_dlpack(array)

"""How other tools load shuffled batches for training; imported by the loading processes, so it needs PyTorch."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import numpy as np
import xarray
import xbatcher
import zarr

# By name, because the checks of this project run where PyTorch is not installed.
_torch, _data = import_module("torch"), import_module("torch.utils.data")
_IterableDataset: Any = _data.IterableDataset


class Chunks(_IterableDataset):  # type: ignore[misc]  # its type is not known here
    """Whole batches: chunks in shuffled order through a buffer of samples, each loading process its share of them."""

    def __init__(self, url: str, length: int, batch: int, buffer: int) -> None:
        self._url, self._length, self._batch, self._buffer = url, length, batch, buffer
        self._epoch = 0

    def __iter__(self) -> Iterator[Any]:
        array = zarr.open(self._url, mode="r")
        assert isinstance(array, zarr.Array)
        info = _data.get_worker_info()
        part, parts = (0, 1) if info is None else (info.id, info.num_workers)
        rng = np.random.default_rng([self._epoch, part])
        self._epoch += 1
        chunks = np.random.default_rng(self._epoch).permutation(array.shape[0] // self._length)
        held: list[np.ndarray[Any, Any]] = []
        count = 0
        for chunk in chunks[part::parts]:
            held.append(np.asarray(array[chunk * self._length : (chunk + 1) * self._length]))
            count += self._length
            if count >= self._buffer + self._batch:
                mixed = rng.permutation(np.concatenate(held))
                while len(mixed) > self._buffer:
                    yield _torch.from_numpy(mixed[: self._batch])
                    mixed = mixed[self._batch :]
                held, count = [mixed], len(mixed)
        if held:
            mixed = rng.permutation(np.concatenate(held))
            for start in range(0, len(mixed), self._batch):
                yield _torch.from_numpy(mixed[start : start + self._batch])


class Samples:
    """Sample by sample: what people write first."""

    def __init__(self, url: str, count: int) -> None:
        self._url, self._count = url, count
        self._array: Any = None

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Any:
        if self._array is None:
            self._array = zarr.open(self._url, mode="r")
        return _torch.from_numpy(np.asarray(self._array[number]))


def _loading(dataset: Any, workers: int, **options: Any) -> Any:
    # Spawned once, and kept for all epochs: a fork would take a Dask client's threads along.
    return _data.DataLoader(
        dataset,
        num_workers=workers,
        multiprocessing_context="spawn",
        persistent_workers=True,
        prefetch_factor=4,
        **options,
    )


def chunkwise(url: str, length: int, batch: int, buffer: int, workers: int) -> Any:
    """Batches out of whole chunks, mixed in a buffer."""
    return _loading(Chunks(url, length, batch, buffer), workers, batch_size=None)


def samplewise(url: str, count: int, batch: int, workers: int) -> Any:
    """Batches of samples that are read one by one in random order."""
    return _loading(Samples(url, count), workers, batch_size=batch, shuffle=True)


def windows(url: str, batch: int, workers: int) -> Any:
    """xbatcher's batches: neighbouring samples, the batches in random order."""
    group, _, name = url.rpartition("/")
    array = xarray.open_zarr(group, chunks=None, consolidated=False)[name]
    generator = xbatcher.BatchGenerator(array, input_dims={"y": batch, "x": array.sizes["x"]})
    dataset = import_module("xbatcher.loaders.torch").MapDataset(generator, transform=_as_tensor)
    return _loading(dataset, workers, batch_size=None, shuffle=True)


def _as_tensor(array: xarray.DataArray) -> Any:
    return _torch.from_numpy(array.to_numpy())


def total(batches: Any) -> float:
    """Look at one number of each sample."""
    return float(sum(float(batch[:, 0].sum()) for batch in batches))

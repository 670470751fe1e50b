"""Batches of samples for training: shuffled in bounded memory, the same for the same seed, to be gone on with.

An epoch is arithmetic on the seed: which item comes when (``source/shuffle.py``), which sample of it, and which
sample leaves the buffer. So a place in it is two numbers, and what a buffer held there can be worked out.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping
from typing import Any, Self, cast

import numpy as np

from zarr_dask_stream.engine.cluster import memory_budget
from zarr_dask_stream.errors import UsageError
from zarr_dask_stream.sampling import Samples
from zarr_dask_stream.scalars import as_whole
from zarr_dask_stream.source.chunk import Chunk
from zarr_dask_stream.source.shuffle import Slot, key_of, shuffled
from zarr_dask_stream.stages.samples import Mixer
from zarr_dask_stream.stream import ChunkStream
from zarr_dask_stream.tensors import JaxBatches, torch_batches
from zarr_dask_stream.watch.report import Report

__all__ = ["Loader"]

_VERSION = 1
# What a key is for: the order of the items, that of the samples in one, and the buffer.
_ITEMS, _INSIDE, _BUFFER = 1, 2, 3


class Loader:
    """Batches of samples along an axis of an array, as NumPy arrays.

    Parameters
    ----------
    stream : ChunkStream, or tuple or dict of them
        What to load. Chunks that are cut along other axes too are put together, so that each sample is
        whole. Several streams are loaded side by side: sample by sample, each with its own shape; the
        options are those of the first. A stream of `stream_dataset` gives dicts by name. After
        ``.map(fn)`` batches are made of what `fn` returned: an array with as many samples as the chunk,
        or a tuple or dict of such arrays.
    batch_size : int
        Samples of a batch.
    shuffle_buffer : int
        0: in order. Otherwise the items come in random order, the samples of an item in random order, and
        through a buffer of so many samples, out of which batches are drawn.
    seed : int, optional
        From 0 to 2**64 - 1. The same seed gives the same batches, whatever the cluster does and however
        many workers it has. By default one is drawn, and kept in `seed`.
    drop_last : bool
        Leave out the samples that don't fill a batch. By default the last batch of an epoch is smaller.
    epochs : int or None
        Epochs of one iteration; None for ever. Each has an order of its own.
    axis : int or str
        Along which the samples lie, by number or dimension name.
    rank, world_size : int
        This process takes part `rank` of `world_size`: consecutive samples of the epoch's order, so that
        few items are read by two. All have the same number of samples, hence of batches: with `drop_last`
        what is left over is left out; without, some samples at the borders come in two parts, as many as
        `torch.utils.data.DistributedSampler` repeats. All ranks need the same seed.

    Attributes
    ----------
    seed : int or None
        None where nothing is shuffled.
    epoch : int
        The epoch of the latest batch; after its end, the next one.

    Raises
    ------
    UsageError
        If a number is out of range, there would be no batch, or the number of samples can't be known before
        they are read (``.filter``, ``missing="skip"``, ``on_error="skip"``).

    Notes
    -----
    Memory is bounded by the stream's ``max_bytes``, `shuffle_buffer` samples, one item and one batch. An
    item is a chunk along `axis`, whole along all other axes. Shuffled, small chunks of a shard are read in
    even parts of it up to 64 MiB; ``stream.rechunk(...)`` decides otherwise. The buffer should hold the
    samples of several items, or batches are mixtures of few.

    Each iteration goes on with the next epoch; one that is left early counts as begun.

    Examples
    --------
    >>> import zarr
    >>> from zarr_dask_stream.chunks import stream_chunks
    >>> x = zarr.create_array({}, shape=(10, 4), chunks=(4, 2), dtype="f4")
    >>> y = zarr.create_array({}, shape=(10,), chunks=(5,), dtype="i8")
    >>> y[:] = np.arange(10)
    >>> loader = Loader((stream_chunks(x), stream_chunks(y)), 4, shuffle_buffer=8, seed=1)
    >>> len(loader), [(a.shape, b.shape) for a, b in loader]
    (3, [((4, 4), (4,)), ((4, 4), (4,)), ((2, 4), (2,))])
    >>> sorted(int(label) for _, labels in loader for label in labels)
    [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    """

    def __init__(  # noqa: PLR0917  # the public contract names these in this order
        self,
        stream: Any,
        batch_size: int,
        shuffle_buffer: int = 0,
        seed: int | None = None,
        drop_last: bool = False,
        epochs: int | None = 1,
        *,
        axis: int | str = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._batch_size = _whole("batch_size", batch_size, least=1)
        self._buffer = _whole("shuffle_buffer", shuffle_buffer, least=0, most=2**32 - 1)
        if not isinstance(drop_last, bool):
            raise UsageError(f"drop_last must be True or False, got {drop_last!r}")
        self._epochs = None if epochs is None else _whole("epochs", epochs, least=1)
        self._world_size = _whole("world_size", world_size, least=1)
        self._rank = _whole("rank", rank, least=0, most=self._world_size - 1)
        self._drop_last = drop_last
        self.seed = self._choose_seed(seed)
        self._samples = Samples.of(stream, axis, shuffled=bool(self._buffer))
        self._start, self._count = self._share()
        self._check_memory()
        self._epoch = 0
        self._batch = 0  # batches of the epoch that were handed out
        self._until: int | None = None  # epoch before which the iteration under way ends
        self._restored = False
        self._stream: ChunkStream | None = None

    def _choose_seed(self, seed: int | None) -> int | None:
        if seed is not None:
            return _whole("seed", seed, least=0, most=2**64 - 1)
        if not self._buffer:
            return None
        if self._world_size > 1:
            raise UsageError("all ranks have to shuffle alike: give each of them the same seed=")
        return int.from_bytes(os.urandom(4), "little")

    def _share(self) -> tuple[int, int]:
        """Return this rank's part of an epoch: its first sample, and how many."""
        total, ranks, size = self._samples.count, self._world_size, self._batch_size
        if self._drop_last:
            count = total // ranks // size * size
            if not count:
                raise UsageError(
                    f"there would be no batch: {total:,} samples for {ranks} ranks don't fill one of {size:,}, and "
                    "drop_last=True leaves out what does not"
                )
            return self._rank * count, count
        return self._rank * total // ranks, -(-total // ranks)

    def _check_memory(self) -> None:
        nbytes = self._samples.sample_nbytes
        if nbytes is not None and min(self._buffer, self._count) * nbytes > memory_budget("100%"):
            raise UsageError(
                f"shuffle_buffer={self._buffer:,} samples of {nbytes:,} bytes are more than the memory of this host"
            )

    # -- what it is ---------------------------------------------------------------------------------

    def __len__(self) -> int:
        """Batches of one epoch, for this rank."""
        return (self._count + self._batch_size - 1) // self._batch_size

    @property
    def samples(self) -> int:
        """Samples of one epoch, all ranks together."""
        return self._samples.count

    @property
    def epoch(self) -> int:
        """The epoch of the latest batch; after its end, the next one."""
        return self._epoch

    @property
    def report(self) -> Report:
        """Account of the latest run; each epoch is a run."""
        return Report(outcome="not started") if self._stream is None else self._stream.report

    def passes(self) -> int | None:
        """Epochs that the next iteration has, or None where it has no end."""
        if not (self._restored and self._until is not None):
            return self._epochs
        return self._until - self._epoch

    def __repr__(self) -> str:
        words = [f"{self.samples:,} samples in {len(self):,} batches of {self._batch_size:,}"]
        if self._world_size > 1:
            words.append(f"rank {self._rank} of {self._world_size}")
        if self._buffer:
            words.append(f"shuffled by seed {self.seed} through {self._buffer:,}")
        return f"Loader({', '.join(words)})"

    # -- batches ------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Any]:
        self._begin()
        while self._until is None or self._epoch < self._until:
            epoch = self._rest_of_epoch()
            if epoch.stream is not None:
                self._stream = epoch.stream
                with contextlib.closing(cast("Generator[Chunk]", iter(epoch.stream))) as chunks:
                    for chunk in chunks:
                        for batch in epoch.take(chunk):
                            self._batch += 1
                            yield batch
            if self._batch < len(self):
                return  # somebody closed it
            self._end_epoch()
        self._until = None

    async def __aiter__(self) -> AsyncIterator[Any]:
        self._begin()
        while self._until is None or self._epoch < self._until:
            epoch = self._rest_of_epoch()
            if epoch.stream is not None:
                self._stream = epoch.stream
                async with contextlib.aclosing(cast("AsyncGenerator[Chunk]", aiter(epoch.stream))) as chunks:
                    async for chunk in chunks:
                        for batch in epoch.take(chunk):
                            self._batch += 1
                            yield batch
            if self._batch < len(self):
                return
            self._end_epoch()
        self._until = None

    def _begin(self) -> None:
        if not self._restored and self._batch:
            self._end_epoch()  # it was left early
        if not self._restored or self._until is None:
            self._until = None if self._epochs is None else self._epoch + self._epochs
        self._restored = False

    def _rest_of_epoch(self) -> _Epoch:
        return _Epoch(
            self._samples,
            seed=None if not self._buffer else self.seed,
            epoch=self._epoch,
            start=self._start,
            count=self._count,
            batch_size=self._batch_size,
            buffer=self._buffer,
            done=self._batch,
        )

    def _end_epoch(self) -> None:
        self._epoch += 1
        self._batch = 0

    def close(self) -> None:
        """Cancel what is being read; a loop that is under way ends. Closing twice does no harm."""
        if self._stream is not None:
            self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None}

    # -- batches for others -------------------------------------------------------------------------

    def torch(self) -> Any:
        """Return the batches as tensors: a ``torch.utils.data.IterableDataset``.

        Returns
        -------
        IterableDataset
            Of whole batches: iterate it, or ``DataLoader(loader.torch(), batch_size=None)``. Tensors lie in
            the memory of the NumPy batches. ``num_workers=0`` only: a forked worker would share the Dask
            client's connections, and it is the cluster that reads in parallel. It shares the loader's place,
            and has its ``state_dict`` and ``load_state_dict``.

        Raises
        ------
        UsageError
            If PyTorch is not installed, or has no tensors of the array's dtype.
        """
        return torch_batches(self, self._samples.dtypes or ())

    def jax(self) -> Any:
        """Return the batches as JAX arrays, to be iterated.

        On a CPU they lie in the memory of the NumPy batches (DLPack).

        Raises
        ------
        UsageError
            If JAX is not installed, has no arrays of the array's dtype, or would turn 64 bits into 32.
        """
        return JaxBatches(self, self._samples.dtypes or ())

    # -- the place ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the place after the latest batch, as plain numbers.

        Examples
        --------
        >>> import zarr
        >>> from zarr_dask_stream.chunks import stream_chunks
        >>> stream = stream_chunks(zarr.create_array({}, shape=(10,), chunks=(4,), dtype="f4"))
        >>> loader = Loader(stream, 2, shuffle_buffer=4, seed=1)
        >>> batches = iter(loader)
        >>> first = [next(batches), next(batches)]
        >>> state = loader.state_dict()
        >>> again = Loader(stream, 2, shuffle_buffer=4, seed=1)
        >>> again.load_state_dict(state)
        >>> [batch.tolist() for batch in again] == [batch.tolist() for batch in batches]
        True
        """
        place = {"epoch": self._epoch, "batch": self._batch, "until": self._until}
        return {"version": _VERSION, **place, "seed": self.seed, "loader": self._about()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch at which a state was saved: the next iteration gives the rest of that one.

        The batches are those of the loader that was saved, bit for bit; its seed comes with the state.
        Read again are only the items of which samples were in the buffer: none for ``shuffle_buffer=0``,
        and in general no more than have samples among the last ``n * (log(n) + 1)`` or so before the place,
        where n is `shuffle_buffer`.

        Raises
        ------
        UsageError
            If it is no such state, or that of a loader of other samples or with other options.
        """
        if not isinstance(state, Mapping) or state.get("version") != _VERSION:  # type: ignore[redundant-expr]  # callers need not be typed
            raise UsageError(f"expected what state_dict() returned (version {_VERSION}), got {state!r:.80}")
        saved, own = state.get("loader"), self._about()
        if not isinstance(saved, Mapping) or saved != own:
            given = saved if isinstance(saved, Mapping) else {}
            differ = [f"{k} was {given.get(k)!r} and is {own[k]!r}" for k in own if given.get(k) != own[k]]
            raise UsageError(f"the state is that of another loader: {'; '.join(differ) or 'it has other options'}")
        epoch = _whole("state['epoch']", state.get("epoch"), least=0)
        batch = _whole("state['batch']", state.get("batch"), least=0, most=len(self))
        until = None if state.get("until") is None else _whole("state['until']", state["until"], least=epoch)
        seed = state.get("seed")
        if (seed is None) and self._buffer:
            raise UsageError("the state has no seed, and this loader shuffles")
        self.seed = None if seed is None else _whole("state['seed']", seed, least=0, most=2**64 - 1)
        self._epoch, self._batch, self._until, self._restored = epoch, batch, until, True

    def _about(self) -> dict[str, Any]:
        return {
            "samples": self._samples.count,
            "items": len(self._samples.numbers),
            "item_samples": self._samples.length,
            "batch_size": self._batch_size,
            "shuffle_buffer": self._buffer,
            "drop_last": self._drop_last,
            "rank": self._rank,
            "world_size": self._world_size,
        }


class _Epoch:
    """One epoch of one rank, from a batch on: what has to be read, and what becomes of it."""

    def __init__(
        self,
        samples: Samples,
        *,
        seed: int | None,
        epoch: int,
        start: int,
        count: int,
        batch_size: int,
        buffer: int,
        done: int,
    ) -> None:
        self._samples = samples
        self._shuffle = None if seed is None else (seed, epoch)
        self._start = start
        self._mixer = mixer = Mixer(
            count=count,
            batch_size=batch_size,
            axis=samples.axes,
            slots=buffer,
            key=0 if seed is None else key_of(seed, epoch, _BUFFER, start),
            done=done,
        )
        deck = samples.deck(None if seed is None else key_of(seed, epoch, _ITEMS))
        coming, end = deck.find(np.array([start + mixer.came, start + count - 1])).tolist()
        stretch = (coming if mixer.came < count else end + 1, end + 1)
        # Items that were read before and have samples in the buffer, as far as they are not read anyway.
        needed = np.unique(deck.find(mixer.held[mixer.held >= 0] + start))
        again = [deck.slot(position) for position in needed[needed < stretch[0]].tolist()]
        self._slots: Iterator[Slot] = itertools.chain(again, deck.slots(*stretch))
        self.stream: ChunkStream | None = None
        if again or stretch[0] < stretch[1]:
            self.stream = samples.stream(tuple(slot.number for slot in again), deck, stretch)

    def take(self, chunk: Chunk) -> Iterator[Any]:
        """Take the next item, and yield the batches that are full with it."""
        slot = next(self._slots)
        assert slot.number == chunk.number
        expected = slot.stop - slot.start
        try:
            rows = self._mixer.rows(chunk.data)
        except UsageError as error:
            raise UsageError(f"chunk {chunk.index} can't be cut into samples: {error}") from None
        if len(rows[0]) != expected:
            raise UsageError(
                f"chunk {chunk.index} has {expected} samples, and after .map(...) there are {len(rows[0])}: a function "
                "of a loader's stream returns as many samples as its chunk has, along the same axis"
            )
        order = None if self._shuffle is None else shuffled(key_of(*self._shuffle, _INSIDE, slot.number), expected)
        for batch in self._mixer.add(rows, slot.start - self._start, order):
            yield self._samples.dress(batch)


def _whole(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """Return a whole number within bounds, or say what was expected."""
    number = as_whole(value)
    if number is None:
        raise UsageError(f"{name} is a whole number, got {value!r}")
    if number < least or (most is not None and number > most):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise UsageError(f"{name} must be {bounds}, got {number}")
    return number

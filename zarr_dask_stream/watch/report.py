"""What a run came to, and how it went: its account, its history and its map, and the ways to show them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zarr_dask_stream.engine.events import Notice
from zarr_dask_stream.watch.account import Account, WorkerShare, human_bytes, human_seconds
from zarr_dask_stream.watch.advice import Advice, advise
from zarr_dask_stream.watch.chunkmap import ChunkMap
from zarr_dask_stream.watch.history import History
from zarr_dask_stream.watch.page import notebook_page, whole_page
from zarr_dask_stream.watch.plot import figure_of

__all__ = ["Report", "WorkerShare", "human_bytes", "human_seconds"]


@dataclass
class Report(Account):
    """Account of one run, filled in while it goes on.

    Attributes
    ----------
    url : str
        The array.
    total : int or None
        Chunks planned for this run; None while a `where` predicate has not been walked to its end.
    filled_missing : int
        Chunks that are not stored and came as fill values (``missing="fill"``), reductions included.
    resumed : int
        Chunks done by earlier runs on the same checkpoint, not counted in `total`.
    emitted, filtered, skipped_missing, dead_lettered, cancelled : int
        Where they ended: each chunk in exactly one. Cancelled are those that were never given out, because
        the run ended early, or because ``.take(n)`` asked for no more.
    retries, hedges : int
        Tries beyond a chunk's first; chunks of which a second copy was started because they straggled.
    batches, batches_lost : int
        Tasks that came back; tasks that lost their worker.
    bytes_stored, bytes_decoded, bytes_written : int
        Bytes read from the store, bytes of decoded data, bytes stored in a target.
    peak_chunks_in_flight, peak_bytes_in_flight : int
        Most chunks, most decoded bytes submitted and not yet taken.
    wall_s : float
        Duration, seconds.
    time : dict of str to float
        Seconds by phase. "fetch" (waiting for the store), "decode" and "compute" (functions, and what a target
        costs) are summed over the workers' threads;
        "queue", "schedule" and "transfer" over tasks: waiting for a thread while others of the run had them all,
        which costs nothing; what else Dask took; the results' way to the client. "consumer" is how long the stream
        waited for whoever iterates.
    dead_letters : list of DeadLetter
        The chunks that were given up, as many as `dead_lettered`.
    workers : dict of str to WorkerShare
        What each worker did.
    outcome : str
        "running", "done", "stopped early" or "failed".
    history : History
        How it went over time: series, histograms, what each worker did, errors by their cause.
    chunkmap : ChunkMap
        The chunk grid, and what has become of each part of it.

    Notes
    -----
    History and map are always kept: with chunks of 40 KB, all of a report takes 0.7 to 1.0 % of a run's processor time,
    0.4 to 0.8 us a chunk (``tests/benchmarks/watch_cost.py``). Their memory is bounded, whatever the grid and the run;
    that of dead letters is not.

    Examples
    --------
    >>> import numpy as np, zarr
    >>> array = zarr.create_array({}, shape=(4, 6), chunks=(2, 3), dtype="f8")
    >>> array[:] = 1.0
    >>> import zarr_dask_stream as zds
    >>> report = zds.stream_chunks(array, concurrency=1).map(np.sum).run()
    >>> report.emitted, report.outcome
    (4, 'done')
    >>> report.chunkmap.label(0, 1)
    'chunk (0, 1): done'
    """

    history: History = field(default_factory=History, repr=False, compare=False)
    chunkmap: ChunkMap = field(default_factory=ChunkMap, repr=False, compare=False)

    def handle(self, notice: Notice) -> None:
        """Fold one notice into the sums, the history and the map."""
        super().handle(notice)
        self.history.handle(notice)
        self.chunkmap.handle(notice)

    def to_dict(self) -> dict[str, Any]:
        """Return the account as plain data for JSON, with errors by their cause, and advice."""
        causes = [cause.to_dict() for cause in self.history.causes]
        return {**super().to_dict(), "causes": causes, "advice": [one.to_dict() for one in self.advice()]}

    # -- how it is shown ----------------------------------------------------------------------------

    def advice(self) -> list[Advice]:
        """Say what would make the run faster or more reliable, the most urgent first.

        Returns
        -------
        list of Advice
            Each with a `title`, and a `text` with the figures it rests on. Empty where nothing stands out, and where
            the run was too short to tell.

        Examples
        --------
        >>> Report().advice()
        []
        """
        return advise(self, self.history)

    def to_html(self, path: str | Path) -> Path:
        """Write the report as one HTML file that needs nothing else.

        It has the chunk map, rates and what was in flight over time, latencies by phase, where the time went, a table
        of workers, errors by their cause, dead letters and advice; light or dark as the reader's system is, and fit
        for print. No script runs in it, and nothing is loaded. It may be written at any moment of a run.

        Parameters
        ----------
        path : str or Path
            The file; what is there is replaced. Its folder has to exist.

        Returns
        -------
        Path
            The file.

        Raises
        ------
        OSError
            If the file can't be written.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     print(Report().to_html(f"{folder}/report.html").name)
        report.html
        """
        target = Path(os.path.expanduser(path))  # noqa: PTH111  # where there is no home, pathlib raises
        target.write_text(whole_page(self, self.history, self.chunkmap), encoding="utf-8")
        return target

    def plot(self) -> Any:
        """Draw the run as a figure: chunk map, rates and what was in flight over time, latencies, time by phase.

        Returns
        -------
        matplotlib.figure.Figure
            It belongs to no window and no backend; a notebook shows it, ``figure.savefig(path)`` keeps it.

        Raises
        ------
        UsageError
            If matplotlib is not installed.

        Examples
        --------
        >>> len(Report().plot().axes) > 3
        True
        """
        return figure_of(self, self.history, self.chunkmap)

    def _repr_html_(self) -> str:
        return notebook_page(self, self.history, self.chunkmap)

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.rows())
        lines = [f"{name:>{width}}  {text}" for name, text in self.rows()]
        lines += [
            f"{'dead':>{width}}  {letter.index} after {letter.attempts} attempt(s): {letter.message}"
            for letter in self.dead_letters[:10]
        ]
        if len(self.dead_letters) > 10:
            lines.append(f"{'':>{width}}  ... and {len(self.dead_letters) - 10:,} more in .dead_letters")
        return "\n".join(lines)

    def __repr__(self) -> str:
        total = "?" if self.total is None else self.total
        return (
            f"Report({self.outcome}: {self.emitted}/{total} emitted, {self.filtered} filtered, "
            f"{self.skipped_missing} missing, {self.dead_lettered} dead, {self.cancelled} cancelled, "
            f"{self.retries} retries, {self.wall_s:.2f} s)"
        )

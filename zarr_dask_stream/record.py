"""What a run writes down so that another one can go on after it: chunks that are done, partial results, its target.

A chunk is noted when its consumer is through with it, or at once where there is none. What is noted is saved when it
is due, and when the run ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from zarr_dask_stream.engine.checkpoint import Ledger
from zarr_dask_stream.engine.completed import Completed
from zarr_dask_stream.engine.events import ChunksEmitted, ChunksFiltered, ChunksSkipped, Notice
from zarr_dask_stream.engine.partials import encode_value
from zarr_dask_stream.errors import StoreError
from zarr_dask_stream.options import Options
from zarr_dask_stream.preparation import ledger_of
from zarr_dask_stream.source.target import Target
from zarr_dask_stream.stages.answers import Answers

__all__ = ["Record", "open_target"]

_TARGET, _BEGUN, _MADE = "target", "begun", "made"  # what a ledger notes of a target
_MANY = 1024  # one by one, marking would cost more than reading


class Record:
    """A run's hold on its ledger.

    Parameters
    ----------
    options : Options
        With a checkpoint.
    answers : Answers, optional
        Of a reduction: its partials are saved with the chunks that were folded into them.
    delivers : bool
        Somebody takes items, and says when they are done. False: a chunk is done when the engine says so.
    now, wall : callable
        Seconds on the run's clock; seconds since 1970.
    """

    def __init__(
        self,
        options: Options,
        answers: Answers | None,
        *,
        delivers: bool,
        now: Callable[[], float],
        wall: Callable[[], float],
    ) -> None:
        self._ledger: Ledger = ledger_of(options)
        self._fold = options.fold
        self._answers = answers
        self._delivers = delivers
        self._now, self._wall = now, wall
        self._acknowledged: list[int] = []

    @property
    def done(self) -> Completed:
        """The chunks that are done."""
        return self._ledger.done

    def open(self) -> None:
        """Take hold of the ledger, and take over what an earlier run left; raises what `Ledger.open` does."""
        if self._fold is not None:
            encode_value(self._fold.reducer.create())  # refuse before the work, not after it
        self._ledger.open(self._now(), self._wall())
        if self._answers is not None:
            self._answers.load(self._ledger.partials)

    def close(self) -> None:
        """Save a last time and let go."""
        self._ledger.acknowledge(self._acknowledged)
        self._keep_partials()
        self._ledger.close(self._now(), self._wall())

    # -- chunks -------------------------------------------------------------------------------------

    def hear(self, notice: Notice) -> None:
        """Mark as done what needs no consumer."""
        if isinstance(notice, ChunksFiltered) or (isinstance(notice, ChunksEmitted) and not self._delivers):
            self._ledger.acknowledge(notice.numbers)
        elif isinstance(notice, ChunksSkipped):
            for run in notice.numbers:
                self._ledger.acknowledge(run)

    def acknowledge(self, numbers: Iterable[int]) -> None:
        """Note chunks that their consumer is through with."""
        self._acknowledged.extend(numbers)

    def save_if_due(self) -> None:
        """Save where enough was noted since the last time, or enough time has passed."""
        ledger, now = self._ledger, self._now()
        due = ledger.due(now, len(self._acknowledged))
        if due or len(self._acknowledged) >= _MANY:
            ledger.acknowledge(self._acknowledged)
            self._acknowledged = []
        if due:
            self._keep_partials()
            ledger.save(now, self._wall())

    def _keep_partials(self) -> None:
        if self._answers is not None:
            self._ledger.partials = self._answers.dump()

    # -- the target ---------------------------------------------------------------------------------

    @property
    def target(self) -> str | None:
        """How far a run has come with making its target, which is saved as soon as it is set; None: not begun."""
        return self._ledger.notes.get(_TARGET)

    @target.setter
    def target(self, state: str) -> None:
        self._ledger.notes[_TARGET] = state
        self._ledger.save(self._now(), self._wall())


def open_target(options: Options, target: Target, record: Record | None) -> None:
    """Make the target of a run, or see that it is still the one that an earlier run has made.

    Raises
    ------
    UsageError
        If its place is taken, or another array is there.
    StoreError
        If it can't be made.
    """
    try:
        made = None if record is None else record.target
        if target.exists or made == _MADE:
            target.check_same()
        else:
            if made is None:
                target.check_free()
            if record is not None:
                record.target = _BEGUN  # before anything of it is there: what is found later is known to be ours
            target.create()
            if record is not None:
                record.target = _MADE
        if options.sink is not None:
            options.sink.tidy()
            options.sink.prepare()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"the target {target.place.url} can't be made: {error}") from error

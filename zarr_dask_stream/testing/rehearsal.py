"""Runs on a scripted cluster: of a stream, with its real store and functions, or of the deciding machine alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from zarr_dask_stream.engine.events import (
    Batch,
    BatchDone,
    Input,
    Notice,
    Tick,
)
from zarr_dask_stream.engine.instructions import Abort, Cancel, Fold, Instruction, Notify, Restart, Submit
from zarr_dask_stream.engine.supervisor import Supervisor
from zarr_dask_stream.engine.task import Work, run_batch
from zarr_dask_stream.engine.window import Item
from zarr_dask_stream.preparation import work_of
from zarr_dask_stream.source.selection import encode_numbers
from zarr_dask_stream.stream import ChunkStream
from zarr_dask_stream.testing.scripted import Scripted, ScriptedExecutor
from zarr_dask_stream.watch.report import Report

__all__ = ["Rehearsal", "rehearse"]

_IDLE_S = 1.0


class _RealReads(ScriptedExecutor):
    """Plays its script, and has all that succeeds there read and put through the stages, in this thread."""

    def __init__(self, work: Work, **script: Any) -> None:
        super().__init__(**script)
        self._work = work

    def _outcome(self, batch: Batch, seconds: float) -> Input:
        played = super()._outcome(batch, seconds)
        if not isinstance(played, BatchDone) or not played.result.numbers:
            return played
        script, real = played.result, run_batch(self._work, encode_numbers(played.result.numbers), worker="scripted")
        real.failures += script.failures
        real.filtered += script.filtered
        real.skipped += script.skipped
        real.unattempted += script.unattempted
        # What it really took, and what of that was set up, would decide how large the next batches are.
        real.stats.wall_s, real.stats.setup_s = seconds, 0.0
        return BatchDone(batch.id, real)


def rehearse(
    stream: ChunkStream[Any],
    *,
    script: Mapping[Any, Sequence[Scripted]] | None = None,
    losses: Mapping[Any, int] | None = None,
    hangs: Collection[Any] = (),
    **executor: Any,
) -> list[Any]:
    """Iterate a stream without a cluster, in virtual time, with faults where the script has them.

    The store is read and your functions are called in this thread, so that a debugger stops in them. The
    stream's policies (retries, hedging, rate, window) are at work as always; hours of backoff take no time.

    Parameters
    ----------
    stream : ChunkStream
        What to run; its ``report`` tells of the run.
    script : mapping of tuple of int to sequence, optional
        By grid index: what becomes of a chunk's first tries, in turn, as in `ScriptedExecutor`.
    losses : mapping of tuple of int to int, optional
        By grid index: how often the batch that holds it loses its worker.
    hangs : collection of tuple of int
        Grid indices whose batch never comes back.
    **executor
        More for `ScriptedExecutor`: threads, duration, jitter, seed, clock.

    Returns
    -------
    list
        The items, as a loop over the stream would get them.

    Examples
    --------
    >>> import zarr, zarr_dask_stream as zds
    >>> array = zarr.create_array({}, shape=(6,), chunks=(2,), dtype="i2", fill_value=5)
    >>> stream = zds.stream_chunks(array, on_error="skip").map(lambda chunk: int(chunk.data.sum()))
    >>> items = rehearse(stream, script={(0,): [TimeoutError()] * 2}, losses={(2,): 99})
    >>> [(item.index, item.data) for item in items], stream.report.retries
    ([((0,), 10), ((1,), 10)], 3)
    >>> [(letter.index, letter.category) for letter in stream.report.dead_letters]
    [((2,), 'cluster')]
    """
    number = stream._options.plan.grid.number  # noqa: SLF001  # a stream does not show its plan
    place = _RealReads(
        work_of(stream._options),  # noqa: SLF001  # nor what travels to workers
        script={number(index): outcomes for index, outcomes in (script or {}).items()},
        losses={number(index): times for index, times in (losses or {}).items()},
        hangs=[number(index) for index in hangs],
        **executor,
    )
    return list(stream._rehearse(place))  # noqa: SLF001  # made for this


class Rehearsal:
    """A run of a `Supervisor` on a `ScriptedExecutor`: the engine's loop without array, cluster or time.

    Parameters
    ----------
    machine : Supervisor
        A new machine.
    executor : ScriptedExecutor
        Where its batches go.
    check : bool
        Assert the machine's invariants after each step.

    Attributes
    ----------
    notices : list of Notice
        What observers would have heard.
    partials : list
        Partials of a reduction, as they came.
    report : Report
        The notices, folded.
    log : list of (float, Input or None)
        Times and inputs, None where the consumer took an item: all that the run depended on. See
        `replay`.
    steps : list of list of Instruction
        What the machine answered to each.

    Examples
    --------
    >>> from zarr_dask_stream.engine.batching import Batcher, BatchLimits, Cutter
    >>> from zarr_dask_stream.engine.retry import RetryPolicy
    >>> from zarr_dask_stream.engine.window import Window, WindowLimits
    >>> from zarr_dask_stream.source.grid import ChunkGrid
    >>> from zarr_dask_stream.source.selection import ChunkPlan, parse_region
    >>> plan = ChunkPlan(ChunkGrid((6,), (1,)), parse_region(None, (6,)))
    >>> machine = Supervisor(
    ...     plan, Cutter(plan.runs()), Window(WindowLimits(chunks=3, nbytes=1000)), Batcher(BatchLimits()),
    ...     RetryPolicy(), chunk_nbytes=8, total=len(plan),
    ... )
    >>> run = Rehearsal(machine, ScriptedExecutor(script={1: [ConnectionError("reset")]}))
    >>> [item.number for item in run.items()]
    [0, 1, 2, 3, 4, 5]
    >>> run.report.retries, run.report.outcome
    (1, 'done')
    """

    def __init__(self, machine: Supervisor, executor: ScriptedExecutor, *, check: bool = True) -> None:
        self.machine = machine
        self.executor = executor
        self.notices: list[Notice] = []
        self.partials: list[Any] = []
        self.report = Report()
        self.log: list[tuple[float, Input | None]] = []
        self.steps: list[list[Instruction]] = []
        self._check = check

    def items(self) -> Iterator[Item]:
        """Run, and hand out what the machine gives; leaving early ends the run as it would a stream."""
        machine, clock = self.machine, self.executor.clock
        outcome, error = "failed", ""
        try:
            self._handle(self.executor.start())
            while True:
                item = machine.take()
                if item is not None:
                    self.log.append((clock(), None))
                    yield item
                    if machine.hungry:
                        self._handle(Tick())
                elif machine.done:
                    break
                else:
                    for event in self.executor.wait(self._patience()):
                        self._handle(event)
            outcome = "done"
        except GeneratorExit:
            outcome = "stopped early"
            raise
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
            raise
        finally:
            self._carry_out(machine.finish(outcome, clock(), error=error))
            self.executor.close()

    def run(self) -> Report:
        """Run to the end and return the report."""
        for _ in self.items():
            pass
        return self.report

    def _patience(self) -> float | None:
        due = self.machine.next_timer()
        return _IDLE_S if due is None else max(due - self.executor.clock(), 0.0)

    def _handle(self, event: Input) -> None:
        now = self.executor.clock()
        self.log.append((now, event))
        instructions = self.machine.handle(event, now)
        self.steps.append(instructions)
        if self._check:
            self.machine.check()
        self._carry_out(instructions)

    def _carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            if isinstance(instruction, Notify):
                self.notices.append(instruction.notice)
                self.report.handle(instruction.notice)
            elif isinstance(instruction, Submit):
                self.executor.submit(instruction.batches)
            elif isinstance(instruction, Cancel):
                self.executor.cancel(instruction.batches)
            elif isinstance(instruction, Restart):
                self.executor.restart(instruction.worker)
            elif isinstance(instruction, Fold):
                self.partials.append(instruction.partial)
            elif isinstance(instruction, Abort):
                raise instruction.error

    @staticmethod
    def replay(machine: Supervisor, log: Iterable[tuple[float, Input | None]]) -> list[list[Instruction]]:
        """Feed a recorded log to a new machine and return its answers.

        They are the recorded ones if the machine was made like the first: same plan, options and seed.
        """
        answers = []
        for now, event in log:
            if event is None:
                machine.take()
            else:
                answers.append(machine.handle(event, now))
        return answers

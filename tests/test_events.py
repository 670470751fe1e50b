"""The vocabulary: notices reach the methods that are named after them, and can be written down."""

from __future__ import annotations

import inspect
import json
import pickle
import threading
from typing import Any

import pytest

from zarr_dask_stream.engine import events
from zarr_dask_stream.engine.events import (
    Batch,
    BatchFinished,
    BatchStats,
    Callback,
    Category,
    ChunkDeadLettered,
    ChunkRetried,
    ChunksEmitted,
    ChunksSkipped,
    DeadLetter,
    Failure,
    Notice,
    RunFinished,
)
from zarr_dask_stream.watch.report import Report

KINDS = [
    cls
    for _, cls in inspect.getmembers(events, inspect.isclass)
    if issubclass(cls, Notice) and cls is not Notice and cls.__module__ == events.__name__
]


class Stubborn(Exception):  # noqa: N818  # it stands for a class of a client library
    """Holds what can neither be copied nor pickled."""

    def __init__(self) -> None:
        super().__init__("no")
        self.lock = threading.Lock()


FAILURE = Failure(3, Category.TRANSIENT, "Stubborn", "no", error=Stubborn())
LETTER = DeadLetter((3,), (slice(3, 4),), 2, "transient", "Stubborn", "no", "enough", error=Stubborn())
NOTICES: list[Notice] = [
    ChunksEmitted(1.0, (1, 2)),
    ChunksSkipped(1.0, (range(3, 9, 2),), 3),
    ChunkRetried(1.0, FAILURE, 1, 0.5),
    ChunkDeadLettered(1.0, 3, LETTER),
    BatchFinished(1.0, Batch(1, (range(4), range(6, 8)), 6, 48), BatchStats(latency={-3: 2}), 0.5, 0.1),
    BatchFinished(1.0, Batch(1, (range(4),), 4, 32), None, 0.5, 0.0, lost="died"),
    RunFinished(1.0, "done", 4, 0.0, 2, 64),
]


def name_of(cls: type[Notice]) -> str:
    return "on" + "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__)


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
def test_a_notice_reaches_the_method_of_its_name(cls: type[Notice]) -> None:
    heard: list[Any] = []
    observer = Callback()
    setattr(observer, name_of(cls), heard.append)
    given: dict[str, Any] = {name: 0.0 if name == "at" else None for name in inspect.signature(cls).parameters}
    notice = cls(**given)
    observer.handle(notice)
    observer.handle(Notice(0.0))
    assert heard == [notice]


def test_everything_is_heard_by_on_notice_first() -> None:
    heard: list[str] = []

    class Both(Callback):
        def on_notice(self, notice: Notice) -> None:
            heard.append("all")

        def on_chunks_emitted(self, notice: ChunksEmitted) -> None:
            heard.append("emitted")

    Both().handle(ChunksEmitted(0.0, ()))
    Both().handle(RunFinished(1.0, "done", 0, 0.0, 0, 0))
    assert heard == ["all", "emitted", "all"]


def test_each_method_of_the_report_has_its_notice() -> None:
    names = {name_of(cls) for cls in KINDS} | {"on_notice"}
    assert {name for name in dir(Report) if name.startswith("on_")} <= names


@pytest.mark.parametrize("notice", NOTICES, ids=lambda notice: type(notice).__name__)
def test_a_notice_can_be_written_down(notice: Notice) -> None:
    data = notice.to_dict()
    assert data["event"] == type(notice).__name__
    assert data["at"] == 1.0
    json.dumps(data)


@pytest.mark.parametrize("notice", [NOTICES[0], NOTICES[1], NOTICES[4], NOTICES[6]], ids=lambda n: type(n).__name__)
def test_notices_are_values(notice: Notice) -> None:
    assert pickle.loads(pickle.dumps(notice)) == notice
    with pytest.raises(AttributeError):
        notice.at = 2.0  # type: ignore[misc]  # frozen

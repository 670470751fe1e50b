"""Ledgers, dead letters and results in files that are nearly right: taken up, or refused with a sentence of ours.

Tried for version 0.1: 900 inputs for each test, 4,500 in all, without a finding. The usual run tries 15 each.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import zarr_dask_stream as zds
from fuzz.mutation import as_json, changed, fine_or_refused, fuzzed, spliced
from zarr_dask_stream.cli.letters import FailedChunks
from zarr_dask_stream.cli.results import result_file
from zarr_dask_stream.engine.partials import decode_value, encode_value
from zarr_dask_stream.errors import StoreError, ZdsError
from zarr_dask_stream.source.array import ArraySpec, open_array

#: These files are a few kilobytes, and a run of this array takes no more than this.
MOST_BYTES = 1 << 24
_names = itertools.count()


@pytest.fixture(scope="module")
def spec() -> ArraySpec:
    array = zarr.create_array({}, shape=(40, 6), chunks=(2, 3), dtype="i4")
    array[:] = np.arange(240).reshape(40, 6)
    return open_array(array)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def _stream(spec: ArraySpec, ledger: Path) -> Any:
    stream = zds.stream_chunks(spec, concurrency=1, checkpoint=ledger)
    return stream.reduce([zds.reducers.mean(), zds.reducers.histogram(3, (0, 9))])


@pytest.fixture(scope="module")
def ledger(spec: ArraySpec, folder: Path) -> dict[str, Any]:
    """What a run leaves that was stopped half way."""
    place = folder / "half.ledger"

    def stop(done: int, total: int) -> None:
        if done >= 20:
            stream.close()

    stream = zds.stream_chunks(spec, concurrency=1, checkpoint=place, progress=stop)
    stream = stream.reduce([zds.reducers.mean(), zds.reducers.histogram(3, (0, 9))])
    stream.run()
    document = json.loads(place.read_bytes())
    assert document["partials"] != {"dict": []}
    assert isinstance(document, dict)
    return document


@given(data=st.data())
@fuzzed
def test_changed_ledgers(spec: ArraySpec, folder: Path, ledger: dict[str, Any], data: st.DataObject) -> None:
    place = folder / f"{next(_names)}.ledger"
    place.write_bytes(as_json(data.draw(changed(ledger))))
    with fine_or_refused(MOST_BYTES):
        list(_stream(spec, place))
    assert place.exists()


@given(data=st.data())
@fuzzed
def test_changed_bytes_of_ledgers(spec: ArraySpec, folder: Path, ledger: dict[str, Any], data: st.DataObject) -> None:
    place = folder / f"{next(_names)}.ledger"
    place.write_bytes(data.draw(spliced(as_json(ledger))))
    with fine_or_refused(MOST_BYTES):
        list(_stream(spec, place))


VALUES = [
    {(0, 1): [np.float32(1.5), float("nan")], "b": {1, 2}, 3: frozenset({4})},
    [np.arange(6).reshape(2, 3), np.datetime64("2020-01-01"), b"bytes", 1j, 2**70, -(2**53)],
    (np.zeros(3, [("a", "i4"), ("b", "f8")]), np.array(["x", "yy"])),
]


@pytest.mark.parametrize("value", VALUES, ids=["dict", "arrays", "records"])
@given(data=st.data())
@fuzzed
def test_changed_values(value: Any, data: st.DataObject) -> None:
    with fine_or_refused(MOST_BYTES):
        decode_value(data.draw(changed(encode_value(value))))


LETTER = {
    "index": [3, 1],
    "region": [[6, 8], [3, 6]],
    "attempts": 2,
    "message": "no",
    "shape": [40, 6],
    "chunks": [2, 3],
}


@given(data=st.data())
@fuzzed
def test_changed_dead_letters(spec: ArraySpec, folder: Path, data: st.DataObject) -> None:
    letters = [{**LETTER, "array": spec.url}] * 2
    drawn = data.draw(changed(letters)) if data.draw(st.booleans()) else letters
    raw = b"\n".join(map(as_json, drawn if isinstance(drawn, list) else [drawn]))
    place = folder / "letters.jsonl"
    place.write_bytes(data.draw(spliced(raw)) if data.draw(st.booleans()) else raw)
    with fine_or_refused(MOST_BYTES):
        FailedChunks.read(str(place)).condition(spec)((3, 1))


@given(data=st.data())
@fuzzed
def test_changed_results(spec: ArraySpec, folder: Path, data: st.DataObject) -> None:
    lines = [{"index": [n, 1], "region": [[2 * n, 2 * n + 2], [3, 6]], "value": n / 3} for n in range(3)]
    raw = b"".join(as_json(line) + b"\n" for line in lines)
    place = folder / "results.jsonl"
    place.write_bytes(data.draw(spliced(raw)))
    with fine_or_refused(MOST_BYTES), result_file(str(place), spec, append=True) as file:
        file.write(0, "{}")


@pytest.mark.parametrize("depth", [500, 5_000, 100_000])
def test_nested_without_end(spec: ArraySpec, folder: Path, ledger: dict[str, Any], depth: int) -> None:
    deep = b'{"a":' * depth + b"1" + b"}" * depth
    tuples = b'{"tuple":[' * depth + b"1" + b"]}" * depth
    for part in ("about", "partials", "notes", "heartbeat"):
        for inside in (deep, tuples):
            place = folder / "deep.ledger"
            place.write_bytes(as_json({**ledger, part: "HERE"}).replace(b'"HERE"', inside))
            with fine_or_refused(MOST_BYTES):
                list(_stream(spec, place))
    place = folder / "deep.jsonl"
    place.write_bytes(as_json({**LETTER, "index": "HERE"}).replace(b'"HERE"', deep))
    with pytest.raises(ZdsError):
        FailedChunks.read(str(place)).condition(spec)
    with pytest.raises(StoreError):
        decode_value(json.loads(b'{"tuple":[' * 400 + b'{"int": "x"}' + b"]}" * 400))

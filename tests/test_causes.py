"""What failures have in common: messages without what differs, and what is kept of each kind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zarr_dask_stream.watch.causes import Cause, normalised


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("", ""),
        ("503 SlowDown (attempt 3)", "# SlowDown (attempt #)"),
        ("s3://bucket/a/c/0/1: not found", "...: not found"),
        ("key c/0/17/3 is truncated", "key c/# is truncated"),
        ("/data/x.zarr/c/1/2 is gone", "... is gone"),
        ("request 8f3a2b91cd failed", "request # failed"),
        ("float32 is not int16", "float32 is not int16"),
        ("it's what it's", "it's what it's"),
        ("a\n  b", "a b"),
        ("decode of shape (10, 20)", "decode of shape (#)"),
    ],
)
def test_what_differs_from_chunk_to_chunk_is_left_out(message: str, expected: str) -> None:
    assert normalised(message) == expected


@given(st.text(max_size=3000))
def test_any_message_has_a_short_form(message: str) -> None:
    assert len(normalised(message)) <= 240


def test_a_cause_is_plain_data() -> None:
    assert Cause("OSError", "reset", tries=2, dead=1).to_dict()["tries"] == 2


def test_a_cause_names_some_workers_and_no_more() -> None:
    cause = Cause.of(("OSError", "reset by #"), "reset by 10.0.0.1", "transient", 2.0)
    for n in range(40):
        cause.blame(f"w{n}")
    cause.blame("w0")
    assert (cause.sample_message, cause.first_s) == ("reset by 10.0.0.1", 2.0)
    assert len(cause.workers) == 32
    assert cause.workers["w0"] == 2

"""Targets with a checkpoint: stopped, gone on with, and what is on the disk by then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import zarr

import zarr_dask_stream as zds
from conformance.oracle import same_bits, sample
from copying import array_in, read
from zarr_dask_stream.source.files import LocalFiles

# -- stopped and gone on with ---------------------------------------------------------------------


def test_a_stopped_copy_goes_on_into_the_same_target(tmp_path: Path) -> None:
    data = sample("i4", (40, 6))
    array_in(tmp_path / "source", data, chunks=(2, 6))
    broken = {(3, 0), (7, 0)}

    def stream() -> Any:
        def fail(chunk: zds.Chunk) -> Any:
            if chunk.index in broken and not (tmp_path / "healed").exists():
                raise RuntimeError("not yet")
            return chunk.data

        return (
            zds.stream_chunks(tmp_path / "source", concurrency=1, on_error="skip", checkpoint=tmp_path / "ledger")
            .map(fail)
            .to_zarr(tmp_path / "target")
        )

    report = stream().run()
    assert report.dead_lettered == 2
    (tmp_path / "healed").touch()
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "target").rglob("*") if p.is_file()}
    report = stream().run()
    assert (report.resumed, report.emitted) == (18, 2)
    same_bits(read(tmp_path / "target"), data)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    report = stream().run()
    assert (report.resumed, report.emitted) == (20, 0)


def test_a_checkpoint_knows_its_target(tmp_path: Path) -> None:
    array_in(tmp_path / "source", sample("i4", (8,)), chunks=(2,))

    def stream(target: Any = tmp_path / "target", **options: Any) -> Any:
        chunks = zds.stream_chunks(tmp_path / "source", concurrency=1, checkpoint=tmp_path / "ledger")
        return chunks.to_zarr(target, **options)

    stream().run()
    with pytest.raises(zds.UsageError, match=r"the ledger .* belongs to another stream: target was .* and is"):
        stream(tmp_path / "other").run()
    with pytest.raises(zds.UsageError, match="belongs to another stream"):
        stream(compressors=None).run()
    zarr.create_array(tmp_path / "target", shape=(8,), chunks=(4,), dtype="i4", overwrite=True)
    with pytest.raises(zds.StoreError, match="is another array now: it is not what an earlier run"):
        stream().run()
    (tmp_path / "target" / "zarr.json").unlink()
    with pytest.raises(zds.StoreError, match="is not there any more: it is not what"):
        stream().run()


def test_a_new_checkpoint_does_not_open_a_place_that_is_taken(tmp_path: Path) -> None:
    array_in(tmp_path / "source", sample("i4", (8,)), chunks=(2,))
    array_in(tmp_path / "target", sample("i4", (8,), seed=1), chunks=(2,))
    for _ in range(2):  # nor does a second try
        with pytest.raises(zds.UsageError, match="target exists"):
            zds.stream_chunks(tmp_path / "source", concurrency=1, checkpoint=tmp_path / "ledger").to_zarr(
                tmp_path / "target"
            ).run()
    same_bits(read(tmp_path / "target"), sample("i4", (8,), seed=1))


def test_a_resumed_overwrite_does_not_begin_again(tmp_path: Path) -> None:
    data = sample("i4", (8,))
    array_in(tmp_path / "source", data, chunks=(2,))
    array_in(tmp_path / "target", sample("i4", (80,), seed=1), chunks=(2,))
    for resumed in (0, 4):
        report = (
            zds.stream_chunks(tmp_path / "source", concurrency=1, checkpoint=tmp_path / "ledger")
            .to_zarr(tmp_path / "target", overwrite=True)
            .run()
        )
        assert report.resumed == resumed
        same_bits(read(tmp_path / "target"), data)


@pytest.mark.parametrize("moment", ["before it is made", "while it is made", "after it is made"])
def test_a_run_that_ended_while_its_target_was_made_goes_on(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zarr_dask_stream.source.target import Target  # noqa: PLC0415  # of this test alone

    data = sample("i4", (8,))
    array_in(tmp_path / "source", data, chunks=(2,))

    def stream() -> Any:
        chunks = zds.stream_chunks(tmp_path / "source", concurrency=1, checkpoint=tmp_path / "ledger")
        return chunks.to_zarr(tmp_path / "target", path="a/b")

    create = Target.create

    def killed(self: Target) -> None:
        if moment != "before it is made":
            create(self)
        if moment == "while it is made":
            (tmp_path / "target" / "a" / "b" / "zarr.json").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Target, "create", killed)
        with pytest.raises(KeyboardInterrupt):
            stream().run()
    stream().run()
    same_bits(read(tmp_path / "target", "a/b"), data)


def test_with_a_checkpoint_a_batch_waits_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = sample("i4", (8,))
    array_in(tmp_path / "source", data, chunks=(2,))
    flushed: list[int] = []
    monkeypatch.setattr(LocalFiles, "flush", lambda _: flushed.append(1))
    stream = zds.stream_chunks(tmp_path / "source", concurrency=1)
    stream.to_zarr(tmp_path / "a").run()
    assert not flushed
    zds.stream_chunks(tmp_path / "source", concurrency=1, checkpoint=tmp_path / "l").to_zarr(tmp_path / "b").run()
    assert flushed

    def broken(_: LocalFiles) -> None:
        raise OSError(5, "the disk is ill")

    monkeypatch.setattr(LocalFiles, "flush", broken)
    retry = zds.RetryPolicy(attempts=1)
    report = (
        zds.stream_chunks(tmp_path / "source", concurrency=1, checkpoint=tmp_path / "m", retry=retry, on_error="skip")
        .to_zarr(tmp_path / "c")
        .run()
    )
    assert (report.emitted, report.dead_lettered) == (0, 4)
    assert "the disk is ill" in report.dead_letters[0].message


def test_nothing_of_an_unfinished_file_stays(tmp_path: Path) -> None:
    """What a killed run left aside is gone after the one that goes on."""
    array_in(tmp_path / "source", sample("i4", (8,)), chunks=(2,))
    checkpoint = zds.Checkpoint(url=tmp_path / "ledger")
    stream = zds.stream_chunks(tmp_path / "source", concurrency=1, checkpoint=checkpoint).to_zarr(tmp_path / "target")
    aside = tmp_path / "target" / f".zds-{checkpoint.token}"
    aside.mkdir(parents=True)
    (aside / ".zds-1-0").write_bytes(b"half")
    stream.run()
    assert sorted(p.name for p in (tmp_path / "target").iterdir()) == ["c", "zarr.json"]

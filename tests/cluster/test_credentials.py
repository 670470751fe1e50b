"""Keys that are replaced while a stream runs, on a real S3 server that refuses the old ones."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from distributed import Client

import zarr_dask_stream as zds
from cluster.streaming import CHUNK_COUNT, pattern, total_of, write_array
from counted import balanced
from realparts.s3 import S3Server
from zarr_dask_stream.engine.events import ChunkRetried, Notice
from zarr_dask_stream.source.store import StoreSpec

pytestmark = [pytest.mark.cluster, pytest.mark.s3]

Key = tuple[str, str]
SOON = zds.RetryPolicy(attempts=8, wait_initial=0.02, wait_max=0.2)


@pytest.fixture
def user(s3_server: S3Server) -> str:
    name = f"user-{uuid.uuid4().hex[:8]}"
    s3_server.make_user(name)
    return name


@pytest.fixture
def url(s3_server: S3Server) -> str:
    place = f"s3://{s3_server.make_bucket(f'keys-{uuid.uuid4().hex[:8]}')}/a.zarr"
    write_array(place, storage_options=s3_server.storage_options)
    return place


def in_environment(key: Key, folder: Path) -> dict[str, str]:
    """Return variables that obstore is given."""
    return {"AWS_ACCESS_KEY_ID": key[0], "AWS_SECRET_ACCESS_KEY": key[1]}


def in_file(key: Key, folder: Path) -> dict[str, str]:
    """Write a file that botocore reads for s3fs; return the variable that names it."""
    file = folder / "credentials"
    file.write_text(f"[default]\naws_access_key_id = {key[0]}\naws_secret_access_key = {key[1]}\n")
    return {"AWS_SHARED_CREDENTIALS_FILE": str(file)}


def set_environment(values: dict[str, str], *, without: str = "") -> None:
    for name in [name for name in os.environ if without and name.startswith(without)]:
        del os.environ[name]
    os.environ.update(values)


def count_refreshes() -> None:
    """Count how often this process opens a store anew."""
    refresh = StoreSpec.refresh
    count = [0]

    def counted(self: StoreSpec) -> Any:
        count[0] += 1
        return refresh(self)

    StoreSpec.refresh = counted  # type: ignore[method-assign]  # put back by `refreshes`
    StoreSpec.counted = (count, refresh)  # type: ignore[attr-defined]  # for the lookup


def refreshes() -> int:
    """Return the count, and stop counting."""
    count, StoreSpec.refresh = StoreSpec.counted  # type: ignore[attr-defined,method-assign]  # set by `count_refreshes`
    return int(count[0])


@pytest.fixture
def everywhere(client: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, str]], None]]:
    """Return a function that sets environment variables here and on all workers, for this test only."""
    before = client.run(lambda: dict(os.environ))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)

    def put(values: dict[str, str]) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        client.run(set_environment, values)

    yield put
    for worker, values in before.items():
        client.run(set_environment, values, without="AWS_", workers=[worker])


@pytest.mark.parametrize("keep", [in_environment, in_file], ids=["obstore", "s3fs"])
def test_a_key_replaced_in_mid_run_costs_no_chunk(
    *, client: Client, everywhere: Any, s3_server: S3Server, user: str, url: str, tmp_path: Path, keep: Any
) -> None:
    old = s3_server.make_key(user)
    everywhere(keep(old, tmp_path))
    categories: list[str] = []

    def listen(notice: Notice) -> None:
        if isinstance(notice, ChunkRetried):
            categories.append(notice.failure.category.value)

    options = {"client_kwargs": {"endpoint_url": s3_server.endpoint, "region_name": "us-east-1"}}
    stream = zds.stream_chunks(
        url, storage_options=options, client=client, concurrency=8, retry=SOON, callbacks=[listen]
    ).map(total_of)
    client.run(count_refreshes)
    total = 0
    for number, item in enumerate(stream):
        total += item.data
        if number == 20:
            everywhere(keep(s3_server.make_key(user), tmp_path))
            s3_server.delete_key(user, *old)
    opened = client.run(refreshes)
    assert total == pattern().sum()
    assert stream.report.emitted == CHUNK_COUNT
    assert balanced(stream.report)
    assert set(categories) == {"credentials"}
    assert max(opened.values()) == 1
    assert stream.report.retries >= sum(opened.values())


@pytest.mark.parametrize("keep", [in_environment, in_file], ids=["obstore", "s3fs"])
def test_a_stream_made_after_a_key_was_replaced_takes_the_new_one(
    *, everywhere: Any, s3_server: S3Server, user: str, url: str, tmp_path: Path, keep: Any
) -> None:
    options = {"client_kwargs": {"endpoint_url": s3_server.endpoint, "region_name": "us-east-1"}}
    make = partial(zds.stream_chunks, url, storage_options=options, region=0, concurrency=1)
    old = s3_server.make_key(user)
    everywhere(keep(old, tmp_path))
    assert len(list(make())) == 10
    new = s3_server.make_key(user)
    everywhere(keep(new, tmp_path))
    s3_server.delete_key(user, *old)
    assert len(list(make())) == 10
    s3_server.delete_key(user, *new)
    with pytest.raises(zds.StoreError, match="InvalidAccessKeyId") as caught:
        make()
    assert "zarr.json" in str(caught.value)
    assert "<" not in str(caught.value)  # what the server said, not the document it said it in

"""Words that occur nowhere but in credentials, looked for in all that commands print and write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

import zarr_dask_stream as stream_package
from cluster.streaming import write_array
from realparts.fault_proxy import FaultProxy, Faults
from realparts.http_files import HttpStore
from realparts.s3 import S3Server, serve_s3
from zarr_dask_stream.watch.snapshot import snapshot

pytestmark = [pytest.mark.cluster, pytest.mark.s3, pytest.mark.slow]

KEY, SECRET, SIGNATURE, PASSWORD = "AKIACANARYKEY", "canary/secret+word", "canary-signature", "canary-password"
CANARIES = tuple(word.lower() for word in (KEY, SECRET, "canary%2Fsecret", SIGNATURE, PASSWORD, "signature="))
PLACE = "s3://secret-tests/a.zarr"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, s3_server: S3Server) -> Iterator[S3Server]:
    with serve_s3(tmp_path_factory.mktemp("canaries"), key=KEY, secret=SECRET) as server:
        server.make_bucket("secret-tests")
        write_array(PLACE, storage_options=server.storage_options)
        yield server


@pytest.fixture
def zds(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Return `zds(*args)`, which runs a command in a folder of its own; gives its exit code and all that it said."""
    (tmp_path / "mine.py").write_text("def biggest(chunk):\n    return chunk.data.max()\n")

    def run(*args: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "zarr_dask_stream", *args, "--debug"]
        environment = {**os.environ, "TMPDIR": str(tmp_path), "DASK_LOGGING__DISTRIBUTED": "debug"}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        return done.returncode, done.stdout + done.stderr

    return run


def leaves_no_trace(said: str, folder: Path) -> None:
    texts = {"what was said": said}
    texts |= {str(path): path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()}
    found = [f"{place}: {word}" for place, text in texts.items() for word in CANARIES if word in text.lower()]
    assert not found


def options_at(server: S3Server, endpoint: str, **more: str) -> list[str]:
    words = {"key": server.key, "secret": server.secret, "client_kwargs.region_name": "us-east-1"}
    words |= {"client_kwargs.endpoint_url": endpoint, **more}
    return [text for name, value in words.items() for text in ("--storage-option", f"{name}={value}")]


COMMANDS = [
    (["info", PLACE, "--stored"], [0]),
    (["stats", PLACE, "--checkpoint", "s3://secret-tests/stats.ledger", "--workers", "1"], [0, 1]),
    pytest.param(
        ["verify", PLACE, "--retries", "0", "--dead-letters", "bad.jsonl", "--json"], [1], marks=pytest.mark.sample
    ),
    (["run", "mine:biggest", PLACE, "--out", "out.jsonl", "--checkpoint", "run.ledger"], [0, 1]),
    (["bench", PLACE, "--seconds", "1"], [0, 1, 3]),
]


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
@pytest.mark.parametrize(("command", "codes"), COMMANDS)
def test_commands_keep_secrets(
    *,
    server: S3Server,
    zds: Callable[..., tuple[int, str]],
    fault_proxy: Callable[..., FaultProxy],
    tmp_path: Path,
    command: list[str],
    codes: list[int],
    client: str,
) -> None:
    proxy = fault_proxy(server.endpoint, seed=1)
    proxy.set(Faults(slow_down=0.02, reset=0.04, truncate=0.1, expired=0.02, match=r"GET .*/c/"))
    more = {"default_cache_type": "none"} if client == "s3fs" else {}
    code, said = zds(*command, *options_at(server, proxy.url, **more))
    assert code in codes, said
    leaves_no_trace(said, tmp_path)
    files = fsspec.filesystem("s3", **server.storage_options, skip_instance_cache=True)
    for path in files.find("secret-tests/stats.ledger"):
        assert not [word for word in CANARIES if word.encode() in files.cat_file(path).lower()]


@pytest.mark.parametrize("client", ["obstore", "s3fs"])
@pytest.mark.parametrize("wrong", [pytest.param("secret", marks=pytest.mark.sample), "endpoint", "bucket"])
def test_commands_that_fail_keep_secrets(
    *, server: S3Server, zds: Callable[..., tuple[int, str]], tmp_path: Path, wrong: str, client: str
) -> None:
    more = {"default_cache_type": "none"} if client == "s3fs" else {}
    if wrong == "secret":
        more["secret"] = f"{SECRET}x"
    endpoint = "http://127.0.0.1:9" if wrong == "endpoint" else server.endpoint
    place = "s3://no-such-bucket/a.zarr" if wrong == "bucket" else PLACE
    code, said = zds("stats", place, *options_at(server, endpoint, **more))
    assert code == 3
    assert "Traceback" in said
    leaves_no_trace(said, tmp_path)


@pytest.mark.parametrize("command", [["stats"], ["verify", "--retries", "0", "--dead-letters", "bad.jsonl"]])
def test_secrets_in_a_url_stay_there(
    *,
    zds: Callable[..., tuple[int, str]],
    http_store: HttpStore,
    fault_proxy: Callable[..., FaultProxy],
    tmp_path: Path,
    command: list[str],
) -> None:
    write_array(str(http_store.directory / "a.zarr"))
    proxy = fault_proxy(http_store.url)
    proxy.set(Faults(slow_down=0.02, reset=0.04, truncate=0.1, match=r"GET .*/c/"))
    place = f"{proxy.url.replace('://', f'://me:{PASSWORD}@')}/a.zarr?X-Amz-Signature={SIGNATURE}"
    code, said = zds(*command, place, "--json")
    assert code in (0, 1), said
    assert json.loads(said[said.index("{\n") :].partition("\n}\n")[0] + "\n}")["url"] == f"{proxy.url}/a.zarr"
    leaves_no_trace(said, tmp_path)


@pytest.mark.sample
@pytest.mark.parametrize("client", ["obstore", "s3fs"])
def test_reports_and_snapshots_keep_secrets(
    *, server: S3Server, fault_proxy: Callable[..., FaultProxy], tmp_path: Path, client: str
) -> None:
    """With everything that can be said of a run: chunks that healed, chunks that did not, an error that ended it."""
    proxy = fault_proxy(server.endpoint, seed=4)
    proxy.set(Faults(slow_down=0.05, reset=0.1, truncate=0.2, match=r"GET .*/c/"))
    more = {"default_cache_type": "none"} if client == "s3fs" else {}
    options = server.options_at(proxy.url) | more
    quick = stream_package.RetryPolicy(attempts=2, wait_initial=0.01, wait_max=0.02)
    healed = stream_package.stream_chunks(
        PLACE, storage_options=options, concurrency=1, retry=quick, on_error="skip", region=slice(0, 12)
    )
    healed.run()
    assert healed.report.retries
    assert healed.report.dead_letters
    proxy.set(Faults(expired=1.0, match=r"GET .*/c/"))
    failed = stream_package.stream_chunks(PLACE, storage_options=options, concurrency=1, retry=quick)
    with pytest.raises(stream_package.ChunkError):
        failed.run()
    for name, report in (("healed", healed.report), ("failed", failed.report)):
        report.to_html(tmp_path / f"{name}.html")
        said = [
            repr(report),
            str(report),
            report._repr_html_(),
            json.dumps(report.to_dict()),
            json.dumps(snapshot(report, report.chunkmap, report.history)),
            repr(report.advice()),
            repr(vars(report)),
        ]
        (tmp_path / f"{name}.txt").write_text("\n".join(said))
        assert "secret-tests" in said[3]
    leaves_no_trace("", tmp_path)

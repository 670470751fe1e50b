"""Every code block of the README runs, every command in it exists, every link leads somewhere."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from pages import ROOT, Page
from realparts.cluster import TcpCluster
from zarr_dask_stream.cli.command import zds

README = Page(ROOT / "README.md")
TEXT = README.text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the README's own first `zds` command has been run."""
    folder = tmp_path_factory.mktemp("readme")
    first, *_ = README.of("zds")
    assert first[:2] == ["demo", "--keep"]
    result = CliRunner().invoke(zds, ["demo", "--keep", str(folder / first[2])])
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_every_block_is_of_a_kind_that_is_tested_here() -> None:
    assert {block.language for block in README.blocks} == {"console", "python"}
    assert {line.split()[0] for line in README.commands} == {"python3", "zds", "pip", "dask"}


def test_the_python_blocks_run_one_after_the_other(inside: None) -> None:
    assert "in chunk (" in README.run_python()


@pytest.mark.parametrize("args", [args for args in README.of("zds")[1:] if "--scheduler" not in args], ids=" ".join)
def test_the_zds_commands_run(inside: None, args: list[str]) -> None:
    result = CliRunner().invoke(zds, args)
    assert result.exit_code == 0, result.stderr
    assert result.stdout


def test_the_cluster_commands_run(inside: None, start_tcp_cluster: Callable[..., TcpCluster]) -> None:
    assert [args[0] for args in README.of("dask")] == ["scheduler", "worker"]  # which is what the fixture starts
    (args,) = [args for args in README.of("zds") if "--scheduler" in args]
    address = start_tcp_cluster(workers=1).address
    result = CliRunner().invoke(zds, [re.sub(r"^tcp://.*", address, word) for word in args])
    assert result.exit_code == 0, result.stderr


def test_the_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {target for args in README.of("make") for target in args} <= targets
    assert set(re.findall(r"`make ([a-z-]+)`", TEXT)) <= targets


def test_the_extras_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for args in README.of("pip"):
        assert args[0] == "install"
        named = re.fullmatch(r"\.(?:\[(.*)\])?", args[1])
        assert named
        assert set(filter(None, (named[1] or "").split(","))) <= set(extras)


def test_links_lead_somewhere() -> None:
    links = [link.partition("#")[0] for link in README.links()]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []

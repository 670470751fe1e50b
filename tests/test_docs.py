"""The pages of the site: their code runs, their commands exist, their links lead somewhere, the site builds."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import zarr
from click.testing import CliRunner

import zarr_dask_stream.testing
from pages import ROOT, Page
from realparts.browser import Browser
from realparts.cluster import TcpCluster
from realparts.s3 import S3Server
from zarr_dask_stream.cli.command import zds

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): Page(path) for path in sorted(DOCS.rglob("*.md"))}
#: Pages whose code needs a server are run by tests of their own.
WITH_SERVERS = {"tutorial.md", "how-to/s3.md"}
#: Programs that a page may call: these are run or checked below, those in the second line are other people's.
PROGRAMS = {"zds", "pip", "make", "dask", "python", "python3"}
PROGRAMS |= {".", "export", "sinfo", "sbatch", "squeue", "scancel", "kubectl", "helm", "curl"}


def _has_python(name: str) -> bool:
    return any(block.language == "python" for block in PAGES[name].blocks)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that `zds demo --keep data` makes."""
    folder = tmp_path_factory.mktemp("docs") / "data"
    result = CliRunner().invoke(zds, ["demo", "--keep", str(folder)])
    assert result.exit_code == 0, result.stderr
    return folder


@pytest.fixture
def inside(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "data").symlink_to(data)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [name for name in PAGES if _has_python(name) and name not in WITH_SERVERS])
def test_the_python_blocks_run(inside: Path, name: str) -> None:
    PAGES[name].run_python()


def test_the_tutorial_runs(inside: Path, start_tcp_cluster: Callable[..., TcpCluster]) -> None:
    page = PAGES["tutorial.md"]
    assert [args[0] for args in page.of("dask")] == ["scheduler", "worker"]  # which is what the fixture starts
    address = start_tcp_cluster(workers=2).address
    page.run_python({"tcp://127.0.0.1:8786": address})


@pytest.fixture
def bucket(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a bucket with what the page about S3 reads, and set what it says should be set."""
    name = s3_server.make_bucket("docs")
    variables = {
        "AWS_ACCESS_KEY_ID": s3_server.key,
        "AWS_SECRET_ACCESS_KEY": s3_server.secret,
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server.endpoint,
    }
    text = PAGES["how-to/s3.md"].text
    for variable, value in variables.items():
        assert variable in text
        monkeypatch.setenv(variable, value)
    options = s3_server.storage_options
    array = zarr.create_array(
        f"s3://{name}/temperature.zarr", shape=(40, 60), chunks=(10, 10), dtype="f4", storage_options=options
    )
    array[:] = np.arange(2400, dtype="f4").reshape(40, 60)
    return name


def test_the_page_about_s3_runs(inside: Path, bucket: str) -> None:
    page = PAGES["how-to/s3.md"]
    said = page.run_python({"s3://bucket/": f"s3://{bucket}/", '"bucket",': f'"{bucket}",'})
    assert said.split() == ["24"] * said.count("24")
    for args in page.of("zds"):
        result = CliRunner().invoke(zds, [arg.replace("s3://bucket/", f"s3://{bucket}/") for arg in args])
        assert result.exit_code == 0, result.stderr


def _commands() -> list[Any]:
    return [
        pytest.param(args, id=f"{name}: {' '.join(args)}")
        for name, page in PAGES.items()
        for args in page.of("zds")
        if name != "how-to/s3.md" and not {"--scheduler", "--keep", "--help"} & set(args)
    ]


@pytest.mark.parametrize("args", _commands())
def test_the_zds_commands_run(inside: Path, args: list[str]) -> None:
    result = CliRunner().invoke(zds, args)
    assert result.exit_code == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if any(b.language == "sh" for b in page.blocks)])
def test_the_shell_scripts_run(inside: Path, name: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in PAGES[name].blocks:
        if block.language == "sh":
            done = subprocess.run(
                ["sh", "-u"],
                input=block.code,
                env={**os.environ, "PATH": path},
                capture_output=True,
                text=True,
                timeout=100,
                check=False,
            )
            assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", PAGES)
def test_commands_and_names_exist(name: str) -> None:
    page = PAGES[name]
    assert {line.split()[0] for line in page.commands} <= PROGRAMS
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {target for args in page.of("make") for target in args} | set(re.findall(r"`make ([a-z-]+)`", page.text))
    assert named <= targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for args in page.of("pip"):
        assert args[0] == "install"
        for some in re.findall(r"\[(.*)\]", " ".join(args[1:])):
            assert set(some.split(",")) <= set(extras)
    options = {opt for command in zds.commands.values() for param in command.params for opt in param.opts}
    used = {word for args in page.of("zds") for word in args if word.startswith("--")}
    assert used - {"--help"} <= options
    for word in set(re.findall(r"\bzds\.([A-Za-z_]+)", page.text)) - {"commands"}:
        assert hasattr(zarr_dask_stream, word), f"zds.{word}"


@pytest.mark.parametrize("name", PAGES)
def test_every_block_is_of_a_kind_that_is_tested(name: str) -> None:
    assert {block.language for block in PAGES[name].blocks} <= {"python", "console", "sh", "text", "toml", "yaml"}


@pytest.mark.parametrize("name", PAGES)
def test_links_and_quoted_files_are_there(name: str) -> None:
    page = PAGES[name]
    links = [link.partition("#")[0] for link in page.links()]
    assert [link for link in links if link and not (page.path.parent / link).exists()] == []
    quoted = re.findall(r'--8<-- "([^":]+)', page.text)
    assert [path for path in quoted if not (ROOT / path).is_file()] == []
    named = re.findall(r"`((?:tests|deploy|docs|examples|notebooks)/[\w./-]*\w/?)(?:::\w+)?`", page.text)
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize(
    "path",
    [*ROOT.glob("*.md"), *ROOT.glob("deploy/**/*.md"), *DOCS.rglob("*.md")],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_links_lead_to_headings_that_are_there(path: Path) -> None:
    reference = "reference/" in path.as_posix()  # whose headings are made when the site is built, which checks them
    dangling = Page(path).dangling()
    assert [link for link in dangling if not (reference or "reference/" in link)] == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One `two`: three\n[a](#one-two-three) [b](#one) [c](page.md#two) [d](other.md) [e](https://x.y/#z)\n"
    )
    assert Page(page).dangling() == ["#one", "page.md#two", "other.md"]


def _tests_named_in(text: str) -> set[tuple[str, str]]:
    return set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text))


@pytest.mark.parametrize(
    "place",
    ["docs/explanation/failures.md", "docs/explanation/guarantees.md", "docs/explanation/load.md", "SECURITY.md"],
)
def test_the_tests_that_prove_what_is_said_exist(place: str) -> None:
    named = _tests_named_in((ROOT / place).read_text(encoding="utf-8"))
    assert named
    for path, test in sorted(named):
        assert re.search(rf"^\s*(async )?def {test}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), (
            f"{path} has no {test}"
        )


def test_each_fault_names_its_proof() -> None:
    text = (DOCS / "explanation/failures.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| Fault")]
    assert len(rows) > 25
    assert [row for row in rows if not _tests_named_in(row)] == []


def test_each_public_name_has_its_place_in_the_reference() -> None:
    """By its own name, or as a member of a module that is shown whole."""
    text = "\n".join(page.text for name, page in PAGES.items() if name.startswith("reference/"))
    shown = {line.rpartition(".")[2] for line in re.findall(r"^::: ([\w.]+)", text, re.MULTILINE)}
    shown |= set(re.findall(r"^ +- (\w+)$", text, re.MULTILINE))
    assert set(zarr_dask_stream.__all__) - shown - {"errors", "reducers"} == set()
    listed = {name for names in re.findall(r"members: \[(.*?)\]", text) for name in re.split(r",\s*", names)}
    public = set(zarr_dask_stream.reducers.__all__)
    named = set(re.findall(r"`(\w+)`", PAGES["reference/reducers.md"].text))
    assert public - listed - named - {"Statistic"} == set()


def _public_things() -> Iterator[tuple[str, Any]]:
    """Give what the reference shows: public names, and what a stream can be asked for."""
    for module in (zarr_dask_stream, zarr_dask_stream.reducers, zarr_dask_stream.errors, zarr_dask_stream.testing):
        for name in module.__all__:
            if not inspect.ismodule(thing := getattr(module, name)):
                yield f"{module.__name__}.{name}", thing
    for name, thing in inspect.getmembers(zarr_dask_stream.ChunkStream):
        if not name.startswith("_"):
            yield f"ChunkStream.{name}", thing


#: Said beside their counterparts, whose examples show both.
_SHOWN_ELSEWHERE = {"ChunkStream.resume": "ChunkStream.paused", "ChunkStream.pause": "ChunkStream.paused"}
_SHOWN_ELSEWHERE |= {"ChunkStream.feed_async": "ChunkStream.feed", "ChunkStream.draining": "ChunkStream.drain"}


def test_each_public_thing_is_described_with_an_example() -> None:
    """Which the doctests of the package run."""
    things = {name: inspect.getdoc(thing) or "" for name, thing in _public_things()}
    assert [name for name, text in things.items() if not text] == []
    bare = {name for name, text in things.items() if ">>> " not in text}
    assert bare - set(_SHOWN_ELSEWHERE) == set()
    assert set(_SHOWN_ELSEWHERE.values()) <= set(things) - bare


def test_each_command_is_in_the_reference() -> None:
    assert "<!-- commands -->" in PAGES["reference/cli.md"].text
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs/hooks.py")
    assert spec is not None
    assert spec.loader is not None
    hooks = importlib.util.module_from_spec(spec)
    pytest.importorskip("mkdocs", reason="the site's builder is not installed: pip install 'zarr-dask-stream[docs]'")
    spec.loader.exec_module(hooks)
    text = hooks.commands()
    assert isinstance(zds, click.Group)
    for name, command in zds.commands.items():
        assert f"## zds {name}" in text
        assert all(param.opts[0] in text for param in command.params)


def test_each_page_is_in_the_navigation() -> None:
    """mkdocs warns of those that are not; this says so without it."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [name for name in PAGES if not re.search(rf"[ :]{re.escape(name)}$", text, re.MULTILINE)] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the site, built with warnings as errors."""
    if importlib.util.find_spec("mkdocs") is None:
        reason = "the site's builder is not installed: pip install 'zarr-dask-stream[docs]'"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("site") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    done = subprocess.run(
        [*command, "--site-dir", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.sample
@pytest.mark.xdist_group("site")
def test_the_site_is_whole_and_needs_no_network(site: Path) -> None:
    texts = {page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert {name.replace(".md", ".html") for name in PAGES} <= set(texts)
    assert "stream_chunks" in texts["reference/streams.html"]
    assert "--storage-option" in texts["reference/cli.html"]
    assert "map_blocks" in texts["explanation/performance.html"]
    assert "supervisor.py" in texts["explanation/architecture.html"]
    assert not list(site.rglob("*.py"))
    for name, text in texts.items():
        assert not re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=\"?https?:[^>]*>", text), name
        assert not re.findall(r"<link\b[^>]*rel=\"?stylesheet[^>]*href=\"?https?:[^>]*>", text), name


@pytest.mark.slow
@pytest.mark.sample
@pytest.mark.xdist_group("site")
def test_the_site_in_a_browser(site: Path, browser: Browser) -> None:
    """Out of files, as `make docs` leaves it: pages load without an error, searching finds, and nothing is cut off."""
    with browser.tab() as tab:
        tab.goto(site / "index.html")
        tab.page.locator(".md-search__input").click()
        tab.page.keyboard.type("checkpoint")
        found = tab.page.locator(".md-search-result__link")
        found.first.wait_for(timeout=20_000)
        assert "resume" in " ".join(link.get_attribute("href") for link in found.all())
        assert tab.errors == []
        assert [url for url in tab.requests if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
    for dark in (False, True):
        with browser.tab(width=400, dark=dark) as tab:
            for name in ("tutorial.html", "reference/streams.html", "explanation/failures.html"):
                tab.goto(site / name)
                assert tab.page.title()
                assert tab.page.evaluate("document.documentElement.scrollWidth") <= 400, name
            assert tab.errors == []

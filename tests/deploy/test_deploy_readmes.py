"""What the READMEs of the deployments say exists: files, links, tests, options of the scripts and of `zds`."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from zarr_dask_stream.cli.command import zds

ROOT = Path(__file__).resolve().parents[2]
READMES = sorted((ROOT / "deploy").rglob("README.md"))
SCRIPTS = sorted(script for script in (ROOT / "deploy").rglob("*.py") if "add_argument" in script.read_text())


def commands(readme: Path) -> list[list[str]]:
    """Return the words of each command, lines that are continued joined."""
    blocks = re.findall(r"^```console\n(.*?)^```", readme.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n", " ", block).splitlines()]
    return [shlex.split(line.removeprefix("$ ")) for line in lines if line.startswith("$ ")]


def options_of(script: Path) -> set[str]:
    """Return the options that a script takes, without running it: what it imports may not be installed."""
    calls = [node for node in ast.walk(ast.parse(script.read_text())) if isinstance(node, ast.Call)]
    added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    return {str(word.value) for call in added for word in call.args if isinstance(word, ast.Constant)}


def options_in(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--") and word != "--"}


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_links_and_paths_lead_somewhere(readme: Path) -> None:
    text = readme.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (readme.parent / link).exists(), link
    for path in re.findall(r"\b((?:deploy|tests)/[\w./-]+\w)", text):
        assert (ROOT / path).exists(), path


def test_every_deployment_is_in_the_table() -> None:
    table = (ROOT / "deploy" / "README.md").read_text()
    folders = {folder.name for folder in (ROOT / "deploy").iterdir() if folder.is_dir()}
    assert set(re.findall(r"^\| \[([a-z]+)\]\(\1/README.md\)", table, re.MULTILINE)) == folders


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_options_exist(readme: Path) -> None:
    for words in commands(readme):
        before, after = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
        script = next((ROOT / word for word in before if (ROOT / word) in SCRIPTS), None)
        if script is not None:
            own = before[before.index(str(script.relative_to(ROOT))) + 1 :]
            assert options_in(own) <= options_of(script), words
        for part in (before, after):
            if "zds" in part:
                name, *rest = part[part.index("zds") + 1 :]
                taken = {option for parameter in zds.commands[name].params for option in parameter.opts}
                assert options_in(rest) <= taken, words


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_a_user_is_told_what_to_see_how_to_go_on_and_what_was_not_run(readme: Path) -> None:
    text = readme.read_text()
    if readme.parent.name == "cloud":
        assert "None of this has been run" in text
        return
    assert re.search("^##+ What you see$", text, re.MULTILINE)
    assert re.search("killed|After a kill", text)
    if readme.parent.name != "deploy":
        assert re.search("^## How it is tested$.* not run", text, re.MULTILINE | re.DOTALL)
        assert readme.parent.name == "grafana" or "../README.md#what-you-see" in text


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_links_into_pages_name_their_headings(readme: Path) -> None:
    for page, name in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", readme.read_text()):
        text = (readme.parent / page if page else readme).read_text()
        headings = {line.lower().replace(" ", "-") for line in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
        assert name in headings, (page, name)


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_every_job_has_a_ledger(readme: Path) -> None:
    """All deployments run the same job, and can go on with it."""
    jobs = [words for words in commands(readme) if "stats" in words and "compose" not in words]
    assert all("--checkpoint" in words for words in jobs)  # that of compose and Kubernetes is in their files
    assert jobs or readme.parent.name in {"deploy", "cloud", "kubernetes", "slurm"}


@pytest.mark.parametrize("readme", READMES, ids=lambda readme: readme.parent.name)
def test_schedulers_and_workers_of_the_commands_keep_http_on_loopback(readme: Path) -> None:
    for words in commands(readme):
        if "dask" in words:
            assert words[words.index("--dashboard-address") + 1].startswith("127.0.0.1:"), words


def test_requirements_are_pinned() -> None:
    files = sorted((ROOT / "deploy").rglob("requirements.txt"))
    assert len(files) >= 5
    for file in files:
        for line in file.read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+(\[\w+\])?==[\d.]+", line), (file, line)

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


def test_requirements_are_pinned() -> None:
    files = sorted((ROOT / "deploy").rglob("requirements.txt"))
    assert len(files) >= 5
    for file in files:
        for line in file.read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+(\[\w+\])?==[\d.]+", line), (file, line)

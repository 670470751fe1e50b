"""Documents whose code is run: the README and the pages of the site."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ROOT", "Block", "Page"]

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(
    r"^(?P<fence>```+)(?P<language>\w*)(?P<more>[^\n]*)\n(?P<code>.*?)^(?P=fence)$", re.MULTILINE | re.DOTALL
)
_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what is said beside it, what is in it, and where it begins."""

    language: str
    more: str
    code: str
    line: int

    @property
    def is_output(self) -> bool:
        """Whether this is what the Python block before it prints."""
        return self.language == "text" and 'title="Output"' in self.more


class Page:
    """A Markdown document of this project."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")
        self.blocks = [
            Block(found["language"], found["more"], found["code"], self.text.count("\n", 0, found.start()) + 2)
            for found in _BLOCK.finditer(self.text)
        ]

    @property
    def name(self) -> str:
        """Path from the source folder."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def prose(self) -> str:
        """The text without its blocks of code."""
        return _BLOCK.sub("", self.text)

    @property
    def commands(self) -> list[str]:
        """Lines that are typed at a prompt."""
        return [
            line.removeprefix("$ ")
            for block in self.blocks
            if block.language == "console"
            for line in block.code.replace("\\\n", " ").splitlines()
            if line.startswith("$ ")
        ]

    def of(self, program: str) -> list[list[str]]:
        """Return the arguments of each command that runs `program`."""
        return [
            words[1:] for words in (shlex.split(line, comments=True) for line in self.commands) if words[0] == program
        ]

    def run_python(self, replaced: Mapping[str, str] | None = None) -> str:
        """Run the Python blocks one after the other; return all that they printed.

        A block of text that is titled "Output" must be what the block before it prints, as in a doctest.
        `replaced` gives what stands in for parts of the text, such as addresses.
        """
        # As in a script: functions travel to the workers by value.
        namespace: dict[str, Any] = {"__name__": "__main__"}
        printed, said = "", ""
        for block in self.blocks:
            code = block.code
            for old, new in (replaced or {}).items():
                code = code.replace(old, new)
            if block.language == "python":
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(compile("\n" * (block.line - 1) + code, self.name, "exec"), namespace)
                said = out.getvalue()
                printed += said
            elif block.is_output:
                fits = doctest.OutputChecker().check_output(code, said, _OPTIONS)
                assert fits, f"{self.name}, line {block.line}: it says\n{code}and the code before it prints\n{said}"
        return printed

    @property
    def anchors(self) -> set[str]:
        """Names of its headings in links."""
        headings = re.findall(r"^#+ +(.+)$", self.prose, re.MULTILINE)
        words = (re.sub(r"\]\([^)]*\)|[^\w\s-]", "", heading).strip().lower() for heading in headings)
        return {re.sub(r"\s", "-", heading) for heading in words}

    def dangling(self) -> list[str]:
        """Return links to files or headings that are not there."""
        found = []
        for link in re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)", self.prose):
            path, _, anchor = link.partition("#")
            target = (self.path.parent / path).resolve() if path else self.path
            known = target.exists() and (not anchor or target.suffix != ".md" or anchor in Page(target).anchors)
            found += [] if known else [link]
        return found

    def links(self) -> list[str]:
        """Return where the links and pictures lead that are no addresses on the web."""
        return re.findall(r"\]\((?!https?:|#)([^)\s]+)", self.prose)

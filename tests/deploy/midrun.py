"""When a job is in the middle of its work, and what it says at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from realparts.process import Process

#: Chunks of an array that takes long enough to be disturbed, at so many a second.
COUNT, RATE = 300, 30


def stats(url: Path, ledger: Path, scheduler: str) -> list[str]:
    """Return the arguments of `zds` for the job that all deployments run, slowed down."""
    words = ["stats", str(url), "--scheduler", scheduler, "--checkpoint", str(ledger)]
    return [*words, "--rate-limit", f"{RATE}/s", "--json"]


def has_progress(ledger: Path) -> bool:
    """Whether the ledger holds some chunks and others are to come: some seconds after the start, when it is saved."""
    try:
        return 0 < int(json.loads(ledger.read_text())["finished"]) < COUNT
    except (OSError, ValueError):
        return False


def wait_for_progress(job: Process, ledger: Path) -> None:
    """Wait until a job has chunks in its ledger, and others to come."""
    job.wait_ready(lambda: has_progress(ledger), timeout_s=90)


def answer_in(text: str) -> dict[str, Any]:
    """Return the JSON that `zds` prints, which may stand between lines of others."""
    answer: dict[str, Any] = json.loads(text[text.index("{\n") : text.rindex("\n}") + 2])
    return answer

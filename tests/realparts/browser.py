"""A real browser (Chromium, driven by Playwright) without a window."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from realparts.packages import absent, need_debian

_ARGUMENTS = (
    "--no-sandbox",  # Chromium refuses root otherwise
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class Tab:
    """A page that is open, and all that went wrong on it.

    `errors` are errors on the console and exceptions of scripts; `requests` are the addresses that were asked for.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def goto(self, url: str | Path) -> None:
        """Open an address, or a file."""
        self.page.goto(url.resolve().as_uri() if isinstance(url, Path) else url)

    def shot(self, path: Path, *, full: bool = True) -> Path:
        """Write a picture of the page."""
        self.page.screenshot(path=str(path), full_page=full)
        return path


@dataclass
class Browser:
    """A running browser; each tab has cookies and storage of its own."""

    chromium: Any

    @contextmanager
    def tab(
        self, *, width: int = 1200, height: int = 900, dark: bool = False, scripts: bool = True, still: bool = True
    ) -> Iterator[Tab]:
        """Open a tab; close it at the end. `still`: the system asks for less motion."""
        context = self.chromium.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            reduced_motion="reduce" if still else "no-preference",
            java_script_enabled=scripts,
            device_scale_factor=1,
        )
        try:
            tab = Tab(context.new_page())
            tab.page.on("console", lambda m: tab.errors.append(m.text) if m.type == "error" else None)
            tab.page.on("pageerror", lambda error: tab.errors.append(str(error)))
            tab.page.on("request", lambda request: tab.requests.append(request.url))
            yield tab
        finally:
            context.close()


def chromium_binary() -> str | None:
    """Return the browser that is installed, or None."""
    return next((path for name in _NAMES if (path := shutil.which(name)) is not None), None)


@contextmanager
def run_browser() -> Iterator[Browser]:
    """Start Chromium, installed first where that is missing and allowed; skip the test where there is none.

    While it runs, its thread has an event loop: no asynchronous test may run in it.
    """
    try:
        playwright = importlib.import_module("playwright.sync_api")
    except ImportError:
        absent("no driver for a browser: pip install playwright")
    if chromium_binary() is None:
        need_debian("chromium", "fonts-dejavu-core")
    binary = chromium_binary()
    if binary is None:
        absent("no Chromium: apt-get install chromium fonts-dejavu-core")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=binary, args=list(_ARGUMENTS))
        try:
            yield Browser(chromium)
        finally:
            chromium.close()

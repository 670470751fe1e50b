"""A real JupyterLab server of our own, with a folder of notebooks and settings that nobody else sees."""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from realparts.process import Process, free_ports

nbformat: Any = pytest.importorskip("nbformat", reason="notebooks: pip install '.[notebook]'")


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab; notebooks are files in `folder`."""

    url: str
    folder: Path
    process: Process

    def write(self, name: str, cells: Sequence[str]) -> Path:
        """Write a notebook of code cells, for the kernel of this Python."""
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in cells],
            metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        )
        path = self.folder / name
        nbformat.write(notebook, path)
        return path

    def read(self, name: str) -> Any:
        """Read a notebook as it was saved."""
        return nbformat.read(self.folder / name, as_version=4)


@contextmanager
def run_lab(folder: Path, *, dark: bool = False) -> Iterator[Lab]:
    """Start JupyterLab in `folder`, yield it once it answers, end it with its kernels."""
    pytest.importorskip("jupyterlab", reason="a notebook server: pip install jupyterlab")
    notebooks = folder / "notebooks"
    notebooks.mkdir(parents=True, exist_ok=True)
    settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    theme = "JupyterLab Dark" if dark else "JupyterLab Light"
    (settings / "themes.jupyterlab-settings").write_text(json.dumps({"theme": theme}))
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    [port] = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    process = Process.start(
        "jupyter-lab",
        [
            *(sys.executable, "-m", "jupyterlab", "--allow-root", "--no-browser", "--ServerApp.ip=127.0.0.1"),
            f"--ServerApp.port={port}",
            "--ServerApp.port_retries=0",
            "--IdentityProvider.token=",
            "--LabApp.expose_app_in_browser=True",
            "--LabApp.extension_manager=readonly",
            f"--ServerApp.root_dir={notebooks}",
        ],
        folder=folder,
        env={
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "JUPYTER_DATA_DIR": str(folder / "data"),
            "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
            "IPYTHONDIR": str(folder / "ipython"),
        },
    )
    try:
        process.wait_ready(lambda: _answers(f"{url}/api/status"), timeout_s=60)
        yield Lab(url, notebooks, process)
    finally:
        process.end()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False

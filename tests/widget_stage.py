"""The widget's own script and style in a bare page, with a model that is fed by a test: every state within a second."""

from __future__ import annotations

import base64
import json
from importlib.resources import files
from typing import Any

from realparts.browser import Tab

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>stage</title><style>{css}
body {{ margin: 16px; background: {ground}; }}</style><body data-jp-theme-light="{light}"><main></main>
<script type="module">
const listeners = {{}};
const revive = (frame) => ({{ ...frame, cells: view(frame.cells), shares: view(frame.shares) }});
const view = (text) => new DataView(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
window.sent = [];
window.model = {{
  frame: null,
  get(name) {{ return this[name]; }},
  on(event, heard) {{ (listeners[event] ??= []).push(heard); }},
  off(event, heard) {{ listeners[event] = (listeners[event] ?? []).filter((one) => one !== heard); }},
  send(message) {{ window.sent.push(message); }},
}};
window.tell = (event, value) => (listeners[event] ?? []).forEach((heard) => heard(value));
window.feed = (frame) => {{ window.model.frame = revive(frame); window.tell("change:frame"); }};
window.start = async (script, frame) => {{
  window.model.frame = revive(frame);
  const url = URL.createObjectURL(new Blob([script], {{ type: "text/javascript" }}));
  const widget = (await import(url)).default;
  window.cleanup = widget.render({{ model: window.model, el: document.querySelector("main") }});
  window.listeners = listeners;
}};
window.ready = true;
</script></body></html>"""


def _plain(frame: dict[str, Any]) -> dict[str, Any]:
    binary = {name: base64.b64encode(frame[name]).decode() for name in ("cells", "shares")}
    plain: dict[str, Any] = json.loads(json.dumps({**frame, **binary}))
    return plain


class Stage:
    """A tab with the widget on it."""

    def __init__(self, tab: Tab, frame: dict[str, Any], *, dark: bool = False) -> None:
        self.tab = tab
        here = files("zarr_dask_stream.watch")
        css, script = ((here / f"widget.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
        ground = "#111111" if dark else "#ffffff"
        tab.page.set_content(_PAGE.format(css=css, ground=ground, light="false" if dark else "true"))
        tab.page.wait_for_function("window.ready")
        tab.page.evaluate("([script, frame]) => window.start(script, frame)", [script, _plain(frame)])

    def feed(self, frame: dict[str, Any]) -> None:
        """Give the widget another frame, and wait until it is drawn."""
        self.tab.page.evaluate("(frame) => window.feed(frame)", _plain(frame))
        self.tab.page.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    @property
    def sent(self) -> list[dict[str, Any]]:
        """What the widget has sent so far."""
        found: list[dict[str, Any]] = self.tab.page.evaluate("window.sent")
        return found

    @property
    def pressed(self) -> list[dict[str, Any]]:
        """What of that is about the stream, and not a question for the label of a cell."""
        return [message for message in self.sent if message["zds"] != "label"]

    def text(self, selector: str = ".zds-live") -> str:
        """Return what a person reads."""
        return str(self.tab.page.inner_text(selector))

    def colours(self) -> set[str]:
        """Return the colours on the map, as #rrggbb."""
        return canvas_colours(self.tab.page)


def canvas_colours(page: Any) -> set[str]:
    """Return the colours of the pixels of the first chunk map on a page, as #rrggbb."""
    found: list[str] = page.evaluate(
        """() => {
          const canvas = document.querySelector(".zds-canvas");
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          const seen = new Set();
          for (let i = 0; i < data.length; i += 4) seen.add((data[i] << 16) | (data[i + 1] << 8) | data[i + 2]);
          return [...seen].map((n) => "#" + n.toString(16).padStart(6, "0"));
        }"""
    )
    return set(found)

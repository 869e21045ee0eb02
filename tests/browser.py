"""Pages as a real browser shows them: Chromium, driven by its own protocol.

https://chromedevtools.github.io/devtools-protocol
"""

import base64
import io
import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from websockets.sync.client import ClientConnection, connect

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
LISTENING = "DevTools listening on "
ANSWER_S = 60.0
# Every text with the color that it has and the one that it stands on.
TEXTS = """
[...document.querySelectorAll("h1, h2, p, th, td, small, code, pre")]
  .filter(e => e.innerText.trim())
  .map(e => {
    const none = /rgba\\(0, 0, 0, 0\\)|transparent/;
    let ground = e;
    while (ground && none.test(getComputedStyle(ground).backgroundColor))
      ground = ground.parentElement;
    return {text: e.innerText.slice(0, 40), ink: getComputedStyle(e).color,
            ground: getComputedStyle(ground || document.body).backgroundColor};
  })
"""
FIGURES = """
[...document.querySelectorAll("svg")].filter(e => e.parentElement.closest("svg") === null)
  .map(e => { const b = e.getBoundingClientRect();
              return [b.left, b.top + scrollY, b.right, b.bottom + scrollY]; })
"""


def program() -> str | None:
    """Chromium's program; None where it is not installed."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


@dataclass
class Shown:
    """A page as it was shown: what it asked for, what went wrong in it, its text, its `picture`
    from top to bottom, the boxes of its figures there, and its texts with their colors.
    """

    asked: list[str]
    errors: list[str]
    text: str
    width: int
    scroll_width: int
    background: str
    texts: list[dict[str, str]]
    figures: list[tuple[float, float, float, float]]
    picture: Image.Image


@dataclass
class _Tab:
    socket: ClientConnection
    session: str
    number: int = 0
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        order = {"id": self.number, "method": method, "params": params}
        self.socket.send(json.dumps(order | ({"sessionId": self.session} if self.session else {})))
        while True:
            message = json.loads(self.socket.recv(timeout=ANSWER_S))
            if message.get("id") == self.number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            self.events.append(message)

    def wait_for(self, event: str) -> None:
        while not any(message.get("method") == event for message in self.events):
            self.events.append(json.loads(self.socket.recv(timeout=ANSWER_S)))

    def value(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"][
            "value"
        ]


class Browser:
    """A browser without windows."""

    def __init__(self, socket: ClientConnection) -> None:
        self._socket = socket

    def show(self, page: Path, *, width: int, scheme: str) -> Shown:
        """A page in a window of so many pixels, for somebody who wants it `light` or `dark`."""
        whole = _Tab(self._socket, session="")
        target = whole.call("Target.createTarget", url="about:blank")["targetId"]
        session = whole.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = _Tab(self._socket, session=session)
        for domain in ("Page", "Network", "Log", "Runtime"):
            tab.call(f"{domain}.enable")
        media = [{"name": "prefers-color-scheme", "value": scheme}]
        tab.call("Emulation.setEmulatedMedia", features=media)
        tab.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        tab.call("Page.navigate", url=page.as_uri())
        tab.wait_for("Page.loadEventFired")
        height = tab.value("document.documentElement.scrollHeight")
        area = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = tab.call("Page.captureScreenshot", captureBeyondViewport=True, clip=area)["data"]
        shown = Shown(
            asked=[
                event["params"]["request"]["url"]
                for event in tab.events
                if event.get("method") == "Network.requestWillBeSent"
            ],
            errors=[
                json.dumps(event["params"])
                for event in tab.events
                if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")
            ],
            text=tab.value("document.body.innerText"),
            width=tab.value("document.documentElement.clientWidth"),
            scroll_width=tab.value("document.documentElement.scrollWidth"),
            background=tab.value("getComputedStyle(document.body).backgroundColor"),
            texts=tab.value(TEXTS),
            figures=[(box[0], box[1], box[2], box[3]) for box in tab.value(FIGURES)],
            picture=Image.open(io.BytesIO(base64.b64decode(shot))).convert("RGB"),
        )
        whole.call("Target.closeTarget", targetId=target)
        return shown


@contextmanager
def running_browser(folder: Path) -> Iterator[Browser]:
    """A browser with its profile in a folder of its own."""
    path = program()
    assert path is not None
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"]
    quiet = ["--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}"]
    process = subprocess.Popen(
        [path, *words, *quiet, "about:blank"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith(LISTENING))
        url = line.removeprefix(LISTENING).strip()
        with connect(url, max_size=None, proxy=None) as socket:
            yield Browser(socket)
            _Tab(socket, session="").call("Browser.close")
        process.communicate(timeout=ANSWER_S)
    finally:
        process.kill()
        process.communicate()


def rgb(color: str) -> tuple[float, float, float]:
    """The parts of a color as CSS gives it, from 0 to 1."""
    inner = color[color.index("(") + 1 : color.index(")")]
    red, green, blue = (float(part) / 255 for part in inner.split(",")[:3])
    return red, green, blue


def contrast(one: str, other: str) -> float:
    """Of two colors, from 1 to 21. Web Content Accessibility Guidelines 2.2, 1.4.3."""
    low, high = sorted(_luminance(rgb(color)) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def _luminance(parts: tuple[float, float, float]) -> float:
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def colored_share(picture: Image.Image) -> float:
    """Of a picture's pixels, how many are no shade of gray."""
    saturation = picture.convert("HSV").getchannel("S")
    return sum(saturation.histogram()[90:]) / (picture.width * picture.height)

"""A real browser without a window, driven through its debugging pipe: two file descriptors, JSON messages ended by a zero byte."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"),
    *("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream", "--no-first-run"),
)
AS_3_AND_4 = """import os, sys
pipes = [os.dup(os.dup(int(number))) for number in sys.argv[1:3]]
os.dup2(pipes[0], 3)
os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])"""
"""Starts a command with two of our pipes where the browser looks for them; twice `dup`, so that none of them is 3 or 4 yet."""


class Browser:
    """One page of the browser."""

    def __init__(self, sending: Any, receiving: Any) -> None:
        self._sending, self._receiving, self._number = sending, receiving, 0
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """Call a method of the protocol and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        self._sending.write(json.dumps(message).encode() + b"\0")
        self._sending.flush()
        while (answer := self._message()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _message(self) -> Any:
        text = bytearray()
        while (found := self._receiving.read(1)) != b"\0":
            assert found, "the browser has ended"
            text += found
        return json.loads(text)

    def open(self, address: str) -> None:
        """Open a page, and wait until it is loaded."""
        self.call("Page.navigate", url=address)
        self.run("new Promise((done) => document.readyState === 'complete' ? done() : addEventListener('load', () => done()))")

    def run(self, expression: str) -> Any:
        """Return the value of an expression of the page, awaited."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until an expression of the page is true; half a minute at most."""
        code = f"""new Promise((done, fail) => {{
            const end = Date.now() + 30000;
            const look = () => ({condition}) ? done() : Date.now() > end ? fail(document.body.innerText) : setTimeout(look, 20);
            look();
        }})"""
        self.run(code)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """Give the page a size in pixels, and the colours of a light or a dark desktop."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def screenshot(self, file: Path) -> None:
        """Write what is seen as a PNG."""
        file.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """A browser with an empty profile in `folder`."""
    (read_in, write_in), (read_out, write_out) = os.pipe(), os.pipe()
    command = [str(CHROMIUM), *OPTIONS, f"--user-data-dir={folder / 'profile'}", "about:blank"]
    process = subprocess.Popen(
        [sys.executable, "-c", AS_3_AND_4, str(read_in), str(write_out), *command],
        pass_fds=(read_in, write_out),
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(folder)},
    )
    os.close(read_in)
    os.close(write_out)
    with os.fdopen(write_in, "wb") as sending, os.fdopen(read_out, "rb") as receiving:
        try:
            yield Browser(sending, receiving)
        finally:
            process.kill()
            process.wait()

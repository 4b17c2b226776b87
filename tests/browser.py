"""A headless Chromium, told by its own protocol (CDP) what to open, press and compute."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import websocket

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def chromium() -> str | None:
    """Where it is installed; None if it is not."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page, in a `with` block; its profile lies in `folder`."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, 0

    def __enter__(self) -> Browser:
        self.process = subprocess.Popen(
            [chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-dev-shm-usage", "--remote-debugging-port=0", "--remote-allow-origins=*",
             "--window-size=1300,1000", f"--user-data-dir={self.folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            port = until(lambda: self._port(), "Chromium does not start")
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as pages:
                page = next(page for page in json.load(pages) if page["type"] == "page")
            self.socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=300)
        except BaseException:
            self._end()
            raise
        return self

    def _port(self) -> str:
        file = self.folder / "DevToolsActivePort"
        return file.read_text().split()[0] if file.is_file() and file.read_text() else ""

    def __exit__(self, *error) -> None:
        self.socket.close()
        self._end()

    def _end(self) -> None:
        self.process.kill()
        self.process.wait()

    def call(self, method: str, **parameters: Any) -> dict:
        """A command of the protocol and its result; events in between are not looked at."""
        self.number += 1
        self.socket.send(json.dumps({"id": self.number, "method": method, "params": parameters}))
        while (answer := json.loads(self.socket.recv())).get("id") != self.number:
            pass
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def compute(self, expression: str) -> Any:
        """The value of an expression of JavaScript, or of the promise that it is."""
        found = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str, seconds: float = 300) -> Any:
        """Its value once it is true, of an object only that it is there."""
        script = f"(() => {{ const x = {expression}; return x instanceof Object ? true : x }})()"
        return until(lambda: self.compute(script), expression, seconds)

    def press(self, key: str, code: int) -> None:
        """A key, by its name and its number in the protocol, for what has the focus."""
        names = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, **names)


def until(found, what: str, seconds: float = 300) -> Any:
    """What `found()` gives once it is true; fails after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := found():
            return value
        time.sleep(0.2)
    raise AssertionError(f"not within {seconds} seconds: {what}")

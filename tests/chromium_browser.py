"""Headless Chromium, controlled over a pipe by the DevTools protocol, with a record of requests."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]


def find_chromium() -> str | None:
    """The browser's path, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


# Chromium reads from descriptor 3 and writes to descriptor 4. Ours may have these numbers, so they
# are copied to higher ones first.
_MOVE_PIPES = """
import fcntl, os, sys
high = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, descriptor in zip((3, 4), high):
    os.dup2(descriptor, number)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Page:
    """One tab, with the addresses of its `requests` and the `errors` of its scripts and console."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.browser, self.session = browser, session
        self.requests: list[str] = []
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.browser.call(method, parameters, self)

    def open(self, path: Path, *, width: int, height: int = 900, dark: bool = False) -> None:
        """Open a file at a width in CSS pixels; below 600 the device is a phone."""
        phone = width < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.requests.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        self.browser.wait_for("Page.loadEventFired", self)

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise AssertionError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        result = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(result["data"]))


class Browser:
    """A running browser that exchanges JSON messages, each terminated by NUL, over two pipes."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self.to_browser, self.from_browser = to_browser, from_browser
        self.buffer, self.number = b"", 0
        self.pages: dict[str, Page] = {}
        self.events: list[tuple[str, str | None]] = []

    def new_page(self) -> Page:
        target = self.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.call("Target.attachToTarget", {"targetId": target, "flatten": True})[
            "sessionId"
        ]
        page = Page.__new__(Page)
        self.pages[session] = page
        page.__init__(self, session)  # type: ignore[misc]
        return page

    def call(
        self, method: str, parameters: dict[str, Any], page: Page | None = None
    ) -> dict[str, Any]:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if page is not None:
            message["sessionId"] = page.session
        os.write(self.to_browser, json.dumps(message).encode() + b"\0")
        while True:
            reply = self._next()
            if reply.get("id") == self.number:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']['message']}")
                result: dict[str, Any] = reply["result"]
                return result

    def wait_for(self, event: str, page: Page) -> None:
        while (event, page.session) not in self.events:
            self._next()
        self.events.clear()

    def _next(self, limit_s: float = 60.0) -> dict[str, Any]:
        end = time.monotonic() + limit_s
        while b"\0" not in self.buffer:
            if not select.select([self.from_browser], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"no message from Chromium for {limit_s} s")
            piece = os.read(self.from_browser, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium exited")
            self.buffer += piece
        raw, _, self.buffer = self.buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(raw)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        method, session = message.get("method"), message.get("sessionId")
        page = self.pages.get(session or "")
        if method is None or page is None:
            return
        self.events.append((method, session))
        parameters = message["params"]
        if method == "Network.requestWillBeSent":
            page.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            page.errors.append(parameters["exceptionDetails"]["text"])
        elif method == "Log.entryAdded":
            page.errors.append(parameters["entry"]["text"])


@contextmanager
def chromium() -> Iterator[Browser]:
    """A new browser with a temporary profile."""
    path = find_chromium()
    assert path is not None
    child_reads, to_browser = os.pipe()
    from_browser, child_writes = os.pipe()
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = [
            sys.executable,
            "-ISc",
            _MOVE_PIPES,
            str(child_reads),
            str(child_writes),
            path,
            *FLAGS,
        ]
        command += [f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            command,
            pass_fds=(child_reads, child_writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_reads)
        os.close(child_writes)
        browser = Browser(to_browser, from_browser)
        try:
            yield browser
        finally:
            try:
                browser.call("Browser.close", {})
            except (RuntimeError, OSError, TimeoutError):
                process.kill()
            process.wait(20)
            os.close(to_browser)
            os.close(from_browser)

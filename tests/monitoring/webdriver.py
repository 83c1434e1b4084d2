"""A browser driven over the W3C WebDriver protocol, which is HTTP and JSON: https://www.w3.org/TR/webdriver2/."""

from __future__ import annotations

import json
import os
import re
import subprocess
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ARGUMENTS = (
    "--headless=new",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--no-default-browser-check",
)
_COMMAND_S = 60
_STARTED = re.compile(r"started successfully on port (\d+)")


class Browser:
    """One session. `address` is chromedriver's."""

    def __init__(self, address: str) -> None:
        # The sandbox refuses to run as root, which containers and CI do.
        arguments = [*_ARGUMENTS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]
        capabilities = {"browserName": "chrome", "goog:chromeOptions": {"args": arguments}}
        capabilities["goog:loggingPrefs"] = {"browser": "ALL"}
        self._session = f"http://{address}/session"
        found = self._ask("POST", "", {"capabilities": {"alwaysMatch": capabilities}})
        self._session += f"/{found['sessionId']}"

    def open(self, url: str) -> None:
        self._ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """A function's body in the page; what it returns."""
        return self._ask("POST", "/execute/sync", {"script": script, "args": arguments})

    def wait_for(self, condition: str, timeout_s: float = 20) -> None:
        """Until an expression holds in the page.

        Raises:
            AssertionError: if it does not in time, with the text of the page.
        """
        script = """
            const [condition, timeout, done] = arguments, holds = new Function(`return (${condition})`);
            const ends = performance.now() + timeout;
            const look = () => holds() ? done(true) : performance.now() > ends ? done(false) : setTimeout(look, 30);
            look();
        """
        self._ask("POST", "/timeouts", {"script": (timeout_s + 10) * 1000})
        held = self._ask("POST", "/execute/async", {"script": script, "args": [condition, timeout_s * 1000]})
        assert held, f"{condition} did not come to hold; the page says\n{self.run('return document.body.innerText')}"

    def text(self, selector: str) -> str:
        """What a person sees in the first element that matches."""
        return str(self.run("return document.querySelector(arguments[0]).innerText.trim()", selector))

    def device(self, width: int, height: int, scheme: str = "light") -> None:
        """The screen's size in CSS pixels, and whether the person prefers light or dark."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._devtools("Emulation.setDeviceMetricsOverride", screen)
        self._devtools("Emulation.setScrollbarsHidden", {"hidden": True})
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self._devtools("Emulation.setEmulatedMedia", {"features": features})

    def screenshot(self, path: Path) -> None:
        """Of the whole page, as PNG."""
        picture = self._devtools("Page.captureScreenshot", {"captureBeyondViewport": True})
        path.write_bytes(b64decode(picture["data"]))

    def complaints(self) -> list[str]:
        """What the page's console has said since the last call: script errors, what the policy blocked, failed requests."""
        return [entry["message"] for entry in self._ask("POST", "/se/log", {"type": "browser"})]

    def quit(self) -> None:
        self._ask("DELETE", "")

    def _devtools(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._ask("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._session + path, data, method=method)
        with urllib.request.urlopen(request, timeout=_COMMAND_S) as answer:
            return json.load(answer)["value"]


@contextmanager
def browser(log: Path) -> Iterator[Browser]:
    """A chromium of its own, gone at the end."""
    with log.open("w") as stderr:
        driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=stderr, text=True)
    assert driver.stdout
    try:
        port = next(found[1] for line in driver.stdout if (found := _STARTED.search(line)))
        session = Browser(f"127.0.0.1:{port}")
        try:
            yield session
        finally:
            session.quit()
    finally:
        driver.terminate()
        driver.wait()
        driver.stdout.close()

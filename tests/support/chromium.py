"""Headless Chromium, controlled with the DevTools protocol through a pipe.

    python tests/support/chromium.py PAGE PHOTO [SCREENSHOT.png]

measures the page of `maskrcnn web` on a photo, with one thread and with one thread per core.
"""

from __future__ import annotations

import fcntl
import functools
import http.server
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EXECUTABLE = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Headers that allow a page to use threads.
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
_CALLS = 7  # timed by the program, after a warm-up call
_FREE = 10  # first file descriptor for the pipes, beyond those that the browser expects


class Browser:
    """A browser with one page.

    Args:
        folder: folder for its profile and downloads.
        webgpu: enable WebGPU, with Chromium's software adapter.
    """

    def __init__(self, folder: Path, *, webgpu: bool = False) -> None:
        (read, their_write), (their_read, write) = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, _FREE) for end in (their_read, their_write)]
        flags = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run")
        gpu = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan")
        flags += gpu if webgpu else ("--disable-gpu",)
        flags += ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")  # a camera with a drawn image
        command = [EXECUTABLE, *flags, "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
        shell = f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}'  # the numbers that the browser expects
        with open(folder / "browser.log", "wb") as log:
            self.process = subprocess.Popen(
                ["bash", "-c", shell, "browser", *command], pass_fds=theirs, stdout=log, stderr=log
            )
        for end in (their_read, their_write, *theirs):
            os.close(end)
        self._reader, self._writer = os.fdopen(read, "rb"), os.fdopen(write, "wb")
        self._number, self._session, self.errors = 0, None, []  # exceptions and error messages of the page
        self.downloads = folder / "downloads"
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Runs a command of the protocol."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        self._writer.write(json.dumps(message).encode() + b"\0")
        self._writer.flush()
        while True:
            answer = json.loads(self._line())
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)

    def _line(self) -> bytes:
        line = bytearray()
        while (byte := self._reader.read(1)) != b"\0":
            assert byte, "the browser has ended"
            line += byte
        return bytes(line)

    def _note(self, event: Mapping[str, Any]) -> None:
        method, parameters = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.errors.append(parameters["exceptionDetails"]["exception"].get("description", "exception"))
        elif method == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.errors.append(str([part.get("value") for part in parameters["args"]]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(parameters["entry"]["text"])

    def open(self, url: str) -> None:
        """Loads a page; its scripts may still be loading data."""
        self.errors.clear()
        self.call("Page.navigate", url=url)
        self.wait(f"location.href === '{url}' && document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Returns the value of a JavaScript expression, or of its promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str, timeout_s: float = 120) -> None:
        """Waits until the document has a body and an expression is true."""
        deadline = time.monotonic() + timeout_s
        while not self.value(f"document.body !== null && ({expression})"):
            assert time.monotonic() < deadline, (expression, self.errors, self.value("document.body.innerText"))
            time.sleep(0.05)

    def choose_file(self, selector: str, path: Path) -> None:
        """Chooses a file in an input element."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path.resolve())])

    def screenshot(self, path: Path) -> None:
        """Saves a screenshot of the page as a PNG file."""
        import base64

        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def close(self) -> None:
        """Ends the browser."""
        self.process.terminate()
        self.process.wait(30)
        self._reader.close()
        self._writer.close()


@contextmanager
def served(folder: Path, headers: Mapping[str, str] | None = None) -> Iterator[str]:
    """Serves a folder on the loopback interface; yields its address."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def main(page: Path, photo: Path, screenshot: Path | None = None) -> None:
    """Prints the median time of each stage."""
    for headers in (None, ISOLATED):
        with tempfile.TemporaryDirectory() as folder, served(page, headers) as address:
            browser = Browser(Path(folder))
            browser.call("Emulation.setDeviceMetricsOverride", width=800, height=900, deviceScaleFactor=1, mobile=False)
            browser.open(address)
            browser.wait("document.body.dataset.state === 'ready'", timeout_s=600)
            threads = browser.value("document.getElementById('status').textContent")
            times: dict[str, list[float]] = {}
            for call in range(_CALLS + 1):
                browser.value("document.body.dataset.state = 'ready'")
                browser.choose_file("#file", photo)
                browser.wait("['done', 'error'].includes(document.body.dataset.state)", timeout_s=600)
                assert browser.value("document.body.dataset.state") == "done", browser.value("error.textContent")
                shown = browser.value("document.getElementById('timing').textContent")
                for stage, text in re.findall(r"(\w+) (\d+) ms", shown) if call else ():
                    times.setdefault(stage, []).append(float(text))
            if screenshot:
                browser.screenshot(screenshot)
            browser.close()
        stages = ", ".join(f"{stage} {statistics.median(each):.0f} ms" for stage, each in times.items())
        print(f"{threads}: {stages}, whole {statistics.median(map(sum, zip(*times.values(), strict=True))):.0f} ms")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

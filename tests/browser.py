"""Headless Chromium, spoken to through its own protocol: what the tests of pages need, and no more. Needs websocket-client, which Jupyter brings."""

import itertools
import json
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
]


def chromium() -> str | None:
    """The browser on this machine; None if there is none."""
    return next(
        (
            p
            for n in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
            if (p := shutil.which(n))
        ),
        None,
    )


class Browser:
    """One page of a headless browser. `errors` holds what went wrong since `open`: console errors, exceptions, requests that failed or left this machine."""

    def __enter__(self):
        import websocket

        self.folder = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [chromium(), *FLAGS, f"--user-data-dir={self.folder.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        port, end = Path(self.folder.name) / "DevToolsActivePort", time.monotonic() + 60
        while not (port.is_file() and port.read_text().count("\n")):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("Chromium does not start")
            time.sleep(0.05)
        pages = json.load(urllib.request.urlopen(f"http://127.0.0.1:{port.read_text().split()[0]}/json"))
        address = next(p["webSocketDebuggerUrl"] for p in pages if p["type"] == "page")
        self.socket, self.ids, self.errors, self.loaded = (
            websocket.create_connection(address, timeout=60),
            itertools.count(1),
            [],
            False,
        )
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.process.terminate()
        self.process.wait(20)
        self.folder.cleanup()

    def _note(self, message: dict):
        method, p = message.get("method"), message.get("params", {})
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.exceptionThrown":
            self.errors.append(
                p["exceptionDetails"].get("exception", {}).get("description", p["exceptionDetails"]["text"])
            )
        elif method == "Runtime.consoleAPICalled" and p["type"] in ("error", "assert"):
            self.errors.append(" ".join(str(a.get("value", a.get("description"))) for a in p["args"]))
        elif method == "Log.entryAdded" and p["entry"]["level"] == "error":
            self.errors.append(p["entry"]["text"] + " " + p["entry"].get("url", ""))
        elif method == "Network.requestWillBeSent" and not p["request"]["url"].startswith(
            ("file:", "data:", "blob:", "about:")
        ):
            self.errors.append(f"asks for {p['request']['url']}")
        elif method == "Network.loadingFailed" and not p.get("canceled"):
            self.errors.append(f"loading failed: {p['errorText']}")

    def call(self, method: str, **params) -> dict:
        """What the browser answers to a command of its protocol."""
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv())
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']['message']}")
                return message["result"]
            self._note(message)

    def open(self, page: str | Path, width: int = 1280, height: int = 900, dark: bool = False):
        """Opens a page, a file with or without an anchor, and waits until it is there."""
        address = page if "://" in str(page) else Path(page).resolve().as_uri()
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            screenWidth=width,
            screenHeight=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self.call(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self.call("Page.navigate", url="about:blank")
        self.errors, self.loaded = [], False
        self.call("Page.navigate", url=address)
        while not (self.loaded and self.js("document.readyState === 'complete' && location.href !== 'about:blank'")):
            time.sleep(0.01)
            self.call("Runtime.evaluate", expression="0")

    def js(self, expression: str):
        """The value of an expression on the page; a promise is waited for."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(done["exceptionDetails"].get("exception", {}).get("description", "failed"))
        return done["result"].get("value")

    def picture(self, path: str | Path, whole: bool = False):
        """Writes what is seen as a PNG."""
        import base64

        Path(path).write_bytes(
            base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
        )

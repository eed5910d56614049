"""A sweep as one SLURM job array: an element for each member that is missing and not queued yet.

The array's index is the member's, so `squeue` and the logs speak of the numbers that
`chinchilla sweep --list` shows. Each element is `launch/slurm.sbatch`, which runs
`chinchilla sweep --workdir FOLDER --only INDEX` and queues itself again when it was preempted.
"""

import hashlib
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence

from chinchilla_jax.errors import UserError
from chinchilla_jax.experiments.sweep import Member

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "launch" / "slurm.sbatch"
LOGS = "slurm"  # In the sweep's folder.
_PATIENCE = 60  # Seconds that SLURM has to answer.
# What this module says itself, and what would make several processes of a member.
_OURS = {"-a": "--array", "-J": "--job-name", "-D": "--chdir", "-W": "--wait",
         "-n": "--ntasks", "-N": "--nodes"}
_WORDS = (*_OURS.values(), "--ntasks-per-node", "--parsable", "--export")


def submit(folder: str | os.PathLike, members: Sequence[Member], at_most: int | None = None,
           flags: Sequence[str] = ()) -> str:
  """Queues one job array; members that wait or run already in one are left out.

  Args:
    folder: of the sweep, on a disk that the nodes see; its files are written.
    members: those to run.
    at_most: elements at a time; None for as many as SLURM starts.
    flags: for sbatch, such as --partition=gpu; they win over those of the script.

  Returns:
    One line that says what was queued.

  Raises:
    UserError: there is no SLURM here, or it refuses; nothing was queued then.
  """
  folder = pathlib.Path(folder).resolve()
  _check(flags)
  name = job_name(folder)
  waiting = queued(name)
  missing = [member.index for member in members if member.index not in waiting]
  left_out = (f"; {len(members) - len(missing)} are in the queue already"
              if len(missing) < len(members) else "")
  if not missing:
    return f"nothing to submit{left_out}"
  logs = folder / LOGS
  try:
    logs.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(f"--workdir: {logs} cannot be written ({error.strerror}); make room, or mend "
                    "it") from error
  array = spans(missing) + (f"%{at_most}" if at_most else "")
  # The interpreter of this command is the one with everything installed; nodes see it or have the
  # same. Set CHINCHILLA for a container.
  environ = {"CHINCHILLA": f"{sys.executable} -m chinchilla_jax"} | os.environ | {"LOGS": str(logs)}
  job = _ask(["sbatch", "--parsable", f"--array={array}", f"--job-name={name}",
              f"--output={logs}/%A_%a.batch.log", *flags, str(SCRIPT), f"--workdir={folder}"],
             environ)
  job = job.partition(";")[0]  # "JOB;CLUSTER" where there are several clusters.
  return (f"queued as job array {job}: member{'s' if len(missing) > 1 else ''} {array}{left_out}; "
          f"watch with squeue --job={job}, stop with scancel {job}; logs in {logs}")


def queued(name: str) -> set[int]:
  """Array indices that wait or run in jobs of this name."""
  # --array gives an element a line, those that wait too. %K: its index, or N/A outside of arrays.
  found = _ask(["squeue", "--me", "--noheader", "--array", f"--name={name}", "--format=%K"])
  return {int(line) for line in found.split() if line.isdecimal()}


def job_name(folder: pathlib.Path) -> str:
  """Of the jobs of a sweep: its folder's name, and a hash of the whole path."""
  plain = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.name)[:40]
  return f"sweep-{plain}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:8]}"


def spans(indices: Iterable[int]) -> str:
  """The shortest way to write them: "3,5,7-9"."""
  runs: list[list[int]] = []
  for index in sorted(indices):
    if runs and index == runs[-1][1] + 1:
      runs[-1][1] = index
    else:
      runs.append([index, index])
  return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _check(flags: Sequence[str]) -> None:
  if not SCRIPT.is_file():
    raise UserError(f"--on slurm: {SCRIPT} is not there; run it from a checkout that was installed "
                    "with pip install -e .")
  for flag in flags:
    if not flag.startswith("-"):
      raise UserError(f"--sbatch: got {flag!r}; give one flag, such as --sbatch=--partition=gpu")
    word = flag.partition("=")[0] if flag.startswith("--") else _OURS.get(flag[:2], "")
    if word in _WORDS:
      raise UserError(f"--sbatch: {flag} cannot be set; a sweep chooses {word} itself, and each of "
                      "its members is one task (give it GPUs with --sbatch=--gpus=N)")


def _ask(command: Sequence[str], environ: dict[str, str] | None = None) -> str:
  try:
    done = subprocess.run(command, env=environ, text=True, capture_output=True, timeout=_PATIENCE,
                          stdin=subprocess.DEVNULL)
  except FileNotFoundError:
    raise UserError(f"--on slurm: {command[0]} was not found; run it where SLURM's commands are, "
                    "on a login node, or leave --on slurm out") from None
  except subprocess.TimeoutExpired:
    raise UserError(f"--on slurm: {command[0]} did not answer within {_PATIENCE} s; see whether "
                    "SLURM is up, with sinfo") from None
  if done.returncode:
    why = " ".join(line.removeprefix(f"{command[0]}: ").removeprefix("error: ")
                   for line in done.stderr.splitlines()) or f"status {done.returncode}"
    raise UserError(f"--on slurm: {command[0]} refused: {why}; mend the flags given with --sbatch, "
                    "or ask whoever runs the cluster")
  return done.stdout.strip()

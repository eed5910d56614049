"""How the processes of one run find each other: flags, SLURM, or the hosts of a TPU."""

import contextlib
import importlib.util
import os
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from chinchilla_jax.errors import UserError

TIMEOUT = 300  # Seconds that processes wait for each other at start.
GIVE_FLAGS = "give each process --coordinator=HOST:PORT, --processes=COUNT and --process=INDEX"
_RETRY = 0.5   # Seconds between two knocks on the coordinator's door.
_SHUTDOWN = 60   # Seconds that one which ends waits for the rest; then JAX ends them all.
# What JAX's own detection asks for. An sbatch script and an salloc shell lack the second.
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID",
               "SLURM_LOCALID")
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"


@dataclass(frozen=True)
class Flags:
  """What the command line says: --coordinator, --processes, --process. All three or none."""

  coordinator: str | None = None  # HOST:PORT, the same on every process; process 0 runs on HOST.
  processes: int | None = None    # In the run.
  process: int | None = None      # This one, from 0.


def start(flags: Flags = Flags(), environ: Mapping[str, str] = os.environ,
          timeout: int = TIMEOUT) -> None:
  """Joins the other processes of this run, if there are any. Call it before JAX sees a device.

  The first of these that applies decides:

  1. Flags. All three must be given; `processes` 1 starts nothing.
  2. SLURM: a job step (`srun`) of several tasks. A batch script or a shell inside an allocation
     is one process; it is started alone, with a note.
  3. TPU: several hosts in TPU_PROCESS_ADDRESSES or TPU_WORKER_HOSTNAMES, or several slices in
     MEGASCALE_NUM_SLICES; on a TPU VM, what the metadata server says of both.
  4. Otherwise this process is alone, and nothing is started.

  A second call does nothing. `environ` is for 2 and 3, `timeout` in seconds.

  Raises:
    UserError: the flags make no sense, the coordinator does not answer in time, or its port is
      taken. (If it is another process that never comes, or in cases 2 and 3, JAX itself ends
      the waiting ones after `timeout`.)
  """
  if jax.distributed.is_initialized():
    return
  if flags != Flags():
    host, port = _checked(flags)
    if flags.processes == 1:
      return
    if flags.process == 0:
      _refuse_taken_port(flags.coordinator, port)
      # If one stays away, JAX aborts; this line then says what it was that did not come.
      print(f"waiting for {flags.processes - 1} other processes at {flags.coordinator}, at most "
            f"{timeout} s", file=sys.stderr, flush=True)
    else:
      _await_coordinator(flags.coordinator, host, port, timeout)
    # Told all, JAX need not look around: in a container it would ask Kubernetes.
    _initialize("--coordinator", timeout, coordinator_address=flags.coordinator,
                num_processes=flags.processes, process_id=flags.process,
                cluster_detection_method="deactivate")
  elif (tasks := _slurm_tasks(environ)) > 1:
    _initialize("SLURM", timeout, **_slurm_devices(environ, tasks))
  elif _tpu_hosts(environ) > 1:
    _initialize("TPU", timeout)


def _checked(flags: Flags) -> tuple[str, int]:
  """(host, port) of flags that are complete and possible."""
  names = {"--coordinator": flags.coordinator, "--processes": flags.processes,
           "--process": flags.process}
  missing = [name for name, value in names.items() if value is None]
  if missing:
    raise UserError(f"{' and '.join(missing)} missing; {GIVE_FLAGS}")
  if not 0 <= flags.process < flags.processes:
    raise UserError(f"--process: got {flags.process} with --processes={flags.processes}; give "
                    "each process its own number from 0 to COUNT - 1")
  host, colon, port = flags.coordinator.rpartition(":")
  bracketed = host.startswith("[") and host.endswith("]")
  if (not colon or not host.strip("[]") or (":" in host and not bracketed)
      or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16):
    raise UserError(f"--coordinator: got {flags.coordinator!r}, expected HOST:PORT of the machine "
                    "of process 0, such as 10.0.0.1:8476 or [fe80::1]:8476")
  return (host[1:-1] if bracketed else host), int(port)


def _initialize(who: str, timeout: int, **arguments) -> None:
  if jax.config.jax_cpu_collectives_implementation in (None, "none"):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # It swallows SIGTERM until the loop handles the signal; `processes.vote` does its work.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(initialization_timeout=timeout,
                               shutdown_timeout_seconds=_SHUTDOWN, **arguments)
  except (RuntimeError, ValueError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{who}: the processes of this run were not joined ({reason}); check that "
                    f"all were started, or {GIVE_FLAGS}") from error


def _await_coordinator(address: str, host: str, port: int, timeout: float) -> None:
  """Knocks until process 0 listens. JAX's own client ends the process when its time is over."""
  deadline = time.monotonic() + timeout
  while True:
    try:
      left = max(deadline - time.monotonic(), 0.1)
      socket.create_connection((host, port), timeout=left).close()
      return
    except OSError as error:
      if time.monotonic() + _RETRY >= deadline:
        raise UserError(
            f"--coordinator: nothing answers at {address} after {timeout} s ({error}); check "
            "that process 0 was started there, and that no firewall closes the port") from None
    time.sleep(_RETRY)


def _refuse_taken_port(address: str, port: int) -> None:
  with socket.socket() as probe:  # JAX 0.12 itself would die of a segmentation fault.
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(("", port))
    except OSError as error:
      raise UserError(f"--coordinator: process 0 cannot listen at {address} "
                      f"({error.strerror}); choose another port") from None


def _slurm_tasks(environ: Mapping[str, str]) -> int:
  """Tasks of the job step that this process belongs to; 1 outside of one."""
  allocated = environ.get("SLURM_NTASKS", "1")
  tasks = "1"
  if all(name in environ for name in _SLURM_STEP):
    # The shell of salloc may itself be a step, of one task, with SLURM_NTASKS of the job.
    tasks = environ.get("SLURM_STEP_NUM_TASKS", allocated)
  if "SLURM_JOB_ID" in environ and int(tasks) == 1 < int(allocated):
    print(f"note: this SLURM job has {allocated} tasks, but one process was started; put srun "
          "before the command to start one per task", file=sys.stderr, flush=True)
  return int(tasks)


def _slurm_devices(environ: Mapping[str, str], tasks: int) -> dict[str, Any]:
  """Which GPUs a task takes. JAX takes the one with the task's number on its node."""
  # Of eight, seven would idle under one task per node; and where SLURM shows each task only its
  # own GPU, there is no number 3.
  if "JAX_LOCAL_DEVICE_IDS" in environ:
    return {}
  visible = environ.get("CUDA_VISIBLE_DEVICES", environ.get("ROCR_VISIBLE_DEVICES", ""))
  own = bool(visible) and "," not in visible
  one_per_node = environ.get("SLURM_STEP_NUM_NODES") == str(tasks)
  return {"local_device_ids": []} if own or one_per_node else {}  # Empty: all that are visible.


def _tpu_hosts(environ: Mapping[str, str]) -> int:
  """Hosts in all slices of the TPU that this process is on; 1 without a TPU."""
  wanted = "tpu" in (environ.get("JAX_PLATFORMS") or "tpu").split(",")
  if not wanted or not (importlib.util.find_spec("libtpu") or environ.get("TPU_LIBRARY_PATH")):
    return 1
  hosts = environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
  if "TPU_PROCESS_ADDRESSES_PATH" in environ:
    return 2  # Or how many there are: JAX reads the file.
  slices = environ.get("MEGASCALE_NUM_SLICES")
  if "TPU_SKIP_MDS_QUERY" not in environ:  # JAX sets it where it sees no TPU chip.
    hosts = hosts or _metadata("worker-network-endpoints")
    if not slices:
      found = re.search(r"MEGASCALE_NUM_SLICES\s*:\s*'?(\d+)", _metadata("tpu-env"))
      slices = found and found[1]
  return len((hosts or "").split(",")) * int(slices or 1)


def _metadata(key: str) -> str:
  """An attribute of this Google Cloud machine; "" if it has none, or is none."""
  request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})
  direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
  for _ in range(3):
    with contextlib.suppress(OSError), direct.open(request, timeout=3) as answer:
      return answer.read().decode()
    time.sleep(_RETRY)
  return ""

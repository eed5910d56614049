"""Several processes, one run: start-up, agreement, batches made in parts, a vote to stop.

Every process runs the same program. Process 0 writes; whatever touches devices, all do in the
same order. All functions work with one process too, and then cost nothing.
"""

import contextlib
import functools
import importlib.util
import itertools
import json
import os
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # The coordinator's table of texts has no public name.
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from chinchilla_jax.errors import UserError

Rows = dict[str, np.ndarray]

TIMEOUT = 300  # Seconds that processes wait for each other at start.
_RETRY = 0.5   # Seconds between two knocks on the coordinator's door.
_SLOWEST = 3600  # Seconds to wait for the slowest later on; JAX notices sooner that one is dead.
_SHUTDOWN = 60   # Seconds that one which ends waits for the rest; then JAX ends them all.
_ROUNDS = itertools.count()  # Everyone takes part in every exchange: the same number everywhere.
# What JAX's own detection asks for. An sbatch script and an salloc shell lack the second.
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID",
               "SLURM_LOCALID")
_GIVE_FLAGS = "give each process --coordinator=HOST:PORT, --processes=COUNT and --process=INDEX"
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


def is_main() -> bool:
  """Whether this is process 0, the only one that writes logs."""
  return index() == 0


def count() -> int:
  """Processes in the run."""
  return jax.process_count()


def index() -> int:
  """This process, from 0."""
  return jax.process_index()


def _checked(flags: Flags) -> tuple[str, int]:
  """(host, port) of flags that are complete and possible."""
  names = {"--coordinator": flags.coordinator, "--processes": flags.processes,
           "--process": flags.process}
  missing = [name for name, value in names.items() if value is None]
  if missing:
    raise UserError(f"{' and '.join(missing)} missing; {_GIVE_FLAGS}")
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
  # It swallows SIGTERM until the loop handles the signal; here `vote` does its work.
  jax.config.update("jax_enable_preemption_service", False)
  try:
    jax.distributed.initialize(initialization_timeout=timeout,
                               shutdown_timeout_seconds=_SHUTDOWN, **arguments)
  except (RuntimeError, ValueError) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{who}: the processes of this run were not joined ({reason}); check that "
                    f"all were started, or {_GIVE_FLAGS}") from error


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


# -------------------------------------------------------------------- Agreement
# By way of the coordinator, not of devices: it may happen before all processes have the same
# number of devices, while a step is in flight, and after any wait (Gloo gives up after 30 s).


def agree(facts: Mapping[str, Any], timeout: float = _SLOWEST) -> None:
  """Refuses, on all processes alike, if one of them has other facts than process 0.

  Args:
    facts: name to what JSON can hold: fields of the config, fingerprints, versions.
    timeout: seconds to wait for the slowest process.

  Raises:
    UserError: names the first fact that differs, both values and the process; or one that did
      not come here in time.
  """
  if _joined() == 1:
    return
  mine = {name: json.dumps(value, sort_keys=True, default=str) for name, value in facts.items()}
  everyone = [json.loads(text) for text in _gather(json.dumps(mine), "agree", timeout)]
  for name in dict.fromkeys(name for one in everyone for name in one):
    for process, theirs in enumerate(everyone):
      ours, other = (one.get(name, "absent") for one in (everyone[0], theirs))
      if other != ours:
        raise UserError(f"process {process} disagrees with process 0: {name} is {other} there, "
                        f"{ours} on process 0; start every process with the same command, "
                        "config, data and code")


@contextlib.contextmanager
def together(timeout: float = _SLOWEST) -> Iterator[None]:
  """A block whose UserError on one process is raised on all at its end, so that none waits."""
  problem = None
  try:
    yield
  except UserError as error:
    problem = error
  first = first_problem(str(problem or ""), timeout)
  if problem:
    raise problem
  if first:
    raise UserError(first)


def first_problem(problem: str, timeout: float = _SLOWEST) -> str:
  """The first process's problem that has one, the same text everywhere; "" if none has."""
  for process, text in enumerate(_gather(problem, "finish its part", timeout)):
    if text:
      return text if _joined() == 1 else f"process {process}: {text}"
  return ""


def from_main(make: Callable[[], Any], timeout: float = _SLOWEST) -> Any:
  """What `make` returns on process 0, on all of them; only there is it called.

  Args:
    make: returns what JSON can hold (tuples come back as lists).
    timeout: seconds to wait for it.

  Raises:
    UserError: what `make` raised, on all processes.
  """
  text = ""
  with together(timeout):
    if _joined() == 1:
      return make()
    if is_main():
      text = json.dumps(make())
  return json.loads(_gather(text, "tell what it knows", timeout)[0])


def barrier(name: str, timeout: float = _SLOWEST) -> None:
  """Waits until every process is here.

  Raises:
    UserError: one did not come in time.
    RuntimeError: another process waits at another barrier, which is a bug.
  """
  if len(names := set(_gather(name, f"reach {name!r}", timeout))) > 1:
    raise RuntimeError(f"processes wait at different barriers: {', '.join(sorted(names))}")


def _joined() -> int:
  """Processes that `start` joined. Asks no device: that waits for the others, and not for long."""
  if distributed.global_state.client is None and count() > 1:
    raise UserError(f"this is one of {count()} processes, not joined yet; {_GIVE_FLAGS}")
  return distributed.global_state.num_processes


def _gather(text: str, purpose: str, timeout: float) -> list[str]:
  """The text of each process, in order, on every process."""
  if _joined() == 1:
    return [text]
  client, key = distributed.global_state.client, f"chinchilla_jax/{next(_ROUNDS)}"
  client.key_value_set(f"{key}/{distributed.global_state.process_id}", f"={text}")
  deadline = time.monotonic() + timeout
  texts: list[str] = []
  while len(texts) < _joined():
    try:  # A second at a time, for no signal is seen in there.
      texts.append(client.blocking_key_value_get(f"{key}/{len(texts)}", 1000)[1:])
    except jax.errors.JaxRuntimeError as error:
      if "DEADLINE_EXCEEDED" not in str(error):
        raise
      if time.monotonic() > deadline:
        raise UserError(f"process {len(texts)} did not {purpose} within {timeout:g} s; see what "
                        "it prints, and start all again") from None
  return texts


# -------------------------------------------------------------------- Batches


def global_batch(make_rows: Callable[[int, int], Rows],
                 shardings: Mapping[str, NamedSharding] | Sharding,
                 batch: int) -> dict[str, jax.Array]:
  """The global arrays of a batch, of which this process makes the rows that its devices hold.

  Nothing is said to other processes, and all transfers are explicit: it may run in a thread of
  its own, under `jax.transfer_guard("disallow")` too.

  Args:
    make_rows: (start, stop) -> arrays whose first axis is rows start ... stop - 1 of the batch.
      Called once for each contiguous stretch; what it returns must not change afterwards.
    shardings: of each array, or one for all; with several processes, NamedShardings. Axes after
      the first may be cut too, and then more is made than this process's devices hold.
    batch: rows of the global batch.

  Returns:
    name -> [batch, ...].
  """
  if count() == 1:
    rows = make_rows(0, batch)
    if isinstance(shardings, Mapping):
      shardings = {name: shardings[name] for name in rows}
    return jax.device_put(rows, shardings)

  every = list(shardings.values()) if isinstance(shardings, Mapping) else [shardings]
  spans = [span for sharding in every for span in _row_spans(sharding, batch)]
  made = [(start, stop, make_rows(start, stop)) for start, stop in _merged(spans)]
  arrays = {}
  for name, array in made[0][2].items():
    sharding = shardings[name] if isinstance(shardings, Mapping) else shardings
    shape = (batch, *array.shape[1:])
    where = sharding.addressable_devices_indices_map(shape)
    parts = [_part(made, name, slices, batch) for slices in where.values()]
    arrays[name] = jax.make_array_from_single_device_arrays(
        shape, sharding, jax.device_put(parts, list(where)))
  return arrays


def _row_spans(sharding: NamedSharding, batch: int) -> list[tuple[int, int]]:
  """The rows that each device of this process holds."""
  rows = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:1]))
  return [slices[0].indices(batch)[:2]
          for slices in rows.addressable_devices_indices_map((batch,)).values()]


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
  """The same rows in as few stretches as can be, in order."""
  merged: list[tuple[int, int]] = []
  for start, stop in sorted(spans):
    if merged and start <= merged[-1][1]:
      merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
    else:
      merged.append((start, stop))
  return merged


def _part(made: list[tuple[int, int, Rows]], name: str, slices: tuple[slice, ...],
          batch: int) -> np.ndarray:
  """What one device holds of one array."""
  start, stop, _ = slices[0].indices(batch)
  offset, rows = next((a, rows) for a, b, rows in made if a <= start and stop <= b)
  return rows[name][start - offset:stop - offset, *slices[1:]]


# -------------------------------------------------------------------- Stop together


@functools.lru_cache(maxsize=8)
def vote(mesh: Mesh, ballot: int) -> jax.Array:
  """This process's ballot, to be handed to a jitted step that applies `counted` to it.

  A signal may reach one process alone, and all must stop after the same step. So the vote goes
  through the step itself and its outcome comes back with the metrics: no program with
  collectives of its own, which could meet the step in another order elsewhere, and no wait.

  Args:
    mesh: of the run.
    ballot: 0 to go on, or the number of the signal that came.

  Returns:
    int32 [devices], an element on each; made without asking other processes, and kept: do not
    donate it.
  """
  sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
  devices = list(sharding.addressable_devices_indices_map((mesh.size,)))
  ones = jax.device_put([np.full(1, ballot, np.int32)] * len(devices), devices)
  return jax.make_array_from_single_device_arrays((mesh.size,), sharding, ones)


def counted(vote: jax.Array) -> jax.Array:
  """Inside jit: the largest ballot of any process, an int32 scalar, the same everywhere."""
  return jnp.max(vote)

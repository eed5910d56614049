"""Several processes, one run: agreement, batches made in parts, a vote to stop.

Every process runs the same program, and `joining.start` has brought them together. Process 0
writes; whatever touches devices, all do in the same order. All functions work with one process
too, and then cost nothing.
"""

import contextlib
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # The coordinator's table of texts has no public name.
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import joining

Rows = dict[str, np.ndarray]

_SLOWEST = 3600  # Seconds to wait for the slowest; JAX notices sooner that one is dead.
_ROUNDS = itertools.count()  # Everyone takes part in every exchange: the same number everywhere.


def is_main() -> bool:
  """Whether this is process 0, the only one that writes logs."""
  return index() == 0


def count() -> int:
  """Processes in the run."""
  return jax.process_count()


def index() -> int:
  """This process, from 0."""
  return jax.process_index()


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
  """Processes that `joining.start` joined. Asks no device: that waits, and not for long."""
  if distributed.global_state.client is None and count() > 1:
    raise UserError(f"this is one of {count()} processes, not joined yet; {joining.GIVE_FLAGS}")
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
  sharding = abstract_vote(mesh).sharding
  devices = list(sharding.addressable_devices_indices_map((mesh.size,)))
  ones = jax.device_put([np.full(1, ballot, np.int32)] * len(devices), devices)
  return jax.make_array_from_single_device_arrays((mesh.size,), sharding, ones)


def abstract_vote(mesh: Mesh) -> jax.ShapeDtypeStruct:
  """What `vote` gives back, without its ballots."""
  return jax.ShapeDtypeStruct((mesh.size,), np.int32, sharding=NamedSharding(
      mesh, PartitionSpec(mesh.axis_names)))


def counted(vote: jax.Array) -> jax.Array:
  """Inside jit: the largest ballot of any process, an int32 scalar, the same everywhere."""
  return jnp.max(vote)

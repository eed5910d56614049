"""What processes do together: in one, and in several real ones on simulated devices."""

import json
import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ports import free_port
from tiny import ROOT

from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import mesh as meshes
from chinchilla_jax.parallel import processes

# Seconds. Four interpreters that import JAX on a busy machine.
PATIENCE = 100

# ---------------------------------------------------------------------- One process


def test_one_process_agrees_with_itself_and_waits_for_nobody():
  assert (processes.count(), processes.index(), processes.is_main()) == (1, 0, True)
  processes.agree({"seed": 1})
  processes.barrier("end")
  with pytest.raises(UserError, match="^mend this$"), processes.together():
    raise UserError("mend this")


def test_one_process_makes_a_batch_in_one_piece():
  calls = []
  def make_rows(start, stop):
    calls.append((start, stop))
    return {"x": np.arange(start, stop, dtype=np.int32)}
  rows = NamedSharding(meshes.on_one(), PartitionSpec("data"))
  for shardings in (rows, {"x": rows, "unused": rows}):
    with jax.transfer_guard("disallow"):
      batch = processes.global_batch(make_rows, shardings, 6)
    assert batch["x"].sharding == rows and np.array_equal(batch["x"], np.arange(6))
  assert calls == [(0, 6), (0, 6)]


def test_one_process_votes():
  mesh = meshes.on_one()
  tally = jax.jit(processes.counted)
  with jax.transfer_guard("disallow"):
    answers = [tally(processes.vote(mesh, ballot)) for ballot in (0, 15)]
  assert [int(answer) for answer in answers] == [0, 15]
  assert processes.vote(mesh, 15) is processes.vote(mesh, 15)


def test_stretches_are_merged():
  assert processes._merged([(4, 6), (0, 2), (2, 4), (0, 2), (8, 9)]) == [(0, 6), (8, 9)]


# ---------------------------------------------------------------------- Several processes

PRELUDE = """
import json, sys, threading
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from chinchilla_jax import config as schema
from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import joining, mesh as meshes, processes
address, n, me = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
try:
  joining.start(joining.Flags(address, n, me), timeout=int(sys.argv[4]))
"""
EPILOGUE = """
except UserError as error:
  print(error, file=sys.stderr)
  sys.exit(2)
"""


def spawn(n: int, devices: int, body: str, *, only: int | None = None,
          timeout: int = 60) -> list[subprocess.CompletedProcess]:
  """Runs `body` in n processes with that many simulated devices each; waits for all."""
  script = PRELUDE + textwrap.indent(textwrap.dedent(body), "  ") + EPILOGUE
  environ = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
             "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
  address = f"127.0.0.1:{free_port()}"
  running = [
      subprocess.Popen([sys.executable, "-c", script, address, str(n), str(process), str(timeout)],
                       env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
      for process in (range(n) if only is None else [only])]
  try:
    ended = []
    for process in running:
      out, err = process.communicate(timeout=PATIENCE)
      # Gloo tells standard output whom it is connected to, piece by piece.
      out = "".join(line for line in out.splitlines(True) if not line.startswith("[Gloo]"))
      ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return ended
  finally:
    for process in running:
      process.kill()


EVERYTHING = """
assert (processes.count(), processes.index()) == (n, me)
assert processes.is_main() == (me == 0)
joining.start(joining.Flags(address, n, me))  # Nothing happens.
processes.agree({"seed": 1, "mesh": (1, 2), "step": None, "text": "x" * 10000})
processes.barrier("began")
with processes.together():
  pass
found = {"rows": {}, "right": {}, "votes": []}

# Batches, made in a thread as prefetch makes them, but under the guard.
whole = {"inputs": np.arange(8 * 6, dtype=np.int32).reshape(8, 6),
         "weights": np.linspace(0, 1, 48, dtype=np.float32).reshape(8, 6)}
for text in ("4,1,1", "2,1,2", "2,2,1", "1,2,2"):
  data, context, tensor = map(int, text.split(","))
  mesh = meshes.make(schema.Mesh(slice=1, data=data, context=context, tensor=tensor))
  one = NamedSharding(mesh, P(("slice", "data"), "context"))
  two = {"inputs": one, "weights": NamedSharding(mesh, P("data"))}
  for shardings in (one, two):
    calls, made = [], []
    def make_rows(start, stop):
      calls.append((start, stop))
      return {name: array[start:stop].copy() for name, array in whole.items()}
    def work():
      with jax.transfer_guard("disallow"):
        made.append(processes.global_batch(make_rows, shardings, 8))
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    batch = made[0]
    found["rows"][text] = calls
    right = all(array.shape == (8, 6) and array.dtype == whole[name].dtype
                and array.sharding == (two[name] if shardings is two else one)
                for name, array in batch.items())
    for name, array in batch.items():
      for shard in array.addressable_shards:
        right &= np.array_equal(shard.data, whole[name][shard.index])
    # And seen from inside a program, by all processes.
    weigh = jax.jit(lambda batch: (batch["inputs"] * np.arange(48).reshape(8, 6)).sum())
    right &= int(weigh(batch)) == int((np.arange(48) ** 2).sum())
    found["right"][text] = bool(right)

# Votes, through a step: only the last process wants to stop, at its third step.
train_step = jax.jit(lambda state, vote: (state + 1, {"stop": processes.counted(vote)}),
                     donate_argnums=0)
state = jax.make_array_from_callback((), NamedSharding(mesh, P()), lambda _: np.int32(0))
with jax.transfer_guard("disallow"):
  for i in range(4):
    state, metrics = train_step(state, processes.vote(mesh, 15 if i == 2 and me == n - 1 else 0))
    found["votes"].append(int(jax.device_get(metrics["stop"])))
processes.barrier("done")
print(json.dumps(found))
"""


@pytest.mark.parametrize("n, devices", [(2, 2), (4, 1)])
def test_real_processes(n, devices):
  ended = spawn(n, devices, EVERYTHING)
  for process, result in enumerate(ended):
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout[result.stdout.index('{"rows"'):])
    assert found["votes"] == [0, 0, 15, 0]
    assert all(found["right"].values()) and len(found["right"]) == 4
    of_half = [[4 * (process * 2 // n), 4 * (process * 2 // n) + 4]]
    of_its_own = [[process * 8 // n, (process + 1) * 8 // n]]
    assert found["rows"] == {"4,1,1": of_its_own, "2,1,2": of_half, "2,2,1": of_half,
                             "1,2,2": [[0, 8]]}


def test_disagreement_is_named_on_all_processes():
  ended = spawn(2, 1, """
      facts = {"data.seed": 1, "model.d_model": 256 * (me + 1), "devices": me}
      processes.agree(facts)
  """)
  for result in ended:
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1] == (
        "process 1 disagrees with process 0: model.d_model is 512 there, 256 on process 0; start "
        "every process with the same command, config, data and code")


def test_processes_with_other_devices_or_facts_can_still_disagree():
  ended = spawn(2, 1, """
      jax.config.update("jax_num_cpu_devices", 1 + me)
      for facts in ({"devices": jax.local_device_count()},
                    {"a": 1, **({"b": 2} if me else {})}, {"a": 1} if me else {"a": 1, "c": 3}):
        try:
          processes.agree(facts)
        except UserError as error:
          print(error)
      processes.barrier("end")
      try:
        processes.barrier(f"barrier {me}")
      except RuntimeError as error:
        print(error)
  """)
  for result in ended:
    assert result.returncode == 0, result.stderr
    said = [line.split(";")[0].rsplit(": ", 1)[1] for line in result.stdout.splitlines()]
    assert said == ["devices is 2 there, 1 on process 0", "b is 2 there, absent on process 0",
                    "c is absent there, 3 on process 0", "barrier 0, barrier 1"]


def test_what_one_process_cannot_do_stops_all():
  ended = spawn(2, 1, """
      with processes.together():
        if me == 1:
          raise UserError("no such file; mend it")
  """)
  assert [result.returncode for result in ended] == [2, 2], ended[0].stderr
  assert [result.stderr.splitlines()[-1] for result in ended] == [
      "process 1: no such file; mend it", "no such file; mend it"]


def test_a_process_that_does_not_come_is_named():
  ended = spawn(2, 1, """
      import time
      if me == 0:
        processes.agree({}, timeout=1)
      time.sleep(4)
  """)
  assert [result.returncode for result in ended] == [2, 0], ended[0].stderr
  assert "process 1 did not agree within 1 s" in ended[0].stderr


def test_a_signal_ends_a_process_that_waits():
  # Both are told to end, as a scheduler does it; neither may stay.
  ended = spawn(2, 1, """
      import os, signal, time
      if me == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
      threading.Timer(2, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
      processes.agree({})
  """)
  assert [result.returncode for result in ended] == [-15, -15], ended[0].stderr


def test_without_process_0_the_others_say_so():
  [result] = spawn(2, 1, "pass", only=1, timeout=2)
  assert result.returncode == 2, result.stderr
  assert "nothing answers at 127.0.0.1:" in result.stderr and "after 2 s" in result.stderr

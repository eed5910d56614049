"""Start-up decided on made-up environments; all else in real processes on simulated devices."""

import json
import os
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny import ROOT

from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import mesh as meshes
from chinchilla_jax.parallel import processes
from chinchilla_jax.parallel.processes import Flags

# Seconds. Four interpreters that import JAX on a busy machine.
PATIENCE = 100

# ---------------------------------------------------------------------- How a run starts


@pytest.fixture
def started(monkeypatch) -> list[dict]:
  """Arguments of each call of jax.distributed.initialize; nothing is started."""
  calls = []

  def initialize(shutdown_timeout_seconds, **arguments):
    assert shutdown_timeout_seconds < 100
    calls.append(arguments)
  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: bool(calls))
  monkeypatch.setattr(processes, "_metadata", lambda key: "")  # No network.
  return calls


@pytest.fixture
def tpu(monkeypatch, started) -> dict[str, str]:
  """A machine with libtpu; returns its metadata, empty so far."""
  metadata: dict[str, str] = {}
  monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: name == "libtpu")
  monkeypatch.setattr(processes, "_metadata", lambda key: metadata.get(key, ""))
  return metadata


def step(**changes) -> dict[str, str]:
  """What srun tells task 1 of 4 on two nodes."""
  return {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4",
          "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "1",
          "SLURM_LOCALID": "1", **changes}


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def test_alone_nothing_is_started(started):
  processes.start(environ={})
  processes.start(Flags("nowhere.invalid:1", 1, 0), environ=step())  # Flags go before SLURM.
  assert started == []


def test_flags_start_what_they_say_once(started, capsys):
  address = f"127.0.0.1:{free_port()}"
  processes.start(Flags(address, 2, 0), environ={}, timeout=5)
  processes.start(Flags(address, 2, 0), environ={}, timeout=5)
  assert started == [{"coordinator_address": address, "num_processes": 2, "process_id": 0,
                      "initialization_timeout": 5, "cluster_detection_method": "deactivate"}]
  assert f"waiting for 1 other processes at {address}, at most 5 s" in capsys.readouterr().err
  assert jax.config.jax_cpu_collectives_implementation == "gloo"


@pytest.mark.parametrize("flags, words", [
    (Flags("a:1", 2, None), ["--process missing"]),
    (Flags(None, None, 0), ["--coordinator and --processes missing"]),
    (Flags("a:1", 0, 0), ["--process:", "--processes=0"]),
    (Flags("a:1", 2, 2), ["--process:", "got 2", "--processes=2"]),
    (Flags("a:1", 2, -1), ["--process:", "got -1"]),
    (Flags("a", 2, 0), ["--coordinator", "'a'", "HOST:PORT"]),
    (Flags(":80", 2, 0), ["--coordinator"]),
    (Flags("a:0", 2, 0), ["--coordinator"]),
    (Flags("a:65536", 2, 0), ["--coordinator"]),
    (Flags("a:http", 2, 0), ["--coordinator"]),
    (Flags("fe80::1:80", 2, 0), ["--coordinator", "[fe80::1]:8476"]),
])
def test_flags_that_make_no_sense(started, flags, words):
  with pytest.raises(UserError) as caught:
    processes.start(flags, environ={})
  assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
  assert started == []


def test_an_ipv6_coordinator_is_fine():
  assert processes._checked(Flags("[fe80::1]:80", 2, 1)) == ("fe80::1", 80)


def test_a_taken_port_is_refused(started):
  with socket.socket() as taken:
    taken.bind(("", 0))
    taken.listen()
    with pytest.raises(UserError, match="cannot listen at .*another port"):
      processes.start(Flags(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0), environ={})
  assert started == []


@pytest.mark.parametrize("host", ["127.0.0.1", "nobody.invalid"])
def test_a_coordinator_that_does_not_answer(started, host):
  address = f"{host}:{free_port()}"
  with pytest.raises(UserError, match=f"nothing answers at {address} after 1 s .*process 0"):
    processes.start(Flags(address, 2, 1), environ={}, timeout=1)
  assert started == []


def test_what_jax_cannot_start_is_the_users_to_mend(monkeypatch):
  def fail(**arguments):
    raise RuntimeError("Failed to recognize coordinator\nand more")
  monkeypatch.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(UserError) as caught:
    processes.start(environ=step())
  assert "SLURM" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("environ, devices", [
    (step(), {}),                                        # JAX: the GPU of the task's number.
    (step(SLURM_STEP_NUM_NODES="4"), {"local_device_ids": []}),          # One task per node: all.
    (step(CUDA_VISIBLE_DEVICES="0,1"), {}),
    (step(CUDA_VISIBLE_DEVICES="3"), {"local_device_ids": []}),          # --gpus-per-task=1
    (step(CUDA_VISIBLE_DEVICES="3", JAX_LOCAL_DEVICE_IDS="0"), {}),
])
def test_a_slurm_step(started, environ, devices):
  processes.start(environ=environ)
  assert started == [{"initialization_timeout": processes.TIMEOUT, **devices}]


@pytest.mark.parametrize("environ, note", [
    (step(SLURM_NTASKS="1", SLURM_STEP_NUM_TASKS="1"), False),           # srun -n 1
    (step(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"), True),            # salloc's own shell
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "node[1-2]",
      "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),                 # sbatch without srun
    ({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}, False),
])
def test_a_slurm_job_without_srun_is_one_process(started, environ, note, capsys):
  processes.start(environ=environ)
  assert started == []
  assert ("srun before the command" in capsys.readouterr().err) == note


NO_CHIP = {"TPU_SKIP_MDS_QUERY": "1"}


@pytest.mark.parametrize("environ, metadata, starts", [
    ({"TPU_WORKER_HOSTNAMES": "a,b", **NO_CHIP}, {}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost", **NO_CHIP}, {}, False),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", **NO_CHIP}, {}, True),
    ({"TPU_PROCESS_ADDRESSES_PATH": "file", **NO_CHIP}, {}, True),
    ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2", **NO_CHIP}, {}, True),
    ({}, {"worker-network-endpoints": "unknown:unknown:10.0.0.2,unknown:unknown:10.0.0.3"}, True),
    ({}, {"worker-network-endpoints": "10.0.0.2"}, False),
    ({}, {"worker-network-endpoints": "10.0.0.2",
          "tpu-env": "ZONE: 'x'\nMEGASCALE_NUM_SLICES: '2'\n"}, True),
    (NO_CHIP, {"worker-network-endpoints": "10.0.0.2,10.0.0.3"}, False),
    ({}, {}, False),
])
def test_tpu_hosts(started, tpu, environ, metadata, starts):
  tpu.update(metadata)
  processes.start(environ=environ)
  assert started == [{"initialization_timeout": processes.TIMEOUT}] * starts


@pytest.mark.parametrize("platforms, starts", [("cpu", 0), ("tpu,cpu", 1), ("", 1)])
def test_a_tpu_that_jax_is_told_not_to_use(started, tpu, platforms, starts):
  processes.start(environ={"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": platforms})
  assert len(started) == starts


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
from chinchilla_jax.parallel import mesh as meshes, processes
address, n, me = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
try:
  processes.start(processes.Flags(address, n, me), timeout=int(sys.argv[4]))
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
processes.start(processes.Flags(address, n, me))  # Nothing happens.
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

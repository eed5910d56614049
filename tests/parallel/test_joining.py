"""How processes find each other, on made-up environments; test_processes.py has real ones."""

import socket

import jax
import pytest
from ports import free_port

from chinchilla_jax.errors import UserError
from chinchilla_jax.parallel import joining
from chinchilla_jax.parallel.joining import Flags


@pytest.fixture
def started(monkeypatch) -> list[dict]:
  """Arguments of each call of jax.distributed.initialize; nothing is started."""
  calls = []

  def initialize(shutdown_timeout_seconds, **arguments):
    assert shutdown_timeout_seconds < 100
    calls.append(arguments)
  monkeypatch.setattr(jax.distributed, "initialize", initialize)
  monkeypatch.setattr(jax.distributed, "is_initialized", lambda: bool(calls))
  monkeypatch.setattr(joining, "_metadata", lambda key: "")  # No network.
  return calls


@pytest.fixture
def tpu(monkeypatch, started) -> dict[str, str]:
  """A machine with libtpu; returns its metadata, empty so far."""
  metadata: dict[str, str] = {}
  monkeypatch.setattr(joining.importlib.util, "find_spec", lambda name: name == "libtpu")
  monkeypatch.setattr(joining, "_metadata", lambda key: metadata.get(key, ""))
  return metadata


def step(**changes) -> dict[str, str]:
  """What srun tells task 1 of 4 on two nodes."""
  return {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[1-2]", "SLURM_NTASKS": "4",
          "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "1",
          "SLURM_LOCALID": "1", **changes}


def test_alone_nothing_is_started(started):
  joining.start(environ={})
  joining.start(Flags("nowhere.invalid:1", 1, 0), environ=step())  # Flags go before SLURM.
  assert started == []


def test_flags_start_what_they_say_once(started, capsys):
  address = f"127.0.0.1:{free_port()}"
  joining.start(Flags(address, 2, 0), environ={}, timeout=5)
  joining.start(Flags(address, 2, 0), environ={}, timeout=5)
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
    joining.start(flags, environ={})
  assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
  assert started == []


def test_an_ipv6_coordinator_is_fine():
  assert joining._checked(Flags("[fe80::1]:80", 2, 1)) == ("fe80::1", 80)


def test_a_taken_port_is_refused(started):
  with socket.socket() as taken:
    taken.bind(("", 0))
    taken.listen()
    with pytest.raises(UserError, match="cannot listen at .*another port"):
      joining.start(Flags(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0), environ={})
  assert started == []


@pytest.mark.parametrize("host", ["127.0.0.1", "nobody.invalid"])
def test_a_coordinator_that_does_not_answer(started, host):
  address = f"{host}:{free_port()}"
  with pytest.raises(UserError, match=f"nothing answers at {address} after 1 s .*process 0"):
    joining.start(Flags(address, 2, 1), environ={}, timeout=1)
  assert started == []


def test_what_jax_cannot_start_is_the_users_to_mend(monkeypatch):
  def fail(**arguments):
    raise RuntimeError("Failed to recognize coordinator\nand more")
  monkeypatch.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(UserError) as caught:
    joining.start(environ=step())
  assert "SLURM" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("environ, devices", [
    (step(), {}),                                        # JAX: the GPU of the task's number.
    (step(SLURM_STEP_NUM_NODES="4"), {"local_device_ids": []}),          # One task per node: all.
    (step(CUDA_VISIBLE_DEVICES="0,1"), {}),
    (step(CUDA_VISIBLE_DEVICES="3"), {"local_device_ids": []}),          # --gpus-per-task=1
    (step(CUDA_VISIBLE_DEVICES="3", JAX_LOCAL_DEVICE_IDS="0"), {}),
])
def test_a_slurm_step(started, environ, devices):
  joining.start(environ=environ)
  assert started == [{"initialization_timeout": joining.TIMEOUT, **devices}]


@pytest.mark.parametrize("environ, note", [
    (step(SLURM_NTASKS="1", SLURM_STEP_NUM_TASKS="1"), False),           # srun -n 1
    (step(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"), True),            # salloc's own shell
    ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "node[1-2]",
      "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, True),                 # sbatch without srun
    ({"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1"}, False),
])
def test_a_slurm_job_without_srun_is_one_process(started, environ, note, capsys):
  joining.start(environ=environ)
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
  joining.start(environ=environ)
  assert started == [{"initialization_timeout": joining.TIMEOUT}] * starts


@pytest.mark.parametrize("platforms, starts", [("cpu", 0), ("tpu,cpu", 1), ("", 1)])
def test_a_tpu_that_jax_is_told_not_to_use(started, tpu, platforms, starts):
  joining.start(environ={"TPU_WORKER_HOSTNAMES": "a,b", "JAX_PLATFORMS": platforms})
  assert len(started) == starts

"""Two processes with nothing in common but a bucket: no folder, no cache."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from ports import free_port
from tiny import ROOT, tiny_experiment, with_fields

from chinchilla_jax import config_io
from chinchilla_jax.training import checkpoint
from chinchilla_jax.training.run_folder import RunFolder
from launch import assert_same_arrays, records

# Each process writes down what it fetches.
SHORT = """
import os, sys
from chinchilla_jax.storage import objects
_download = objects.download
def download(url, file):
  with open(os.environ["CHINCHILLA_CACHE"] + ".fetched", "a") as log:
    log.write(url + chr(10))
  _download(url, file)
objects.download = download
from chinchilla_jax.training import run_lock
run_lock.SECONDS = 2.0
from chinchilla_jax import cli
sys.exit(cli.main())
"""


def train(experiment, workdir, tmp_path, devices=2, processes=2):
  """(exit status, what was printed) of each; every one has a cache of its own."""
  config = tmp_path / "config.json"
  config.write_text(json.dumps(config_io.to_dict(experiment)))
  address, running = f"127.0.0.1:{free_port()}", []
  for index in range(processes):
    words = [f"--coordinator={address}", f"--processes={processes}", f"--process={index}"]
    running.append(subprocess.Popen(
        [sys.executable, "-c", SHORT, "train", f"--config={config}", f"--workdir={workdir}",
         *(words if processes > 1 else [])], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=os.environ | {
            "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
            "CHINCHILLA_CACHE": str(tmp_path / f"cache-{index}"),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}))
  try:
    texts = [process.communicate(timeout=300)[0] for process in running]
    return [(process.returncode, text) for process, text in zip(running, texts, strict=True)]
  finally:
    for process in running:
      process.kill()


def arrays(workdir, step):
  """Every array of a checkpoint, by path, whatever devices it was cut over."""
  folder = (workdir / "checkpoints" / str(step) / "state").absolute()
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    tree = reader.metadata(folder).item_metadata.tree
    whole = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    leaves, _ = jax.tree.flatten_with_path(
        reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=whole)))
  return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def test_each_puts_its_part_and_fetches_what_it_needs(gs_server, tiny_store, tmp_path):
  gs_server.copy_up(pathlib.Path(tiny_store), "stores/several")
  url = f"{gs_server.url}/runs/several"
  experiment = with_fields(
      tiny_experiment(f"{gs_server.url}/stores/several"), run_length="4 steps",
      checkpoint__every="2 steps", checkpoint__keep_every="1 steps", evaluation__every="0 steps",
      mesh__whole_below=0)
  whole = with_fields(experiment, data__store=tiny_store)
  ended = train(whole, tmp_path / "whole", tmp_path)
  assert [status for status, _ in ended] == [0, 0], ended
  ended = train(experiment, url, tmp_path)
  assert [status for status, _ in ended] == [0, 0], "\n".join(text for _, text in ended)
  for index in range(2):
    assert len(list((tmp_path / f"cache-{index}/stores").glob("[!.]*"))) == 1
    assert not list((tmp_path / f"cache-{index}/scratch").glob("*"))
  down = gs_server.copy_down("runs/several", tmp_path / "down")
  assert sorted(p.name for p in (down / "checkpoints/4/seals").iterdir()) == ["0.json", "1.json"]
  parts = [json.loads((down / f"checkpoints/4/seals/{index}.json").read_text())["files"]
           for index in range(2)]
  table = "state/optimizer.master.embedding.table/"
  assert all(any(name.startswith(table) for name in part) for part in parts)
  assert not parts[0].keys() & parts[1].keys()
  assert_same_arrays(arrays(down, 4), arrays(tmp_path / "whole", 4))
  assert records(url) == records(tmp_path / "whole")

  # The last checkpoint is gone: both go on from step 2, and end as before.
  path = RunFolder(url).checkpoints
  for name in gs_server.names("runs/several/checkpoints/4"):
    gs_server.files().rm_file(f"bucket/{name}")
  assert checkpoint.steps(path) == [2]
  ended = train(experiment, url, tmp_path)
  assert [status for status, _ in ended] == [0, 0] and "resuming at step 2" in ended[0][1], ended
  fetched = [{line.partition(table)[2] for line in (tmp_path / f"cache-{index}.fetched").read_text()
              .splitlines() if table in line} - {".zarray"} for index in range(2)]
  chunks = {path.name for path in (down / f"checkpoints/2/{table}").iterdir()} - {".zarray"}
  # Each fetches what its devices hold, which is what it put; nobody fetches all of it.
  assert fetched[0] | fetched[1] == chunks and not fetched[0] & fetched[1] and len(chunks) == 4
  again = gs_server.copy_down("runs/several", tmp_path / "again")
  assert_same_arrays(arrays(again, 4), arrays(tmp_path / "whole", 4))
  assert records(url) == records(tmp_path / "whole")

"""launch/tpu_vm.sh against a recording gcloud; its far side runs for real, in folders."""

import shutil
import subprocess
import sys

import pytest
from fake_cloud import Cloud, checkout
from tiny import ROOT

WHERE = ["--project=a-project", "--zone=us-central2-b"]
AT = "--project=a-project --zone=us-central2-b"
SLICE = "compute tpus queued-resources"
ALL = f"{AT} --node=all --worker=all --batch-size=all"


@pytest.fixture(scope="module")
def repo(tmp_path_factory):
  return checkout(tmp_path_factory.mktemp("checkout"))


@pytest.fixture
def cloud(tmp_path):
  return Cloud(tmp_path, sys.executable)


@pytest.fixture
def tpu_vm(cloud, repo):
  def call(*words, stdin=""):
    done = cloud.run(repo / "launch/tpu_vm.sh", *words, *WHERE, stdin=stdin) if "--" not in words \
        else cloud.run(repo / "launch/tpu_vm.sh", *words[:words.index("--")], *WHERE,
                       *words[words.index("--"):], stdin=stdin)
    # But for the command itself, nothing deletes.
    assert words[0] == "delete" or not any(" delete " in line for line in cloud.calls)
    return done
  return call


def test_create_asks_checks_first_and_waits_until_it_is_there(cloud, tpu_vm):
  done = tpu_vm("create", "x", "--topology=v5e:4x4", "--bucket=gs://the-bucket", "--spot",
                "--service-account=sa@a-project.iam.gserviceaccount.com")
  assert done.returncode == 0, done.stderr
  describe = f"{SLICE} describe x {AT} '--format=value(state.state)'"
  assert cloud.calls == [
      f"compute tpus tpu-vm accelerator-types list {AT} '--format=value(type)'",
      "storage buckets describe gs://the-bucket --project=a-project '--format=value(name)'",
      describe,
      f"{SLICE} create x {AT} --accelerator-type=v5litepod-16 "
      "--runtime-version=v2-alpha-tpuv5-lite --node-id=x --spot "
      "--service-account=sa@a-project.iam.gserviceaccount.com",
      describe, describe, describe]
  assert "16 chips in 4 machines, spot" in done.stderr and "x is there" in done.stderr


def test_several_slices_of_a_shape_of_ones_own(cloud, tpu_vm):
  assert tpu_vm("create", "x", "--topology=v4:4x4x16", "--node-count=2", "--reserved",
                "--runtime-version=my-own").returncode == 0
  assert cloud.calls[2] == (f"{SLICE} create x {AT} --type=v4 --topology=4x4x16 "
                            "--runtime-version=my-own --node-count=2 --node-prefix=x --reserved")


def test_no_capacity_is_asked_for_again_ever_later(cloud, tpu_vm):
  cloud.answer("queued-resources create", 1, times=4, err="Create request issued\n"
               "ERROR: (gcloud...create) RESOURCE_EXHAUSTED: There is no more capacity in the zone")
  done = tpu_vm("create", "x", "--topology=v4:8x8x16")
  assert done.returncode == 0, done.stderr
  assert sum(" create " in line for line in cloud.calls) == 5
  assert (cloud.folder / "slept").read_text().split()[:4] == ["30", "60", "120", "240"]


def test_after_so_many_attempts_it_ends_with_75(cloud, tpu_vm):
  cloud.answer("queued-resources create", 1, times=9, err="ERROR: no more capacity in the zone")
  done = tpu_vm("create", "x", "--topology=v4:8x8x16", "--attempts=3")
  assert done.returncode == 75 and "no capacity for v4:8x8x16 after 3 attempts" in done.stderr
  assert sum(" create " in line for line in cloud.calls) == 3


@pytest.mark.parametrize("error", [
    "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV4' has been exceeded. Limit: 0",
    "ERROR: (gcloud) PERMISSION_DENIED: not yours"])
def test_other_refusals_are_told_at_once(cloud, tpu_vm, error):
  cloud.answer("queued-resources create", 1, err=error)
  done = tpu_vm("create", "x", "--topology=v4:8x8x16")
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1] == f"launch/tpu_vm.sh: create: {error}"
  assert sum(" create " in line for line in cloud.calls) == 1


def test_one_that_is_there_is_not_asked_for_again(cloud, tpu_vm):
  cloud.state("ACTIVE")
  assert tpu_vm("create", "x", "--topology=v4:8x8x16").returncode == 0
  cloud.state("WAITING_FOR_RESOURCES", "ACTIVE")
  assert tpu_vm("create", "x", "--topology=v4:8x8x16").returncode == 0
  assert not any(" create " in line for line in cloud.calls)


def test_it_waits_so_long_and_then_says_run_me_again(cloud, tpu_vm):
  cloud.state("WAITING_FOR_RESOURCES")
  done = tpu_vm("create", "x", "--topology=v4:8x8x16", "--wait=60")
  assert done.returncode == 75 and "the same command goes on waiting" in done.stderr


@pytest.mark.parametrize("words", [["create", "x", "--topology=v4:8x8x16"], ["setup", "x"],
                                   ["train", "x", "--", "--workdir=/nfs/x"], ["attach", "x"]])
def test_what_a_preemption_left_is_not_deleted_by_itself(cloud, tpu_vm, words):
  cloud.state("SUSPENDED")
  done = tpu_vm(*words)
  assert done.returncode == 2 and "launch/tpu_vm.sh delete x, then create" in done.stderr


def test_a_slice_that_fails_while_waited_for(cloud, tpu_vm):
  cloud.state("ACCEPTED", "FAILED")
  done = tpu_vm("create", "x", "--topology=v4:8x8x16")
  assert done.returncode == 1 and "FAILED before it was ever there" in done.stderr


# -------------------------------------------------------------------- On the machines


@pytest.fixture
def ready(cloud, tpu_vm):
  cloud.state("ACTIVE")
  done = tpu_vm("setup", "x", "--bucket=the-bucket")
  assert done.returncode == 0, done.stderr
  return cloud


def test_setup_copies_the_commit_and_installs_on_all_machines_at_once(ready, repo, tpu_vm):
  commit = subprocess.run(["git", "-C", repo, "rev-parse", "--short=12", "HEAD"], text=True,
                          capture_output=True, check=True).stdout.strip()
  copy, unpack, install = ready.calls[2:]
  assert copy.startswith(f"{SLICE} scp /") and copy.endswith(f"chinchilla-{commit}.tar.gz x: {ALL}")
  assert unpack.startswith(f"{SLICE} ssh x {ALL} '--command=set -e; ")
  assert install == (f"{SLICE} ssh x {ALL} "
                     "'--command=chinchilla/src/launch/tpu_worker.sh setup the-bucket'")
  for home in ready.machines:
    done = (home / "system").read_text()
    assert f"uv venv --quiet --clear --python 3.12 {home}/chinchilla/venv" in done
    assert f"--editable {home}/chinchilla/src[tpu,gcs]" in done
    assert "mount /mnt/gcs/the-bucket" in done
    assert (home / "system-files/etc/fstab").read_text().startswith(
        "the-bucket /mnt/gcs/the-bucket gcsfuse rw,")
    assert not list(home.glob("*.tar.gz"))
  # Again: nothing is installed twice.
  assert tpu_vm("setup", "x").returncode == 0
  assert all((home / "system").read_text().count("uv venv") == 1 for home in ready.machines)


def test_setup_from_a_repository(cloud, repo, tpu_vm):
  cloud.state("ACTIVE")
  commit = subprocess.run(["git", "-C", repo, "rev-parse", "HEAD"], text=True,
                          capture_output=True, check=True).stdout.strip()
  done = tpu_vm("setup", "x", f"--repo={repo}", f"--commit={commit}")
  assert done.returncode == 0, done.stderr
  assert not any(" scp " in line for line in cloud.calls)
  assert (cloud.machines[1] / "chinchilla/src/launch/tpu_worker.sh").exists()


TRAIN = ["train", "x", "--bucket=the-bucket", "--secret=WANDB_API_KEY=wandb", "--",
         "--config=configs/chinchilla.py:70b", "--config.run_length=20 tokens/param",
         "--workdir=/mnt/gcs/the-bucket/runs/it's"]


def test_train_starts_a_unit_that_outlives_the_session(ready, tpu_vm):
  done = tpu_vm(*TRAIN)
  assert done.returncode == 0, done.stderr
  assert done.stdout == "vm-0: started\nvm-1: started\n"
  for home in ready.machines:
    done = (home / "system").read_text().splitlines()[-4:]
    assert done == ["systemctl is-active --quiet chinchilla.service", "systemctl daemon-reload",
                    "systemctl enable --quiet chinchilla.service",
                    "systemctl start chinchilla.service"]
    assert (home / "chinchilla/run").read_text() == (
        "secrets=('WANDB_API_KEY=wandb')\nset -- '--config=configs/chinchilla.py:70b' "
        "'--config.run_length=20 tokens/param' '--workdir=/mnt/gcs/the-bucket/runs/it'\\''s'\n")
  # The same again changes nothing; another run is refused while this one goes on.
  assert "vm-0: runs already" in tpu_vm(*TRAIN).stdout
  other = tpu_vm(*TRAIN, "--config.seed=2")
  assert other.returncode == 2 and "vm-0: another run goes on here" in other.stderr
  new = tpu_vm("setup", "x")
  assert new.returncode == 2 and "a run goes on here, stop it first" in new.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd-analyze here")
def test_systemd_understands_the_unit(ready, tpu_vm):
  assert tpu_vm(*TRAIN).returncode == 0
  unit = ready.machines[0] / "system-files/etc/systemd/system/chinchilla.service"
  done = subprocess.run(["systemd-analyze", "verify", str(unit)], text=True, capture_output=True)
  about = [line for line in done.stderr.splitlines() if "chinchilla" in line]
  assert about == [], done.stderr


def test_the_run_gets_the_secret_and_is_started_again_and_nobody_else_sees_it(ready, tpu_vm):
  """What systemd starts, without systemd."""
  secret = "hush-5eb1"
  (ready.folder / "secret").write_text(secret + "\n")
  assert tpu_vm(*TRAIN).returncode == 0
  home = ready.machines[1]
  (home / "body").write_text(
      f'[ "$WANDB_API_KEY" = {secret} ] && echo "knows, $*"; echo "$(ps -ef)" >> "$HOME/ps"\n'
      'echo >> "$HOME/starts"; [ "$(wc -l < "$HOME/starts")" = 3 ] && exit 0; exit 75\n')
  done = subprocess.run(
      [home / "chinchilla/src/launch/tpu_worker.sh", "run"], text=True, capture_output=True,
      timeout=60, env={"HOME": str(home), "PATH": f"{ready.folder}/vm:/usr/bin:/bin", "PAUSE": "0",
                       "FAKE_CLOUD": str(ready.folder)})
  assert done.returncode == 0, done.stderr
  assert done.stdout.count("knows, train --config=configs/chinchilla.py:70b "
                           "--config.run_length=20 tokens/param") == 3
  (home / "body").unlink()
  (ready.folder / "secret").unlink()
  holding = [path for path in ready.folder.rglob("*") if path.is_file() and not path.is_symlink()
             and secret.encode() in path.read_bytes()]
  assert holding == [] and secret not in done.stderr
  assert ready.calls[-1] == "secrets versions access latest --secret=wandb"


def test_attach_status_stop(ready, tpu_vm):
  assert tpu_vm(*TRAIN).returncode == 0
  assert tpu_vm("attach", "x").stdout == "vm-0: step 12/12\nvm-1: step 12/12\n"
  assert tpu_vm("attach", "x", "--worker=0").returncode == 0
  assert ready.calls[-1].startswith(f"{SLICE} ssh x {AT} --node=all --worker=0 ")
  assert tpu_vm("status", "x").stdout == (
      "x: ACTIVE\nvm-0: active; step 12/12\nvm-1: active; step 12/12\n")
  assert tpu_vm("stop", "x").stdout == "vm-0: stopped\nvm-1: stopped\n"
  assert not (ready.machines[0] / "active").exists()
  assert "disable --quiet chinchilla.service" in (ready.machines[0] / "system").read_text()


@pytest.mark.parametrize("words, stdin, deleted", [
    (["delete", "x"], "", False), (["delete", "x"], "n\n", False), (["delete", "x"], "y\n", True),
    (["delete", "x", "--yes"], "", True), (["delete", "x", "--yes", "--dry-run"], "", False)])
def test_delete_asks(cloud, tpu_vm, words, stdin, deleted):
  cloud.state("ACTIVE")
  done = tpu_vm(*words, stdin=stdin)
  assert done.returncode == (0 if deleted or "--dry-run" in words else 2)
  command = f"{SLICE} delete x {AT} --force --quiet"
  assert (cloud.calls[-1:] == [command]) is deleted
  if "--dry-run" in words:
    assert done.stdout.splitlines()[-1] == f"gcloud {command}"


def test_a_dry_run_prints_the_commands_and_runs_none(cloud, tpu_vm):
  done = tpu_vm("create", "x", "--topology=v6e:2x4", "--dry-run")
  assert done.stdout.splitlines()[2] == (
      f"gcloud {SLICE} create x {AT} --accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e "
      "--node-id=x")
  for words in (["setup", "x"], TRAIN, ["attach", "x"], ["status", "x"], ["stop", "x"]):
    dry = [*words[:2], "--dry-run", *words[2:]]
    done = tpu_vm(*dry)
    assert done.returncode == 0 and done.stdout.startswith("gcloud compute tpus "), done.stderr
  assert cloud.calls == []


# -------------------------------------------------------------------- Bad input


@pytest.mark.parametrize("words, message", [
    (["create", "x", "--topology=v5e:3x3"], "a host of v5e is 2x2 chips"),
    (["create", "x", "--topology=v9:4x4"], "unknown generation 'v9'"),
    (["create", "x", "--accelerator-type=v5e-16"], "accelerator type 'v5e-16' is unknown; one of:"),
    (["create", "x", "--accelerator-type=v4-24"], "no usual shape of that size"),
    (["create", "x", "--topology=h100:8"], "h100:8 is no TPU"),
    (["create", "x", "--topology=v3:4x4", "--node-count=2"], "Cloud joins slices from v4 on"),
    (["create", "x", "--topology=v4:2x2x2", "--node-count=none"], "--node-count: got 'none'"),
    (["create", "x"], "no slice; give --topology"),
    (["create", "X", "--topology=v4:2x2x2"], "'X' cannot name a slice"),
    (["create", "x", "--topology=v4:2x2x2", "--spot", "--reserved"], "give one of them"),
    (["create", "x", "--topolgy=v4:2x2x2"], "unknown flag --topolgy=v4:2x2x2"),
    (["creat", "x"], "no command 'creat'"),
    (["create", "x", "--topology=v4:2x2x2", "--bucket=a b"], "is not a bucket's name"),
    (["train", "x"], "no arguments"),
    (["train", "x", "--", "--config=a"], "no --workdir"),
    (["train", "x", "--", "--workdir=runs/a"], "is a folder of each machine"),
    (["train", "x", "--", "--workdir=gs:///a"], "is not gs://BUCKET/FOLDER"),
    (["train", "x", "--", "--workdir=s3://b/a"], "give one that all see, such as gs://BUCKET/runs/x"),
    (["train", "x", "--", "--workdir=/mnt/gcs/b/a"], "not on the bucket that is mounted"),
    (["train", "x", "--secret=A=sk-1/2+3==", "--", "--workdir=/a"], "not its value"),
    (["train", "x", "--", "--workdir=/a", "--wandb_api_key=1"], "looks like a secret"),
    (["setup", "x", "--repo=https://me:pw@host/r", "--commit=abcdef0"], "can be read by all"),
    (["setup", "x", "--repo=https://host/r", "--commit=main"], "since a branch moves"),
])
def test_bad_input_is_refused_before_anything_is_asked(cloud, tpu_vm, words, message):
  done = tpu_vm(*words)
  assert done.returncode == 2 and message in done.stderr, done.stderr
  assert done.stderr.count("\n") == 1 and done.stdout == ""
  assert cloud.calls == []


@pytest.mark.parametrize("to, words, message", [
    ("accelerator-types", ["create", "x", "--topology=v4:8x8x16"], "check --project, --zone"),
    ("buckets", ["create", "x", "--topology=v4:8x8x16", "--bucket=no-such"],
     "make it with gcloud storage buckets create gs://no-such --location=us-central2"),
    ("describe", ["setup", "x"], "check --project, --zone")])
def test_what_only_the_cloud_knows_is_asked_before_anything_is_created(cloud, tpu_vm, to, words,
                                                                       message):
  cloud.answer(to, 1, err="ERROR: (gcloud) PERMISSION_DENIED: it is not yours")
  done = tpu_vm(*words)
  assert done.returncode == 2 and message in done.stderr and "it is not yours" in done.stderr
  assert done.stderr.count("\n") == 1
  assert not any(" create " in line for line in cloud.calls)


@pytest.mark.parametrize("words, message", [
    (["--config=configs/chinchilla.py:70b", "--config.mesh.tensor=16"],
     "tensor 16 does not make 4 devices"),
    (["--config=configs/chinchilla.py:74m", "--config.batch.sequences=6"], "do not divide"),
    (["--config=configs/chinchilla.py:74m", "--workdir=/x"], "")])
def test_a_config_that_does_not_fit_is_refused_before_the_slice_is_asked_for(cloud, repo, words,
                                                                             message):
  done = cloud.run(repo / "launch/tpu_vm.sh", "create", "x", "--topology=v4:2x2x1", *WHERE, "--",
                   *[word.replace("configs/", f"{ROOT}/configs/") for word in words],
                   CHINCHILLA=f"{sys.executable} -m chinchilla_jax", PYTHONPATH=str(ROOT))
  if not message:
    assert done.returncode == 0, done.stderr
    return
  assert done.returncode == 2 and message in done.stderr, done.stderr
  assert done.stderr.count("\n") == 1 and cloud.calls == []


def test_a_zone_without_such_slices(cloud, tpu_vm):
  done = tpu_vm("create", "x", "--topology=v5p:2x2x2")
  assert done.returncode == 2 and "us-central2-b has no v5p-16" in done.stderr
  assert len(cloud.calls) == 1


@pytest.mark.parametrize("flags, message", [
    (["--zone=us-central2-b"], "no project"), (["--project=a"], "no zone"),
    (["--project=a", "--zone=central"], "'central' is not a zone")])
def test_no_project_or_zone(cloud, repo, flags, message):
  done = cloud.run(repo / "launch/tpu_vm.sh", "create", "x", "--topology=v4:2x2x2", *flags)
  assert done.returncode == 2 and message in done.stderr and cloud.calls == []


def test_help_has_every_command(cloud, repo):
  done = cloud.run(repo / "launch/tpu_vm.sh", "--help")
  assert done.returncode == 0
  for word in ("create", "setup", "train", "attach", "status", "stop", "delete", "--dry-run"):
    assert word in done.stdout
  assert "set -euo" not in done.stdout

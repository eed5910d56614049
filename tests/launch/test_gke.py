"""launch/gke/render.py: what it prints against published schemas, and what it refuses."""

import subprocess
import sys

import pytest
import yaml
from tiny import ROOT

RENDER = ROOT / "launch/gke/render.py"
TPU = ["--name=c70b", "--image=r.io/p/chinchilla:1.0", "--topology=v5p:8x8x8",
       "--bucket=my-bucket", "--service-account=trainer"]
GPU = ["--name=c1", "--image=r.io/p/chinchilla:1.0", "--topology=h100:16", "--claim=runs"]
BUCKET = ["--config=configs/chinchilla.py:70b", "--workdir=/mnt/gcs/my-bucket/runs/70b",
          "--config.data.store=/mnt/gcs/my-bucket/stores/text"]
URL = [word for word in TPU if not word.startswith("--bucket")]
OBJECTS = ["--config=configs/chinchilla.py:70b", "--workdir=gs://my-bucket/runs/70b",
           "--config.data.store=gs://my-bucket/stores/text"]
CLAIM = ["--config=configs/chinchilla.py:1424m", "--workdir=/mnt/claim/runs/1",
         "--config.data.store=/mnt/claim/stores/text"]

# JobSet v1alpha2, the fields used: name -> (type, allowed values or None, required). From the CRD
# of kubernetes-sigs/jobset (config/components/crd/bases), which no package carries. Its jobs are
# Jobs of Kubernetes, and checked as such.
JOBSET = {
    "": {"apiVersion": (str, ("jobset.x-k8s.io/v1alpha2",), True), "kind": (str, ("JobSet",), True),
         "metadata": (dict, None, True), "spec": (dict, None, True)},
    "spec": {"failurePolicy": (dict, None, False), "replicatedJobs": (list, None, True),
             "network": (dict, None, False), "suspend": (bool, None, False)},
    "spec.failurePolicy": {"maxRestarts": (int, None, False), "rules": (list, None, False)},
    "spec.failurePolicy.rules": {
        "name": (str, None, True),
        "action": (str, ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"), True),
        "onJobFailureReasons": (list, None, False)},
    "spec.replicatedJobs": {"name": (str, None, True), "replicas": (int, None, False),
                            "template": (dict, None, True)},
    "spec.replicatedJobs.template": {"metadata": (dict, None, False), "spec": (dict, None, True)},
}
REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded",
           "PodFailurePolicy"}


def check_jobset(node, path=""):
  fields = JOBSET[path]
  assert set(node) <= set(fields), (path, set(node) - set(fields))
  for name, (kind, values, required) in fields.items():
    if name not in node:
      assert not required, (path, name)
      continue
    assert type(node[name]) is kind and (values is None or node[name] in values), (path, name)
    inner = f"{path}.{name}".lstrip(".")
    for part in (node[name] if kind is list else [node[name]]) if inner in JOBSET else []:
      check_jobset(part, inner)


def render(flags, train):
  done = subprocess.run([sys.executable, RENDER, *flags, "--", *train], text=True, cwd=ROOT,
                        capture_output=True, timeout=120)
  assert done.returncode == 0, done.stderr
  return list(yaml.safe_load_all(done.stdout))


def job_of(jobset):
  """A job of a JobSet as one of Kubernetes."""
  [one] = jobset["spec"]["replicatedJobs"]
  return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": one["name"]},
          **one["template"]}


def validate(manifest):
  schemas = pytest.importorskip(
      "kubernetes_validate", reason="schemas: pip install kubernetes-validate")
  schemas.validate(manifest, "1.31", strict=True)


@pytest.fixture(scope="module")
def jobset():
  [manifest] = render([*TPU, "--slices=2", "--spot", "--secret=WANDB_API_KEY=wandb:key"], BUCKET)
  return manifest


@pytest.fixture(scope="module")
def gpu():
  return render(GPU, CLAIM)


def test_a_jobset_has_the_structure_of_its_crd(jobset):
  check_jobset(jobset)
  assert jobset["metadata"] == {
      "name": "c70b", "labels": {"app": "c70b"}, "annotations": {
          "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}}
  policy = jobset["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 50
  assert [(rule["action"], rule["onJobFailureReasons"]) for rule in policy["rules"]] == [
      ("FailJobSet", ["PodFailurePolicy"])]
  assert set(policy["rules"][0]["onJobFailureReasons"]) <= REASONS


def test_its_jobs_and_those_of_gpu_nodes_pass_the_published_schema(jobset, gpu):
  validate(job_of(jobset))
  for manifest in gpu:
    validate(manifest)
  with pytest.raises(Exception, match="Additional properties"):  # The schema is really strict.
    broken = job_of(jobset)
    validate({**broken, "spec": {**broken["spec"], "completion": 1}})


def test_pods_and_chips_of_slices(jobset):
  [slices] = jobset["spec"]["replicatedJobs"]
  spec = slices["template"]["spec"]
  assert slices["replicas"] == 2
  assert spec["completions"] == spec["parallelism"] == 128  # 512 chips, 4 a machine.
  assert spec["completionMode"] == "Indexed"
  pod = spec["template"]["spec"]
  assert pod["nodeSelector"] == {
      "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
      "cloud.google.com/gke-tpu-topology": "8x8x8", "cloud.google.com/gke-spot": "true"}
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4"}


@pytest.mark.parametrize("topology, label, shape, pods, chips", [
    ("v4:2x2x4", "tpu-v4-podslice", "2x2x4", 4, 4), ("v6e:16x16", "tpu-v6e-slice", "16x16", 64, 4),
    ("v5e:2x4", "tpu-v5-lite-podslice", "2x4", 1, 8),
    ("v5litepod-16", "tpu-v5-lite-podslice", "4x4", 4, 4),
    ("v3:2x2", "tpu-v3-device", "2x2", 1, 4), ("v3:4x4", "tpu-v3-slice", "4x4", 4, 4),
    ("tpu7x:2x2x2", "tpu7x", "2x2x2", 2, 4)])
def test_selectors_of_every_generation(topology, label, shape, pods, chips):
  config = ["--config=configs/chinchilla.py:1424m", *BUCKET[1:], "--config.mesh.data=0",
            "--config.batch.sequences=512"]
  [manifest] = render([*TPU, f"--topology={topology}"], config)
  spec = job_of(manifest)["spec"]
  pod = spec["template"]["spec"]
  assert pod["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": label,
                                 "cloud.google.com/gke-tpu-topology": shape}
  assert spec["completions"] == pods
  assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": str(chips)}
  assert ("annotations" in manifest["metadata"]) is (pods > 1)


def test_exit_statuses_are_those_of_the_house(jobset, gpu):
  """2 and 130 end it; 75 and all others start it again, within the limit."""
  tpu_job, gpu_job = job_of(jobset)["spec"], gpu[1]["spec"]
  final = {"action": "FailJob", "onExitCodes": {"containerName": "chinchilla", "operator": "In",
                                                "values": [2, 130]}}
  assert tpu_job["podFailurePolicy"]["rules"] == [final]
  assert gpu_job["podFailurePolicy"]["rules"][0] == final
  assert (tpu_job["backoffLimit"], gpu_job["backoffLimit"]) == (0, 100)
  for job in (tpu_job, gpu_job):
    assert job["template"]["spec"]["restartPolicy"] == "Never"
  grace = lambda job: job["template"]["spec"]["terminationGracePeriodSeconds"]
  assert (grace(tpu_job), grace(gpu_job)) == (25, 300)  # Spot, and not.


def test_pods_have_no_rights_and_secrets_no_values(jobset, gpu):
  for job in (job_of(jobset), gpu[1]):
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 1000
    assert container["securityContext"] == {"allowPrivilegeEscalation": False,
                                            "capabilities": {"drop": ["ALL"]}}
  assert job_of(jobset)["spec"]["template"]["spec"]["containers"][0]["env"][1] == {
      "name": "WANDB_API_KEY", "valueFrom": {"secretKeyRef": {"name": "wandb", "key": "key"}}}


def test_the_bucket_is_mounted_where_the_run_is_told(jobset):
  template = job_of(jobset)["spec"]["template"]
  assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  assert template["spec"]["serviceAccountName"] == "trainer"
  [volume] = template["spec"]["volumes"]
  assert volume["csi"]["volumeAttributes"] == {
      "bucketName": "my-bucket", "mountOptions": "implicit-dirs,uid=1000,gid=1000"}
  [container] = template["spec"]["containers"]
  assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/mnt/gcs/my-bucket"}]
  assert container["args"] == ["train", *BUCKET]


def test_a_run_at_a_url_mounts_nothing_but_room_on_the_node():
  [manifest] = render(URL, OBJECTS)
  template = job_of(manifest)["spec"]["template"]
  assert "annotations" not in template["metadata"]
  assert template["spec"]["serviceAccountName"] == "trainer"
  assert template["spec"]["automountServiceAccountToken"] is False
  assert template["spec"]["volumes"] == [{"name": "runs", "emptyDir": {}}]
  [container] = template["spec"]["containers"]
  assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/cache"}]
  assert {"name": "CHINCHILLA_CACHE", "value": "/cache"} in container["env"]
  assert container["args"] == ["train", *OBJECTS]


def test_gpu_nodes_meet_at_pod_0(gpu):
  service, job = gpu
  pod = job["spec"]["template"]["spec"]
  [container] = pod["containers"]
  assert container["args"] == ["train", *CLAIM, "--coordinator=c1-0.c1:8476", "--processes=2",
                               "--process=$(INDEX)"]
  assert pod["subdomain"] == service["metadata"]["name"] == "c1"
  assert service["spec"]["clusterIP"] == "None"
  assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
  assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
  [_, one] = render([*GPU, "--topology=h100:4"], CLAIM)
  assert one["spec"]["completions"] == 1
  [container] = one["spec"]["template"]["spec"]["containers"]
  assert container["args"] == ["train", *CLAIM]
  assert container["resources"]["limits"] == {"nvidia.com/gpu": "4"}


@pytest.mark.parametrize("flags, train, message", [
    ([*TPU, "--topology=v5p:3x3x3"], BUCKET, "a host of v5p is 2x2 chips"),
    ([*TPU, "--topology=v5p-7"], BUCKET, "no usual shape"),
    ([*TPU, "--topology=v2:4x4"], BUCKET, "GKE has no nodes of v2"),
    ([*TPU, "--topology=v3:4x4", "--slices=2"], BUCKET, "Cloud joins slices from v4 on"),
    ([*TPU, "--topology=v4:2x2x1", "--slices=2"], BUCKET, "joins only slices of several machines"),
    ([*TPU, "--topology=v4:2x2x2"], [*BUCKET, "--config.mesh.tensor=16"],
     "does not make 8 devices"),
    ([*TPU, "--topology=v4:8x8x16"], [*BUCKET, "--config.batch.sequences=100"],
     "100 do not divide among slice x data = 256"),
    ([*TPU, "--image=r.io/p/chinchilla"], BUCKET, "has no tag"),
    ([*TPU, "--image=r.io/p/chinchilla:latest"], BUCKET, "may change while the run goes on"),
    ([*TPU, "--bucket="], BUCKET, "give a folder in gs://BUCKET, or one that is mounted"),
    ([*URL, "--service-account="], OBJECTS, "--workdir: as whom"),
    (URL, [*OBJECTS[:2], "--config.data.store=/mnt/gcs/my-bucket/stores/text"],
     "put the store where all see it: --config.data.store=gs://BUCKET/stores"),
    ([*TPU, "--claim=c"], BUCKET, "one of them"),
    ([*TPU, "--service-account="], BUCKET, "as whom?"),
    ([*TPU, "--name=C70b"], BUCKET, "cannot name anything in Kubernetes"),
    ([*TPU, "--secret=WANDB_API_KEY=0123"], BUCKET, "never a value"),
    (TPU, [], "nothing after --"),
    (TPU, [*BUCKET, "--workdir=runs/1"], "all machines must see it, so give a folder in"),
    (TPU, BUCKET[:2], "is a folder of the image"),
    (TPU, [*BUCKET, "--process=1"], "processes find each other"),
    (TPU, [*BUCKET, "--config.optimizer.peak=1"], "no such field"),
    (TPU[1:], BUCKET, "required: --name"),
])
def test_bad_input_is_one_line_and_no_manifest(flags, train, message):
  done = subprocess.run([sys.executable, RENDER, *flags, "--", *train], text=True, cwd=ROOT,
                        capture_output=True, timeout=120)
  assert done.returncode == 2 and message in done.stderr, done.stderr
  assert done.stderr.count("\n") == 1 and done.stdout == ""

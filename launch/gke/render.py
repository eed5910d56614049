#!/usr/bin/env python3
"""Prints the manifest of a run on GKE: a JobSet for TPU slices, an indexed Job for GPU nodes.

  launch/gke/render.py --name=c70b --image=REGISTRY/chinchilla:1.0 --topology=v5p:8x8x8 \\
    --service-account=trainer -- --config=configs/chinchilla.py:70b \\
    --workdir=gs://my-bucket/runs/70b --config.data.store=gs://my-bucket/stores/text \\
    | kubectl apply -f -

What follows -- are the arguments of `chinchilla train`. The config is loaded and laid over the
devices here, so that one that does not fit is refused before there is anything in the cluster.
It speaks to no cluster and writes no file. docs/launch.md has the whole story.
"""

import argparse
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

_LAUNCH = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_LAUNCH), str(_LAUNCH.parent)]

import tpu_names  # noqa: E402
import yaml  # noqa: E402

from chinchilla_jax import cli, config_io  # noqa: E402
from chinchilla_jax.errors import UserError  # noqa: E402
from chinchilla_jax.parallel import topology  # noqa: E402

Tree = dict[str, Any]

USER = 1000  # Of the Dockerfile.
PORT = 8476
# Exit statuses of docs/reliability.md after which starting again does not help.
FINAL = [2, 130]
# Node label cloud.google.com/gke-accelerator; GKE documentation, "About GPUs".
GPUS = {"a100-40gb": "nvidia-tesla-a100", "a100-80gb": "nvidia-a100-80gb",
        "h100": "nvidia-h100-80gb", "h200": "nvidia-h200-141gb", "b200": "nvidia-b200"}
_LABEL = r"[a-z]([-a-z0-9]*[a-z0-9])?"


def render(args: argparse.Namespace, train: Sequence[str]) -> list[Tree]:
  """The manifests of a run.

  Raises:
    UserError: what was asked for cannot be.
  """
  found = (topology.parse(args.topology, args.slices)
           if args.topology.partition(":")[0] in GPUS
           else tpu_names.parse(args.topology, args.slices))
  _check(args, train, found)
  if not found.chip.ici_dims:
    return _gpu_job(args, train, found)
  return [_jobset(args, train, found)]


# -------------------------------------------------------------------- Manifests


def _jobset(args: argparse.Namespace, train: Sequence[str], found: topology.Slice) -> Tree:
  """One job a slice, one pod a machine. GKE tells the pods who they are; JAX finds that."""
  machines, chips = tpu_names.machines(found)
  metadata = _metadata(args)
  if machines > 1:  # A slice of several machines is a node pool, and wants it whole.
    metadata["annotations"] = {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  pod = _pod(args, train, tpu_names.gke_labels(found), {"google.com/tpu": chips})
  pod["spec"]["containers"][0]["ports"] = [{"containerPort": 8471}, {"containerPort": 8080}]
  # A machine that is lost takes the whole run with it, so a job gives up at once and the JobSet
  # starts all of them again together.
  return {
      "apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata,
      "spec": {
          "failurePolicy": {
              "maxRestarts": args.restarts,
              "rules": [{"name": "useless", "action": "FailJobSet",
                         "onJobFailureReasons": ["PodFailurePolicy"]}]},
          "replicatedJobs": [{
              "name": "slice", "replicas": found.slices,
              "template": {"spec": _job(machines, pod, backoff=0)}}]}}


def _gpu_job(args: argparse.Namespace, train: Sequence[str], found: topology.Slice) -> list[Tree]:
  """One pod a node. They meet at pod 0, whose name a headless Service makes known."""
  nodes = -(-found.chips // topology.GPUS_PER_NODE)
  selector = {"cloud.google.com/gke-accelerator": GPUS[found.chip.name]}
  train = [*train]
  if nodes > 1:
    train += [f"--coordinator={args.name}-0.{args.name}:{PORT}", f"--processes={nodes}",
              "--process=$(INDEX)"]
  pod = _pod(args, train, selector, {"nvidia.com/gpu": min(found.chips, topology.GPUS_PER_NODE)})
  container = pod["spec"]["containers"][0]
  container["env"].append({"name": "INDEX", "valueFrom": {"fieldRef": {
      "fieldPath": "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}})
  container["ports"] = [{"containerPort": PORT}]
  # NCCL shares memory through /dev/shm, of which a pod has 64 MB.
  container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})
  pod["spec"]["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory"}})
  pod["spec"]["subdomain"] = args.name
  # If one pod ends all do, and each counts; but not one whose node was taken away.
  job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": _metadata(args),
         "spec": _job(nodes, pod, backoff=args.restarts * nodes)}
  job["spec"]["podFailurePolicy"]["rules"].append({
      "action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]})
  service = {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(args),
             "spec": {"clusterIP": "None", "publishNotReadyAddresses": True,
                      "selector": {"job-name": args.name}, "ports": [{"port": PORT}]}}
  return [service, job]


def _job(pods: int, pod: Tree, backoff: int) -> Tree:
  return {
      "completions": pods, "parallelism": pods, "completionMode": "Indexed",
      "backoffLimit": backoff,
      "podFailurePolicy": {"rules": [{
          "action": "FailJob",
          "onExitCodes": {"containerName": "chinchilla", "operator": "In", "values": FINAL}}]},
      "template": pod}


def _pod(args: argparse.Namespace, train: Sequence[str], selector: Tree,
         resources: dict[str, int]) -> Tree:
  """Without rights: not root, no capabilities, nothing of the cluster."""
  mount, volume = _disk(args)
  amounts = {name: str(count) for name, count in resources.items()}
  env: list[Tree] = [{"name": "PYTHONUNBUFFERED", "value": "1"}]
  for variable, secret, key in args.secrets:
    env.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}})
  spec: Tree = {
      "restartPolicy": "Never",  # What podFailurePolicy asks for.
      "terminationGracePeriodSeconds": args.grace,
      "nodeSelector": dict(selector),
      "automountServiceAccountToken": False,
      "securityContext": {"runAsNonRoot": True, "runAsUser": USER, "runAsGroup": USER,
                          "fsGroup": USER, "seccompProfile": {"type": "RuntimeDefault"}},
      "containers": [{
          "name": "chinchilla", "image": args.image, "args": ["train", *train], "env": env,
          "resources": {"limits": amounts, "requests": dict(amounts)},
          "securityContext": {"allowPrivilegeEscalation": False,
                              "capabilities": {"drop": ["ALL"]}},
          "volumeMounts": [{"name": "runs", "mountPath": mount}]}],
      "volumes": [{"name": "runs", **volume}]}
  pod: Tree = {"metadata": {"labels": {"app": args.name}}, "spec": spec}
  if not args.bucket and not args.claim:
    env.append({"name": "CHINCHILLA_CACHE", "value": mount})
  if args.bucket:
    # GKE puts the container that mounts the bucket beside ours.
    pod["metadata"]["annotations"] = {"gke-gcsfuse/volumes": "true"}
    spec["automountServiceAccountToken"] = True  # That container proves who it is.
  if args.service_account:
    spec["serviceAccountName"] = args.service_account
  if args.spot:
    spec["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
    spec["tolerations"] = [{"key": "cloud.google.com/gke-spot", "operator": "Equal",
                            "value": "true", "effect": "NoSchedule"}]
  if args.reservation:
    spec["nodeSelector"]["cloud.google.com/reservation-name"] = args.reservation
  return pod


def _disk(args: argparse.Namespace) -> tuple[str, Tree]:
  """(folder in the container, volume)."""
  if args.bucket:
    return f"/mnt/gcs/{args.bucket}", {"csi": {
        "driver": "gcsfuse.csi.storage.gke.io",
        "volumeAttributes": {"bucketName": args.bucket,
                             "mountOptions": f"implicit-dirs,uid={USER},gid={USER}"}}}
  if args.claim:
    return "/mnt/claim", {"persistentVolumeClaim": {"claimName": args.claim}}
  # The run is at a URL: room on the node for the store, and for a part of a checkpoint.
  return "/cache", {"emptyDir": {}}


def _metadata(args: argparse.Namespace) -> Tree:
  metadata: Tree = {"name": args.name, "labels": {"app": args.name}}
  if args.namespace:
    metadata["namespace"] = args.namespace
  if args.queue:
    metadata["labels"]["kueue.x-k8s.io/queue-name"] = args.queue
  return metadata


# -------------------------------------------------------------------- What was asked for


def _check(args: argparse.Namespace, train: Sequence[str], found: topology.Slice) -> None:
  for flag, value in (("--name", args.name), ("--namespace", args.namespace),
                      ("--claim", args.claim), ("--service-account", args.service_account),
                      ("--reservation", args.reservation), ("--queue", args.queue)):
    if value and not re.fullmatch(_LABEL, value):
      raise UserError(f"{flag}: {value!r} cannot name anything in Kubernetes; use lower-case "
                      "letters, digits and hyphens, a letter first")
  if len(args.name) > 40:  # Names of pods are made of it, which have 63.
    raise UserError(f"--name: {args.name!r} has {len(args.name)} characters, allowed are 40")
  if not re.fullmatch(r"[\w.:/-]+(@sha256:[0-9a-f]{64}|:[\w][\w.-]*)", args.image):
    raise UserError(f"--image: {args.image!r} has no tag; give IMAGE:TAG or IMAGE@sha256:..., "
                    "since all machines have to run the same")
  if args.image.endswith(":latest"):
    raise UserError("--image: 'latest' may change while the run goes on; give another tag, or "
                    "IMAGE@sha256:...")
  if args.bucket and args.claim:
    raise UserError("--bucket and --claim: two places for the run; give one of them")
  if args.bucket and not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", args.bucket):
    raise UserError(f"--bucket: {args.bucket!r} is not a bucket's name")
  if args.bucket and not args.service_account:
    raise UserError("--bucket: as whom? give --service-account=NAME, a Kubernetes service account "
                    "that may write to it (docs/launch.md)")
  for flag, value, least in (("--restarts", args.restarts, 0), ("--grace", args.grace, 1)):
    if value < least:
      raise UserError(f"{flag}: got {value}, allowed is at least {least}")
  if found.chip.ici_dims:
    tpu_names.gke_labels(found)
    if found.slices > 1 and tpu_names.machines(found)[0] == 1:
      raise UserError(f"{found.name}: GKE joins only slices of several machines; use a larger "
                      "shape")
  _check_train(args, train, found)


def _check_train(args: argparse.Namespace, train: Sequence[str], found: topology.Slice) -> None:
  if not train:
    raise UserError("nothing after --; give the arguments of chinchilla train: -- --config=... "
                    "--workdir=...")
  config, overrides, rest = cli.split_config_flags(train)
  parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
  parser.add_argument("--workdir")
  parser.add_argument("--force", action="store_true")
  parsed, unknown = parser.parse_known_args(rest)
  if unknown:
    raise UserError(f"after --: {unknown[0]} is not for here; processes find each other by "
                    "themselves")
  mounted, workdir = args.bucket or args.claim, parsed.workdir or ""
  mount = _disk(args)[0] if mounted else "gs://BUCKET"
  if not workdir.startswith(f"{mount}/" if mounted else ("gs://", "s3://")):
    raise UserError(f"--workdir: {workdir or 'none given'}; all machines must see it, so give a "
                    f"folder in {mount}" + ("" if mounted else ", or one that is mounted, with "
                                            "--bucket=NAME or --claim=NAME"))
  if not mounted and workdir.startswith("gs://") and not args.service_account:
    raise UserError("--workdir: as whom? give --service-account=NAME, a Kubernetes service account "
                    "that may write to that bucket (docs/launch.md)")
  experiment = config_io.load(config, overrides)
  store = experiment.data.store
  if "://" not in store and not (mounted and store.startswith("/")):
    raise UserError(f"config.data.store: {store!r} is a folder of the image; put the store where "
                    f"all see it: --config.data.store={mount}/stores/...")
  from chinchilla_jax.parallel import mesh
  axes = mesh.sizes(experiment.mesh, found.devices, found.networks)
  rows = axes["slice"] * axes["data"]
  if experiment.batch.sequences % rows:
    raise UserError(f"config.batch.sequences: {experiment.batch.sequences} do not divide among "
                    f"slice x data = {rows} of {found.name}; change the batch, or config.mesh")


def _secret(text: str) -> tuple[str, str, str]:
  match = re.fullmatch(r"([A-Za-z_]\w*)=([a-z0-9][-a-z0-9.]*):([\w.-]+)", text)
  if match is None:
    raise argparse.ArgumentTypeError(
        "give VARIABLE=SECRET:KEY, a Kubernetes Secret and its key, never a value")
  return match[1], match[2], match[3]


class _Parser(argparse.ArgumentParser):

  def error(self, message: str):
    raise UserError(f"{message}; see launch/gke/render.py --help")


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(prog="launch/gke/render.py", description=__doc__, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--name", required=True, help="of the run in the cluster")
  parser.add_argument("--image", required=True, help="made from the Dockerfile, with a tag")
  parser.add_argument("--topology", required=True,
                      help="as in chinchilla compile: v5p:8x8x8, h100:16; or v5litepod-16")
  parser.add_argument("--slices", type=int, default=1, help="TPU slices of that topology (1)")
  parser.add_argument("--bucket", default="",
                      help="mounted at /mnt/gcs/BUCKET by Cloud Storage FUSE")
  parser.add_argument("--claim", default="",
                      help="or a PersistentVolumeClaim (ReadWriteMany), mounted at /mnt/claim")
  parser.add_argument("--service-account", default="", help="the Kubernetes service account")
  parser.add_argument("--namespace", default="", help="kubectl's by default")
  parser.add_argument("--queue", default="", help="a local queue of Kueue")
  parser.add_argument("--spot", action="store_true", help="on Spot nodes")
  parser.add_argument("--reservation", default="", help="on nodes of this reservation")
  parser.add_argument("--restarts", type=int, default=50,
                      help="of the whole run, after crashes and preemptions (50)")
  parser.add_argument("--grace", type=int, default=0,
                      help="seconds between SIGTERM and the end (300; 25 on Spot nodes)")
  parser.add_argument("--secret", dest="secrets", type=_secret, action="append", default=[],
                      metavar="VARIABLE=SECRET:KEY", help="for the run's environment; repeatable")
  return parser


def main(argv: Sequence[str]) -> int:
  argv = list(argv)
  train: list[str] = []
  if "--" in argv:
    argv, train = argv[:argv.index("--")], argv[argv.index("--") + 1:]
  try:
    args = _parser().parse_args(argv)
    # GKE gives pods on Spot nodes no more than 25 s.
    args.grace = args.grace or (25 if args.spot else 300)
    manifests = render(args, train)
  except UserError as error:
    print(f"launch/gke/render.py: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
  print(yaml.safe_dump_all(manifests, sort_keys=False, width=1000), end="")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))

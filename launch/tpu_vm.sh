#!/usr/bin/env bash
# A run on Cloud TPU VMs, with gcloud: launch/tpu_vm.sh COMMAND NAME [FLAGS] [-- TRAIN ARGUMENTS]
#
#   create   asks for the slice (a queued resource) and waits until it is there; with -- and the
#            arguments of `chinchilla train`, only if that config fits the slice
#   setup    checkout and environment on all its machines at once
#   train    starts the run on all of them; it survives this terminal; -- is followed by the
#            arguments of `chinchilla train`
#   attach   follows the logs of all of them; Ctrl-C ends the following, not the run
#   status   of the slice, and of the run on each machine
#   stop     saves and ends the run; the slice stays, and costs
#   delete   deletes the slice, after a question; nothing else here ever does
#
# After a preemption: delete (what is left of it), then the same create, setup and train again.
#
#   --project=ID --zone=ZONE        or CLOUDSDK_CORE_PROJECT and CLOUDSDK_COMPUTE_ZONE
#   --topology=v5e:4x4              as in `chinchilla compile`; or --accelerator-type=v5litepod-16
#   --node-count=N                  so many slices of that, joined over the data-centre network (1)
#   --spot | --reserved             otherwise on demand
#   --runtime-version=V --service-account=A --network=N --subnetwork=S --internal-ips
#   --attempts=N                    asks again, so often, when there is no capacity (20)
#   --wait=SECONDS                  for the slice to be there (3600); then status 75: run it again
#   --bucket=NAME                   mounted at /mnt/gcs/NAME on every machine (create, setup, train)
#   --repo=URL --commit=SHA         the code; by default this checkout's last commit is copied there
#   --secret=VARIABLE=NAME          for the run's environment, from the Secret Manager; repeatable
#   --worker=N                      attach: of one machine of each slice
#   --dry-run                       prints the commands, runs none
#   --yes                           delete: does not ask
#
# CHINCHILLA: the command that checks a config here (chinchilla); PYTHON: an interpreter (python3).
#
# Ends with 0; 2 when the user has to mend something, with nothing created; 75 when the same command
# is to be run again; otherwise with gcloud's status. docs/launch.md has the whole story.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

refuse() {
  echo "launch/tpu_vm.sh: $*" >&2
  exit 2
}
say() { echo "launch/tpu_vm.sh: $*" >&2; }

# -------------------------------------------------------------------- What was asked for

usage() { sed -n '2,/^set -euo/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }

verb=${1:-}
case $verb in
  create | setup | train | attach | status | stop | delete) ;;
  "" | -h | --help | help)
    usage
    exit 0
    ;;
  *) refuse "no command '$verb'; one of: create, setup, train, attach, status, stop, delete" ;;
esac
name=${2:-}
[[ $name =~ ^[a-z]([-a-z0-9]{0,60}[a-z0-9])?$ ]] ||
  refuse "'$name' cannot name a slice; give lower-case letters, digits and hyphens after $verb"
shift 2

project=${CLOUDSDK_CORE_PROJECT:-} zone=${CLOUDSDK_COMPUTE_ZONE:-}
topology="" node_count=1 pricing="" runtime_version="" bucket="" repo="" commit="" worker=all
slice="" shape="" flags="" kind="" generation="" chips="" machines="" runtime=""
attempts=20 patience=3600 dry_run="" yes="" secrets=() more=() arguments=() after=""
while [ $# -gt 0 ]; do
  value=${1#*=}
  case $1 in
    --project=*) project=$value ;;
    --zone=*) zone=$value ;;
    --topology=* | --accelerator-type=*)
      [ -z "$topology" ] || refuse "--topology and --accelerator-type: give one of them"
      topology=$value
      ;;
    --node-count=*) node_count=$value ;;
    --spot | --reserved)
      [ -z "$pricing" ] || refuse "--spot and --reserved: give one of them"
      pricing=$1
      ;;
    --runtime-version=*) runtime_version=$value ;;
    --service-account=* | --network=* | --subnetwork=* | --internal-ips) more+=("$1") ;;
    --attempts=*) attempts=$value ;;
    --wait=*) patience=$value ;;
    --bucket=*) bucket=${value#gs://} ;;
    --repo=*) repo=$value ;;
    --commit=*) commit=$value ;;
    --secret=*) secrets+=("$value") ;;
    --worker=*) worker=$value ;;
    --dry-run) dry_run=yes ;;
    --yes) yes=yes ;;
    --)
      after=yes
      shift
      arguments=("$@")
      break
      ;;
    *) refuse "$verb: unknown flag $1; write flags as --flag=value, see launch/tpu_vm.sh --help" ;;
  esac
  shift
done

[ -n "$project" ] || refuse "no project; give --project=ID or set CLOUDSDK_CORE_PROJECT"
[[ $project =~ ^[a-z0-9.:-]+$ ]] || refuse "--project: '$project' is not a project's id"
[ -n "$zone" ] || refuse "no zone; give --zone=ZONE, such as us-central2-b"
[[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] ||
  refuse "--zone: '$zone' is not a zone; write one such as us-central2-b"
for number in "$attempts" "$patience"; do
  [[ $number =~ ^[0-9]{1,7}$ ]] || refuse "--attempts and --wait: '$number' is not a number"
done
[[ $worker =~ ^(all|[0-9]{1,4})$ ]] || refuse "--worker: '$worker' is neither a number nor all"
[ -z "$bucket" ] || [[ $bucket =~ ^[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]$ ]] ||
  refuse "--bucket: '$bucket' is not a bucket's name"
for secret in ${secrets[@]+"${secrets[@]}"}; do
  [[ $secret =~ ^[A-Za-z_][A-Za-z0-9_]*=[A-Za-z0-9_-]+$ ]] ||
    refuse "--secret: give VARIABLE=NAME, the name of a secret in the Secret Manager, not its value"
done
[[ -z $after || $verb == train || $verb == create ]] ||
  refuse "$verb takes nothing after --; that is for train and create"

# Sets slice, shape, flags, kind, generation, chips, machines and runtime; the names are those of
# `chinchilla compile`.
understand() {
  local facts
  [ -n "$topology" ] ||
    refuse "no slice; give --topology=v5e:4x4 or --accelerator-type=v5litepod-16"
  facts=$("${PYTHON:-python3}" "$here/tpu_names.py" "$topology" "$node_count" 2>&1) ||
    refuse "$(tail -1 <<<"$facts")"
  eval "$facts"
}

# Whether the config lies over the devices of the slice; `inspect` compiles nothing: seconds.
fits() {
  local argument config=() chinchilla said asked
  for argument in "${arguments[@]}"; do
    [[ $argument != --config* ]] || config+=("$argument")
  done
  read -ra chinchilla <<<"${CHINCHILLA:-chinchilla}"
  command -v "${chinchilla[0]}" >/dev/null ||
    refuse "create: ${chinchilla[0]} not found, which checks the config; set CHINCHILLA, or leave" \
      "out what follows --"
  asked=(inspect "${config[@]}" "--topology=$shape" "--slices=$node_count")
  said=$("${chinchilla[@]}" "${asked[@]}" 2>&1) || {
    said=$(tail -1 <<<"$said")
    refuse "create: ${config[0]:-no --config} on $slice: ${said#chinchilla inspect: }"
  }
}

if [ "$verb" = create ]; then
  understand
  [ ${#arguments[@]} = 0 ] || fits
fi

if [ "$verb" = train ]; then
  [ ${#arguments[@]} -gt 0 ] ||
    refuse "train: no arguments; give those of chinchilla train: -- --config=... --workdir=..."
  workdir=""
  for argument in "${arguments[@]}"; do
    case $argument in
      --workdir=*) workdir=${argument#*=} ;;
      --workdir) refuse "train: write --workdir=FOLDER, in one word" ;;
      *[Aa][Pp][Ii]_[Kk][Ee][Yy]=* | *[Tt][Oo][Kk][Ee][Nn]=*)
        refuse "train: ${argument%%=*} looks like a secret, which all could read; use --secret"
        ;;
    esac
  done
  [ -n "$workdir" ] ||
    refuse "train: no --workdir; all machines must see it, so give one such as gs://BUCKET/runs/x"
  case $workdir in
    gs://*)
      [[ $workdir =~ ^gs://[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]/[^/] ]] ||
        refuse "train: --workdir: $workdir is not gs://BUCKET/FOLDER"
      ;;
    /mnt/gcs/*)
      [[ -n $bucket && $workdir == /mnt/gcs/$bucket/* ]] ||
        refuse "train: --workdir: $workdir is not on the bucket that is mounted; give --bucket"
      ;;
    /*) ;;
    *) refuse "train: --workdir: $workdir is a folder of each machine; give one that all see," \
      "such as gs://BUCKET/runs/x" ;;
  esac
fi

if [ "$verb" = setup ] && [ -n "$repo$commit" ]; then
  [[ -n $repo && $commit =~ ^[0-9a-f]{7,40}$ ]] ||
    refuse "setup: give both --repo=URL and --commit=SHA (a commit, since a branch moves)"
  [[ $repo != *@* || $repo == git@* ]] ||
    refuse "setup: --repo: a name or password in the address can be read by all; use a deploy key"
fi

# -------------------------------------------------------------------- gcloud

cloud=(gcloud compute tpus)
where=("--project=$project" "--zone=$zone")

# As it could be typed.
shown() {
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=${word@Q}
    line+=" $word"
  done
  echo "${line# }"
}

# Runs a command that changes something, or prints it.
run() {
  if [ -n "$dry_run" ]; then shown "$@"; else "$@"; fi
}

# The answer to a question in $answer; its complaint in $complaint.
ask() {
  answer="" complaint=""
  if [ -n "$dry_run" ]; then
    shown "$@"
    return 0
  fi
  local errors status=0
  errors=$(mktemp)
  answer=$("$@" 2>"$errors") || status=$?
  complaint=$(grep -m1 '^ERROR' "$errors" || tail -1 "$errors")
  rm -f "$errors"
  return "$status"
}

# State of the queued resource; "" if there is none.
look() {
  if ask "${cloud[@]}" queued-resources describe "$name" "${where[@]}" \
    '--format=value(state.state)'; then
    state=$answer
  elif [[ $complaint == *NOT_FOUND* || $complaint == *"not found"* ]]; then
    state=""
  else
    refuse "$complaint; check --project, --zone and your rights (gcloud auth login)"
  fi
}

on_all() {
  run "${cloud[@]}" queued-resources ssh "$name" "${where[@]}" --node=all --worker=all \
    --batch-size=all "--command=$1"
}

need_active() {
  look
  [ -z "$dry_run" ] || return 0
  case $state in
    ACTIVE) ;;
    "") refuse "$verb: there is no slice $name in $project, $zone; create it first" ;;
    SUSPENDED | SUSPENDING | FAILED)
      refuse "$verb: $name is $state (preempted, or never came);" \
        "launch/tpu_vm.sh delete $name, then create, setup and train it again"
      ;;
    *) refuse "$verb: $name is $state; wait for it with launch/tpu_vm.sh create $name ..." ;;
  esac
}

check_bucket() {
  [ -n "$bucket" ] || return 0
  ask gcloud storage buckets describe "gs://$bucket" "--project=$project" '--format=value(name)' ||
    refuse "--bucket: gs://$bucket: $complaint; make it with gcloud storage buckets create" \
      "gs://$bucket --location=${zone%-*} --uniform-bucket-level-access" \
      "--enable-hierarchical-namespace"
}

[ -n "$dry_run" ] || command -v gcloud >/dev/null ||
  refuse "gcloud not found; install it: https://cloud.google.com/sdk/docs/install"

# -------------------------------------------------------------------- Commands

create() {
  local asked status delay=30 words
  # The first question shows whether project and zone are right, and what the zone has.
  ask "${cloud[@]}" tpu-vm accelerator-types list "${where[@]}" '--format=value(type)' ||
    refuse "create: $complaint; check --project, --zone and your rights (gcloud auth login)"
  if [ -z "$dry_run" ]; then
    grep -qx -- "${kind:-$generation-[0-9]*}" <<<"$answer" ||
      refuse "create: $zone has no ${kind:-$generation}; see which zone has:" \
        "https://cloud.google.com/tpu/docs/regions-zones"
  fi
  check_bucket
  look
  case $state in
    "")
      words=(queued-resources create "$name" "${where[@]}")
      # shellcheck disable=SC2206  # flags are one or two words without blanks.
      words+=($flags "--runtime-version=${runtime_version:-$runtime}")
      if [ "$node_count" = 1 ]; then
        words+=("--node-id=$name")
      else
        words+=("--node-count=$node_count" "--node-prefix=$name")
      fi
      [ -z "$pricing" ] || words+=("$pricing")
      say "asking for ${slice}: $chips chips in $machines machines${pricing:+, ${pricing#--}}"
      for ((asked = 1; ; asked++)); do
        if [ -n "$dry_run" ]; then
          shown "${cloud[@]}" "${words[@]}" ${more[@]+"${more[@]}"}
          break
        fi
        status=0
        ask "${cloud[@]}" "${words[@]}" ${more[@]+"${more[@]}"} || status=$?
        [ "$status" != 0 ] || break
        no_capacity "$complaint" || refuse "create: $complaint"
        if [ "$asked" -ge "$attempts" ]; then
          say "no capacity for $slice after $asked attempts; run the same command again later," \
            "or try another zone or --spot"
          exit 75
        fi
        say "no capacity for $slice, attempt $asked of $attempts; again in $delay s"
        "${SLEEP:-sleep}" "$delay"
        delay=$((delay < 300 ? delay * 2 : 600))
      done
      ;;
    ACTIVE)
      say "$name is there already"
      return
      ;;
    SUSPENDED | SUSPENDING | FAILED)
      refuse "create: a $name is there and $state (preempted, or never came);" \
        "remove what is left with launch/tpu_vm.sh delete $name, then create it again"
      ;;
    DELETING) refuse "create: $name is being deleted; wait, or choose another name" ;;
    *) say "$name was asked for already: $state" ;;
  esac
  await
}

# Whether a refusal means that there are no machines now. A quota that is used up does not.
no_capacity() {
  case $1 in
    *[Qq]uota*) return 1 ;;
    *RESOURCE_EXHAUSTED* | *"no more capacity"* | *"not enough"* | *tockout* | *STOCKOUT* | \
      *"nsufficient capacity"* | *"urrently unavailable"* | *UNAVAILABLE*) return 0 ;;
  esac
  return 1
}

await() {
  local waited=0 before=""
  while :; do
    look
    [ -z "$dry_run" ] || return 0
    case $state in
      ACTIVE)
        say "$name is there; next: launch/tpu_vm.sh setup $name ..."
        return
        ;;
      FAILED | SUSPENDED | SUSPENDING | "")
        say "$name is ${state:-gone} before it was ever there; see: gcloud compute tpus" \
          "queued-resources describe $name ${where[*]}; then launch/tpu_vm.sh delete $name"
        exit 1
        ;;
    esac
    [ "$state" = "$before" ] || say "$name is $state"
    before=$state
    if [ "$waited" -ge "$patience" ]; then
      say "$name is still $state after $waited s; the same command goes on waiting"
      exit 75
    fi
    "${SLEEP:-sleep}" 30
    waited=$((waited + 30))
  done
}

setup() {
  local unpack archive
  need_active
  check_bucket
  # Into a folder of its own first, so that a broken transfer leaves the old code whole. The code
  # of a run that goes on is not taken away from it.
  unpack="set -e; if systemctl is-active --quiet chinchilla; then echo a run goes on here, stop it"
  unpack+=" first >&2; exit 2; fi; cd && mkdir -p chinchilla && cd chinchilla && rm -rf new"
  if [ -n "$repo" ]; then
    unpack+=" && git clone --quiet $(printf %q "$repo") new && git -C new checkout --quiet $commit"
  else
    commit=$(git -C "$here/.." rev-parse --short=12 HEAD) ||
      refuse "setup: no git checkout here; give --repo=URL and --commit=SHA"
    git -C "$here/.." diff --quiet HEAD -- ||
      say "note: what is not committed stays here; $commit is what runs"
    archive=$(mktemp -d)/chinchilla-$commit.tar.gz
    # shellcheck disable=SC2064
    trap "rm -rf '$(dirname "$archive")'" EXIT
    git -C "$here/.." archive --format=tar.gz --output="$archive" HEAD
    # What is shown in a dry run should not depend on the day.
    [ -z "$dry_run" ] || archive=chinchilla-$commit.tar.gz
    run "${cloud[@]}" queued-resources scp "$archive" "$name:" "${where[@]}" --node=all \
      --worker=all --batch-size=all
    unpack+=" && mkdir new && tar -xzf ../chinchilla-$commit.tar.gz -C new"
    unpack+=" && rm ../chinchilla-$commit.tar.gz"
  fi
  on_all "$unpack && rm -rf src && mv new src"
  on_all "chinchilla/src/launch/tpu_worker.sh setup $bucket"
}

train() {
  local words
  need_active
  check_bucket
  printf -v words ' %q' ${secrets[@]+"${secrets[@]/#/--secret=}"} "${arguments[@]}"
  on_all "chinchilla/src/launch/tpu_worker.sh start$words"
  say "follow it with launch/tpu_vm.sh attach $name --project=$project --zone=$zone"
}

attach() {
  need_active
  run "${cloud[@]}" queued-resources ssh "$name" "${where[@]}" --node=all "--worker=$worker" \
    --batch-size=all "--command=chinchilla/src/launch/tpu_worker.sh follow"
}

status() {
  look
  [ -n "$dry_run" ] || echo "$name: ${state:-not there}"
  if [ -n "$dry_run" ] || [ "$state" = ACTIVE ]; then
    on_all "chinchilla/src/launch/tpu_worker.sh status"
  fi
}

stop() {
  need_active
  on_all "chinchilla/src/launch/tpu_worker.sh stop"
}

delete() {
  local reply
  look
  if [ -z "$dry_run" ]; then
    [ -n "$state" ] || refuse "delete: there is no slice $name in $project, $zone"
    if [ -z "$yes" ]; then
      read -r -p "delete $name ($state) in $project, $zone, with what is on its disks? [y/N] " \
        reply || reply=""
      [[ $reply == [yY] || $reply == yes ]] || refuse "delete: not deleted; say y, or give --yes"
    fi
  fi
  run "${cloud[@]}" queued-resources delete "$name" "${where[@]}" --force --quiet
}

"$verb"

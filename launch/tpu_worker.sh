#!/usr/bin/env bash
# The part of launch/tpu_vm.sh that runs on every machine of a slice; it lies there in
# ~/chinchilla/src/launch. Not meant to be called by hand.
#
#   tpu_worker.sh setup [BUCKET]     environment in ~/chinchilla/venv; the bucket at /mnt/gcs/BUCKET
#   tpu_worker.sh start ARGUMENT...  `chinchilla train` under systemd; --secret=VARIABLE=NAME first
#   tpu_worker.sh stop | status | follow
#   tpu_worker.sh run                what systemd starts
#
# Safe to run again, each of them.
set -euo pipefail

home=${CHINCHILLA_HOME:-$HOME/chinchilla}
unit=chinchilla.service

refuse() {
  echo "$(hostname): $*" >&2
  exit 2
}

setup() {
  local bucket=${1:-} stamp
  # TPU VMs come with Python 3.10; uv brings another one.
  if ! command -v uv >/dev/null; then
    python3 -m pip install --quiet --user uv
    PATH=$HOME/.local/bin:$PATH
  fi
  stamp=$(sha256sum <"$home/src/setup.py")
  if [ "$(cat "$home/venv/installed" 2>/dev/null)" != "$stamp" ]; then
    uv venv --quiet --clear --python 3.12 "$home/venv"
    uv pip install --quiet --python "$home/venv/bin/python" --editable "$home/src[tpu,gcs]"
    echo "$stamp" >"$home/venv/installed"
  fi
  [ -z "$bucket" ] || mount_bucket "$bucket"
  echo "$(hostname): ready, $("$home/venv/bin/chinchilla" --version)"
}

# By /etc/fstab, so that it is there again after a restart of the machine.
mount_bucket() {
  local options bucket=$1 folder=/mnt/gcs/$1 list=/etc/apt/sources.list.d/gcsfuse.list
  local key=/usr/share/keyrings/cloud.google.asc
  if ! command -v gcsfuse >/dev/null; then
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt" \
      "gcsfuse-$(lsb_release -c -s) main" | sudo tee "$list" >/dev/null
    sudo apt-get update -qq
    sudo apt-get install -y -qq gcsfuse
  fi
  if ! grep -q "^$bucket $folder " /etc/fstab; then
    options=rw,_netdev,allow_other,implicit_dirs,uid=$(id -u),gid=$(id -g)
    echo "$bucket $folder gcsfuse $options 0 0" | sudo tee -a /etc/fstab >/dev/null
  fi
  sudo mkdir -p "$folder"
  mountpoint -q "$folder" || sudo mount "$folder"
}

start() {
  local wanted=$home/run.new secrets=()
  [ -x "$home/venv/bin/chinchilla" ] || refuse "not set up; launch/tpu_vm.sh setup comes first"
  while [ $# -gt 0 ] && [[ $1 == --secret=* ]]; do
    secrets+=("${1#--secret=}")
    shift
  done
  # Of secrets only their names.
  {
    echo "secrets=(${secrets[*]@Q})"
    echo "set -- ${*@Q}"
  } >"$wanted"
  if systemctl is-active --quiet "$unit"; then
    cmp -s "$wanted" "$home/run" ||
      refuse "another run goes on here; end it with launch/tpu_vm.sh stop, or repeat its arguments"
    echo "$(hostname): runs already"
    return
  fi
  mv "$wanted" "$home/run"
  # local.sh is the supervisor: it starts the run again as docs/reliability.md says. systemd lets go
  # of the SSH session, starts it after a restart of the machine, and keeps the logs.
  sudo tee "/etc/systemd/system/$unit" >/dev/null <<UNIT
[Unit]
Description=chinchilla train
Wants=network-online.target
After=network-online.target remote-fs.target

[Service]
Type=exec
User=$(id -un)
WorkingDirectory=$home/src
Environment=HOME=$HOME CHINCHILLA_HOME=$home
ExecStart=$home/src/launch/tpu_worker.sh run
# SIGTERM to all of them; the run saves, which may take a while with a large model.
KillMode=control-group
TimeoutStopSec=15min
# If the run is out of memory, local.sh has to live to start it again.
OOMPolicy=continue
Restart=on-abnormal
RestartSec=30
LimitMEMLOCK=infinity
LimitNOFILE=1048576

[Install]
WantedBy=multi-user.target
UNIT
  sudo systemctl daemon-reload
  sudo systemctl enable --quiet "$unit"
  sudo systemctl start "$unit"
  echo "$(hostname): started"
}

# A secret goes from the Secret Manager into the environment of the run, and nowhere else.
run() {
  local secrets secret value
  # shellcheck source=/dev/null
  source "$home/run"
  for secret in ${secrets[@]+"${secrets[@]}"}; do
    value=$(gcloud secrets versions access latest --secret="${secret#*=}")
    export "${secret%%=*}=$value"
  done
  CHINCHILLA=$home/venv/bin/chinchilla RETRIES=${RETRIES:-100} exec "$home/src/launch/local.sh" "$@"
}

stop() {
  # Not after the next restart of the machine either.
  sudo systemctl disable --quiet "$unit" 2>/dev/null || true
  sudo systemctl stop "$unit" 2>/dev/null || true
  echo "$(hostname): stopped"
}

status() {
  local state last
  state=$(systemctl is-active "$unit" || true)
  last=$(journalctl --unit="$unit" --lines=1 --output=cat --no-pager 2>/dev/null || true)
  echo "$(hostname): $state; $last"
}

# Through ssh without a terminal nothing tells journalctl that its reader has gone; sed notices.
follow() {
  journalctl --unit="$unit" --lines=50 --output=cat --follow | sed -u "s/^/$(hostname): /"
}

case ${1:-} in
  setup | start | stop | status | follow | run) "$@" ;;
  *) refuse "tpu_worker.sh: no command ${1:-given}" ;;
esac

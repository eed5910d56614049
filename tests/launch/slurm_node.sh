#!/usr/bin/env bash
# A real SLURM of one node on this machine, for tests: slurm_node.sh start FOLDER | stop FOLDER
#
# Needs root and Debian's slurm-wlm and munge, which `start` installs where they are missing. All
# that SLURM writes lies in FOLDER; a SLURM that is there already is left alone (status 3). The
# node has at least two processors, whatever the machine has: tests need two tasks.
set -euo pipefail

folder=${2:?a folder}
export SLURM_CONF=$folder/slurm.conf

stop() {
  scancel --quiet --user=root 2>/dev/null || true
  local daemon pid
  for daemon in slurmd slurmctld munged; do
    pid=$(cat "$folder/$daemon.pid" 2>/dev/null) || continue
    kill "$pid" 2>/dev/null || true
    for _ in $(seq 50); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 0.1
    done
    rm -f "$folder/$daemon.pid"
  done
}

# For clients and daemons alike. Sockets and ports of our own, so that no other SLURM is touched.
# cred_expire: how long a job that is queued again waits (120 s by default).
configure() {
  local node memory processors
  node=$(hostname -s)
  memory=$(($(awk '/MemTotal/ {print $2}' /proc/meminfo) / 1024 - 1024))
  processors=$(($(nproc) > 2 ? $(nproc) : 2))
  cat >"$folder/slurm.conf" <<CONF
ClusterName=tests
SlurmctldHost=$node(127.0.0.1)
SlurmctldPort=$((20000 + RANDOM % 5000 * 2))
SlurmdPort=$((20001 + RANDOM % 5000 * 2))
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmdSpoolDir=$folder/slurmd
StateSaveLocation=$folder/slurmctld
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=2,batch_sched_delay=0
KillWait=20
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=$node NodeAddr=127.0.0.1 CPUs=$processors RealMemory=$memory State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

start() {
  if [ "$(id -u)" != 0 ]; then
    echo "slurm_node.sh: needs root" >&2
    exit 3
  fi
  if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    if ! { apt-get update -qq &&
      DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge; } \
      >"$folder/apt.log" 2>&1; then
      echo "slurm_node.sh: slurm-wlm and munge could not be installed:" \
        "$(tail -1 "$folder/apt.log")" >&2
      exit 3
    fi
  fi
  mkdir -p "$folder/slurmd" "$folder/slurmctld"
  # munged refuses a key or a socket in a folder that others may write.
  chmod 755 "$folder"
  (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
  munged --key-file="$folder/munge.key" --socket="$folder/munge.socket" \
    --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" \
    --seed-file="$folder/munged.seed" --force
  configure
  slurmctld
  slurmd
  for _ in $(seq 60); do
    case $(sinfo --noheader --format=%T --partition=low 2>/dev/null) in
      idle) exit 0 ;;
      down* | drained*)
        scontrol update "nodename=$(hostname -s)" state=resume 2>/dev/null || true
        ;;
    esac
    sleep 0.5
  done
  tail -5 "$folder/slurmctld.log" "$folder/slurmd.log" >&2
  stop
  exit 1
}

case ${1:-} in
  start | stop) "$1" ;;
  *) echo "usage: slurm_node.sh start|stop FOLDER" >&2; exit 2 ;;
esac

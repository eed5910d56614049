#!/usr/bin/env bash
# One run in several processes on this machine: the smallest cluster there is.
#
#   launch/two_processes.sh --config=configs/smoke.py --workdir=runs/two
#
# Takes the arguments of `chinchilla train`. Process 0 listens on a free port of localhost and
# speaks for all; what the others have to say carries their number. Ctrl-C and SIGTERM reach all of
# them, and they stop after the same step. Ends with the status of process 0, or, if that is 0, with
# the first other one.
#
#   CHINCHILLA   the command (chinchilla)
#   PROCESSES    how many (2)
set -euo pipefail
# Each process in a group of its own, so that a Ctrl-C comes once, from here, and not twice.
set -m

read -ra command <<<"${CHINCHILLA:-chinchilla}"
n=${PROCESSES:-2}
if [[ ! $n =~ ^[1-9][0-9]*$ ]]; then
  echo "launch/two_processes.sh: PROCESSES is '$n'; give a number from 1" >&2
  exit 2
fi
if ! command -v "${command[0]}" >/dev/null; then
  echo "launch/two_processes.sh: ${command[0]} not found; activate the environment, or set" \
    "CHINCHILLA=.venv/bin/chinchilla" >&2
  exit 2
fi
for argument in "$@"; do
  case $argument in
    --coordinator* | --processes* | --process*)
      echo "launch/two_processes.sh: it chooses ${argument%%=*} itself; leave that out" >&2
      exit 2
      ;;
  esac
done

# Below the ports that outgoing connections take, and free a moment ago: nothing answers.
port=""
for ((attempt = 0; attempt < 50; attempt++)); do
  candidate=$((20000 + RANDOM % 12000))
  if ! (: <"/dev/tcp/127.0.0.1/$candidate") 2>/dev/null; then
    port=$candidate
    break
  fi
done
if [ -z "$port" ]; then
  echo "launch/two_processes.sh: no free port found between 20000 and 31999; close some" >&2
  exit 2
fi

pids=()
trap 'kill -INT "${pids[@]}" 2>/dev/null || true' INT
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM

for ((i = n - 1; i >= 0; i--)); do
  words=("${command[@]}" train "$@")
  ((n == 1)) || words+=("--coordinator=127.0.0.1:$port" "--processes=$n" "--process=$i")
  if ((i == 0)); then
    "${words[@]}" &
  else
    # The filter outlives a Ctrl-C, to pass on what is said at the end.
    "${words[@]}" > >(trap '' INT TERM; exec sed -u "s/^/process $i: /") 2>&1 &
  fi
  pids[i]=$!
done

status=0
for ((i = 0; i < n; i++)); do
  # A signal ends a `wait`, not the process; its status can be asked for afterwards.
  while kill -0 "${pids[i]}" 2>/dev/null; do wait "${pids[i]}" || true; done
  ended=0
  wait "${pids[i]}" || ended=$?
  ((status)) || status=$ended
done
exit "$status"

#!/usr/bin/env bash
# A run on this machine that survives crashes: launch/local.sh --config=configs/chinchilla.py:74m ...
#
# Takes the arguments of `chinchilla train` and starts it again when it was preempted or hung (75),
# or died of something that the next start can survive (killed, out of memory, a power cut's
# aftermath). It ends when the run is complete (0), when the user has to mend something (2), on
# Ctrl-C (130), and when it is itself told to stop by SIGTERM; the run has been saved by then.
# To stop it from outside, signal the process group: kill -TERM -- -PGID.
#
#   CHINCHILLA   the command (chinchilla)
#   RETRIES      starts after the first one (20)
#   PAUSE        seconds between them (5)
set -u

stopped=""
trap 'stopped=yes' TERM  # bash acts on it when the command has ended, and so has saved.

for ((start = 0; start <= ${RETRIES:-20}; start++)); do
  ${CHINCHILLA:-chinchilla} train "$@"
  status=$?
  case $status in
    0 | 2 | 130) exit $status ;;
  esac
  [ -n "$stopped" ] && exit "$status"
  echo "launch/local.sh: ended with status $status, start $((start + 1)) of $((${RETRIES:-20} + 1))" >&2
  sleep "${PAUSE:-5}"
  [ -n "$stopped" ] && exit "$status"
done
echo "launch/local.sh: giving up" >&2
exit "$status"

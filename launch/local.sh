#!/usr/bin/env bash
# A run on this machine that survives crashes: launch/local.sh --config=configs/chinchilla.py:74m ...
#
# Takes the arguments of `chinchilla train` and starts it again when it dies of something that the
# next start can survive (killed, out of memory, a power cut's aftermath). It ends when the run is
# complete (0), when the user has to mend something (2), and on Ctrl-C or SIGTERM (130, 143), which
# have saved by then. To stop it from outside, signal the process group: kill -TERM -- -PGID.
#
#   CHINCHILLA   the command (chinchilla)
#   RETRIES      starts after the first one (20)
#   PAUSE        seconds between them (5)
set -u

for ((start = 0; start <= ${RETRIES:-20}; start++)); do
  ${CHINCHILLA:-chinchilla} train "$@"
  status=$?
  case $status in
    0 | 2 | 130 | 143) exit $status ;;
  esac
  echo "launch/local.sh: ended with status $status, start $((start + 1)) of $((${RETRIES:-20} + 1))" >&2
  sleep "${PAUSE:-5}"
done
echo "launch/local.sh: giving up" >&2
exit "$status"

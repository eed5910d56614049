#!/usr/bin/env bash
# The long proofs of docs/reliability.md: sixty kills, a soak of 20,000 steps, and whatever else is
# marked `long`. About forty minutes on two cores; the soak reads stores/smoke (make smoke). PYTHON=... chooses the interpreter (.venv/bin/python).
set -eu
cd "$(dirname "$0")/../.."
JAX_PLATFORMS=cpu exec "${PYTHON:-.venv/bin/python}" -m pytest tests/survival tests/parallel -m long -s "$@"

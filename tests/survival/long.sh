#!/usr/bin/env bash
# The long proofs of docs/reliability.md: sixty kills, and whatever else is marked `long`.
# About twelve minutes on two cores. PYTHON=... chooses the interpreter (.venv/bin/python).
set -eu
cd "$(dirname "$0")/../.."
JAX_PLATFORMS=cpu exec "${PYTHON:-.venv/bin/python}" -m pytest tests/survival tests/parallel -m long -s "$@"

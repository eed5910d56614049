# make smoke   set up and run the main job (about five minutes on two cores)
# make test    set up and run lint and tests (with the TPU compiler, about 150 MB to download)
# make test-slurm   jobs on a real SLURM of one node (as root on Debian, whose packages it installs)
# PYTHON=...   the interpreter to use; any of 3.11, 3.12, 3.13

VENV := .venv
BIN := $(VENV)/bin
# Extra flags of the training command, such as SMOKE_FLAGS=--config.run_length='100 steps'.
SMOKE_FLAGS ?=

.PHONY: setup smoke test test-slurm lint clean

setup: $(VENV)/installed

# A version manager can leave commands that fail when run, so a candidate is run before it is chosen.
$(VENV)/installed: setup.py
	@set -e; chosen=""; \
	for candidate in $(PYTHON) $(if $(PYTHON),,python3.12 python3.13 python3.11 python3); do \
	  if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then \
	    chosen="$$candidate"; break; \
	  fi; \
	done; \
	if [ -z "$$chosen" ]; then \
	  echo "make: no Python 3.11 to 3.13 with venv found$(if $(PYTHON), at $(PYTHON),); name one: make PYTHON=/path/to/python3.12" >&2; exit 2; \
	fi; \
	echo "setting up $(VENV) with $$("$$chosen" --version)"; \
	"$$chosen" -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

smoke: setup
	$(BIN)/chinchilla prepare --config=configs/smoke.py
	$(BIN)/chinchilla train --config=configs/smoke.py $(SMOKE_FLAGS)
	$(BIN)/chinchilla generate --workdir runs/smoke --prompt "import " --max-tokens 96
	$(BIN)/chinchilla evaluate --workdir runs/smoke --compressors

lint: setup
	$(BIN)/ruff check .

# The TPU compiler lies beside the environment: inside it, JAX would look for a TPU in every run.
$(VENV)/compiler: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ "libtpu>=0.0.40" || \
	  echo "no TPU compiler for this machine: its tests will be skipped" >&2
	@mkdir -p $@ && touch $@

# Twice: on one device, and what needs several on eight simulated ones.
test: lint $(VENV)/compiler
	PATH="$(CURDIR)/$(BIN):$$PATH" JAX_PLATFORMS=cpu PYTHONPATH=$(VENV)/compiler $(BIN)/python -m pytest --ignore=tests/simulated --durations=30
	JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 $(BIN)/python -m pytest tests/simulated

test-slurm: setup
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest tests/launch -m "slurm and not long"

clean:
	rm -rf $(VENV) runs stores build *.egg-info

# `make help` lists the targets. Needs GNU make (3.81 or later) and a POSIX shell; setup finds Python itself.

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
HOPPER := $(VENV)/hopper
HOPPER_PINS := tests/pallas_kernels/hopper.txt
CONFIG := configs/train/tiny_cpu.gin
RUN_DIR := runs/tiny_cpu

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup train test check format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED) $(HOPPER)/.installed ## make .venv with all that development needs

# What was compiled once is kept, for the next start.
train: export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/.cache/jax
train: $(INSTALLED) ## train a tiny model on this machine's own Python source, then sample it; again: resume
	$(BIN)/python -m train --config $(CONFIG) --run-dir $(RUN_DIR)
	$(BIN)/python -m infer sample --checkpoint $(RUN_DIR) --prompt 'def ' --temperature 0.8 --max-tokens 200

test: $(INSTALLED) $(HOPPER)/.installed ## run the CPU tests
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(INSTALLED) $(HOPPER)/.installed ## formatting, lint, spelling, types, import rules, tests
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/codespell
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(MAKE) test

format: $(INSTALLED) ## format the code and mend what lint can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove caches and build products; .venv and runs/ stay
	rm -rf .cache .hypothesis .import_linter_cache .pytest_cache .ruff_cache build dist *.egg-info
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

# A candidate counts only if it runs (a pyenv shim may stand for nothing), is of a wanted minor version, can make an
# environment (Debian ships ensurepip apart) and has the usual ABI ('t': no global lock, few packages are built for it).
$(INSTALLED): pyproject.toml constraints.txt
	@set -e; \
	suits() { \
	  "$$1" -c "import ensurepip, sys; v = sys.version_info; \
	    sys.exit(v[0] != 3 or not $$2 <= v[1] <= $$3 or 't' in sys.abiflags)" >/dev/null 2>&1; \
	}; \
	find_python() { \
	  if [ -n "$$PYTHON" ]; then \
	    if suits "$$PYTHON" 12 99; then echo "$$PYTHON"; fi; \
	    return; \
	  fi; \
	  for minors in '12 12' '13 13' '14 99'; do \
	    for candidate in python3.12 python3.13 python3 python python3.14 python3.15 \
	        "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python3 \
	        "$$HOME"/.pyenv/versions/3.1[2-9]*/bin/python3 \
	        "$$(uv python find "3.$${minors% *}" 2>/dev/null)"; do \
	      if suits "$$candidate" $$minors; then echo "$$candidate"; return; fi; \
	    done; \
	  done; \
	}; \
	if ! suits $(BIN)/python 12 99; then \
	  python=$$(find_python); \
	  if [ -n "$$python" ]; then \
	    echo "Making $(VENV) with $$python ($$("$$python" -V))"; \
	    "$$python" -m venv --clear $(VENV); \
	  elif [ -z "$$PYTHON" ] && command -v uv >/dev/null; then \
	    echo 'Making $(VENV) with a Python 3.12 that uv downloads'; \
	    uv venv --quiet --clear --seed --python 3.12 $(VENV); \
	  else \
	    if [ -n "$$PYTHON" ]; then echo "PYTHON=$$PYTHON is not a Python >= 3.12 with the venv module." >&2; \
	    else echo 'No Python >= 3.12 with the venv module was found on PATH, under pyenv or through uv.' >&2; fi; \
	    echo 'Install one (`pyenv install 3.12`, `uv python install 3.12`, a system package such as' >&2; \
	    echo 'python3.12 and python3.12-venv, or python.org) or name it: make setup PYTHON=/path/to/python3.12' >&2; \
	    exit 1; \
	  fi; \
	fi; \
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip >/dev/null; \
	echo "Installing about $$(grep -c == constraints.txt) packages into $(VENV): some minutes the first time"; \
	( $(BIN)/python -m pip install -c constraints.txt -e '.[dev]' 2>&1 && echo 'exit 0' || echo 'exit 1' ) \
	  | tee $(VENV)/install.log \
	  | ( while read -r line; do case "$$line" in \
	      Collecting*) printf . ;; \
	      'Installing collected'*) printf ' unpacking' ;; \
	      exit*) echo; exit "$${line#exit }" ;; \
	    esac; done ) \
	  || { tail -n 30 $(VENV)/install.log >&2; exit 1; }; \
	touch $@; \
	echo 'Ready.'

# Training does not need these. pip passes over what is not for this system, and the tests that compile are skipped there.
$(HOPPER)/.installed: $(HOPPER_PINS) | $(INSTALLED)
	@echo 'Installing the compiler for Hopper GPUs into $(HOPPER): about 260 MB to download'
	@rm -rf $(HOPPER) && mkdir -p $(HOPPER)
	@$(BIN)/python -m pip install --quiet --no-deps --no-compile --target $(HOPPER) -r $(HOPPER_PINS)
	@touch $@

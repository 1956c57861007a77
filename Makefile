# One door for people and for CI. Needs Python >= 3.11 with its venv module; everything else is installed into
# .venv. A target that is already satisfied costs nothing.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
VENV ?= .venv
LOCK := requirements.lock
TEST_EXTRAS := dev,docs,quant,ray,tensorboard,postgres
ALL_EXTRAS := $(TEST_EXTRAS),bench

PY := $(VENV)/bin/python

# Tests run in so many processes, one more than two cores as many tests wait; a test file stays in one.
JOBS ?= 3
SPREAD = -n $(JOBS) --dist loadfile

# Of `make test-portable`: the tests to run; empty: all.
ONLY ?=

# Of `make fuzz`; the seed is printed, so that a finding can be repeated.
COUNT ?= 2000000
SEED := $(or $(SEED),$(shell date +%s))

# An editable install names its folder: the stamps carry the folder's checksum, so a copy is installed anew.
HERE := $(shell pwd -P | cksum | cut -d' ' -f1)
RUNTIME := $(VENV)/.runtime-$(HERE)
TESTING := $(VENV)/.testing-$(HERE)
BENCHING := $(VENV)/.benching-$(HERE)

PROTOS := $(wildcard protos/fedpeft/v1/*.proto)
STUBS := fedpeft/v1

# Everything here works without a network once it is installed, and reports to nobody.
export HF_HUB_OFFLINE := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export FLWR_TELEMETRY_ENABLED := 0
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false
export TORCHDYNAMO_DISABLE := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help setup check test test-fast test-portable federation soak fuzz protos reference docs demo bench lock clean \
        lint format-check types protos-check pytest pytest-fast pytest-exhaustive exhaustive

help:  ## list the targets
	@echo "usage: make TARGET"; echo
	@sed -n 's/^\([a-z-]*\):.*  ## \(.*\)$$/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) \
	  | while IFS='|' read -r name text; do printf '%-12s %s\n' "$$name" "$$text"; done

setup: $(TESTING)  ## create .venv with everything that the tests need

demo: $(RUNTIME)  ## fine-tune the embedded model across simulated clients; the run is in runs/demo
	$(PY) -m fedpeft.cli simulate --out runs/demo --force

check: lint format-check types protos-check  ## ruff, mypy --strict, generated code against protos/

test: check  ## every check, then every test
	@$(MAKE) --no-print-directory pytest

test-fast: $(TESTING)  ## the tests that take seconds
	@$(MAKE) --no-print-directory pytest-fast

test-portable: $(TESTING)  ## every test under three instruction sets of torch, oneDNN, OpenBLAS and numba; thrice as long
	@set -e; for kind in default avx2 native; do \
	  case $$kind in \
	    default) set -- ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 OPENBLAS_CORETYPE=Nehalem \
	      NUMBA_CPU_NAME=generic ;; \
	    avx2) set -- ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell ;; \
	    native) set -- -u ATEN_CPU_CAPABILITY -u ONEDNN_MAX_CPU_ISA -u OPENBLAS_CORETYPE -u NUMBA_CPU_NAME ;; \
	  esac; \
	  echo "== instructions: $$kind"; env "$$@" $(PY) -m pytest $(SPREAD) $(ONLY); done

federation: $(TESTING)  ## a server and three agents on this machine, killed midway; one minute on idle cores
	$(PY) -m pytest -q -s tests/integration/test_federation.py

soak: $(TESTING)  ## kills, reconnects and delays for MINUTES (30), and neither bytes nor memory may tell
	$(PY) simulations/soak.py --minutes $(or $(MINUTES),30)

fuzz: $(TESTING)  ## millions of hostile update messages; COUNT=N SEED=N, a random seed by default
	$(PY) -m tests.wire.fuzz_update --count $(COUNT) --seed $(SEED)

exhaustive: $(TESTING)  ## what make test samples, in full: every crash point, method and base; 25 minutes
	@$(MAKE) --no-print-directory pytest-exhaustive

protos: $(TESTING)  ## regenerate fedpeft/v1 from protos/
	$(call generate,.)

reference: $(TESTING)  ## write the reference pages of docs/ from the code
	$(PY) -m docs.generate

docs: $(TESTING)  ## build the documentation as a site in site/, offline; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "site/index.html; with the search: $(PY) -m http.server -d site"

bench: $(BENCHING)  ## run every benchmark script in simulations/
	@set -e; for script in simulations/bench_*.py; do echo "== $$script"; $(PY) "$$script"; done

lock:  ## resolve every dependency anew and write requirements.lock
	$(require_python)
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	  $(PYTHON) -m venv "$$folder"; \
	  "$$folder/bin/python" -m pip install --quiet -e ".[$(ALL_EXTRAS)]"; \
	  { echo "# What the checks were run with, as constraints: pip install -c $(LOCK) -e ."; \
	    echo "# Written by: make lock"; \
	    "$$folder/bin/python" -m pip freeze --exclude-editable --exclude fedpeft \
	      | grep -E '^[A-Za-z0-9._-]+==' | sed 's/+[A-Za-z0-9.]*$$//' | LC_ALL=C sort -f; } > "$$folder/lock"; \
	  mv "$$folder/lock" $(LOCK)
	@echo "$(LOCK): $$(grep -c == $(LOCK)) packages"

clean:  ## delete .venv, caches and build folders; runs/ stays
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find fedpeft server client tests simulations -name __pycache__ -type d -prune -exec rm -rf {} +

# The parts of check and test, each of which can be called alone.

lint: $(TESTING)
	$(PY) -m ruff check .

format-check: $(TESTING)
	$(PY) -m ruff format --check .

types: $(TESTING)
	$(PY) -m mypy

protos-check: $(TESTING)
	@set -e; folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	  $(call generate,"$$folder"); \
	  diff -ru --exclude=__init__.py --exclude=__pycache__ "$$folder/$(STUBS)" $(STUBS) \
	    || { echo "$(STUBS) differs from protos/; run: make protos" >&2; exit 1; }
	@echo "protos: $(STUBS) matches $(PROTOS)"

pytest: $(TESTING)
	$(PY) -m pytest $(SPREAD)

pytest-fast: $(TESTING)
	$(PY) -m pytest $(SPREAD) -m "not slow"

pytest-exhaustive: $(TESTING)
	$(PY) -m pytest $(SPREAD) -m exhaustive

# Installation. A stamp is older than pyproject.toml or the lock when they change, and the install is repeated.

$(RUNTIME): pyproject.toml $(LOCK)
	$(call install,.)
	@touch $@

$(TESTING): pyproject.toml $(LOCK)
	$(call install,.[$(TEST_EXTRAS)])
	@touch $(RUNTIME) $@

$(BENCHING): pyproject.toml $(LOCK) | $(TESTING)
	$(call install,.[$(ALL_EXTRAS)])
	@touch $@

define require_python
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing), Python 3.11 or newer is needed;" \
	    "name one with: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
endef

# $(1): what to install, with extras. An environment that works is kept, and what is in it.
define install
	$(require_python)
	@$(PY) -c 'import pip' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "no virtual environment could be made; install Python's venv module (Debian: python3-venv)" >&2; \
	  exit 1; }
	@echo "installing $(1) into $(VENV); the first time takes some minutes"
	@$(PY) -m pip install --quiet -c $(LOCK) -e "$(1)"
endef

# $(1): the folder under which fedpeft/v1 is written. Only files with a service get a service stub.
define generate
$(PY) -m grpc_tools.protoc -Iprotos --python_out=$(1) --pyi_out=$(1) $(PROTOS)$(if $(SERVICES), && \
	  $(PY) -m grpc_tools.protoc -Iprotos --grpc_python_out=$(1) $(SERVICES))
endef
SERVICES = $(shell grep -l '^service ' $(PROTOS))

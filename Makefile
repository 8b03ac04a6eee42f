# Set-up, demo and checks. Each target installs what it needs, once.
# All paths are relative, so that the folder's name may contain spaces.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.test
# With tested versions, pip does not search for others; modules are compiled when first imported.
PIP := $(PY) -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt
# Two processes of one thread each: threads that wait for each other cost more than they help.
PARALLEL := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
APART := slow or browser or s3 or cluster or docs or tower

.PHONY: demo pictures test test-browser test-s3 test-cluster test-docs test-tower test-slow train-demo fuzz lint docs \
	notebooks bench bench-scale bench-retrieval bench-gpu bench-gpu-kit bench-gpu-rehearsal clean help

help:
	@echo "make demo       run the three commands on real images (results in demo/)"
	@echo "make pictures   redraw the pictures of README and documentation"
	@echo "make test       ruff, mypy, import order, and all tests except those below"
	@echo "make test-browser  the report in Chromium"
	@echo "make test-s3    object storage, against an S3 server on this machine"
	@echo "make test-cluster  clusters: several Ray nodes, or processes that train, on this machine"
	@echo "make test-docs  the documentation, its examples and a notebook"
	@echo "make test-tower real images and the real network, compared with results of the research code"
	@echo "make test-slow  slower tests, such as comparisons with the research code itself"
	@echo "make fuzz       feed broken files and odd arguments for ten minutes"
	@echo "make docs       build the documentation site (in site/)"
	@echo "make notebooks  run the notebooks in examples/, and keep their output"
	@echo "make train-demo train on frames of a walk (FRAMES=DIR), and add whitening"
	@echo "make bench      compare speed with the research code (about an hour on 2 cores)"
	@echo "make bench-scale  measure how cost grows with the size of the data set"
	@echo "make bench-retrieval  compare types of index, up to a million descriptors (resumes)"
	@echo "make bench-gpu  measure correctness and speed on a CUDA GPU, in eight minutes"
	@echo "make bench-gpu-kit  prepare it for a machine without a network (in build/gpu_kit)"
	@echo "make bench-gpu-rehearsal  rehearse it on the CPU, with few packages and no network"
	@echo "make clean      remove the virtual environment and everything made with it"

$(INSTALLED): pyproject.toml constraints.txt
	@echo "Installing the package and what it needs into $(VENV), once."
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
		{ echo "error: $(PYTHON) cannot make a virtual environment; needed are Python 3.10 to 3.13 and its venv module"; exit 2; }
	$(PIP) --editable .
	@touch $(INSTALLED)

$(TESTABLE): $(INSTALLED)
	@echo "Installing what tests and documentation need, once."
	$(PIP) --editable ".[test]"
	@touch $(TESTABLE)

demo: $(INSTALLED)
	$(PY) -m patchnetvlad.cli.demo

# The last needs Chromium.
pictures: demo $(TESTABLE)
	$(PY) docs/make_pictures.py
	$(PY) docs/make_report_picture.py

lint: $(TESTABLE)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports

test: lint
	$(PARALLEL) -m "not ($(APART))"

test-browser: $(TESTABLE)
	$(PY) -m pytest -m "browser and not slow"

test-s3: $(TESTABLE)
	$(PY) -m pytest -m "s3 and not slow"

test-cluster: $(TESTABLE)
	$(PY) -m pytest -m "cluster and not slow"

test-docs: $(TESTABLE)
	$(PY) -m pytest -m "docs and not slow"

# If the reference data is missing, only the demo images are matched.
test-tower: $(TESTABLE)
	$(PY) -m pytest -m "tower and not slow"

# Includes the package kapture, which reads our pairs.
test-slow: $(TESTABLE)
	$(PIP) --editable ".[test,interop]"
	$(PY) -m pytest -m slow
	$(PY) -m pytest tests/test_exports.py

# FRAMES: a folder with index.txt and positions.npy, whose unit is the number of a frame.
FRAMES ?= ../shared/tower_train
train-demo: $(TESTABLE)
	$(PY) benchmarks/train_results.py --train "$(FRAMES)" --seeds 1 --work build/train \
		--set posdistthr=2 negdistthr=5 valdistthr=2 cellsize=3

fuzz: $(TESTABLE)
	$(PY) tests/fuzz.py --minutes 10 --seed 0

docs: $(TESTABLE)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "The site is in site/: open site/index.html"

notebooks: $(TESTABLE)
	$(PY) examples/run.py

bench: $(TESTABLE)
	$(PY) benchmarks/bench.py

bench-scale: $(TESTABLE)
	$(PY) benchmarks/growth.py

bench-retrieval: $(TESTABLE)
	$(PY) benchmarks/scale.py

# Without a virtual environment: such a machine may have no package index.
bench-gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

bench-gpu-kit: $(TESTABLE)
	$(PY) benchmarks/gpu_kit.py

bench-gpu-rehearsal:
	$(PYTHON) benchmarks/gpu_rehearsal.py

clean:
	rm -rf $(VENV) demo build site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache *.egg-info

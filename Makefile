# Set-up, demonstration and checks. Each target does all of its own set-up, once.
# Relative paths only, so that the folder's name may hold spaces.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
TESTABLE := $(VENV)/.test
# With versions that were tested, pip searches for none; modules are compiled when first imported.
PIP := $(PY) -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt
# Two processes of one thread each: threads that wait for each other cost more than they help.
PARALLEL := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder
APART := slow or browser or s3 or cluster or docs or tower

.PHONY: demo pictures test test-browser test-s3 test-cluster test-docs test-tower test-slow fuzz lint docs \
	notebooks bench bench-scale bench-retrieval bench-gpu bench-gpu-kit bench-gpu-rehearsal clean help

help:
	@echo "make demo       run the three commands on real photographs (results in demo/)"
	@echo "make pictures   make the pictures of README and documentation again"
	@echo "make test       ruff, mypy, and all tests but those of the following lines"
	@echo "make test-browser  the report in Chromium"
	@echo "make test-s3    object storage, against an S3 server on this machine"
	@echo "make test-cluster  clusters: several nodes of Ray on this machine"
	@echo "make test-docs  the documentation, its examples and a notebook"
	@echo "make test-tower a real data set, against what the research code made of it"
	@echo "make test-slow  the tests that take longer: against the research code itself"
	@echo "make fuzz       broken files and odd arguments, ten minutes long"
	@echo "make docs       the documentation as a site (in site/)"
	@echo "make notebooks  run the notebooks in examples/, and keep what they print"
	@echo "make bench      ours and the research code side by side (about an hour on 2 cores)"
	@echo "make bench-scale  how cost grows with the size of the data set"
	@echo "make bench-retrieval  kinds of index up to a million descriptors (goes on where it stopped)"
	@echo "make bench-gpu  all there is to know about a CUDA GPU, in eight minutes"
	@echo "make bench-gpu-kit  what that needs on a machine without a network (in build/gpu_kit)"
	@echo "make bench-gpu-rehearsal  try it on the CPU, with little installed and the network off"
	@echo "make clean      remove the virtual environment and what was made with it"

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

# Where the reference data is absent, these tests are skipped.
test-tower: $(TESTABLE)
	$(PY) -m pytest -m "tower and not slow"

# With the package kapture, which reads our pairs back.
test-slow: $(TESTABLE)
	$(PIP) --editable ".[test,interop]"
	$(PY) -m pytest -m slow
	$(PY) -m pytest tests/test_exports.py

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

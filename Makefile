# Every target sets up what it needs: .venv with the pinned versions of constraints.txt.
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Bindings alone (1.2 MB each): tests check names and signatures against them, with a stub in the place of libnvinfer.
TENSORRT_VERSIONS := tests/tensorrt_versions.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo bench bench-14b bench-kernel speed test models check lint types imports wheel clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## Create .venv with the pinned dependencies

$(STAMP): pyproject.toml constraints.txt $(TENSORRT_VERSIONS)
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[cpu,diffusers,dev]'
	@for v in $$(cat $(TENSORRT_VERSIONS)); do \
	  $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/tensorrt/$$v \
	    tensorrt_cu13_bindings==$$v || echo "no bindings of TensorRT $$v for this Python: tests that read them skip"; \
	done
	@touch $@

demo: $(STAMP) ## The whole line on Wan2.1-T2V-1.3B's configuration: load, rewrite, verify, export, run (about two minutes)
	$(BIN)/python -m t3compile.demo

bench: $(STAMP) ## The measurements of BENCHMARKS.md, after the tests: windows, full attention and the paper's form (an hour and the tests)
	$(BIN)/python -m tests.bench_suite

KERNELS := --device cuda --dtype bfloat16 --what attention --against full,paper,regrouped --runtime torch,compile

bench-kernel: $(STAMP) ## The kernel beside full attention, the paper's form and regrouped tokens on a GPU, at real sizes (minutes)
	$(BIN)/t3compile bench t3-wan2.1-4k --sizes 480p,720p,4k $(KERNELS) --markdown
	$(BIN)/t3compile bench t3-wan2.2-4k --sizes 4k $(KERNELS) --markdown

speed: $(STAMP) ## Seconds that every step takes at 1, 10, 40 and 80 blocks, and docs/speed.png (half an hour)
	$(BIN)/python -m tests.speed --json docs/speed.json --plot docs/speed.png

bench-14b: $(STAMP) ## Wan 14B at 4K through every command from a checkpoint larger than memory (57 GB of disk, some ten minutes)
	$(BIN)/python -m tests.bench_14b

test: $(STAMP) ## Run the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

models: $(STAMP) ## Run every model of the zoo and write docs/models.md
	$(BIN)/python -m tests.zoo

check: lint types imports test ## ruff, mypy --strict, the import contracts and the tests

lint: $(STAMP)
	$(BIN)/ruff check t3compile passes export tests docs
	$(BIN)/ruff format --check t3compile passes export tests docs

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

wheel: $(STAMP) ## Build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

clean: ## Remove what the targets made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

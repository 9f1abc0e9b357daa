.DEFAULT_GOAL := help
.PHONY: help install demo format lint types test slow docs bench check all report \
	sam seem dinov2 openclip blip deit dino resnet152 efficientnet_lite0

PYTHON ?= python3
BIN := .venv/bin
DATA ?= sample
OPTIONS ?=
BACKBONES := sam seem dinov2 openclip blip deit dino resnet152

help:     ## Show these targets
	@grep -E '^[a-z]+: *.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12
	@echo "sam seem dinov2 openclip blip deit dino resnet152 efficientnet_lite0"
	@echo "            All scenarios of one backbone: make dinov2 DATA=csv:labels.csv OPTIONS='--epochs 10'"

# A stamp per set of extras; the environment is made anew only when what it needs has changed.
.venv/.demo: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	@touch $@

.venv/.dev: setup.cfg pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@ .venv/.demo

install: .venv/.dev  ## Make .venv with all that development and tests need

demo: .venv/.demo  ## Run the main job on a sample that ships with scikit-learn
	$(BIN)/medprobe extract sample -m efficientnet_lite0 -o demo/features
	$(BIN)/medprobe probe demo/features/sample/efficientnet_lite0.h5 -o demo/results
	$(BIN)/medprobe report demo/results -o demo/report

format: .venv/.dev  ## Rewrite the code and the generated docs in place
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .
	$(BIN)/cog -r -I tests CONTRIBUTING.md docs/cli.md docs/backbones.md docs/protocols.md

lint: .venv/.dev  ## Check style and formatting, changing nothing
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/.dev  ## Check types
	$(BIN)/mypy

test: .venv/.dev  ## Run the fast tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile -m 'not slow and not gpu and not network'

slow: .venv/.dev  ## Run the slow tests
	$(BIN)/pytest -m slow

docs: .venv/.dev  ## Check that the generated docs are up to date
	$(BIN)/cog --check -I tests CONTRIBUTING.md docs/cli.md docs/backbones.md docs/protocols.md

bench: .venv/.dev  ## Print the benchmark tables
	$(BIN)/python benchmarks/bench_extract.py
	$(BIN)/python benchmarks/bench_sweep.py
	$(BIN)/python benchmarks/bench_finetune.py

check: lint types docs test  ## Everything that CI runs; the tests last, so that theirs is the closing line

$(BACKBONES) efficientnet_lite0: .venv/.demo
	$(BIN)/medprobe run -d $(DATA) -m $@ $(OPTIONS)

all: .venv/.demo  ## All scenarios of every backbone of the study on DATA
	$(BIN)/medprobe run -d $(DATA) $(BACKBONES:%=-m %) $(OPTIONS)

report: .venv/.demo  ## Write report/index.html of all results
	$(BIN)/medprobe report results

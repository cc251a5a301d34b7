# make demo   a real model answers from a compressed cache, beside its plain one (fetches the demo model on first use)
# make test   everything that this machine can run, both backends
# make figures   README's picture, from the JSON in results/
# make results WIKITEXT=FILE   README's tables and pictures from nothing: long; goes on where it stopped
# make lint   formatting and static checks      make bench   speed beside the plain cache
VENV   := .venv
PYTHON := $(VENV)/bin/python
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# the backend of this machine: MLX on Apple silicon, PyTorch elsewhere
BACKEND := $(if $(filter Darwin-arm64,$(shell uname -sm | tr ' ' -)),mlx,torch)

# MLX's Linux wheel brings a slow BLAS; Debian's OpenBLAS makes its tests several times faster where it is installed
OPENBLAS := $(firstword $(wildcard /usr/lib/*/openblas-pthread/libopenblas.so.0))

.PHONY: demo test figures results lint bench clean

demo: $(VENV)/.installed-$(BACKEND)
	$(VENV)/bin/spectralkv generate --model demo --prompt-file shared/spectral_kv_core/data/demo_prompt.txt --bits 3 --max-tokens 64 --compare

test: $(VENV)/.installed-all
	$(PYTHON) -m pytest -q --ignore-glob='*test_mlx*'
	LD_PRELOAD=$(OPENBLAS) $(PYTHON) -m pytest -q tests/test_mlx*.py

figures: $(VENV)/.installed-plots
	$(VENV)/bin/spectralkv plot results/methods_smollm2.json --only rate_distortion --output results/figures

RUNS := build/results
EVAL := $(VENV)/bin/spectralkv eval --model demo --backend torch --documents 4 --scored 128 --step 16 --greedy 0
OURS := spectral,spectral-dense,spectral-stored
PEERS := affine,kivi,turboquant,turboquant-qjl,jarviskv,eigen-attention,xkv
SCORERS := streaming,random,knorm,keydiff,snapkv,expected-attention,fourierkv,waveletkv,waveletfourierkv,triattention,wavelettriattention

results: $(VENV)/.installed-all
	@test -f "$(WIKITEXT)" || { echo "Give the test text of WikiText-2: make results WIKITEXT=wikitext2-test.txt" >&2; exit 1; }
	@mkdir -p $(RUNS)
	$(PYTHON) results/tables.py --code $(RUNS)/code.txt
	$(EVAL) --dtype float32 --methods $(OURS) --bits 4,3,2,1.5,1,0.5 --prefix 1024 --tasks text,copy --metrics kl --text wiki="$(WIKITEXT)" --output $(RUNS)/codec_smollm2_1024
	$(EVAL) --dtype bfloat16 --methods spectral --bits 4,3,2,1.5,1,0.5 --documents 1 --tasks text --metrics kl --text wiki="$(WIKITEXT)" --output $(RUNS)/codec_smollm2_sizes
	$(EVAL) --dtype float32 --methods $(OURS),$(PEERS) --bits 4.5,3.5,2.5,1.5,1,0.5 --prefix 1024 --tasks text --metrics kl --text wiki="$(WIKITEXT)" code=$(RUNS)/code.txt --output $(RUNS)/methods_smollm2
	$(EVAL) --dtype float32 --methods $(SCORERS) --keep 0.5,0.25,0.14 --prefix 2048 --tasks text --metrics kl,aop --text wiki="$(WIKITEXT)" code=$(RUNS)/code.txt --output $(RUNS)/scorers_smollm2
	for name in codec_smollm2_1024 codec_smollm2_sizes methods_smollm2 scorers_smollm2; do $(PYTHON) results/tables.py --publish $(RUNS)/$$name; done
	$(PYTHON) results/tables.py --write
	$(MAKE) figures

lint: $(VENV)/.installed-all
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .

bench: $(VENV)/.installed-bench
	$(VENV)/bin/spectralkv bench --synthetic llama-3.1-8b --bits 2
	$(VENV)/bin/spectralkv bench --model demo --context 1024,4096 --bits 2

clean:
	rm -rf $(VENV) build *.egg-info

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

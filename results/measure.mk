# The runs behind the tables and pictures of README and of this folder: make results WIKITEXT=FILE [GEMMA=DIR]
#
# WIKITEXT is the test text of WikiText-2, GEMMA a directory with Gemma 3 270M, whose tables are made only with it. A run that
# was cut off goes on from its rows in build/results. Two runs at a time: make -j2 results OMP_NUM_THREADS=1 ...
RUNS    := build/results
DEMO    := --model demo --dtype float32
PAIRS   := $(DEMO) --profile $(RUNS)/pairs.safetensors
SMALL   := --model "$(GEMMA)" --dtype float32 --profile $(RUNS)/gemma.safetensors --documents 2
WIKI    := --text wiki="$(WIKITEXT)"
BOTH    := $(WIKI) code=$(RUNS)/code.txt
OURS    := spectral,spectral-trellis,spectral-dense,spectral-stored
PAIRED  := spectral-dense,spectral-dense-pairs,spectral-stored,spectral-stored-pairs
PEERS   := affine,kivi,turboquant,turboquant-qjl,jarviskv,eigen-attention
SCORERS := streaming,random,knorm,keydiff,snapkv,expected-attention,waveletattention,fourierkv,waveletkv,waveletfourierkv,triattention,wavelettriattention
COMMA   := ,
CODED   := $(subst $(COMMA),+spectral$(COMMA),$(SCORERS))+spectral
ROUNDED := nearest,expected-attention,triattention,wavelettriattention,fourierkv,waveletkv,waveletfourierkv,keydiff,knorm
FEWER   := nearest,expected-attention,triattention,wavelettriattention,waveletkv
TIERED  := --methods expected-attention+spectral,expected-attention+spectral-dense --tiers 0.25:3.5,0.75:1.5 0.25:2.5,0.75:0.5
LADDER  := --bits 4.5,3.5,2.5,1.5,1,0.5 --prefix 1024 --tasks text
SHARES  := --keep 0.5,0.25,0.14 --prefix 2048 --tasks text
STEERED := --prefix 1024 --tasks text,copy
DEEP    := --prefix 3500 --tasks needle --documents 1 --scored 64

# every run, and its options; those that end in _more, _all, _half, _tiers and _joint are rows of the table before the underscore
ARGS_codec_smollm2_1024    := $(DEMO) --methods $(OURS) --bits 4,3,2,1.5,1,0.5 --prefix 1024 --tasks text,copy $(WIKI)
ARGS_codec_smollm2_pairs   := $(PAIRS) --methods $(PAIRED) --bits 2,1.5,1,0.5 --prefix 1024 --tasks text,copy $(WIKI)
ARGS_codec_smollm2_wide    := $(PAIRS) --documents 16 --methods spectral,spectral-trellis,spectral-dense,spectral-dense-pairs \
  --bits 2,1.5,1,0.5 --prefix 1024 --tasks text,copy $(WIKI)
ARGS_codec_smollm2_2048    := $(DEMO) --methods $(OURS) --bits 2,1 --prefix 2048 --tasks text,copy $(WIKI)
ARGS_codec_smollm2_chunks  := $(DEMO) --methods $(OURS) --bits 2 --prefix 2048 --prefill-chunk 512 --tasks text $(WIKI)
ARGS_codec_smollm2_code    := $(DEMO) --documents 2 --methods $(OURS) --bits 2,1 --prefix 2048 --tasks text --text code=$(RUNS)/code.txt
ARGS_codec_smollm2_sizes   := --model demo --dtype bfloat16 --methods spectral --bits 4,3,2,1.5,1,0.5 --documents 1 --tasks text $(WIKI)
ARGS_methods_smollm2       := $(DEMO) --methods $(OURS),$(PEERS),xkv $(LADDER) $(BOTH)
ARGS_methods_smollm2_joint := $(DEMO) --methods kvtc --profile $(RUNS)/joint.safetensors $(LADDER) $(BOTH)
ARGS_methods_smollm2_high  := $(DEMO) --methods svdq,svdq-prompt,eigen-attention,think --bits 12,10,9 --prefix 1024 --tasks text $(BOTH)
ARGS_scorers_smollm2       := $(DEMO) --methods $(SCORERS) $(SHARES) --metrics kl,aop $(BOTH)
ARGS_composed_smollm2      := $(DEMO) --documents 2 --methods $(CODED) --bits 2 --keep 0.5 --prefix 2048 --tasks text $(BOTH)
ARGS_composed_smollm2_more := $(DEMO) --documents 2 --methods $(CODED) --bits 4 --keep 0.25 --prefix 2048 --tasks text $(BOTH)
ARGS_composed_smollm2_all  := $(DEMO) --documents 2 --methods spectral --bits 1 --prefix 2048 --tasks text $(BOTH)
ARGS_steering_smollm2      := $(DEMO) --documents 2 --methods spectral,spectral-dense --bits 2,1 --rounding-scores $(ROUNDED) $(STEERED) $(BOTH)
ARGS_steering_smollm2_more := $(DEMO) --documents 2 $(TIERED) $(STEERED) $(BOTH)
ARGS_needle_smollm2        := $(DEMO) --methods streaming,snapkv,expected-attention,waveletattention,wavelettriattention --keep 0.125 $(DEEP) $(WIKI)
ARGS_needle_smollm2_more   := $(DEMO) --methods spectral,spectral-trellis,spectral-dense --bits 2,1 $(DEEP) $(WIKI)
ARGS_needle_smollm2_half   := $(DEMO) --methods waveletattention+spectral --bits 2 --keep 0.5 $(DEEP) $(WIKI)
ARGS_needle_smollm2_tiers  := $(DEMO) $(TIERED) $(DEEP) $(WIKI)
ARGS_second_seed_smollm2   := $(DEMO) --methods fourierkv,waveletkv,waveletfourierkv,triattention,wavelettriattention,turboquant \
  --bits 4.25 --keep 0.140625 --prefix 4096 --tasks text,drift --metrics kl,aop --greedy 64 --scored 64 --documents 1 $(WIKI)

ARGS_codec_gemma3_270m_2048    := $(SMALL) --documents 4 --methods $(OURS) --bits 2,1 --prefix 2048 --tasks text,copy $(WIKI)
ARGS_methods_gemma3_270m       := $(SMALL) --methods $(OURS),$(PEERS) $(LADDER) $(BOTH)
ARGS_scorers_gemma3_270m       := $(SMALL) --methods $(SCORERS) $(SHARES) --metrics kl,aop $(BOTH)
ARGS_composed_gemma3_270m      := $(SMALL) --methods $(CODED) --bits 2 --keep 0.5 --prefix 2048 --tasks text $(BOTH)
ARGS_composed_gemma3_270m_more := $(SMALL) --methods $(CODED) --bits 4 --keep 0.25 --prefix 2048 --tasks text $(BOTH)
ARGS_composed_gemma3_270m_all  := $(SMALL) --methods spectral --bits 1 --prefix 2048 --tasks text $(BOTH)
ARGS_steering_gemma3_270m      := $(SMALL) --methods spectral,spectral-dense --bits 2,1 --rounding-scores $(FEWER) $(STEERED) $(BOTH)
ARGS_steering_gemma3_270m_more := $(SMALL) $(TIERED) $(STEERED) $(BOTH)

MODELS  := smollm2 $(if $(GEMMA),gemma3_270m)
NAMED   := $(patsubst ARGS_%,%,$(filter ARGS_%,$(.VARIABLES)))
MEASURE := $(foreach model,$(MODELS),$(foreach run,$(NAMED),$(if $(findstring _$(model),$(run)),$(run))))
# runs that are one table
TABLES  := $(filter-out %_more %_all %_half %_tiers %_joint,$(MEASURE))

.PHONY: results $(addprefix run-,$(MEASURE))

results: $(addprefix run-,$(MEASURE)) $(VENV)/.installed-plots ## make every table and picture from nothing: WIKITEXT=FILE [GEMMA=DIR], hours
	for name in $(TABLES); do \
	  also=; for part in more all half tiers joint; do [ ! -d $(RUNS)/$${name}_$$part ] || also="$$also $(RUNS)/$${name}_$$part"; done; \
	  $(PYTHON) results/tables.py --publish $(RUNS)/$$name $$also || exit 1; \
	done
	$(PYTHON) results/tables.py --write
	$(MAKE) figures

.PHONY: outliers

outliers: $(VENV)/.installed-all ## measure texts that a profile does not know at equal bytes: WIKITEXT=FILE [GEMMA=DIR], half an hour
	@test -f "$(WIKITEXT)" || { echo "Give the test text of WikiText-2: make outliers WIKITEXT=wikitext2-test.txt" >&2; exit 1; }
	$(PYTHON) tools/outlier_table.py --model demo --name smollm2 --text "$(WIKITEXT)" --output results/outliers_smollm2.json
	[ -z "$(GEMMA)" ] || { $(MAKE) $(RUNS)/gemma.safetensors && $(PYTHON) tools/outlier_table.py --model "$(GEMMA)" --name gemma3-270m \
	  --profile $(RUNS)/gemma.safetensors --text "$(WIKITEXT)" --output results/outliers_gemma3_270m.json; }
	$(PYTHON) results/tables.py --write

.PHONY: windows

windows: $(VENV)/.installed-all $(RUNS)/gemma.safetensors ## measure packed sliding windows: WIKITEXT=FILE GEMMA=DIR
	$(VENV)/bin/spectralkv profile --windows --no-probes --tokens 16384 --model "$(GEMMA)" --backend torch --dtype float32
	$(PYTHON) tools/windows_table.py "$(GEMMA)" $(RUNS)/gemma.safetensors "$(WIKITEXT)" --prefix 1500 --documents 2 \
	  --dtype bfloat16 --output results/windows_gemma3_270m.json
	$(PYTHON) results/tables.py --write

$(addprefix run-,$(MEASURE)): run-%: $(RUNS)/code.txt
	$(VENV)/bin/spectralkv eval --backend torch --documents 4 --scored 128 --step 16 --greedy 0 --metrics kl $(ARGS_$*) --output $(RUNS)/$*

run-methods_smollm2_joint: $(RUNS)/joint.safetensors
run-codec_smollm2_pairs run-codec_smollm2_wide: $(RUNS)/pairs.safetensors
$(addprefix run-,$(filter %_gemma3_270m %_gemma3_270m_more %_gemma3_270m_all %_gemma3_270m_2048,$(MEASURE))): $(RUNS)/gemma.safetensors

$(RUNS)/code.txt: $(VENV)/.installed-all
	@test -f "$(WIKITEXT)" || { echo "Give the test text of WikiText-2: make results WIKITEXT=wikitext2-test.txt" >&2; exit 1; }
	mkdir -p $(RUNS)
	$(PYTHON) results/tables.py --code $@

$(RUNS)/joint.safetensors: $(RUNS)/code.txt
	$(VENV)/bin/spectralkv profile --backend torch $(DEMO) --joint --output $@

$(RUNS)/pairs.safetensors: $(RUNS)/code.txt
	$(VENV)/bin/spectralkv profile --backend torch $(DEMO) --pairs --output $@

$(RUNS)/gemma.safetensors: $(RUNS)/code.txt
	$(VENV)/bin/spectralkv profile --backend torch --model "$(GEMMA)" --dtype float32 --output $@

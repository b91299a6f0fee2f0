# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# The demo. `make demo WEIGHTS=pretrained ENCODER=vit_base_patch14_reg4_dinov2` uses real weights, where they can be had;
# `make demo ENCODER=vit_small_patch16_dinov3_qkvb LAYERS=5,8,11` combines several blocks.
ENCODER ?= test_vit
WEIGHTS ?= random:0
# The little default encoder sees 96 pixels as 8 × 8 patches of 12; a named one has sizes of its own.
ENCODER_SIZES ?= $(if $(filter test_vit,$(ENCODER)),--input-size 96 --encoder-args patch_size=12 --image-size 96)
# Blocks whose tokens are combined; the last one if none are named.
LAYERS ?=
DEMO ?= runs/demo
DECODER_STEPS ?= 800
# RAEv2's recipe, whose images were the better ones at equal steps (docs/training.md). A GPU trains a larger network longer.
GPU ?= $(shell nvidia-smi -L 2>/dev/null | grep -m 1 '^GPU ')
DIT_MODEL ?= $(if $(GPU),--model.width 256 --model.depth 8)
DIT_PRESET ?= raev2-tiny
DIT_BATCH ?= $(if $(GPU),64,32)
DIT_STEPS ?= $(if $(GPU),6000,1500)
COMPRESSOR_STEPS ?= 5000
COMPACT_STEPS ?= 3000
# Images that are reconstructed or compared, and images that are generated.
COMPARED ?= 280
SAMPLES ?= 112
# Of `make demo-few-step`, the two stages after the demo's DiT.
CMT_STEPS ?= 100
MFD_STEPS ?= 1500
# Without a GPU, accelerate would give the process a single thread.
CORES := $(shell $(PYTHON) -c 'import os; print(os.cpu_count())')
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	--num_cpu_threads_per_process $(CORES)

.PHONY: demo demo-compact demo-few-step test test-slow check fmt api clean

$(VENV)/.installed-demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.installed-demo

demo: $(VENV)/.installed-demo
	$(BIN)/python -m pipeline.demo photographs data/demo/photographs
	$(BIN)/pipeline encode data/demo/photographs --out $(DEMO)/store --shards 16 \
		--encoder $(ENCODER) --weights $(WEIGHTS) $(ENCODER_SIZES) $(if $(LAYERS),--layers $(LAYERS)) --views center
	$(BIN)/pipeline verify $(DEMO)/store
	$(LAUNCH) train/decoder.py decoder-tiny --store $(DEMO)/store --out $(DEMO)/decoder --max-steps $(DECODER_STEPS)
	$(LAUNCH) train/dit.py $(DIT_PRESET) $(DIT_MODEL) --store $(DEMO)/store --out $(DEMO)/dit \
		--global-batch-size $(DIT_BATCH) --max-steps $(DIT_STEPS)
	$(LAUNCH) eval/reconstruction.py $(DEMO)/store --decoder $(DEMO)/decoder/snapshots/latest.safetensors \
		--num $(COMPARED) --out $(DEMO)/reconstruction
	$(LAUNCH) eval/generation.py $(DEMO)/dit/snapshots/latest.safetensors \
		--decoder $(DEMO)/decoder/snapshots/latest.safetensors --num $(SAMPLES) --seed 0 \
		--guidance cfg --guidance-scale 2 --out $(DEMO)/generation
	$(BIN)/python -m pipeline.demo page --store $(DEMO)/store --decoder $(DEMO)/decoder --dit $(DEMO)/dit \
		--reconstruction $(DEMO)/reconstruction --generation $(DEMO)/generation --out $(DEMO)

# One step instead of fifty: reuses what `make demo` left, and adds a section to its page.
demo-few-step: $(VENV)/.installed-demo
	$(LAUNCH) train/dit.py $(DIT_PRESET)-cmt $(DIT_MODEL) --store $(DEMO)/store --out $(DEMO)/cmt --max-steps $(CMT_STEPS) \
		--teacher $(DEMO)/dit/snapshots/latest.safetensors
	$(LAUNCH) train/dit.py $(DIT_PRESET)-mfd $(DIT_MODEL) --store $(DEMO)/store --out $(DEMO)/mfd --max-steps $(MFD_STEPS) \
		--teacher $(DEMO)/dit/snapshots/latest.safetensors --init-from $(DEMO)/cmt/snapshots/latest.safetensors
	$(BIN)/python eval/few_step.py $(DEMO)/mfd/snapshots/latest.safetensors --out $(DEMO)/few-step \
		--teacher $(DEMO)/dit/snapshots/latest.safetensors --store $(DEMO)/store --num-samples $(COMPARED) \
		--decoder $(DEMO)/decoder/snapshots/latest.safetensors
	$(BIN)/python -m pipeline.demo page --store $(DEMO)/store --decoder $(DEMO)/decoder --dit $(DEMO)/dit \
		--reconstruction $(DEMO)/reconstruction --generation $(DEMO)/generation --out $(DEMO) \
		--few-step $(DEMO)/few-step $(if $(wildcard $(DEMO)/compact/generation),--compact $(DEMO)/compact)

# After `make demo`: compact latents of the same store, and a section of them on the same page.
demo-compact: $(VENV)/.installed-demo
	$(LAUNCH) train/compressor.py flat-tiny --store $(DEMO)/store --out $(DEMO)/compact/compressor \
		--max-steps $(COMPRESSOR_STEPS)
	$(BIN)/pipeline add-field $(DEMO)/store --name flat \
		--compressor $(DEMO)/compact/compressor/snapshots/latest.safetensors
	$(BIN)/pipeline verify $(DEMO)/store
	$(LAUNCH) train/dit.py dit-tiny --store $(DEMO)/store/fields/flat --out $(DEMO)/compact/dit --max-steps $(COMPACT_STEPS)
	$(LAUNCH) eval/reconstruction.py $(DEMO)/store/fields/flat --num $(COMPARED) --out $(DEMO)/compact/reconstruction \
		--compressor $(DEMO)/compact/compressor/snapshots/latest.safetensors \
		--decoder $(DEMO)/decoder/snapshots/latest.safetensors
	$(LAUNCH) eval/generation.py $(DEMO)/compact/dit/snapshots/latest.safetensors --num $(SAMPLES) --seed 0 \
		--compressor $(DEMO)/compact/compressor/snapshots/latest.safetensors \
		--decoder $(DEMO)/decoder/snapshots/latest.safetensors \
		--guidance cfg --guidance-scale 2 --out $(DEMO)/compact/generation
	$(BIN)/python -m pipeline.demo page --store $(DEMO)/store --decoder $(DEMO)/decoder --dit $(DEMO)/dit \
		--reconstruction $(DEMO)/reconstruction --generation $(DEMO)/generation --out $(DEMO) \
		--compact $(DEMO)/compact $(if $(wildcard $(DEMO)/few-step),--few-step $(DEMO)/few-step)

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: check
	$(BIN)/python -m pytest -m "not gpu and not slow" -n auto --dist worksteal

test-slow: check
	$(BIN)/python -m pytest -m "not gpu" -n auto --dist worksteal

fmt: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The page of the names that `shards` offers, from their docstrings; a test compares it.
api: $(VENV)/.installed-test
	$(BIN)/python -m shards.testing.api_page > docs/api.md

# What the demo, the tests and the benchmarks wrote; the environment and other runs stay.
clean:
	rm -rf $(DEMO) data/demo runs/benchmarks .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# `make train` and `make test` set everything up in .venv first; `make help` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST_TRITON := 3.6.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
# The published wheel, whose models the tests compare with, and what importing it takes beside the test extra. Without their
# dependencies, which would bring torchvision.
ORIGINALS := vision_xformer==0.2.0 performer-pytorch==1.1.4 local-attention==1.4.4 axial-positional-embedding==0.3.12

.DEFAULT_GOAL := help
.PHONY: help train test attack bench traffic quality docs report lint clean

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' Makefile

# Threads that spin while they wait stop each other on shared cores, where a step then takes many times as long.
train: $(READY)  ## train hybrid_vip on the digits; other arguments: make train ARGS="--epochs 60"
	OMP_WAIT_POLICY=passive $(BIN)/vix train --model hybrid_vip --dataset digits $(ARGS)

test: $(READY)  ## run the tests; some of them: make test ARGS="-k models"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 $(ARGS)

attack: $(READY)  ## attack the ops, their arguments and the readers of files: make attack ARGS="--minutes 20 --backend triton"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attack $(ARGS)

bench: $(READY)  ## time every operator beside its peers; with torch.compile too: make bench ARGS=--compiled
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m pytest --benchmark $(ARGS)

traffic: $(READY)  ## count the bytes that the kernels move; one op: make traffic ARGS="--op apply_rope"
	OMP_NUM_THREADS=1 $(BIN)/vix dev traffic $(ARGS)

quality: $(READY)  ## measure how close each attention comes to softmax attention; draws docs/quality.png
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.quality --output docs/quality.png $(ARGS)

docs: $(READY)  ## build the documentation site into site/
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m mkdocs build --strict $(ARGS)

lint: $(READY)  ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The whole grid with the installed Triton, sm_90 alone with the oldest that is supported, which lies in a folder of its own:
# 4,389 specialisations in 45 minutes on two cores, and more than half an hour for the shared memory of every entry.
report: $(READY) $(VENV)/triton-$(OLDEST_TRITON)/.ready  ## compile every kernel for GPUs that are not there, and weigh the code
	$(BIN)/vix dev compile-report $(ARGS)
	$(BIN)/vix dev compile-report --shared $(ARGS)
	PYTHONPATH=$(VENV)/triton-$(OLDEST_TRITON) $(BIN)/vix dev compile-report $(ARGS) --arch sm_90

clean:  ## remove the environment and all caches, keep runs/
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .benchmarks *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# With an NVIDIA driver torch is the user's business: the system's CUDA build if it has one, else pip's choice.
# Without one it is the CPU build of constraints/cpu.txt and its torchvision, which timm needs for the tests: from PyTorch's own
# index where that answers within seconds, otherwise from the index that pip is configured for. PyPI's torchvision does not match
# a CPU build; the last line says so.
$(READY): pyproject.toml constraints/cpu.txt
	@set -e; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "Python 3.10 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }; \
	if nvidia-smi >/dev/null 2>&1; then \
		constraint=; site=; \
		if $(PYTHON) -c 'import sys, torch; sys.exit(torch.version.cuda is None)' 2>/dev/null; then \
			site=--system-site-packages; \
		fi; \
		$(PYTHON) -m venv $$site $(VENV); \
	else \
		constraint="--constraint constraints/cpu.txt"; index=; \
		$(PYTHON) -m venv $(VENV); \
		if $(PYTHON) -c 'import urllib.request as u; u.urlopen("$(CPU_INDEX)/torch/", timeout=5)' 2>/dev/null; then \
			index="--index-url $(CPU_INDEX)"; \
		fi; \
		echo "no NVIDIA driver: installing the CPU build of torch $$index"; \
		$(BIN)/python -m pip install --quiet $$index $$constraint torch torchvision || { \
			echo "no CPU build of torch found: point pip to an index that has one, such as $(CPU_INDEX)" >&2; exit 1; }; \
	fi; \
	$(BIN)/python -m pip install --quiet $$constraint --editable '.[train,test]'; \
	$(BIN)/python -m pip install --quiet --no-deps $(ORIGINALS)
	@$(BIN)/python tests/torchvision_operators.py
	@touch $@

$(VENV)/triton-$(OLDEST_TRITON)/.ready: $(READY)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) triton==$(OLDEST_TRITON)
	@touch $@

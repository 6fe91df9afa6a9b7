# Targets that need .venv set it up first. `make help` lists all targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
OLDEST_TRITON := 3.6.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
# The published wheel, which the tests compare with, and the packages it imports that are not in the test extra. They are
# installed without their dependencies, because these include torchvision.
ORIGINALS := vision_xformer==0.2.0 performer-pytorch==1.1.4 local-attention==1.4.4 axial-positional-embedding==0.3.12

.DEFAULT_GOAL := help
.PHONY: help train test attack hosts bench traffic quality linearize docs report lint clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' Makefile

# On shared cores, threads that spin while they wait block each other, which makes each step many times slower.
train: $(READY)  ## train hybrid_vip on 8 x 8 digits; with options: make train ARGS="--epochs 60"
	OMP_WAIT_POLICY=passive $(BIN)/vix train --model hybrid_vip --dataset digits $(ARGS)

test: $(READY)  ## run the tests; a selection: make test ARGS="-k models"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(ARGS)

attack: $(READY)  ## test operators and file readers with random cases: make attack ARGS="--minutes 20 --backend triton"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.attack $(ARGS)

hosts: $(READY)  ## run timm's tests with this library; transformers' tests, too: make hosts ARGS="--transformers PATH"
	$(BIN)/python -m tests.hosts $(ARGS)

bench: $(READY)  ## compare the speed of every operator with other packages; with torch.compile: make bench ARGS=--compiled
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	$(BIN)/python -m pytest --benchmark $(ARGS)

traffic: $(READY)  ## count the bytes that the kernels read and write; one operator: make traffic ARGS="--op apply_rope"
	OMP_NUM_THREADS=1 $(BIN)/vix dev traffic $(ARGS)

quality: $(READY)  ## measure and plot how much each attention differs from softmax attention; writes docs/quality.png
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.quality --output docs/quality.png $(ARGS)

# DATA is a dataset of vix train, such as a pack of CIFAR-10 images. The teacher is trained with 65 tokens, and then with 257
# tokens on 10,000 enlarged images. In all, this takes two hours on one CPU core.
DATA ?= cifar10
STUDY := runs/linearize
# Train a teacher in the folder STUDY/$(1) with the options $(2), or continue a run that was interrupted.
teacher = test -f $(STUDY)/$(1)/finished || { \
	if test -f $(STUDY)/$(1)/last.pt; then $(BIN)/vix train --resume $(STUDY)/$(1); \
	else $(BIN)/vix train --model hybrid_vit --model-kwargs patch_size=4 depth=6 --opt muon $(2) --output $(STUDY)/$(1); fi && \
	touch $(STUDY)/$(1)/finished; }
linearize: export OMP_NUM_THREADS := 1
linearize: $(READY)  ## train a softmax model, convert it to several attention methods, and compare: make linearize DATA=PACK
	$(call teacher,teacher-65,--dataset $(DATA) --epochs 7 --batch-size 128 --lr 4e-3 --warmup-epochs 1)
	test -d $(STUDY)/images || $(BIN)/python -m bench.image_folder --dataset $(DATA) --output $(STUDY)/images \
		--train 10000 --test 3000
	$(call teacher,teacher-257,--initial-checkpoint $(STUDY)/teacher-65 --dataset $(STUDY)/images --img-size 64 \
		--epochs 1 --batch-size 64 --lr 1e-3 --warmup-epochs 0.1)
	test -f $(STUDY)/linearize-time.csv || $(BIN)/python -m bench.linearize_time --output $(STUDY)
	$(BIN)/python -m bench.linearize --teacher $(STUDY)/teacher-257 --output $(STUDY) --seeds 0 --steps 200 $(ARGS)

docs: $(READY)  ## build the documentation site into site/
	$(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m mkdocs build --strict $(ARGS)

lint: $(READY)  ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The installed Triton compiles the kernels for all architectures. The oldest supported Triton, which is installed in a separate
# folder, compiles them only for sm_90. Kernels that are already in the committed table are skipped. Two cores compile about one
# kernel per second. Measuring the shared memory of every launch configuration takes more than half an hour.
report: $(READY) $(VENV)/triton-$(OLDEST_TRITON)/.ready  ## compile changed kernels for seven GPU architectures; check budgets
	$(BIN)/vix dev compile-report $(ARGS)
	$(BIN)/vix dev compile-report --shared $(ARGS)
	PYTHONPATH=$(VENV)/triton-$(OLDEST_TRITON) $(BIN)/vix dev compile-report $(ARGS) --arch sm_90

clean:  ## remove the environment and all caches; keep runs/
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache .benchmarks *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# With an NVIDIA driver, use the system's CUDA build of torch if there is one, otherwise the build that pip chooses.
# Without a driver, install the CPU build of constraints/cpu.txt and the matching torchvision, which timm needs for the tests.
# Both come from PyTorch's index if it answers within seconds, otherwise from the index that pip is configured for. PyPI's
# torchvision does not match a CPU build. The command before `touch` reports such a mismatch.
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

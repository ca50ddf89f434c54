# make demo     install, train a policy in a dream, check it in the simulator (about 15 minutes)
# make install  install into the active virtual environment, or into .venv; make test, lint and bench do this first
#
# make libero   add the LIBERO simulator (not its assets: docs/libero.md)
#
# PIP_FLAGS     further options of pip, such as the index of a CUDA or a CPU build of torch
# VLLM          virtual environment with bin/vllm, for `make vllm-test`: the judge's client against a real server
# DEMO_FLAGS    options of `rawdream demo`, such as "--long" or "--minutes 2 --episodes 10"

PYTHON ?= python3
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.rawdream-installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
LINT := build/lint

# Their wheels require builds of torch other than the CPU build; installed without dependencies, they work.
RL_LIBRARIES := torchrl==0.14.1 skrl==2.1.1 tensordict==0.14.3 pyvers==0.2.3 hoptorch==0.1.4 orjson==3.13.0 \
	rsl-rl-lib==5.5.1 GitPython==3.2.1 gitdb==4.0.12 smmap==5.0.3

# The simulator needs little of what its package requires: no torchvision, no robomimic, no OpenCV with windows.
LIBERO := hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1
LIBERO_NEEDS := cloudpickle easydict future matplotlib numba opencv-python-headless termcolor

.PHONY: demo install libero test vllm-test lint bench wheel clean help
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rawdream needs Python 3.11 or newer; make PYTHON=python3.12 install")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(PIP_FLAGS) -c constraints.txt torch==2.13.0
	$(PIP) install $(PIP_FLAGS) -c constraints.txt -e '.[dev,sb3,piper,trl]'
	$(PIP) install $(PIP_FLAGS) --no-deps $(RL_LIBRARIES)
	@ldconfig -p 2>/dev/null | grep -q -e libEGL.so.1 -e libOSMesa \
		|| echo 'No OpenGL library found. On Debian: apt-get install libegl1 libgles2 libosmesa6 ffmpeg'
	@touch $@

libero: install
	$(PIP) install $(PIP_FLAGS) -c constraints.txt $(LIBERO_NEEDS)
	$(PIP) install $(PIP_FLAGS) --no-deps $(LIBERO)

demo: install
	$(BIN)/rawdream demo $(DEMO_FLAGS)

test: install
	$(BIN)/python -m pytest -q -m 'not slow and not gpu and not vllm'
	$(BIN)/python -m pytest -q -m 'slow and not gpu and not vllm'

vllm-test: install
	@test -x "$(VLLM)/bin/vllm" || { echo 'Name an environment that has vLLM: make vllm-test VLLM=DIR (with DIR/bin/vllm)'; exit 2; }
	RAWDREAM_VLLM="$(abspath $(VLLM))" $(BIN)/python -m pytest -q -m vllm

# mypy and import-linter check the built wheel, because only there wrappers/ and trainers/ are inside rawdream_env.
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(PIP) wheel -q --no-deps --no-build-isolation -w $(LINT) .
	$(PIP) install -q --no-deps --no-index --target $(LINT)/package $(LINT)/*.whl
	cd $(LINT)/package && PYTHONPATH=. $(abspath $(BIN))/lint-imports --config $(CURDIR)/pyproject.toml
	cd $(LINT)/package && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml -p rawdream_env

bench: install
	$(BIN)/rawdream bench

wheel: install
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

# make train   train the `shapes` preset, on a GPU if there is one, into runs/
# make test    run the test suite, a process per core; ARGS='-n 0' for one alone
#
# Both set themselves up in .venv first: torch, build tools, bvae with its extension.
#   TORCH='torch==2.13.0'   which torch to install (pip requirement)
#   PYTHON=python3.12       which Python to make .venv from
#   ARGS='...'              further arguments for the trainer or pytest

TORCH ?= torch>=2.11
PYTHON ?= python3
ARGS ?=

empty :=
space := $(empty) $(empty)
VENV := .venv
STAMP := $(VENV)/torch-$(subst $(space),_,$(subst ",,$(subst >,_,$(subst <,_,$(subst =,_,$(TORCH))))))
BIN := $(VENV)/bin

.PHONY: train test install torch clean

train: install
	$(BIN)/python -m bvae.train $(ARGS)

test: install
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder $(ARGS)

install: $(VENV)/installed

torch: $(STAMP)

# Torch comes first and the build uses it as it is: an isolated build would fetch another one and compile against that.
$(STAMP): Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade '$(TORCH)' 'setuptools>=77' wheel ninja pybind11
	touch '$@'

# By a path that type checkers find too: they do not run the import hook of setuptools' other way.
$(VENV)/installed: $(STAMP) pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --config-settings editable_mode=compat --editable '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build bvae/*.so

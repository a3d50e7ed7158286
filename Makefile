# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Packages are installed before embkern, whose extension is built against the torch that is there.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

CPP    := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo test lint format sanitize bench clean

help:
	@echo "make demo      compress a real model, reload it, compare (about two minutes after the set-up)"
	@echo "make test      lint and every test"
	@echo "make lint      ruff, mypy, clang-format"
	@echo "make format    let ruff and clang-format rewrite the sources"
	@echo "make sanitize  the native kernels' tests under AddressSanitizer and UBSan"
	@echo "make bench     the benchmarks, into benchmarks/results"
	@echo "make clean     remove .venv and what was built"

setup: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt embkern/_version.py $(wildcard csrc/*.* csrc/*/*.*)
	@echo "setting up $(VENV) (once; torch is the large part)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip "setuptools>=77" wheel ninja
	@$(PIP) torch numpy
	@PYTHONWARNINGS=ignore $(PIP) --no-build-isolation --editable ".[demo,test,lint]"
	@$(BIN)/embkern env
	@touch $@

demo: $(STAMP)
	@$(BIN)/embkern demo

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(STAMP)
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP)

# A file of tests stays with one process: what its tests share is made once.
test: lint
	@$(BIN)/python -m pytest -n auto --dist loadfile

# The checkout's tests of the native kernels, against a build with AddressSanitizer and UBSan.
sanitize: $(STAMP)
	@EMBKERN_NATIVE=1 EMBKERN_SANITIZE=1 $(BIN)/python setup.py -q build \
	  --build-temp build/sanitize --build-lib build/sanitize/lib
	@rm -rf build/sanitize/lib/tests && cp -r tests pyproject.toml build/sanitize/lib
	@cd build/sanitize/lib && \
	  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(abspath $(BIN))/python -m pytest tests/ops -p no:cacheprovider --capture=sys

bench: $(STAMP)
	@for name in import_time cosine_mse methods direction quality gather_project gather_decode plots; do $(BIN)/python -m benchmarks $$name || exit 1; done

clean:
	rm -rf $(VENV) build demo-output *.egg-info embkern/*.so .pytest_cache .mypy_cache .ruff_cache

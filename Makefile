# Two commands do everything: `make demo` and `make test`. Both set up .venv first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Byte code is compiled when a module is first imported: most of what is installed never is.
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
# A file of tests stays with one process: what its tests share is made once.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile

SOURCES := pyproject.toml setup.py constraints.txt embkern/_version.py
NATIVE  := setup.py $(shell find csrc -type f)
CPP     := $(shell find csrc tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help setup demo test test-slow test-interpreter test-all lint format sanitized sanitize fuzz docs bench sdist clean

help:
	@echo "make demo       compress a real model, reload it, compare (a minute or two after the set-up)"
	@echo "make test       the tests, in minutes"
	@echo "make lint       ruff, mypy, clang-format"
	@echo "make test-all   the tests, and those that take longer: kernels under Triton's interpreter, compiled ahead"
	@echo "                of time and under the CUDA emulator, installs, torchrun, benchmarks, faults"
	@echo "make format     let ruff and clang-format rewrite the sources"
	@echo "make sanitize   the native kernels' tests under AddressSanitizer and UBSan"
	@echo "make fuzz       properties of ops and files on drawn cases, SECONDS=600, under ASan and UBSan"
	@echo "make test-oldest, make test-latest"
	@echo "                the tests with the oldest dependencies that are declared, and with the newest there are"
	@echo "make constraints   pin the newest version of everything that make installs"
	@echo "make docs       the documentation, into build/docs"
	@echo "make bench      the benchmarks, into benchmarks/results"
	@echo "make sdist      the source distribution, into dist"
	@echo "make clean      remove .venv and what was built"

# ---- set-up: what the demo needs first, the rest for those who test or lint ---------------------------------

# The extension is built against the torch that is there, while the other packages are installed.
$(VENV)/.torch: constraints.txt
	@echo "setting up $(VENV) (once; torch is the large part)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --upgrade pip setuptools wheel ninja
	@$(PIP) torch numpy
	@touch $@

$(VENV)/.native: $(VENV)/.torch $(NATIVE)
	@mkdir -p build
	@$(BIN)/python setup.py -q build_ext --inplace > build/native.log || { cat build/native.log; exit 1; }
	@touch $@

$(VENV)/.packages: $(VENV)/.torch $(SOURCES)
	@EMBKERN_NATIVE=0 $(PIP) --no-build-isolation --editable ".[demo]"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch $(NATIVE) $(SOURCES)
	@$(MAKE) --no-print-directory -j2 $(VENV)/.native $(VENV)/.packages
	@$(BIN)/embkern env
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	@EMBKERN_NATIVE=0 $(PIP) --no-build-isolation --editable ".[test]"
	@touch $@

$(VENV)/.lint: $(VENV)/.test
	@EMBKERN_NATIVE=0 $(PIP) --no-build-isolation --editable ".[test,lint]"
	@touch $@

# For the tests of exports, which are slow.
$(VENV)/.interop: $(VENV)/.test
	@EMBKERN_NATIVE=0 $(PIP) --no-build-isolation --editable ".[test,interop]"
	@touch $@

setup: $(VENV)/.test $(VENV)/.lint

# ---- what a user and a contributor run ----------------------------------------------------------------------

demo: $(VENV)/.demo
	@$(BIN)/embkern demo

test: $(VENV)/.test
	@$(PYTEST)

test-slow: $(VENV)/.test $(VENV)/.interop
	@$(PYTEST) -m slow

# Triton decides when it is imported whether kernels are compiled or interpreted.
test-interpreter: $(VENV)/.test
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --dist load tests/triton/interpreter

test-all: test test-slow test-interpreter

lint: $(VENV)/.lint
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.lint
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i $(CPP)

# Tests run against it with LD_PRELOAD: the interpreter itself has no sanitizer.
SANITIZED = cd build/sanitize/lib && \
  LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:quarantine_size_mb=64 \
  UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
  $(abspath $(BIN))/python -m pytest -p no:cacheprovider --capture=sys

sanitized: $(VENV)/.test
	@EMBKERN_NATIVE=1 EMBKERN_SANITIZE=1 $(BIN)/python setup.py -q build \
	  --build-temp build/sanitize --build-lib build/sanitize/lib
	@rm -rf build/sanitize/lib/tests && cp -r tests pyproject.toml build/sanitize/lib

# The checkout's tests of the native kernels, against a build with AddressSanitizer and UBSan.
sanitize: sanitized
	@$(SANITIZED) tests/ops

# Properties of every op and file format on drawn cases, for so many seconds; the case under way is kept in
# build/sanitize/last, since a sanitizer ends the process.
SECONDS ?= 600
fuzz: sanitized
	@export EMBKERN_FUZZ_SECONDS=$(SECONDS) EMBKERN_FUZZ_LAST=$(abspath build/sanitize/last); \
	  $(SANITIZED) tests/fuzz --tb=native || { tr -d '\0' < $(abspath build/sanitize/last) | head -1; exit 1; }

bench: $(VENV)/.test
	@for name in import_time cosine_mse methods direction quality gather_project gather_decode packed_head packed_cross_entropy codes language_models generate plots; do $(BIN)/python -m benchmarks $$name || exit 1; done

$(VENV)/.docs: $(VENV)/.torch $(SOURCES)
	@EMBKERN_NATIVE=0 $(PIP) --no-build-isolation --editable ".[docs]"
	@touch $@

# The notice that is silenced is about a later major version of mkdocs.
docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "build/docs/index.html"

include environments.mk

sdist: $(UV)
	@$(UV) build --quiet --sdist --out-dir dist
	@ls dist/*.tar.gz

clean:
	rm -rf $(VENV) .venv-oldest .venv-latest build dist demo-output *.egg-info embkern/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The environments of the dependencies' bounds. Both test a copy of the checkout in build/, so that neither the
# extension here nor .venv changes. On Linux, PyPI's torch brings CUDA (3 GB); UV_TORCH_BACKEND=cpu takes the
# CPU's from PyTorch's own index.
#
# An interpreter that is found here, else a version for uv to find or download.
python  = $(or $(shell python$(1) -c 'import sys; print(sys.executable)' 2>/dev/null),$(lastword $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python)))
PYTHON_OLDEST ?= $(or $(call python,3.10),3.10)
PYTHON_LATEST ?= $(or $(call python,3.14),$(call python,3.13),$(call python,3.12),3.14)
UV := build/uv/bin/uv

# What results are measured with; `make constraints` takes the newest release of everything else. This torch's
# CUDA build asks for just this triton; transformers 5.21 and later do not support Python 3.10.
PINS  := torch==2.13.0 "transformers==5.23.0; python_version>='3.11'" triton==3.7.1
TOOLS := pip "setuptools>=77" wheel ninja uv

.PHONY: constraints test-oldest test-latest

$(UV):
	@$(PYTHON) -m venv build/uv
	@build/uv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv

# Exact versions of all that `make` installs, on every Python from 3.10 on.
constraints: $(UV)
	@printf '%s\n' $(PINS) > build/pins.txt
	@printf '%s\n' $(TOOLS) | $(UV) pip compile --quiet --upgrade --universal --python-version 3.10 \
	  --python build/uv/bin/python --extra demo --extra test --extra interop --extra lint --extra docs --constraint build/pins.txt \
	  --no-annotate --custom-compile-command "make constraints" --output-file constraints.txt pyproject.toml -

test-oldest: $(UV)
	$(call test_with,oldest,$(PYTHON_OLDEST),--resolution lowest-direct)

test-latest: $(UV)
	$(call test_with,latest,$(PYTHON_LATEST),--upgrade)

# $(call test_with,name,interpreter,how uv resolves): a new environment .venv-name, the extension built in it
# (without CUDA: no test here runs on a device), the fast tests, and the compilation of Triton's kernels, since
# each release has a compiler of its own.
define test_with
@$(UV) venv --quiet --clear --python $(2) .venv-$(1) || \
  { echo "make test-$(1): no such Python; name one: make test-$(1) PYTHON_$(shell echo $(1) | tr a-z A-Z)=/path/to/python"; exit 1; }
@$(UV) pip install --quiet --python .venv-$(1)/bin/python $(3) --requirements pyproject.toml --extra test
@$(UV) pip install --quiet --python .venv-$(1)/bin/python pip "setuptools>=77" wheel ninja
@rm -rf build/$(1) && mkdir -p build/$(1) && git ls-files -z | xargs -0 cp --parents -t build/$(1)
@CUDA_HOME=/none EMBKERN_NATIVE=1 $(UV) pip install --quiet --python .venv-$(1)/bin/python --no-build-isolation --no-deps \
  --editable build/$(1)
@$(UV) pip freeze --quiet --python .venv-$(1)/bin/python --exclude-editable
@.venv-$(1)/bin/embkern env
@cd build/$(1) && ../../.venv-$(1)/bin/python -m pytest -n auto --dist loadfile
@cd build/$(1) && ../../.venv-$(1)/bin/python -m pytest -m slow tests/triton
endef

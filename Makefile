# SPDX-License-Identifier: Apache-2.0
# The menu. `make demo` and `make test` each work alone from a fresh clone with Python, a C++ compiler and make:
# they create .venv, install what requirements.txt pins, build the wheel, install it and run against it.

PYTHON ?= python3
ARGS ?=

TORCH = torch==2.13.0
TIMM = timm==1.0.29
TORCHVISION = torchvision==0.28.0
# Second versions that users have; each lies beside the environment and is put in front of it by PYTHONPATH.
OTHER_TRITON = triton==3.8.0
OTHER_TRANSFORMERS = transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.1 requests==2.32.5 \
    urllib3==2.8.0 certifi==2026.10.18 idna==3.20 charset_normalizer==3.5.2

BIN = .venv/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check --quiet
PACKAGES = .venv/packages-installed
WHEEL = .venv/wheel-installed
OTHERS = .venv/others-installed
SOURCES = CMakeLists.txt LICENSE README.md pyproject.toml \
    $(shell find cmake csrc pylearngene triton_kernels -type f \( -name '*.py' -o -name '*.pyi' -o -name 'py.typed' -o -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake' \))

SANITIZED = $(CURDIR)/build/sanitize/site
WITH_SANITIZERS = OMP_WAIT_POLICY=passive PYTHONPATH=$(SANITIZED) \
    LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
    $(BIN)/pytest --capture=sys -m 'not full' $(ARGS)
OPERATORS = tests/test_expansion.py tests/test_expansion_direct.py tests/test_expansion_conv.py \
    tests/test_expansion_stack.py tests/test_expansion_layer_norm.py tests/test_gene_bank.py

.PHONY: help demo test test-full sanitize lint bench plan wheel clean

help:
	@echo 'make demo    train an ancestry, a learngene and its descendants; ARGS=... for options'
	@echo 'make test    run the tests against the installed wheel; ARGS=... for pytest'
	@echo 'make test-full  run what `make test` leaves out: other versions of packages, several processes, sanitizers'
	@echo 'make sanitize  run the tests of native code with address and undefined behaviour sanitizers'
	@echo 'make lint    ruff, mypy and clang-format'
	@echo 'make bench   run the benchmarks, under 15 minutes; ARGS=... for some: --only forward'
	@echo 'make plan    measure where the regimes of the CPU cross, generate their table'
	@echo 'make wheel   build the wheel into dist/'
	@echo 'make clean   remove what was built; the environment stays'

demo: $(WHEEL)
	$(BIN)/pylearngene demo --install-data $(ARGS)

# Waiting threads sleep: where several processes share the cores, spinning ones slow each other down.
test: $(WHEEL)
	OMP_WAIT_POLICY=passive $(BIN)/pytest tests -m 'not full' $(ARGS)

# The tests marked `full`, then those of the hosts beside the older transformers.
test-full: $(WHEEL) $(OTHERS)
	OMP_WAIT_POLICY=passive $(BIN)/pytest tests -m full $(ARGS)
	OMP_WAIT_POLICY=passive PYTHONPATH=.venv/transformers-4 $(BIN)/pytest tests -m 'hosts' $(ARGS)
	$(MAKE) sanitize

# Every test that calls native code, the operators once per instruction level of torch. Left out is what compiles, runs
# in Triton's interpreter or measures memory. Reports go straight to the terminal, past pytest, and end the run.
sanitize: $(PACKAGES)
	$(PIP) install --no-deps --no-build-isolation --upgrade --target $(SANITIZED) \
	    -C build-dir=build/sanitize/cmake -C cmake.define.PYLEARNGENE_SANITIZE=ON .
	$(WITH_SANITIZERS) $(filter-out %_fallback.py %_distant.py,$(wildcard tests/test_native*.py)) tests/test_sanitize.py
	for level in default avx2 avx512 all; do \
	    if [ $$level = all ]; then unset ATEN_CPU_CAPABILITY; else export ATEN_CPU_CAPABILITY=$$level; fi; \
	    $(WITH_SANITIZERS) $(OPERATORS) -k 'not compil and not fullgraph and not triton and not reference and not peak and not level' \
	        || exit 1; \
	done

# Neither sets anything of OpenMP: speed is judged with the threads that users have.
bench: $(WHEEL)
	$(BIN)/python -P benchmarks/run.py $(ARGS)

plan: $(WHEEL)
	$(BIN)/python -P benchmarks/plan/__main__.py $(ARGS)

lint: $(PACKAGES)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict pylearngene
	$(BIN)/clang-format --dry-run -Werror $$(find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# A module left in the source folder would replace the one that is built.
wheel: $(PACKAGES)
	rm -rf dist pylearngene/_C*.so pylearngene/_cuda*.so
	$(BIN)/python -m build --wheel --no-isolation

# torch comes first and alone, so that nothing else decides its version. timm would pull a torchvision into
# site-packages, which beside a CPU torch fails to import and takes transformers with it; the tests find it elsewhere.
$(PACKAGES): requirements.txt Makefile
	$(PYTHON) -m venv .venv
	$(PIP) install $(TORCH)
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps $(TIMM)
	rm -rf .venv/torchvision-for-tests
	$(PIP) install --no-deps --target .venv/torchvision-for-tests $(TORCHVISION)
	touch $@

$(OTHERS): $(PACKAGES)
	rm -rf .venv/triton-other .venv/transformers-4
	$(PIP) install --no-deps --target .venv/triton-other $(OTHER_TRITON)
	$(PIP) install --no-deps --target .venv/transformers-4 $(OTHER_TRANSFORMERS)
	touch $@

$(WHEEL): $(PACKAGES) $(SOURCES)
	$(MAKE) wheel
	$(PIP) install --force-reinstall --no-deps dist/*.whl
	touch $@

clean:
	rm -rf build dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache $(WHEEL)

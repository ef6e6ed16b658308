# The verbs. Each sets up what it needs by itself; CI runs exactly these.
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt
# So that the first start need not; where there is no compiler they are not needed (it says what that costs).
KERNELS := $(VENV)/bin/diptych kernels build || true
SOURCES := services router kernels loadtest tests

.PHONY: setup run-setup demo up test test-full fuzz sim lint format proto chaos bench-kv bench-fetch bench-cancel \
	bench-transfer bench-routing bench-policies bench-overload bench-index bench-kernels bench-locks bench-gateway \
	bench-templates bench-door bench-cpu bench-processes bench-threads bench-gpu clean

# Everything for development. The stamp makes it run once per change of its inputs. lm-eval (extra `eval`) is
# not compiled: one test imports a tenth of what it brings, and compiling all of it takes most of a minute.
setup: $(VENV)/.setup
$(VENV)/.setup: pyproject.toml constraints.txt
	@test -x $(PY) || python3 -m venv $(VENV)
	@echo "installing the tested set of packages (first time: a few minutes)"
	@$(PIP) "torch==2.13.0" && $(PIP) -e ".[worker,nixl,dev]" && $(PIP) --no-compile lm-eval
	@$(KERNELS)
	@touch $@ $(VENV)/.run-setup

# What running needs and no more.
run-setup: $(VENV)/.run-setup
$(VENV)/.run-setup: pyproject.toml constraints.txt
	@test -x $(PY) || python3 -m venv $(VENV)
	@echo "installing what running needs (first time: a few minutes)"
	@$(PIP) "torch==2.13.0" && $(PIP) -e ".[worker]"
	@$(KERNELS)
	@touch $@

demo: run-setup
	@$(VENV)/bin/diptych demo

up: run-setup
	@exec $(VENV)/bin/diptych up

test: setup
	@$(PY) -m pytest -m "not full"

# All 60 exactness prompts and the other full-size proofs (about 20 minutes on two cores).
test-full: setup
	@$(PY) -m pytest

# Anything at the ports between gateways and workers (EXAMPLES=2000), and they go on serving.
fuzz: setup
	@FUZZ_EXAMPLES=$(or $(EXAMPLES),2000) $(PY) -m pytest tests/fuzz

# Whole clusters on virtual time, with faults: SEEDS=N runs N of them, SEED=N repeats one with its log.
sim: setup
	@$(PY) -m tests.sim $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),1000) --processes $$(nproc))

lint: setup
	@$(VENV)/bin/ruff check $(SOURCES)
	@$(VENV)/bin/ruff format --check $(SOURCES)
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-cache
	@$(PY) -m services.wire.generate --check

format: setup
	@$(VENV)/bin/ruff check --fix $(SOURCES)
	@$(VENV)/bin/ruff format $(SOURCES)

proto: setup
	@$(PY) -m services.wire.generate

# Parts of a real cluster are killed, stopped and drained under load (SECONDS=600, SEED=1,
# TRANSPORTS=grpc: KV over gRPC alone, also where NIXL is installed).
chaos: setup
	@$(PY) -m tests.chaos --seconds $(or $(SECONDS),600) --seed $(or $(SEED),1) --json chaos.json \
		$(if $(TRANSPORTS),--transports $(TRANSPORTS))

# The share of allocated KV slots that hold no token, on real request lengths (LENGTHS=file.csv).
bench-kv: setup
	@$(PY) -m tests.bench.kv_waste $(if $(LENGTHS),--lengths $(LENGTHS))

# A cached prefix fetched from another worker, against computing it.
bench-fetch: setup
	@$(PY) -m tests.bench.prefix_fetch

# From a client's hanging up to the last block freed on both workers.
bench-cancel: setup
	@$(PY) -m tests.bench.cancel

# How fast KV moves between two processes, beside what memory, sockets, gRPC and NIXL themselves can do.
bench-transfer: setup
	@$(PY) -m tests.bench.transfer $(if $(QUICK),--quick)

# All routing policies over real request traces, in virtual time (QUICK=1: under three minutes, DATA=folder
# of the traces, JSON=file). Steps take measured times: `python -m tests.bench.routing.measure`.
bench-routing: setup
	@$(PY) -m tests.bench.routing $(if $(QUICK),--quick) $(if $(DATA),--data $(DATA)) $(if $(JSON),--json $(JSON))

# Policies on a real cluster of four workers: the same requests, one policy after the other (QUICK=1, FETCH=no).
bench-policies: setup
	@$(PY) -m tests.bench.policies $(if $(QUICK),--quick) $(if $(filter no,$(FETCH)),--no-fetch)

# Open-loop load of several API keys and priorities at 0.5 to 3 times what a real cluster can do (QUICK=1).
bench-overload: setup
	@$(PY) -m tests.bench.overload $(if $(QUICK),--quick)

# Look-ups in the prefix index with a million blocks in it, beside PING and the layout before (QUICK=1).
bench-index: setup
	@$(PY) -m tests.bench.index $(if $(QUICK),--quick)

# Chat templates rendered in a process of their own beside rendering them here, hostile ones too.
bench-templates: setup
	@$(PY) -m tests.bench.templates

# What one gateway process can do, and what it adds to every token: real gateway and gRPC, workers without a
# model (QUICK=1; ARGS="--only stream --concurrency 64 --workers 2+2 --gateway probe").
bench-gateway: setup
	@$(PY) -m tests.bench.gateway $(if $(QUICK),--quick) $(ARGS)

# What an API key and its limits cost a request, beside a bare round trip to Redis.
bench-door: setup
	@$(PY) -m tests.bench.door

# The C++ kernels with weights of 4 and 8 bits beside torch in float32: rates, steps and quality
# (PART=linear|attention|sampling|steps|quality, THREADS=1, LEVEL=avx512_vnni|avx_vnni|avx2|plain for the rates).
bench-kernels: setup
	@$(PY) -m tests.bench.kernels --threads $(or $(THREADS),1) $(if $(PART),--part $(PART)) \
	  $(if $(LEVEL),--level $(LEVEL))

# A step with one and two threads, and workers that share a machine's cores in several ways (PART=steps|workers)
bench-threads: setup
	@$(PY) -m tests.bench.threads $(if $(PART),--part $(PART))

# Whole servers side by side: Diptych, llama.cpp, vLLM, transformers; peers are installed and built on first use
# (QUICK=1, ONLY=diptych,llama.cpp,vllm,transformers, SHAPE=256x64, CONCURRENCY=1,8, ARGS="--resume|--render").
bench-cpu: setup
	@$(PIP) matplotlib
	@$(PY) -m tests.bench.cpu $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY)) $(if $(SHAPE),--shapes $(SHAPE)) \
		$(if $(CONCURRENCY),--concurrency $(CONCURRENCY)) $(ARGS)

# Steps of the torch path on a GPU, as it is and compiled (ARGS="--dtype float32").
bench-gpu: setup
	@$(PY) -m tests.bench.gpu $(ARGS)

# Processor time of each process of a whole server, for each token (LAYOUT=1+1|both, SHAPE=256x64, CONCURRENCY=1,8).
bench-processes: setup
	@$(PY) -m tests.bench.processes $(if $(LAYOUT),--layout $(LAYOUT)) $(if $(SHAPE),--shape $(SHAPE)) \
		$(if $(CONCURRENCY),--concurrency $(CONCURRENCY))

# A call and a transfer of KV with a token and with mutual TLS, beside neither (QUICK=1).
bench-locks: setup
	@$(PY) -m tests.bench.locks $(if $(QUICK),--quick)

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache *.egg-info

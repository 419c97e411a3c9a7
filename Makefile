# Everything a person at a shell needs. `make demo` and `make test` work from a fresh clone.

PYTHON      ?= python3
# cpu or gpu: which ONNX Runtime is installed, and for what is exported; default: what this machine has
ACCELERATOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
CHECKPOINT  ?=# a folder in diffusers' layout, or a hub id such as cvssp/audioldm2; default: what was exported last, else the demo's
REPOSITORY  ?= model_repository
PROMPT      ?= a dog barking in the rain
OUTPUT      ?= .demo/audio.wav
HTTP_PORT   ?= 8000
GRPC_PORT   ?= 8001
METRICS_PORT ?= 8002

VENV      := .venv
BIN       := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(ACCELERATOR)
CHROMIUM  := $(VENV)/chromium/chromium
PROMETHEUS := $(VENV)/prometheus/promtool
# What people write goes to the commands through their environment: a quote or a dollar sign in it is only that.
override CHECKPOINT := $(value CHECKPOINT)
override REPOSITORY := $(value REPOSITORY)
override PROMPT     := $(value PROMPT)
override OUTPUT     := $(value OUTPUT)
export CHECKPOINT REPOSITORY PROMPT OUTPUT

.PHONY: demo serve export check test test-lowest bench bench-gpu perf parity lint format wheel lock clean help

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: export ## Generate one WAV file through an embedded Triton (PROMPT, CHECKPOINT, OUTPUT)
	$(BIN)/python -m server.demo --model-repository="$$REPOSITORY" --output="$$OUTPUT" -- "$$PROMPT"

serve: export ## Run an embedded Triton in the foreground (CHECKPOINT, HTTP_PORT, GRPC_PORT, METRICS_PORT)
	exec $(BIN)/python -m server --model-repository="$$REPOSITORY" \
		--http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --metrics-port $(METRICS_PORT)

export: $(INSTALLED) ## Export CHECKPOINT, unless it was exported last
	@$(BIN)/python -m export.provide --output="$$REPOSITORY" --checkpoint="$$CHECKPOINT" --target=$(ACCELERATOR)

# Two processes with a thread each. Servers get the machine for themselves: Triton 2.51 aborts where the process of a
# model is kept from running for about a second, and with two processes full of tests it did.
WITHOUT_SERVER := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --durations=10 -m

check: lint ## Check style, types and what can be tested in a minute
	$(WITHOUT_SERVER) "not server and not slow"

test: $(INSTALLED) $(CHROMIUM) $(PROMETHEUS) ## Run the whole test suite
	$(WITHOUT_SERVER) "not server"
	$(BIN)/python -m pytest -m server --durations=20

# The lowest versions lie before those of the project's environment, which has everything else that the tests need.
LOWEST       := .test/lowest
LOWEST_TESTS := $(addprefix tests/client/test_client_,$(addsuffix .py,wire errors flow gateways network tls request result async generation))
SITE_PACKAGES = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'

test-lowest: $(INSTALLED) ## Run the client's tests with the lowest versions of its dependencies that it allows
	$(PYTHON) -m venv --clear $(LOWEST)
	$(LOWEST)/bin/pip install --quiet --disable-pip-version-check -r requirements/client-lowest.txt
	$(BIN)/python $(SITE_PACKAGES) > "$$($(LOWEST)/bin/python $(SITE_PACKAGES))/rest.pth"
	PYTHONPATH="$(CURDIR)/client/src" $(LOWEST)/bin/python -m pytest --confcutdir=tests/client $(LOWEST_TESTS)

bench: $(INSTALLED) $(CHROMIUM) ## Measure, and write docs/benchmarks.md (three hours)
	$(BIN)/python -m benchmarks.latency --size demo --length 2.56 --repeats 9 --precisions fp32
	$(BIN)/python -m benchmarks.latency --size full
	$(BIN)/python -m benchmarks.load
	$(BIN)/python -m benchmarks.load --requests 128 --long
	$(BIN)/python -m benchmarks.overload
	$(BIN)/python -m benchmarks.soak --minutes 30
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.startup
	$(BIN)/python -m benchmarks.cache
	$(BIN)/python -m benchmarks.cancel
	$(BIN)/python -m benchmarks.front
	$(BIN)/python -m benchmarks.faults
	$(BIN)/python -m benchmarks.knobs
	$(BIN)/python -m benchmarks.neighbour
	$(BIN)/python -m benchmarks.precision
	$(BIN)/python -m benchmarks.denoising
	$(BIN)/python -m benchmarks.unet --dtype fp32 --steps 5 --name unet_cpu_fp32
	$(BIN)/python -m benchmarks.unet --dtype bf16 --steps 5 --name unet_cpu_bf16
	$(BIN)/python -m benchmarks.stages --dtype bf16

bench-gpu: $(INSTALLED) ## Measure a GPU, into .demo/gpu (ten minutes, ACCELERATOR=gpu)
	$(BIN)/python -m benchmarks.gpu --output .demo/gpu

perf: $(INSTALLED) ## Fetch Triton's perf_analyzer and load an embedded server over gRPC and HTTP (ten minutes)
	$(BIN)/python -m benchmarks.perf_analyzer

parity: $(INSTALLED) ## Measure the agreement with diffusers and write docs/parity.md
	$(BIN)/python -m benchmarks.parity

lint: $(INSTALLED) ## Check style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@# Triton wants every adapter to be a module named `model`, and mypy takes a module's name once.
	for adapter in model_repository/*/1/model.py server/backends/onnxruntime/model.py; do \
		$(BIN)/mypy "$$adapter" || exit 1; \
	done

format: $(INSTALLED) ## Rewrite the code in the project's style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

wheel: $(INSTALLED) ## Build the client's wheel and source distribution into dist/
	cd client && "$(CURDIR)/$(BIN)/python" -m hatchling build --directory ../dist

lock: $(INSTALLED) ## Write the versions of all installed packages to requirements/constraints.txt
	$(BIN)/python -m pip list --format=freeze --exclude-editable --exclude pip --exclude setuptools \
		| sed 's/+cpu$$//' | grep -viE '^(nvidia-cu|cuda|triton=|onnxruntime)' > requirements/constraints.txt

clean: ## Remove everything that was made here
	rm -rf $(VENV) .demo .test
	git clean -fdXq -- "$$REPOSITORY"

$(INSTALLED): requirements/*.txt client/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "Python 3.11 or 3.12 is needed, and $(PYTHON) is %d.%d: run make with PYTHON=python3.11" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-r requirements/$(ACCELERATOR).txt -r requirements/dev.txt -c requirements/constraints.txt -e ./client
	@rm -f $(VENV)/.installed-* && touch $@

# Where it can't be had, the tests of the page are skipped, and say so.
$(CHROMIUM): tests/helpers/chromium.py | $(INSTALLED)
	-$(BIN)/python tests/helpers/chromium.py $(@D)

# Where it can't be had, the tests of the alerts and the dashboard are skipped, and say so.
$(PROMETHEUS): tests/helpers/prometheus.py | $(INSTALLED)
	-$(BIN)/python tests/helpers/prometheus.py $(@D)

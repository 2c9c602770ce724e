# make demo   a synthetic data set, trained, evaluated, registered, drawn (4 to 8 minutes on 2 cores)
# make test   linters and the tests every change must pass
# make test-all   the long matrices too
# make wheel  the package as dist/*.whl
# make coverage   the same tests as `make test`, with the branch coverage of every file at the end
# Another Python needs a folder of its own: make PYTHON=python3.13 VENV=.venv-3.13 test
PYTHON ?= python3.11
VENV ?= .venv
TESTS ?= tests
# As many processes as processors, at most four: each holds torch, and one of them a Ray.
PARALLEL ?= -n logical --maxprocesses 4 --dist loadscope --no-loadscope-reorder
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
export MLFLOW_DISABLE_TELEMETRY := true
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: install op demo lint test test-all coverage wheel clean

install: $(VENV)/.installed

# Two steps, because DeepSpeed's own build imports torch and so cannot run isolated from it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) setuptools wheel ninja torch torchvision
	$(PIP) --no-build-isolation -e '.[dev]'
	touch $@

op: install
	$(BIN)/python -m pipeline.csrc.build

demo: op
	$(BIN)/python -m jobs.demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

test: lint op
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" $(TESTS)

test-all: lint op
	$(BIN)/python -m pytest -m "not gpu" --hypothesis-profile=new

# The table comes also when a test fails.
coverage: op
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(PARALLEL) -m "not slow and not gpu" $(TESTS); status=$$?; \
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report && exit $$status

# Without the last build's folder: files that were moved since would come along.
wheel: install
	rm -rf build
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) runs build dist *.egg-info

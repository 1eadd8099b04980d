PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Groups of files (tests/conftest.py) in their order, which begins with the longest.
SIDE_BY_SIDE := --numprocesses auto --maxprocesses 4 --dist loadscope --no-loadscope-reorder

.PHONY: setup demo test team-test slow-test check fix ui clean bench workloads operating-curve kill-trials

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(shell command -v $(PYTHON) || command -v python3) -m venv "$(VENV)"
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools
	"$(BIN)/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch "$(STAMP)"

demo: setup
	"$(BIN)/jetway" run digits

test: setup
	"$(BIN)/python" -m pytest $(SIDE_BY_SIDE) -m "not serial and not slow and not team and not gpu and not device"
	"$(BIN)/python" -m pytest -m "serial and not slow and not team and not gpu and not device"

team-test: setup
	"$(BIN)/python" -m pytest $(SIDE_BY_SIDE) -m "team and not serial and not slow"
	"$(BIN)/python" -m pytest -m "team and serial and not slow"

slow-test: setup
	"$(BIN)/python" -m pytest -m slow

# mypy looks the packages up through a link, because their import names start with "jetway."
check: setup
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	mkdir -p "$(VENV)/typing" && ln -sfn ../.. "$(VENV)/typing/jetway"
	MYPYPATH="$(VENV)/typing" "$(BIN)/mypy" -p jetway.configs -p jetway.data -p jetway.flows -p jetway.tasks
	"$(BIN)/vermin" --quiet --no-tips --violations --target=3.6- tasks/on_device tasks/package_files

fix: setup
	"$(BIN)/ruff" check --fix .
	"$(BIN)/ruff" format .

ui: setup
	"$(BIN)/jetway" ui

bench: setup
	"$(BIN)/python" tests/benchmarks/upload.py

workloads: setup
	"$(BIN)/python" tests/benchmarks/workloads.py

operating-curve: setup
	mkdir -p .jetway
	"$(BIN)/python" tests/benchmarks/operating_curve.py .jetway/operating_curve.jsonl --chart .github/operating-curve.png

# JETWAY_KILL_TRIALS=60 make kill-trials: an hour
kill-trials: setup
	JETWAY_KILL_TRIALS=$${JETWAY_KILL_TRIALS:-60} "$(BIN)/python" -m pytest -m team tests/integration/test_kill_trials.py

clean:
	if [ -x "$(BIN)/jetway" ]; then "$(BIN)/jetway" stop; fi
	rm -rf "$(VENV)" .jetway .mypy_cache .pytest_cache .ruff_cache build *.egg-info

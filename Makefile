# Everything runs in a virtual environment of its own; PYTHON says which Python makes it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# Without a GPU the CPU build of torch is enough, and smaller by gigabytes, where pip can find it
TORCH = torch==2.13.0

.PHONY: demo test install pytest campaign docs figures type lint format check-codestyle commit-checks

demo: install
	$(BIN)/python examples/pendulum.py

test: install pytest

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --upgrade pip  # that of Python 3.10 does not find versions that go together
	if command -v nvidia-smi > /dev/null; then $(BIN)/pip install "$(TORCH)"; \
	else $(BIN)/pip install "$(TORCH)+cpu" || $(BIN)/pip install "$(TORCH)"; fi
	$(BIN)/pip install -e ".[mujoco,tests]"
	touch $(VENV)/installed

pytest:
	$(BIN)/python -m pytest --numprocesses 2 --dist loadgroup --cov

# Each part ends with status 1 if it finds a fault
campaign: install
	$(BIN)/python -W ignore tests/sb3/test_fuzz.py --cases 10000 --jobs 2
	$(BIN)/python -W ignore tests/sb3/kills.py --kills 200 --inside 100
	$(BIN)/python benchmarks/memory.py --gradient-steps 15000

docs: install
	$(BIN)/pip install --quiet -e ".[docs]"
	$(BIN)/mkdocs build --strict

# The figures of README and docs, from the files in benchmarks/results/
figures: install
	$(BIN)/python benchmarks/bandit.py --report-only
	$(BIN)/python benchmarks/tracking.py --report-only
	$(BIN)/python benchmarks/speed.py --report-only
	$(BIN)/python benchmarks/exploration.py --report-only
	$(BIN)/python benchmarks/fork_episodes.py --report-only
	$(BIN)/python benchmarks/returns.py --report-only --steps 100000 --env HalfCheetah-v5 Hopper-v5 Walker2d-v5 Ant-v5 Humanoid-v5 \
		--algos DQS CrossQ SAC-1e-3 SAC TQC
	cp benchmarks/results/returns/curves_HalfCheetah-v5_Hopper-v5_Walker2d-v5_Ant-v5_Humanoid-v5_100000.png docs/returns.png
	$(BIN)/python benchmarks/returns.py --report-only --steps 1000000 --env HalfCheetah-v5 Ant-v5 --algos DQS SAC-1e-3 --seeds 0 --tag=-8envs
	cp benchmarks/results/returns/curves_HalfCheetah-v5_Ant-v5-8envs_1000000.png docs/returns_8envs.png
	cd benchmarks/results && cp bandit.png tracking.png speed.png exploration.png fork.gif ../../docs/

type:
	$(BIN)/mypy

lint:
	$(BIN)/ruff check .

check-codestyle:
	$(BIN)/ruff format --check .

format:
	$(BIN)/ruff check --select I --fix .
	$(BIN)/ruff format .

type lint check-codestyle format: install

commit-checks: format type lint

# make demo | make test | make test-wheel | make clean. PYTHON=python3.12 picks the interpreter of the environment.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help .venv demo docs test test-gpu bench-gpu test-wheel test-image-reward clean

help:
	@echo "make demo    teacher, one-step student and RL on real digits, on the CPU; ends with a table and a report"
	@echo "make test    ruff, codespell, mypy and the tests"
	@echo "make test-gpu    the tests that need a GPU"
	@echo "make bench-gpu   the tables of docs/benchmarks.md on a GPU: base, large and huge in bf16, as text and JSON"
	@echo "make docs    the documentation as a site, in build/docs; a warning is an error"
	@echo "make test-wheel   a wheel in a fresh environment and an empty folder: its recipes, its rewards, the demo"
	@echo "make test-image-reward   ours against the package image-reward, in an environment that it builds (4 GB)"
	@echo "make .venv   the environment only: .venv, with the versions in constraints.txt"
	@echo "make clean   remove .venv and the caches (runs/ stays)"

.venv: $(BIN)/.installed

# A stamp, not the folder, says that the installation succeeded: one that was interrupted is repeated.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $@

demo: .venv
	$(BIN)/marval-rl demo

test: .venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder  # two processes: a file stays in one

test-gpu: .venv
	$(BIN)/python -m pytest -q -m gpu tests/parity/test_gpu.py tests/test_noise.py

bench-gpu: .venv
	mkdir -p build
	for size in base large huge; do \
	  $(BIN)/marval-rl bench --model_size $$size --steps 64 --guidance_scale 2.9 --dtype bfloat16 \
	    --batch_sizes 1 16 128 --compile --growth --no_baseline --output build/bench_$$size.json || exit 1; \
	done
	$(BIN)/marval-rl bench --model_size base --steps 64 --guidance_scale 2.9 --batch_sizes 1 --repeats 1
	$(BIN)/marval-rl bench --model_size base --steps 8 --dtype bfloat16 --batch_sizes 16 --no_baseline --trainers --throughput \
	  --output build/bench_trainers.json

docs: .venv
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

test-wheel: .venv
	$(BIN)/python -m pytest -q -m wheel tests/test_packaging.py

test-image-reward: .venv
	$(BIN)/python -m pytest -s -m image_reward_environment tests/test_image_reward_environment.py

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

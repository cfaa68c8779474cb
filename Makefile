# The project's commands. `make run` and `make test` need Python 3.11+, git and make, and fetch everything else.
PYTHON ?= python3
MODEL ?= smollm2
PROMPT ?= Why is the sea salty? Answer in one sentence.
PYTEST_ARGS ?=
PIER = .venv/bin/pier

.PHONY: run test test-engines test-gpu cover check format docs bench setup clean

run: setup ## set everything up and let a real model answer
	$(PIER) run $(MODEL) "$(PROMPT)"

test: setup ## every test; as root also on an own Docker Engine and registry
	scripts/test $(PYTEST_ARGS)

test-engines: setup ## the engines that have an environment of their own: vLLM, Triton, OpenVINO …
	scripts/test-engines $(PYTEST_ARGS)

test-gpu: setup ## what needs an NVIDIA GPU; elsewhere skipped, and said
	PIERHEAD_RUNTIME__ENVIRONMENTS="$${PIERHEAD_RUNTIME__ENVIRONMENTS:-$$PWD/.cache/engines}" \
	.venv/bin/python -m pytest -m gpu tests/gpu $(PYTEST_ARGS)

cover: setup ## every test, with branch coverage
	scripts/test --cov --cov-report=term:skip-covered $(PYTEST_ARGS)

check: setup ## formatting, lint and types
	.venv/bin/ruff format --check src tests bench
	.venv/bin/ruff check src tests bench
	.venv/bin/pyright

format: setup ## mend what can be mended by itself
	.venv/bin/ruff check --fix-only --quiet src tests bench
	.venv/bin/ruff format src tests bench

docs: setup ## the documentation as a web site in site/
	.venv/bin/python scripts/reference docs/reference
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet

bench: setup ## every figure, side by side with its peers; takes about half an hour
	for script in bench/cli.py bench/coldstart.py bench/container.py bench/transfer.py bench/gateway.py bench/balancing.py bench/onnx.py; do .venv/bin/python $$script; done

setup: .venv/.ready

.venv/.ready: uv.lock pyproject.toml scripts/bootstrap
	@$(PYTHON) scripts/bootstrap
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis site

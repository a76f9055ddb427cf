# The commands of this project; `make help` lists them. Everything runs in .venv, which `make install` fills.
MODEL ?= scripts/demo_checkpoint/demo-gpt2
NAME ?= $(firstword $(subst @, ,$(notdir $(MODEL))))
PYTHON ?= python3
VENV := .venv
IN_VENV := $(VENV)/bin/python

.PHONY: help install demo serve test lint format clean
.DEFAULT_GOAL := help

help: ## list the commands
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

install: $(VENV)/.installed ## make .venv with everything (1.9 GB)

# pip 25.1 is the first that reads dependency groups.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(IN_VENV) -m pip install --quiet --upgrade 'pip>=25.1'
	$(IN_VENV) -m pip install --quiet --constraint constraints.txt --group test --group lint
	touch $@

demo: install ## checkpoint -> engine -> server -> answers, on the CPU
	$(IN_VENV) scripts/demo.py

serve: install ## build and serve a model: make serve MODEL=gpt2
	$(IN_VENV) build/engines.py --model $(MODEL) --served-name $(NAME) --output out/$(NAME)
	exec $(IN_VENV) scripts/serve.py out/$(NAME)

test: install ## the whole test suite
	$(IN_VENV) -m pytest

lint: install ## check code style
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .

format: install ## mend code style
	$(IN_VENV) -m ruff check --fix .
	$(IN_VENV) -m ruff format .

clean: ## remove .venv and what was built into out/
	rm -rf $(VENV) out

# The commands of this project; `make help` lists them. Everything runs in .venv, which `make install` fills.
MODEL ?= scripts/demo_checkpoint/demo-gpt2
NAME ?= $(firstword $(subst @, ,$(notdir $(MODEL))))
PYTHON ?= python3
VENV := .venv
IN_VENV := $(VENV)/bin/python
IMAGES ?= server-cpu builder client
IMAGE_TAG ?= dev
IMAGE_BUILD ?= docker build

.PHONY: help install demo serve load images test bench fuzz soak lint format clean
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

load: install ## put a load on a running server: make load ARGS="--concurrency 8 --duration 30s"
	$(IN_VENV) clients/load.py $(ARGS)

images: $(IMAGES:%=image-%) ## build triton-trtllm/{server-cpu,builder,client}:dev; IMAGES=server is for NVIDIA GPUs

# IMAGE_BUILD="buildah bud" does as well; IMAGE_ARGS are more options of the builder, such as "--network host".
image-%:
	$(IMAGE_BUILD) --file containerfiles/$*.Containerfile --tag triton-trtllm/$*:$(IMAGE_TAG) \
		--build-arg PIP_INDEX_URL --build-arg PIP_EXTRA_INDEX_URL \
		--build-arg VERSION=$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml) \
		--build-arg REVISION=$(or $(shell git describe --match= --always --dirty --abbrev=40 2>/dev/null),unknown) $(IMAGE_ARGS) .

test: install ## the whole test suite
	$(IN_VENV) -m pytest

bench: install ## measure this machine, 10 minutes: table, JSON and picture in out/bench
	$(IN_VENV) scripts/bench.py $(ARGS)

fuzz: install ## 12,000 odd requests to a real server
	FUZZ_EXAMPLES=12000 $(IN_VENV) -m pytest tests/server/test_fuzz.py

soak: install ## 20,000 requests, twice; memory and slots before and after
	SOAK_REQUESTS=20000 $(IN_VENV) -m pytest -s tests/server/test_soak.py

lint: install ## check code style
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .

format: install ## mend code style
	$(IN_VENV) -m ruff check --fix .
	$(IN_VENV) -m ruff format .

clean: ## remove .venv and what was built into out/
	rm -rf $(VENV) out

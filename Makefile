# The commands of this project; `make help` lists them. Everything runs in .venv, which `make install` fills.
MODEL ?= scripts/demo_checkpoint/demo-gpt2
NAME ?= $(firstword $(subst @, ,$(notdir $(MODEL))))
PYTHON ?= python3
VENV := .venv
IN_VENV := $(VENV)/bin/python
IMAGES ?= server-cpu builder client
IMAGE_TAG ?= dev
IMAGE_BUILD ?= docker build

.PHONY: help install demo serve load images image-demo chart test cluster-images test-cluster drain autoscaling bench fuzz soak lint format clean
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

# CLUSTER_LOAD reads an archive of `docker save`: "kind load image-archive /dev/stdin", "../shared/k8s/cluster load -".
CLUSTER_LOAD ?= kind load image-archive /dev/stdin
CLUSTER_IMAGES := $(IMAGES:%=triton-trtllm/%:$(IMAGE_TAG)) triton-trtllm/server-demo:$(IMAGE_TAG)

chart: install ## write what chart/ holds of monitoring/ and scripts/, and the golden files of its tests
	cp monitoring/rules.yaml monitoring/alerts.yaml monitoring/kubernetes.yaml chart/files/
	$(IN_VENV) scripts/dashboard.py chart/files/dashboard.json
	PYTHONPATH=tests/chart $(IN_VENV) tests/chart/rendering.py

image-demo: ## the CPU server with the demo's engine baked in
	$(IN_VENV) build/engines.py --model scripts/demo_checkpoint/demo-gpt2 --engine openvino --output out/image/demo-gpt2
	docker build --file containerfiles/server-cpu.Containerfile --tag triton-trtllm/server-demo:$(IMAGE_TAG) \
		--build-arg REPOSITORIES=out/image --build-arg PIP_INDEX_URL --build-arg PIP_EXTRA_INDEX_URL $(IMAGE_ARGS) .

cluster-images: install images image-demo ## build the images and load them onto the cluster's nodes
	docker save $(CLUSTER_IMAGES) | $(CLUSTER_LOAD)

test-cluster: cluster-images ## the chart on the cluster of KUBECONFIG, in namespaces of its own, half an hour; ARGS="-m 'not figures'": less
	TEST_KUBECONFIG=$(KUBECONFIG) TEST_IMAGE_TAG=$(IMAGE_TAG) $(IN_VENV) -m pytest -s tests/cluster $(ARGS)

drain: ## 100 scale-downs, rolling updates and kubectl drains under load; after test-cluster, whose images it uses
	DRAIN_OPERATIONS=100 TEST_KUBECONFIG=$(KUBECONFIG) TEST_IMAGE_TAG=$(IMAGE_TAG) \
		$(IN_VENV) -m pytest -s tests/cluster/test_drain.py -k no_answer

autoscaling: install ## record what the autoscaler on the cluster of KUBECONFIG does; after test-cluster, whose images it uses
	$(IN_VENV) scripts/record_autoscaling.py --tag $(IMAGE_TAG) $(ARGS)

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

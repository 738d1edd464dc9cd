# make serve [ENGINE=sglang]   serve a real model in NVFP4 and compare it with BF16
# make test                    set up both engines and run every test
# make lint                    ruff and pyright on the installed package

ENGINE ?= vllm
PORT ?= 8000
SETUP = python3 common/demo/environment.py
PYTEST = -m pytest -p no:cacheprovider --timeout 1500 --durations 25

.PHONY: serve test test-vllm test-sglang lint clean

serve:
	$(SETUP) $(ENGINE)
	.envs/$(ENGINE)/bin/python -m fourfold.common.demo.serve --port $(PORT)

test: test-vllm test-sglang

test-vllm:
	$(SETUP) vllm vllm-0.33.0
	.envs/vllm/bin/python $(PYTEST) tests/common tests/recipes tests/vllm

test-sglang:
	$(SETUP) sglang
	.envs/sglang/bin/python $(PYTEST) tests/sglang

lint:
	$(SETUP) vllm
	.envs/vllm/bin/ruff format --check .
	.envs/vllm/bin/ruff check .
	.envs/vllm/bin/pyright --pythonpath .envs/vllm/bin/python

clean:
	rm -rf .envs

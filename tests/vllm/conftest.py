"""Tests for an environment with vLLM, which `make test-vllm` makes: it pins other versions than qdense is developed with."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["*"]

"""Settings under which vLLM runs on a processor; without vLLM nothing here is collected."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None
if HAS_VLLM:
    # Before vLLM is imported, which reads them then. Not without it: other tests compile.
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other tests may run beside these
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
    }
sys.path.insert(0, str(Path(__file__).parent))


def let_triton_interpret():
    """vLLM's second model runner needs Triton, which runs without a GPU if it interprets: vLLM is told of a backend."""
    from triton.backends import backends
    from triton.runtime.interpreter import InterpreterBuilder

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def as_bool(mask):
        # Compiled, any number is a mask; the interpreter wants truth values.
        mask.data = mask.data.astype(bool)
        return mask

    InterpreterBuilder.create_masked_load = lambda self, at, mask, *rest: load(self, at, as_bool(mask), *rest)
    InterpreterBuilder.create_masked_store = lambda self, at, value, mask, *rest: store(
        self, at, value, as_bool(mask), *rest
    )
    from vllm.v1.sample.ops import topk_topp_sampler

    # Stock top-k and top-p, of requests that opt out, in PyTorch: their kernel is not one that can be interpreted.
    topk_topp_sampler.HAS_TRITON = False


# TRITON_INTERPRET has to be set from outside: Triton reads it as it is imported, which other tests' files have done.
if HAS_VLLM and os.environ.get("TRITON_INTERPRET") == "1":
    let_triton_interpret()

collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]


@pytest.fixture(scope="module")
def base():
    from hf_adaptive_decode.testbed import load_base_model  # torch reads the settings above as it is imported

    return load_base_model()


@pytest.fixture(scope="module")
def tokenizer():
    from hf_adaptive_decode.testbed import load_tokenizer

    return load_tokenizer()

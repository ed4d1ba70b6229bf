"""Settings under which vLLM runs on a processor; without vLLM nothing here is collected."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import SimpleNamespace

# Before vLLM is imported, which reads them then.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
}
sys.path.insert(0, str(Path(__file__).parent))


def let_triton_interpret():
    """vLLM's second model runner needs Triton, which runs without a GPU if it interprets: vLLM is told of a backend."""
    os.environ |= {"TRITON_INTERPRET": "1"}
    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)


if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
    let_triton_interpret()

collect_ignore_glob = [] if importlib.util.find_spec("vllm") else ["test_*.py"]

"""Starts vLLM on a transformers model's base, with the plugin, and writes policies for it; knows no request."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..adapters import config_for
from ..configuration import AutoDecoConfig
from ..errors import MissingExtraError
from ..hub.store import save_adapter
from ..policies import DecodingPolicy, build_policy
from ..policies.action_policy import ActionPolicy

# In this process vLLM starts sooner, and schedules the same requests in the same way.
_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def start(model: PreTrainedModel, folder: str, batch_rows: int | None, options: Mapping[str, Any]) -> Any:
    """
    A `vllm.LLM` with the base of `model`, whose plugin serves plain sampling until it is given a policy.

    Args:
        model ([`~transformers.PreTrainedModel`]): Says where its base lies, and in which dtype.
        folder (`str`): For files.
        batch_rows (`int`, *optional*): Most sequences decoded at once.
        options (mapping): For `vllm.LLM`.

    Raises:
        [`MissingExtraError`]: If vLLM is not installed.
    """
    try:
        from vllm import LLM
    except ImportError as error:
        raise MissingExtraError("vllm", "vllm") from error
    plain = build_policy(config_for(model, AutoDecoConfig(policy="static", actions=[{"temperature": 1.0}])))
    settings: dict[str, Any] = {
        "dtype": str(model.dtype).removeprefix("torch."),
        "skip_tokenizer_init": True,
        "distributed_executor_backend": "uni" if options.get("tensor_parallel_size", 1) == 1 else None,
        "seed": 0,
    }
    if batch_rows is not None:
        settings["max_num_seqs"] = batch_rows
    if model.device.type == "cpu":
        # A request's own seed and prompts read in parts do not go together on CPUs.
        settings |= {"enforce_eager": True, "enable_chunked_prefill": False}
    else:
        settings["gpu_memory_utilization"] = 0.45
    with _environment(_IN_PROCESS):
        return LLM(model=save_served(model, plain, folder), **(settings | dict(options)))


def save_served(model: PreTrainedModel, policy: DecodingPolicy, folder: str) -> str:
    """Writes a policy as it is now, as an adapter of the model's base; returns the adapter's folder."""
    config = copy.deepcopy(policy.config)
    config.base_model_name_or_path = config.base_model_revision = None
    config = config_for(model, config)
    if isinstance(policy, ActionPolicy):
        config.deterministic = bool(policy.deterministic)  # exploring, it draws whatever its settings say
    path = Path(folder, "adapter")
    save_adapter(policy, config, path)
    return str(path)


@contextmanager
def _environment(usual: Mapping[str, str]) -> Iterator[None]:
    """Within it, variables that nobody has set are set."""
    added = {name: value for name, value in usual.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]

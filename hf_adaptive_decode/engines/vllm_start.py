"""Starts vLLM on a transformers model's base, with the plugin, and writes policies for it; knows no request."""

from __future__ import annotations

import copy
import gc
import os
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..adapters import config_for
from ..configuration import AutoDecoConfig
from ..errors import MissingExtraError
from ..hub.store import save_adapter
from ..policies import DecodingPolicy, build_policy
from ..policies.action_policy import ActionPolicy
from ..serving.client import replace_adapter
from ..serving.plugin import PREFIX

# In this process vLLM starts sooner, and schedules the same requests in the same way.
_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
# Those that were started here and are used, and those that nobody uses any more while others are.
_OPEN: list[Any] = []
_ENDED: list[Any] = []


class Colocated:
    """
    A `vllm.LLM` in this process, started when it is first asked for, and shut down when nobody holds this any more.

    Args:
        model ([`~transformers.PreTrainedModel`]): Says where its base lies, and in which dtype.
        batch_rows (`int`, *optional*): Most sequences decoded at once.
        options (mapping): For `vllm.LLM`.
        llm (`vllm.LLM`, *optional*): One that runs already, and goes on running.
    """

    def __init__(
        self, model: PreTrainedModel, batch_rows: int | None, options: Mapping[str, Any], llm: Any = None
    ) -> None:
        self._model, self._batch_rows, self._options = model, batch_rows, options
        self._llm = llm
        self._folder = tempfile.TemporaryDirectory(prefix="decoding-adapter-")
        self._shut_down: Any = None

    @property
    def llm(self) -> Any:
        """The `vllm.LLM`; raises [`MissingExtraError`] if vLLM is not installed."""
        if self._llm is None:
            gc.collect()  # engines that nobody holds any more
            self._llm = self._start()
            _OPEN.append(self._llm)
            self._shut_down = weakref.finalize(self, _shut_down, self._llm)
        return self._llm

    @property
    def has_plugin(self) -> bool:
        """Whether it serves policies; one that is started here does."""
        if self._llm is None:
            return True
        return bool(self._llm.llm_engine.model_config.hf_config.architectures[0].startswith(PREFIX))

    def serve(self, policy: DecodingPolicy) -> None:
        """Gives the workers a policy as it is now; no request may be under way."""
        replace_adapter(self.llm, self._save(policy))

    def close(self) -> None:
        """Shuts down what was started here, and deletes its files."""
        if self._shut_down is not None:
            self._shut_down()
        self._llm = self._shut_down = None
        self._folder.cleanup()

    def _start(self) -> Any:
        try:
            from vllm import LLM
        except ImportError as error:
            raise MissingExtraError("vllm", "vllm") from error
        model, options = self._model, self._options
        plain = AutoDecoConfig(policy="static", actions=[{"temperature": 1.0}])  # until there is another
        settings: dict[str, Any] = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "skip_tokenizer_init": True,
            "distributed_executor_backend": "uni" if options.get("tensor_parallel_size", 1) == 1 else None,
            "seed": 0,
        }
        if self._batch_rows is not None:
            settings["max_num_seqs"] = self._batch_rows
        if model.device.type == "cpu":
            # A request's own seed and prompts read in parts do not go together on CPUs.
            settings |= {"enforce_eager": True, "enable_chunked_prefill": False}
        else:
            settings["gpu_memory_utilization"] = 0.45
        with _environment(_IN_PROCESS):
            return LLM(model=self._save(build_policy(config_for(model, plain))), **(settings | dict(options)))

    def _save(self, policy: DecodingPolicy) -> str:
        """Writes a policy as an adapter of the model's base; returns the adapter's folder."""
        config = copy.deepcopy(policy.config)
        config.base_model_name_or_path = config.base_model_revision = None
        config = config_for(self._model, config)
        if isinstance(policy, ActionPolicy):
            config.deterministic = bool(policy.deterministic)  # exploring, it draws whatever its settings say
        path = Path(self._folder.name, "adapter")
        save_adapter(policy, config, path)
        return str(path)


def _shut_down(llm: Any) -> None:
    core = llm.llm_engine.engine_core
    if type(core).__name__ != "InprocClient":
        core.shutdown()
        return
    # Engines of one process share their groups of devices, which the first that ends takes from all of them.
    _OPEN.remove(llm)
    _ENDED.append(llm)
    if not _OPEN:
        _ENDED.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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

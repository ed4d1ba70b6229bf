"""Sets an engine up for an adapter: its base's weights, its processor, what does not go with it; knows no policy."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..errors import UnsupportedGenerationError
from ..hub.files import Wanted, fetch
from .source import AdapterSource, read_settings_of, shape_of, source_in

_V2 = "vllm.v1.worker.gpu.sample.logits_processor"
_WORKER = f"{__package__}.worker.AdapterWorker"
_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")


def hook_of(architecture: str) -> type:
    """What vLLM calls when an engine with an adapter on this base architecture is configured."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class AdapterHook(VerifyAndUpdateConfig):  # type: ignore[misc]
        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            _point_to_base(model_config, source_in(model_config.hf_config))
            base = MODELS_CONFIG_MAP.get(architecture)
            if base is not None:
                base.verify_and_update_model_config(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            base = MODELS_CONFIG_MAP.get(architecture)
            if base is not None:
                base.verify_and_update_config(vllm_config)
            _set_up(vllm_config)

    return AdapterHook


def _point_to_base(model_config: Any, source: AdapterSource) -> None:
    """The base's weights are loaded by vLLM as of any model; the adapter's tokenizer is used, if it has one."""
    if source.base is not None:
        if model_config.tokenizer == model_config.model and not _has_tokenizer(source):
            model_config.tokenizer, model_config.tokenizer_revision = source.base, source.base_revision
        model_config.model, model_config.revision = source.base, source.base_revision
    if model_config.generation_config == "auto":
        # The base's own sampling values are what the adapter replaces.
        model_config.generation_config = "vllm"


def _has_tokenizer(source: AdapterSource) -> bool:
    wanted = [Wanted("config.json", 1 << 24), *(Wanted(name, 1 << 30, optional=True) for name in _TOKENIZERS)]
    return len(fetch(source.path, wanted, revision=source.revision).paths) > 1


def _set_up(vllm_config: Any) -> None:
    """
    Puts the processor in, for the runner that will run it.

    Raises:
        [`UnsupportedGenerationError`]: If the engine is to do what the adapter could not take part in.
    """
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    source = source_in(model_config.hf_config)
    _, config = read_settings_of(source, *shape_of(model_config))
    is_second = importlib.util.find_spec(_V2) is not None and vllm_config.use_v2_model_runner
    if vllm_config.speculative_config is not None and not is_second:
        raise UnsupportedGenerationError(
            "speculative decoding goes with an adapter in vLLM's V2 model runner alone (the V1 runner checks drafts "
            "without asking logits processors): set VLLM_USE_V2_MODEL_RUNNER=1, or leave `--speculative-config` out."
        )
    if vars(parallel).get("enable_batch_sharded_sampling"):  # older versions have no such thing
        raise UnsupportedGenerationError(
            "batch-sharded sampling computes logits in a way that hides their hidden states; leave "
            "`--enable-batch-sharded-sampling` out."
        )
    reads_samples = "samples" in config.budget_features or len(config.action_prior or []) > 1
    kind = "SamplesAdapterProcessor" if reads_samples else "AdapterProcessor"
    module = f"{__package__}.runner_{'v2' if is_second else 'v1'}"
    model_config.logits_processors = [*(model_config.logits_processors or []), f"{module}:{kind}"]
    if not parallel.worker_extension_cls:
        parallel.worker_extension_cls = _WORKER

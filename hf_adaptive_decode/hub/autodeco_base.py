"""The base model inside a released AutoDeco checkpoint: its settings and its tensors; knows nothing of heads."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from ..configuration import AutoDecoConfig
from ..errors import AdapterLoadError
from .checkpoint import INDEX_FILE, WEIGHTS_FILE, Checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What a merged checkpoint puts in front of the names of its base's tensors.
BASE_PREFIX = "llm."
# What a released config has beside its base's own settings; the last row is ours, so that nothing is lost on the way.
RELEASED_SETTINGS = (
    "base_model_type",
    "base_model_name_or_path",
    "enable_temperature_head",
    "enable_top_p_head",
    "use_enhanced_features",
    "top_p_hidden_size",
    "temperature_hidden_size",
    "train_temp",
    "train_top_p",
    *("base_model_revision", "base_fingerprint", "detach_temperature"),
)
# Of a base's settings, what could run code, choose files, or cost memory by a number alone.
_NEVER_TAKEN = {
    *(
        "auto_map",
        "trust_remote_code",
        "custom_pipelines",
        "transformers_weights",
        "id2label",
        "label2id",
        "num_labels",
    ),
    *("name_or_path", "_name_or_path", "_commit_hash", "_auto_class"),
}
_HOW_TO_RUN = ("attn_implementation", "_attn_implementation", "experts_implementation", "_experts_implementation")
_HUB_ARGUMENTS = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "force_download")


def load_merged_base(files: Checkpoint, heads: Set[str], **kwargs: Any) -> PreTrainedModel:
    """
    The base model out of a merged checkpoint, loaded by transformers file by file.

    Args:
        files ([`Checkpoint`]): Where it lies.
        heads (set of `str`): Names of the tensors that are not the base's.
        kwargs: As `AutoModelForCausalLM.from_pretrained` takes them; those about the Hub mean nothing here.

    Raises:
        [`AdapterLoadError`]: If its tensors are not those that its config describes; lists them.
    """
    # Not at the top: loading the Auto classes imports the module that imports this one (see `_registration`).
    from transformers import AutoModelForCausalLM

    for file in sorted(set((files.index or {INDEX_FILE: WEIGHTS_FILE}).values())):
        files.get(file)
    kwargs = {name: value for name, value in kwargs.items() if name not in (*_HUB_ARGUMENTS, "output_loading_info")}
    # The files' own names, less the prefix, are those that transformers knows how to convert for this architecture.
    kwargs |= {"key_mapping": {rf"^{BASE_PREFIX[:-1]}\.": ""}, "use_safetensors": True, "local_files_only": True}
    with _without_load_report():
        model, found = AutoModelForCausalLM.from_pretrained(
            files.folder,
            config=base_config(files.settings, files.source),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    problems = [f"{name} is missing" for name in sorted(found["missing_keys"])]
    problems += [f"{name} has shape {tuple(a)} and should have {tuple(b)}" for name, a, b in found["mismatched_keys"]]
    if problems:
        raise AdapterLoadError(
            f"{files.source!r} does not hold the base model that its config describes: {'; '.join(problems)}."
        )
    unused = sorted(set(found["unexpected_keys"]) - set(heads))
    if unused:
        warnings.warn(f"{files.source!r}: the base model has no use for {', '.join(unused)}.", stacklevel=2)
    return cast("PreTrainedModel", model)


def base_settings(settings: Mapping[str, Any], source: str) -> dict[str, Any]:
    """
    The base model's own settings out of a released config, without what could run code or choose files.

    Raises:
        [`AdapterLoadError`]: If the config does not say what kind of model it is, or transformers knows no such kind.
    """
    from transformers import CONFIG_MAPPING

    kind = settings.get("base_model_type")
    if not isinstance(kind, str) or kind == AutoDecoConfig.model_type or kind not in CONFIG_MAPPING:
        raise AdapterLoadError(
            f"the config of {source!r} says that the base model's type is {kind!r}, which transformers does not know; "
            "pass the base model yourself, or put its `model_type` there as `base_model_type`."
        )
    dropped = {*RELEASED_SETTINGS, "architectures", "model_type"}
    kept = {name: value for name, value in settings.items() if name not in dropped}
    return {**_harmless(kept), "model_type": kind}


def _harmless(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, and those of the models within the model, without what is never taken from a file."""
    return {
        name: _harmless(value) if isinstance(value, dict) else value
        for name, value in settings.items()
        if name not in _NEVER_TAKEN and not name.startswith(_HOW_TO_RUN)
    }


def base_config(settings: Mapping[str, Any], source: str) -> PreTrainedConfig:
    """The same as transformers' config of that kind; raises as [`base_settings`], and if a setting makes no sense."""
    from transformers import CONFIG_MAPPING

    own = base_settings(settings, source)
    try:
        return cast("PreTrainedConfig", CONFIG_MAPPING[own["model_type"]].from_dict(own))
    except Exception as error:  # a config's class raises whatever its settings' types make it raise
        raise AdapterLoadError(
            f"the base model's settings in the config of {source!r} make no sense: {error}"
        ) from error


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Silences transformers' table of the heads as unexpected tensors; what is wrong is said in an error."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(is_other)
    try:
        yield
    finally:
        logger.removeFilter(is_other)

"""What vLLM's own sampler does as this library's warp does it, and what it does not; it imports no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from ..policies import POLICIES, DecodingPolicy
from .constraints import Constraints
from .deciding import decides_here

# vLLM raises a smaller one to the least, with no more than a warning, and refuses one above the greatest.
LEAST_TEMPERATURE, GREATEST_TEMPERATURE = 0.01, 2.0
# Parts of a generation config that are parameters of vLLM's, too.
_SHARED = {"RepetitionPenaltyLogitsProcessor", "MinNewTokensLengthLogitsProcessor"}


def sampled_otherwise(settings: Mapping[str, float]) -> str | None:
    """
    Why vLLM's own sampler would draw from another distribution; `None` if it draws from the same.

    It applies min-p in front of top-k and top-p, and this library behind them, as transformers does. Tokens that min-p
    drops are the same either way, and top-k does not mind; but top-p then takes its mass of what is left.

    Args:
        settings (mapping): `temperature`, `top_k`, `top_p`, `min_p`; what is left out is off.
    """
    temperature = settings.get("temperature", 1.0)
    if temperature == 0:
        return None
    if not LEAST_TEMPERATURE <= temperature <= GREATEST_TEMPERATURE:
        span = f"{LEAST_TEMPERATURE:g} to {GREATEST_TEMPERATURE:g}"
        return f"its temperature is from {span}, and {temperature:g} is wanted"
    if settings.get("min_p", 0.0) > 0 and settings.get("top_p", 1.0) < 1:
        return (
            f"it applies min-p before top-p, and top_p={settings['top_p']:g} before min_p={settings['min_p']:g} is "
            "wanted"
        )
    return None


def route(policy: DecodingPolicy, with_plugin: bool) -> tuple[bool, str | None]:
    """
    How requests of a policy are sampled.

    Args:
        policy ([`DecodingPolicy`]): Decides.
        with_plugin (`bool`): Whether the engine has the library's plugin.

    Returns:
        Whether each request is given its own settings and vLLM's sampler does the rest, rather than the plugin; and why
        it is neither, `None` if it is one.
    """
    kind = f'this "{policy.config.policy}" policy'
    is_known = type(policy) is POLICIES.get(policy.config.policy)
    why = None
    if decides_here(policy) and is_known:
        found = [sampled_otherwise(action) for action in policy.config.actions or [{}]]
        why = next((one for one in found if one is not None), None)
        if why is None:
            return True, None
    if not is_known:
        return False, (
            f"{type(policy).__name__} has no name by which vLLM's workers could be given it; take the engine "
            '"transformers".'
        )
    if policy.pools_prompt:
        return False, (
            f'vLLM reads prompts in parts and from its cache, and {kind} reads their mean (`pooling="mean"`); take the '
            'engine "transformers".'
        )
    if not with_plugin:
        without = "it decides no token by its hidden state" if why is None else why
        return False, (
            f"vLLM's own sampler alone cannot draw as {kind} says: {without}. The library's plugin can: take the "
            'engine "vllm" and let it start vLLM, or start your own with an adapter\'s folder as its model.'
        )
    return False, None


def constrained_as(model: PreTrainedModel) -> tuple[dict[str, Any], str | None]:
    """
    The constraints of a model's generation config as vLLM's parameters, and why not, if one has none.

    Returns:
        `repetition_penalty` and `min_tokens`, as far as they are set; and a sentence or `None`.
    """
    found = {type(one).__name__ for one in Constraints(model).found}
    others = sorted(found - _SHARED)
    if others:
        return {}, (
            f"the model's generation config asks for {', '.join(others)}, which vLLM is not told of; take the engine "
            '"transformers", or unset it in `model.generation_config`.'
        )
    own = model.generation_config
    settings: dict[str, Any] = {}
    if "RepetitionPenaltyLogitsProcessor" in found:
        settings["repetition_penalty"] = own.repetition_penalty
    if "MinNewTokensLengthLogitsProcessor" in found:
        settings["min_tokens"] = own.min_new_tokens
    return settings, None

"""What a request may ask of an adapter, checked where it comes in; knows no engine and no policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..budget import MAX_BUDGET, whole_budget
from ..errors import BudgetError, SamplingParameterError, UnsupportedGenerationError

_OPT_OUT = '`vllm_xargs={"adaptive_decoding": false}`'
# What vLLM takes for "off", besides the values that it puts in itself.
_OFF = {"temperature": (1.0,), "top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,)}
_YES, _NO = (True, "true", "True", "1"), (False, "false", "False", "0")


@dataclass(frozen=True)
class RequestSettings:
    """
    What `vllm_xargs` (in Python `SamplingParams.extra_args`) says to the adapter.

    Args:
        adaptive (`bool`): `adaptive_decoding`; without it the request is stock vLLM's.
        token_budget (`int`, *optional*): What the policy is told as b; `max_tokens` unless given.
        samples (`int`, *optional*): `parallel_budget`, B.
        trace (`str`, *optional*): `decoding_trace`: the tag under which what was decided is kept for whoever takes it.
        logs_trace (`bool`): Whether what was decided is logged when the request ends.
        observes (`bool`): `decoding_observation`: whether what the policy saw is kept, too.
    """

    adaptive: bool = True
    token_budget: int | None = None
    samples: int | None = None
    trace: str | None = None
    logs_trace: bool = False
    observes: bool = False

    @property
    def is_traced(self) -> bool:
        """Whether anything of the request is recorded."""
        return self.trace is not None or self.logs_trace


def read_settings(asked: Mapping[str, Any] | None) -> RequestSettings:
    """
    The settings among a request's extra arguments; the others are somebody else's.

    Raises:
        [`BudgetError`]: If a budget is not a positive whole number.
        [`UnsupportedGenerationError`]: If a switch is neither on nor off.
    """
    if not asked:
        return RequestSettings()
    budgets = {name: _budget(asked, name) for name in ("token_budget", "parallel_budget")}
    trace = asked.get("decoding_trace", False)
    is_tag = isinstance(trace, str) and trace not in _YES + _NO
    settings = RequestSettings(
        adaptive=_switch(asked, "adaptive_decoding", True),
        token_budget=budgets["token_budget"],
        samples=budgets["parallel_budget"],
        trace=trace if is_tag else None,
        logs_trace=not is_tag and _switch(asked, "decoding_trace", False),
        observes=_switch(asked, "decoding_observation", False),
    )
    if settings.observes and settings.trace is None:
        raise UnsupportedGenerationError(
            "`decoding_observation` needs a tag under which to keep it: pass it as `decoding_trace`, a string."
        )
    return settings


def check_request(params: Any, reads_samples: bool) -> None:
    """
    Refuses a request that would fight the adapter.

    Args:
        params (`vllm.SamplingParams`): As the client sent them, before copies for n > 1 are made.
        reads_samples (`bool`): Whether the policy reads B, which the copies do not tell.

    Raises:
        [`SamplingParameterError`], [`BudgetError`], [`UnsupportedGenerationError`]: All are `ValueError`s; vLLM makes
            HTTP 400 of them.
    """
    settings = read_settings(params.extra_args)
    if not settings.adaptive or params.temperature == 0:
        return
    for name, allowed in _OFF.items():
        value = getattr(params, name)
        if value not in allowed:
            greedy = " (0 is the base model's greedy decoding)" if name == "temperature" else ""
            raise SamplingParameterError(
                f"`{name}` is {value!r}, and the adapter decides how each token is sampled: leave it out{greedy}, or "
                f"sample without the adapter: {_OPT_OUT}."
            )
    if reads_samples and params.n > 1 and settings.samples is None:
        raise BudgetError(
            f"the policy decides by the number of samples, and vLLM does not tell it n={params.n}: pass "
            f'`vllm_xargs={{"parallel_budget": {params.n}}}`.'
        )


def _budget(asked: Mapping[str, Any], name: str) -> int | None:
    value = asked.get(name)
    if value is None:
        return None
    number = whole_budget(value)
    if number is None:
        raise BudgetError(f"`{name}` is {value!r}; it has to be a whole number from 1 to {MAX_BUDGET}.")
    return number


def _switch(asked: Mapping[str, Any], name: str, default: bool) -> bool:
    value = asked.get(name, default)
    if value in _YES:
        return True
    if value in _NO:
        return False
    raise UnsupportedGenerationError(f"`{name}` is {value!r}; it has to be true or false.")

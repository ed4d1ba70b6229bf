"""What a fresh model card says, section by section; knows an adapter's settings, no files and no results."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..configuration import AutoDecoConfig
from .markdown import code, literal, table

_END_OF_MANUAL_DECODING = "[The End of Manual Decoding](https://huggingface.co/papers/2510.26697)"
_PAPERS = {
    "heads": _END_OF_MANUAL_DECODING,
    "token_actions": "*Learning Adaptive LLM Decoding*",
    "sequence_actions": "*Learning Adaptive LLM Decoding*",
}
_KINDS = {
    "heads": "heads that predict temperature and top-p for every token",
    "token_actions": "a policy that chooses one of a few sampling configurations for every token",
    "sequence_actions": "a policy that chooses one of a few sampling configurations for every prompt",
    "static": "fixed sampling parameters (a baseline)",
    "entropy": "a temperature computed from the entropy of the next-token distribution (a baseline)",
}
_UNTRAINED = ("static", "entropy")
_FEATURES = {
    "hidden": "the model's last hidden state",
    "statistics": "four statistics of the next-token distribution",
    "entropy": "the entropy of the next-token distribution",
}
_BUDGETS = {"tokens": "how many tokens are left", "samples": "how many samples are drawn for the prompt"}
_PARAMETERS = {"temperature": "temperature", "top_k": "top-k", "top_p": "top-p", "min_p": "min-p"}
_USAGE = """## How to use

```python
from transformers import AutoTokenizer
from hf_adaptive_decode import AutoDecoForCausalLM

adapter = {adapter}
model = AutoDecoForCausalLM.from_pretrained(adapter)
tokenizer = AutoTokenizer.from_pretrained(adapter)
inputs = tokenizer("...", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, budget=256)[0]))  # at most 256 new tokens
```

What is passed to `generate` wins over the adapter; `with model.disable_adapter():` gives {base}, exactly.

### What it decides

{decides}"""
_LORA = """

### The LoRA beside it

The base model carries a LoRA, which lies in `peft/` as PEFT writes one and is loaded along with the adapter (it needs
`peft`). The adapter goes with it: on the base model alone its decisions mean nothing."""
NO_RESULTS = """## Results

None recorded. Before use, compare with greedy decoding, default sampling, the best static setting chosen on validation
data, and MeanShift (the adapter's own mean as a static setting)."""
_LIMITS = f"""## Limits

- {{made}} for this base model alone. On another one of the same shape it loads with a warning, and its decisions mean
  nothing there.
- Results hold for the tasks, budgets and base model that they were measured on. On other domains, measure first,
  against MeanShift too: where a static setting does as well, use that.
- It chooses how to sample from what the base model predicts and adds no knowledge: the base model's errors, biases and
  licence remain.
- Modes in which it could not act as intended (assisted generation, contrastive search and the like) are refused; greedy
  and beam search are the base model's own.

## Cite

- Wang et al., {_END_OF_MANUAL_DECODING}: Towards Truly End-to-End Language Models. arXiv:2510.26697 (the heads).
- Su et al., *Learning Adaptive LLM Decoding* (the policies that choose actions).
- `hf_adaptive_decode`, which implements both.
"""


@dataclass(frozen=True)
class TrainingFacts:
    """
    What a card says of an adapter's training; what is `None` reads "not recorded".

    Args:
        data (`str`, *optional*): What it was trained on, in words: source, split, how many examples.
        loss (`str`, *optional*): The loss or objective.
        steps (`int`, *optional*): Optimiser steps.
        seed (`int`, *optional*): The training seed.
    """

    data: str | None = None
    loss: str | None = None
    steps: int | None = None
    seed: int | None = None


def introduction(config: AutoDecoConfig) -> str:
    """Title and first sentence."""
    paper = _PAPERS.get(config.policy)
    after = f"After {paper}" if paper else "For comparison"
    title = f"# A decoding adapter for {_base(config)}"
    return f"{title}\n\n{after}: {_KINDS[config.policy]}. The base model's weights are untouched."


def usage_section(config: AutoDecoConfig, name: str, has_lora: bool = False) -> str:
    """
    How to use the adapter, and what it decides.

    Args:
        config ([`AutoDecoConfig`]): Its settings.
        name (`str`): Its folder or Hub id, for the code.
        has_lora (`bool`, defaults to `False`): Whether a LoRA of the base lies beside it.
    """
    base = "the base model with its LoRA" if has_lora else "the base model"
    text = _USAGE.format(adapter=literal(name), decides=_decides(config), base=base)
    return text + _LORA if has_lora else text


def training_section(config: AutoDecoConfig, facts: TrainingFacts) -> str:
    """What the adapter was trained on."""
    heading = "## What it was trained on\n\n"
    if config.policy in _UNTRAINED:
        return f"{heading}Nothing: it has no weights."
    named = config.base_model_name_or_path or "built in code"
    revision = f", revision {config.base_model_revision}" if config.base_model_revision else ""
    rows = [("base model", f"{named}{revision}"), *vars(facts).items()]
    return heading + table(("", ""), [(name, "not recorded" if value is None else value) for name, value in rows])


def limits_and_citations(config: AutoDecoConfig) -> str:
    """Limits and citations."""
    return _LIMITS.format(made="Made" if config.policy in _UNTRAINED else "Trained")


def _base(config: AutoDecoConfig) -> str:
    return code(config.base_model_name_or_path) if config.base_model_name_or_path else "a model built in code"


def _decides(config: AutoDecoConfig) -> str:
    if config.policy == "heads":
        ranges = {"temperature": config.temperature_range, "top_p": config.top_p_range}
        parts = [f"{_PARAMETERS[name]} between {ranges[name][0]:g} and {ranges[name][1]:g}" for name in config.heads]
        extra = " The top-p head also reads four statistics of the distribution at that temperature."
        return f"For every token: {' and '.join(parts)}. It reads {_reads(config)}.{extra * config.top_p_statistics}"
    if config.policy == "entropy":
        return f"For every token, a temperature by this rule: {code(json.dumps(config.entropy_rule, sort_keys=True))}."
    actions = config.actions or []
    if config.policy == "static":
        text = f"For every {config.mixture_per}, one of these settings, drawn by its share.{_masked(config)}"
        return f"{text}\n\n{_action_table(actions, config.action_weights or [1.0] * len(actions))}"
    told = [_BUDGETS[name] for name in config.budget_features]
    each = "token" if config.policy == "token_actions" else "prompt"
    text = f"For every {each}, one of these actions. It reads {' and '.join([_reads(config), *told])}.{_masked(config)}"
    return f"{text}\n\n{_action_table(actions)}"


def _masked(config: AutoDecoConfig) -> str:
    if config.max_prob_mask is None:
        return ""
    how = "greedy" if config.masked_steps == "greedy" else "decoded with the likeliest action of its prior"
    return f" Where the model gives one token more than {config.max_prob_mask:g}, it is {how}."


def _reads(config: AutoDecoConfig) -> str:
    return " and ".join(_FEATURES[name] for name in config.features)


def _action_table(actions: Sequence[dict[str, Any]], weights: Sequence[float] | None = None) -> str:
    header = ["action", *_PARAMETERS.values()]
    rows = [[str(i), *(_shown(name, action.get(name)) for name in _PARAMETERS)] for i, action in enumerate(actions)]
    if weights is not None:
        header.append("share")
        rows = [[*row, f"{100 * w / sum(weights):.1f} %"] for row, w in zip(rows, weights, strict=True)]
    return table(header, rows)


def _shown(name: str, value: float | None) -> str:
    if name == "temperature":
        return "0 (greedy)" if value == 0 else f"{1.0 if value is None else value:g}"
    return "off" if value is None else f"{value:g}"

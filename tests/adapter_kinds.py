"""Adapters of every kind that decide differently from row to row, and what goes wrong around them."""

from __future__ import annotations

import tiny
import torch
from tiny import PAD, prompts
from transformers import LogitsProcessor

from hf_adaptive_decode.types import Observation

NEVER = -float("inf")
TRACED = {"return_dict_in_generate": True, "output_scores": True, "output_decoding_trace": True}
ENDLESS = {"eos_token_id": None, "pad_token_id": PAD}
ACTIONS = [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.5, "top_k": 20}]
EDT = {"name": "edt", "temperature": 0.9, "theta": 0.5}
DYNATEMP = {"name": "dynatemp", "low": 0.2, "high": 1.5, "top_p": 0.9}
TOLD = {"budget_features": ["tokens", "samples"], "max_token_budget": 32, "max_parallel_budget": 8}
KINDS = {
    "heads": {},
    "heads with statistics": {"features": ["hidden", "statistics"]},
    "heads as released": {"top_p_statistics": True},
    "token actions": {"policy": "token_actions", "actions": ACTIONS, **TOLD},
    "masked token actions": {"policy": "token_actions", "actions": ACTIONS, "max_prob_mask": 0.9},
    "sequence actions": {"policy": "sequence_actions", "actions": ACTIONS, **TOLD},
    "sequence actions by the mean": {"policy": "sequence_actions", "actions": ACTIONS, "pooling": "mean"},
    "a static": {"policy": "static", "actions": ACTIONS[1:2]},
    "a mixture": {"policy": "static", "actions": ACTIONS},
    "a mixture per sequence": {"policy": "static", "actions": ACTIONS, "mixture_per": "sequence"},
    "edt": {"policy": "entropy", "entropy_rule": EDT},
    "dynatemp": {"policy": "entropy", "entropy_rule": DYNATEMP},
}
WITH_WEIGHTS = [kind for kind in KINDS if kind.startswith("heads") or "actions" in kind]


def build(kind: str, base=None, **settings):
    """A model whose adapter decides differently from row to row, and with budgets from step to step."""
    model = tiny.wrap(base, **{**KINDS[kind], **settings}).eval()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in model.decoding_adapter.parameters():
            scale = 0.1 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        if "actions" in kind:  # what all states have in common would decide for all of them
            policy, context = model.decoding_adapter, tiny.hidden_and_logits(model, prompts(8, 8))[0].flatten(0, 1)
            budgets = torch.randint(1, 8, (2, len(context)), generator=generator)
            policy.layers[-1].bias -= policy.action_logits(Observation(context.float(), *budgets)).mean(0)
    return model


def filled(model, value: float):
    """Every weight is `value`, with either sign."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.decoding_adapter.parameters():
            parameter.copy_(value * (torch.rand(parameter.shape, generator=generator) - 0.5).sign())
    return model


class Change(LogitsProcessor):
    """Puts a value into the scores of row 1, at some tokens, from a step on."""

    def __init__(self, value: float, tokens=slice(7, 8), length: int = 5):
        self.value, self.tokens, self.length = value, tokens, length

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        if input_ids.shape[1] >= self.length:
            scores[1, self.tokens] = self.value
        return scores


class Script(LogitsProcessor):
    """Leaves one token a step, so that every run has the same tokens whatever its random numbers."""

    def __init__(self, tokens: torch.Tensor, prompt: int):
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids, scores):
        wanted = self.tokens[:, min(input_ids.shape[1] - self.prompt, self.tokens.shape[1] - 1), None]
        return torch.full_like(scores, NEVER).scatter(1, wanted, scores.gather(1, wanted))

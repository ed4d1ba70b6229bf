"""Two ways to choose one static setting: an expert's search by score, and TURN by entropy alone; knows no task."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ..engines.engine import Engine
from ..engines.transformers import Prompt, TransformersEngine, encode_prompt
from ..losses import IGNORE_INDEX
from .likelihood import read_documents


@dataclass(frozen=True)
class Search:
    """
    What an expert's search found.

    Args:
        settings (`dict`): The choice: `temperature`, and `top_p` unless it is greedy.
        score (`float`): Its score.
        path (list of `dict`): Everything that was measured, in order, as `{"settings": .., "score": ..}`.
    """

    settings: dict[str, float]
    score: float
    path: list[dict[str, Any]]


def expert_search(
    measure: Callable[[dict[str, float]], float], step: float = 0.1, highest: float = 1.5, with_greedy: bool = True
) -> Search:
    """
    Temperature first, with top-p 1, then top-p at the best temperature (AutoDeco, Figure 3, "expert-guided tuning").

    On the problems that one then reports on it is an oracle and no fair baseline; on validation it is fair. Of equal
    scores the first measured wins: the colder temperature, and the larger top-p.

    Args:
        measure (`Callable`): The score, higher is better, of settings with `temperature` and `top_p` (greedy:
            `temperature` 0 alone).
        step (`float`, defaults to 0.1): Distance between neighbours, the paper's; at most 0.5.
        highest (`float`, defaults to 1.5): Largest temperature, which the paper does not say.
        with_greedy (`bool`, defaults to `True`): Whether greedy decoding is among the temperatures.

    Raises:
        `ValueError`: If the step or the largest temperature is out of range.
    """
    if not 0 < step <= 0.5:
        raise ValueError(f"`step` is {step!r}; it has to be above 0 and at most 0.5.")
    if not step <= highest <= 100:
        raise ValueError(f"`highest` is {highest!r}; it has to be between the step, {step:g}, and 100.")
    path: list[dict[str, Any]] = []

    def try_all(settings: list[dict[str, float]]) -> dict[str, Any]:
        path.extend({"settings": one, "score": float(measure(dict(one)))} for one in settings)
        return max(path, key=lambda tried: float(tried["score"]))

    greedy: list[dict[str, float]] = [{"temperature": 0.0}] if with_greedy else []
    best = try_all([*greedy, *({"temperature": value, "top_p": 1.0} for value in _grid(step, highest))])
    if best["settings"]["temperature"] > 0:
        masses = [mass for mass in reversed(_grid(step, 1.0)) if mass < 1]
        best = try_all([best["settings"] | {"top_p": mass} for mass in masses])
    return Search(best["settings"], best["score"], path)


def _grid(step: float, highest: float) -> list[float]:
    """Multiples of the step up to `highest`, without the dust of binary fractions."""
    return [round(step * place, 10) for place in range(1, int(highest / step + 1e-9) + 1)]


def turn_temperature(
    temperatures: Sequence[float], entropies: Sequence[float], aggregation_shift: float = 0.0
) -> float:
    """
    TURN (Du et al., 2025, arXiv 2502.05234): the temperature where log entropy turns from concave to convex.

    Below it the mean entropy of sampled tokens grows ever more slowly with temperature, above it ever faster: text has
    begun to fall apart. It is where the curve's slope is least before it rises; of several turns, as noise and the
    limit log V make them, that with the greatest rise after it. Between grid points the second difference is
    interpolated. Where the curve turns nowhere, warns and takes the end beyond which the turn has to lie: the lowest
    temperature of a convex curve, the highest of a concave one.

    Args:
        temperatures (sequence of `float`): At least 4, ascending, above 0.
        entropies (sequence of `float`): Mean token entropy at each, above 0, in nats; see [`measure_entropies`].
        aggregation_shift (`float`, defaults to 0.0): Added to the turning point. The paper adds 0 for majority votes
            and 0.1 for best-of-N.

    Raises:
        `ValueError`: If the numbers are no such curve.
    """
    t, h = np.asarray(temperatures, dtype=np.float64), np.asarray(entropies, dtype=np.float64)
    if t.ndim != 1 or t.shape != h.shape or len(t) < 4 or not (np.diff(t) > 0).all() or not t[0] > 0:
        raise ValueError(
            f"`temperatures` is {t.tolist()} with {h.size} entropies; it has to be at least 4 ascending numbers above "
            "0, with an entropy for each."
        )
    if not (np.isfinite(h).all() and (h > 0).all()):
        raise ValueError(f"`entropies` is {h.tolist()}; they have to be finite and above 0.")
    slope = np.diff(np.log(h)) / np.diff(t)  # of the segments between neighbours
    rise = np.array([slope[place:].max() - slope[place] for place in range(len(slope))])
    least = int(rise.argmax())
    if rise[least] <= 0 or least == 0:
        curve, end, where = ("concave", t[-1], "higher") if rise[least] <= 0 else ("convex", t[0], "lower")
        warnings.warn(
            f"the log entropy is {curve} from {t[0]:g} to {t[-1]:g} and turns nowhere; {end:g} is taken for its "
            f"turning point, which is to be found at {where} temperatures.",
            stacklevel=2,
        )
        return float(end + aggregation_shift)
    # The curvature is negative where the least steep segment begins, and positive where it ends.
    second = np.diff(slope)[least - 1 : least + 1] / (t[least + 1 : least + 3] - t[least - 1 : least + 1])
    return float(t[least] + (t[least + 1] - t[least]) * second[0] / (second[0] - second[1]) + aggregation_shift)


@torch.no_grad()
def measure_entropies(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    temperatures: Sequence[float],
    *,
    token_budget: int,
    samples: int = 1,
    seed: int = 0,
    batch_rows: int = 256,
    engine: Engine | None = None,
) -> list[float]:
    """
    Mean entropy of the tempered distributions that tokens were sampled from, at each temperature.

    The tokens are sampled, and read again in one pass; constraints of the generation config are no part of that pass.

    Args:
        model, tokenizer: A base or adaptive model (the adapter plays no part) and its tokenizer.
        prompts (sequence of `str` or of message lists): What to complete; answers are not needed.
        temperatures (sequence of `float`): Each above 0.
        token_budget, samples, seed, batch_rows: As [`~engines.transformers.complete`] takes them.
        engine ([`Engine`], *optional*): Samples; transformers by default.

    Returns:
        list of `float`: In nats, one a temperature, over all tokens together.
    """
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    how: dict[str, Any] = {"token_budget": token_budget, "samples": samples, "seed": seed}
    engine = engine or TransformersEngine(model, tokenizer, batch_rows=batch_rows)
    means = []
    for temperature in temperatures:
        found = engine.complete(prompts, settings={"temperature": temperature}, **how)
        texts = [(ids, list(one.token_ids)) for ids, group in zip(encoded, found, strict=True) for one in group]
        total, tokens = 0.0, 0
        for some in read_documents(model, [_document(prompt, answer) for prompt, answer in texts]):
            p = (some.logits / temperature).softmax(-1)
            total += float(torch.special.entr(p).sum(-1).double().sum())
            tokens += len(some.target)
        means.append(total / tokens)
    return means


def _document(prompt: list[int], answer: list[int]) -> Mapping[str, list[int]]:
    return {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}

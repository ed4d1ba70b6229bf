"""How the soft top-p of training differs from the hard one of sampling; knows both, and no model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import style

_DRAWN = 60  # of a larger vocabulary so many tokens, the likeliest


def plot_soft_top_p(
    path: style.Path,
    *,
    logits: Sequence[float] | np.ndarray | None = None,
    temperature: float = 1.0,
    top_p: float = 0.8,
    alpha: float = 30.0,
) -> None:
    """
    Draws the soft and the hard top-p side by side (AutoDeco, Figure 2), as a PNG.

    On the left the weight of a token by the cumulative probability up to it (equation 2), on the right what becomes of
    an example distribution: by [`soft_top_p_probs`] in training, and by [`warp_logits`] in sampling.

    Args:
        path (`str`): The file to write.
        logits (array of shape `[V]`, *optional*): The example; 50 tokens of falling probability when `None`.
        temperature (`float`, *optional*, defaults to 1.0): T, above 0.
        top_p (`float`, *optional*, defaults to 0.8): P, above 0 and up to 1.
        alpha (`float`, *optional*, defaults to 30.0): Steepness of the soft mask.

    Raises:
        `ValueError`: If an argument is out of its range.
        [`MissingExtraError`]: If matplotlib is not installed.
    """
    for name, value, highest in (("temperature", temperature, np.inf), ("top_p", top_p, 1.0), ("alpha", alpha, np.inf)):
        if not 0 < value <= highest:
            raise ValueError(
                f"`{name}` is {value!r}; it has to be above 0" + ("." if highest == np.inf else " and up to 1.")
            )
    given = -0.15 * np.arange(50) if logits is None else style.as_array("logits", logits)
    if not len(given) or np.isnan(given).any():
        raise ValueError("`logits` has to hold at least one number, and no NaN.")
    original, hard, soft = _distributions(given, temperature, top_p, alpha)
    with style.figure(path, 9.0, 3.3) as drawn:
        left, right = drawn.subplots(1, 2)
        cumulative = np.linspace(0, 1, 1001)
        looks: dict[str, dict[str, Any]] = {
            "hard": {"color": style.COLORS[1], "linestyle": (0, (5, 1.5))},
            "soft": {"color": style.COLORS[0]},
        }
        left.plot(cumulative, np.exp(-alpha * np.maximum(cumulative - top_p, 0)), **looks["soft"])
        left.plot([0, top_p, top_p, 1], [1, 1, 0, 0], **looks["hard"])
        left.axvline(top_p, color=style.GREY, linewidth=0.8, linestyle=":")
        left.set_xlabel("cumulative probability c, in descending order")
        left.set_ylabel("weight of the token")
        left.set_title(f"(a) masks, P = {top_p:g}, α = {alpha:g}")
        ranks = np.arange(1, len(original) + 1)
        bars = right.bar(ranks, original, width=0.85, color=style.GREY, alpha=0.4)
        (smooth,) = right.plot(ranks, soft, marker="o", markersize=3, linewidth=1.0, **looks["soft"])
        (cut,) = right.step(ranks, hard, where="mid", **looks["hard"])
        right.set_xlabel("token, by rank")
        right.set_ylabel("probability")
        right.set_title(f"(b) an example of {len(given):,} tokens, T = {temperature:g}")
        right.xaxis.get_major_locator().set_params(integer=True)
        style.legend_below(drawn, [bars, cut, smooth], ["before", "hard top-p (sampling)", "soft top-p (training)"])


def _distributions(logits: np.ndarray, temperature: float, top_p: float, alpha: float) -> tuple[np.ndarray, ...]:
    """The distribution before, after hard and after soft top-p, of the likeliest tokens in descending order."""
    import torch

    from ...losses import soft_top_p_probs
    from ...types import SamplingParameters
    from ...warping import warp_logits

    row = torch.from_numpy(np.sort(logits)[::-1].copy())
    hard = warp_logits(row[None].float(), SamplingParameters(temperature=temperature, top_p=top_p))[0]
    soft = soft_top_p_probs(row, temperature, top_p, alpha)
    parts = ((row / temperature).softmax(-1), hard.double().softmax(-1), soft)
    return tuple(part[:_DRAWN].numpy() for part in parts)

"""Where the author of the corpus had a choice, and a hand-written rule that is hot there and greedy elsewhere; it reads
types and tokens and knows neither right answers nor budgets.

The rule is a yardstick for learned policies, made by looking at the corpus. It is no upper bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .problems import VOCABULARY

if TYPE_CHECKING:
    import torch


def fork_kind(kind: str, written: int, last: str) -> str | None:
    """
    What sort of fork the next token stands at, `None` where it is determined by the text so far.

    Args:
        kind (`str`): The type of the problem.
        written (`int`): How many completion tokens there are already.
        last (`str`): The last of them; not read before the first.

    Example:
        >>> fork_kind("calc", 0, ""), fork_kind("coin", 8, "no"), fork_kind("run", 0, "")
        ('opening', 'guess', None)
    """
    if kind == "calc" and written == 0:
        return "opening"
    if kind == "sign" and written in (0, 3):
        return "sign"
    if kind == "coin" and (written == 3 or (written > 3 and last == "no")):
        return "guess"
    return None


class ForkRule:
    """
    A logits processor for `generate(do_sample=True, temperature=1.0, top_k=0)`: hot at forks, greedy everywhere else.

    Args:
        types (`Sequence[str]`): The type of each prompt of the batch, before `num_return_sequences` repeats it.
        prompt_width (`int`): Number of columns of the left-padded prompts.
        temperatures (`Mapping[str, float]`): Temperature by sort of fork: `"opening"`, `"guess"` and `"sign"`; a sort
            that is missing, or 0, is greedy.
    """

    def __init__(self, types: Sequence[str], prompt_width: int, temperatures: Mapping[str, float]) -> None:
        self.types = list(types)
        self.prompt_width = prompt_width
        self.temperatures = dict(temperatures)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """
        Args:
            input_ids (`torch.Tensor`): `[rows, prompt_width + written]`.
            scores (`torch.Tensor`): `[rows, vocabulary]`.
        """
        import torch

        written = input_ids.shape[1] - self.prompt_width
        repeats = len(scores) // len(self.types)
        last = input_ids[:, -1].tolist()
        sorts = [fork_kind(self.types[row // repeats], written, VOCABULARY[token]) for row, token in enumerate(last)]
        temperature = torch.tensor([self.temperatures.get(sort, 0.0) if sort else 0.0 for sort in sorts]).to(scores)
        top = scores.argmax(dim=-1, keepdim=True)
        greedy = torch.full_like(scores, float("-inf")).scatter(1, top, 0.0)
        hot = scores / temperature.clamp_min(1e-6)[:, None]
        return torch.where(temperature[:, None] > 0, hot, greedy)

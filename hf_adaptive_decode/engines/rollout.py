"""Decodes many rows as one policy says, new ones in the places of those that end; knows policies and tokens, no text,
no tasks and no training.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from ..policies import DecodingPolicy
from .decoding import Decoding
from .records import Decisions, Decoded, Rows
from .stepping import SteppedModel

__all__ = ["Decisions", "Decoded", "Rows", "decode", "decode_finished"]


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    policy: DecodingPolicy,
    rows: Rows,
    *,
    ends: set[int],
    pad: int,
    records: str | None = None,
    drops_ended: bool = True,
    batch_rows: int | None = None,
    patience: float = 1.0,
) -> Decoded:
    """
    One completion of each row. What a row writes does not depend on the others, nor on how many go on at once.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base (or the adaptive model), in evaluation mode.
        policy ([`DecodingPolicy`]): Decides; in evaluation mode.
        rows ([`Rows`]): What to decode.
        ends (set of `int`): Tokens that end a row.
        pad (`int`): Fills the left of shorter prompts.
        records (`str`, *optional*): `"parameters"` of every token, or `"decisions"` of an action policy.
        drops_ended (`bool`, defaults to `True`): Whether ended rows leave the batch and the cache (Appendix D.1), and
            waiting ones take their places.
        batch_rows (`int`, *optional*): Most rows decoded at once; all of them by default. The others wait for a place,
            those of a prompt together; with a model whose cache is more than keys and values (Mamba, hybrids), until
            the whole batch has ended.
        patience (`float`, defaults to 1): Prompts are read for free places once these have stood free for as much as
            this many steps of the whole batch; reading costs about one.

    Raises:
        [`LogitsError`]: If the model's logits or the policy's parameters are not finite; names step and row.
    """
    on, count = rows.keys.device, len(rows.keys)
    with SteppedModel(model, pad, policy.config.pooling == "mean") as stepped:
        decoding = Decoding(stepped, policy, rows, ends, records, drops_ended, batch_rows, patience)
        written = {name: torch.full((count, decoding.longest), no, device=on) for name, no in decoding.kept.items()}
        lengths, ended = torch.zeros_like(rows.keys), torch.zeros(count, dtype=torch.bool, device=on)
        for at, part in decoding.run():
            lengths[at], ended[at] = part.lengths, part.ended
            for name, column in written.items():
                column[at, : part.tokens.shape[1]] = vars(part)[name]
    narrow = {name: column[:, : int(lengths.max())] for name, column in written.items()}
    return Decoded(lengths=lengths, ended=ended, decisions=Decisions.in_order(decoding.decisions), **narrow)


@torch.no_grad()
def decode_finished(
    model: PreTrainedModel,
    policy: DecodingPolicy,
    rows: Rows,
    *,
    ends: set[int],
    pad: int,
    records: str | None = None,
    batch_rows: int | None = None,
    patience: float = 1.0,
) -> Iterator[tuple[torch.Tensor, Decoded]]:
    """
    As [`decode`], for callers that keep what is finished: each row once, soon after it has ended.

    Args:
        model, policy, rows, ends, pad, batch_rows, patience: As [`decode`] takes them.
        records (`str`, *optional*): `"parameters"` of every token; decisions come together, from [`decode`].

    Yields:
        `(at, decoded)`: numbers of rows `[M]`, `torch.long`, and their completions.
    """
    with SteppedModel(model, pad, policy.config.pooling == "mean") as stepped:
        yield from Decoding(stepped, policy, rows, ends, records, True, batch_rows, patience).run()

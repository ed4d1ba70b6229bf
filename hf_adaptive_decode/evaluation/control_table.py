"""What commands in prompts do to an adapter's temperature and top-p, measured and as a table (AutoDeco, Table 4); knows
adapters and prompts, no training and no tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from ..engines.base import Completion
from ..engines.transformers import Prompt, complete, encode_prompt, special_tokens
from ..errors import AdaptiveDecodeError
from ..losses.control import mean_predictions
from ..modeling import AutoDecoForCausalLM
from ..projection import FrozenProjection
from ..training.control import DIRECTIONS, CommandSet, with_command
from ..types import DecodeState
from .control import control_effect
from .table import markdown_table

# A mean for each prompt, by parameter.
Means = dict[str, list[float]]
TEXTS = {"own": "each version's own text", "same": "the same text under all"}


def measure_control(
    model: AutoDecoForCausalLM,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    commands: CommandSet,
    *,
    token_budget: int | Sequence[int] = 256,
    samples: int = 4,
    seed: int = 0,
    batch_rows: int = 256,
) -> dict[str, Any]:
    """
    The mean T and P of each prompt without a command and with each command, and how they differ.

    Each is measured twice. On the text that is generated under the command, as in the paper's Table 4, a mean also
    changes because another text has other tokens. On the same text (what was generated without a command, read behind
    the command) only what the adapter makes of the command is left; that is measured for `heads`, which decide by the
    text alone.

    Args:
        model ([`AutoDecoForCausalLM`]): With a trained adapter.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): Its tokenizer.
        prompts (sequence of `str` or of message lists): Held-out prompts, without commands.
        commands ([`CommandSet`]): Each of its commands is measured on all prompts.
        token_budget, samples, seed, batch_rows: As [`~engines.transformers.complete`] takes them.

    Returns:
        `dict`: `prompts`, `samples`, `token_budget`, `seed`, and `rows`: one a command and text, with `command`,
        `direction`, `text` (`"own"` or `"same"`) and, for each predicted parameter, the fields of [`ControlEffect`].

    Raises:
        [`AdaptiveDecodeError`]: If the model has no adapter.
    """
    if not isinstance(model, AutoDecoForCausalLM):
        raise AdaptiveDecodeError(
            f"{type(model).__name__} has no decoding adapter, so a command can move nothing; wrap it with "
            "`AutoDecoForCausalLM.from_base` or load an adapter with `from_pretrained`."
        )
    config = model.decoding_config
    names = tuple(config.heads) if config.policy == "heads" else ("temperature", "top_p")
    how: dict[str, Any] = {"token_budget": token_budget, "samples": samples, "seed": seed}
    plain = complete(model, tokenizer, prompts, **how, batch_rows=batch_rows)
    before = {"own": _of_completions(plain, names)}
    if config.policy == "heads":
        before["same"] = _of_texts(model, tokenizer, prompts, plain, names, batch_rows)
    rows = []
    for direction, command in ((d, c) for d in DIRECTIONS for c in vars(commands)[d]):
        told = [with_command(prompt, command) for prompt in prompts]
        after = {"own": _of_completions(complete(model, tokenizer, told, **how, batch_rows=batch_rows), names)}
        if config.policy == "heads":
            after["same"] = _of_texts(model, tokenizer, told, plain, names, batch_rows)
        for text, means in after.items():
            effects = {
                name: asdict(control_effect(before[text][name], means[name], direction, seed=seed)) for name in names
            }
            rows.append({"command": command, "direction": direction, "text": text, **effects})
    return {"prompts": len(prompts), **how, "rows": rows}


def control_table(result: Mapping[str, Any]) -> str:
    """
    Mean T and P by command, their differences from the baseline with 95 % intervals over prompts, and how often the
    difference has the commanded sign, as aligned Markdown.

    Args:
        result (mapping): What [`measure_control`] returns, fresh or read back from JSON.

    Returns:
        `str`: One table for the versions' own texts and, where it was measured, one for the same text.
    """
    texts = dict.fromkeys(row["text"] for row in result["rows"])
    return "\n\n".join(_block([row for row in result["rows"] if row["text"] == text], TEXTS[text]) for text in texts)


def _block(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    names = [name for name in ("temperature", "top_p") if name in rows[0]]
    shown = {"temperature": "T", "top_p": "top-p"}
    header = [title]
    first = ["none"]
    for name in names:
        header += [f"mean {shown[name]}", "difference", f"consistency ({shown[name]})"]
        first += [f"{rows[0][name]['mean_baseline']:.3f}", "", ""]
    lines = [first]
    for row in rows:
        line = [f"{row['command']} ({row['direction']})"]
        for effect in (row[name] for name in names):
            low, high = effect["interval"]["low"], effect["interval"]["high"]
            difference = f"{effect['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
            line += [f"{effect['mean_command']:.3f}", difference, f"{100 * effect['consistency']:.0f} %"]
        lines.append(line)
    return markdown_table(header, lines)


def _of_completions(groups: Sequence[Sequence[Completion]], names: Sequence[str]) -> Means:
    """What each prompt's tokens were sampled with, all its samples together."""
    return {
        name: [float(np.concatenate([vars(one)[name] for one in group]).mean()) for group in groups] for name in names
    }


@torch.no_grad()
def _of_texts(
    model: AutoDecoForCausalLM,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    groups: Sequence[Sequence[Completion]],
    names: Sequence[str],
    batch_rows: int,
) -> Means:
    """What the heads say of given completions behind each prompt, all samples of a prompt together."""
    policy, projection, pad = model.decoding_adapter, FrozenProjection(model), special_tokens(model, tokenizer)["pad"]
    project = projection.logits if policy.needs_logits else None

    def predict(hidden: torch.Tensor, logits: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        parameters = policy(DecodeState(hidden, logits))
        return parameters.temperature, parameters.top_p

    found: Means = {name: [] for name in names}
    heads = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    size = max(1, batch_rows // max(map(len, groups)))
    for start in range(0, len(prompts), size):
        places = range(start, min(start + size, len(prompts)))
        texts = [(place, heads[place], list(one.token_ids)) for place in places for one in groups[place]]
        width = max(len(head) + len(ids) for _, head, ids in texts)
        ids = torch.full((len(texts), width), pad, device=model.device)
        attends, predicts = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (_, head, written) in enumerate(texts):
            end = len(head) + len(written)
            ids[row, :end] = torch.tensor(head + written)
            attends[row, :end] = 1
            predicts[row, len(head) - 1 : end - 1] = True
        hidden = projection.hidden_states(input_ids=ids, attention_mask=attends)
        owner = torch.tensor([place - start for place, _, _ in texts], device=model.device)
        rows = owner[predicts.nonzero()[:, 0]]
        means = mean_predictions(hidden[predicts], rows.to(hidden.device), len(places), predict, project)
        for name in names:
            found[name] += vars(means)[name].tolist()
    return found

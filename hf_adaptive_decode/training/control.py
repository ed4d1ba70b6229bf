"""Commands that ask a model for less or more diversity, put into prompts, and the ranking loss of a batch that has them
(AutoDeco, section 3.3); knows prompts and hidden states, no Trainer and no tokenizer.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..losses import IGNORE_INDEX
from ..losses.control import RankingLossConfig, RankingLossOutput, RowMeans, mean_predictions, ranking_loss
from ..policies import DecodingPolicy
from ..projection import Projection
from ..types import DecodeState

DIRECTIONS = ("low", "high")


@dataclass(frozen=True)
class CommandSet:
    """
    Sentences that ask for less and for more diversity.

    Args:
        low (`tuple` of `str`): Ask for low diversity.
        high (`tuple` of `str`): Ask for high diversity.
    """

    low: tuple[str, ...]
    high: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in DIRECTIONS:
            commands = vars(self)[name]
            listed = isinstance(commands, tuple) and len(commands) > 0
            if not listed or not all(isinstance(command, str) and command.strip() for command in commands):
                raise ValueError(f"`{name}` is {commands!r}; it has to be a tuple of one or more commands, none empty.")

    @classmethod
    def read(cls, given: CommandSet | Mapping[str, Sequence[str]] | str) -> CommandSet:
        """
        A command set as arguments name it.

        Args:
            given ([`CommandSet`], mapping or `str`): A set, a mapping of `low` and `high` to lists, or
                `"diversity"` for the training half of `DIVERSITY_COMMANDS`.

        Raises:
            `ValueError`: If it is none of these.
        """
        if isinstance(given, CommandSet):
            return given
        if given == "diversity":
            return DIVERSITY_COMMANDS["train"]
        lists = isinstance(given, Mapping) and all(isinstance(commands, list | tuple) for commands in given.values())
        if not isinstance(given, Mapping) or not lists or set(given) != set(DIRECTIONS):
            raise ValueError(
                f"the commands are {given!r}; they have to be a `CommandSet`, a mapping of 'low' and 'high' "
                "to lists, or 'diversity' for the built-in ones."
            )
        return cls(low=tuple(given["low"]), high=tuple(given["high"]))


# The held-out half is for measuring: an adapter trained on the first has seen none of its sentences.
DIVERSITY_COMMANDS: dict[str, CommandSet] = {
    "train": CommandSet(
        low=(
            "Keep the randomness of your answer low.",
            "Give the answer you are most sure of.",
            "Stay with the most likely wording.",
            "Be consistent: the same question should get the same answer.",
            "Do not experiment, just answer in the usual way.",
            "Please be as deterministic as you can.",
            "Write the safe, expected answer.",
            "Precision matters here, variety does not.",
        ),
        high=(
            "Keep the randomness of your answer high.",
            "Give an answer that few others would give.",
            "Move away from the most likely wording.",
            "Be varied: the same question may get very different answers.",
            "Experiment freely and answer in an unusual way.",
            "Please be as unpredictable as you can.",
            "Write a bold, unexpected answer.",
            "Variety matters here, precision does not.",
        ),
    ),
    "held_out": CommandSet(
        low=(
            "I want little variation between your answers.",
            "Answer conservatively.",
            "Choose what is certain over what is interesting.",
            "Surprises are not welcome in this answer.",
        ),
        high=(
            "I want a lot of variation between your answers.",
            "Answer adventurously.",
            "Choose what is interesting over what is certain.",
            "Surprises are welcome in this answer.",
        ),
    ),
}


def with_command(prompt: Any, command: str) -> Any:
    """
    A prompt with a command at its end; of a conversation, at the end of the last user message.

    Args:
        prompt (`str` or list of messages): Plain or conversational.
        command (`str`): The sentence.

    Raises:
        `ValueError`: If a conversation has no user message.

    Example:

    ```python
    >>> with_command("Tell me a story.", "Be bold.")
    'Tell me a story. Be bold.'

    ```
    """
    if isinstance(prompt, str):
        return f"{prompt} {command}"
    places = [index for index, message in enumerate(prompt) if message["role"] == "user"]
    if not places:
        raise ValueError(f"the prompt {prompt!r} has no user message to put a command into.")
    message = prompt[places[-1]]
    said = message["content"]
    # What is no text is the parts of a multimodal message.
    content = f"{said} {command}" if isinstance(said, str) else [*said, {"type": "text", "text": command}]
    return [*prompt[: places[-1]], {**message, "content": content}, *prompt[places[-1] + 1 :]]


def with_commands(rows: Any, commands: CommandSet, seed: int = 0) -> Any:
    """
    Rows with `low_prompt` and `high_prompt` beside their `prompt`.

    Which command a row gets depends on the seed and on the row's place alone.

    Args:
        rows ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or sequence of mappings): Each with a `prompt`,
            plain or conversational.
        commands ([`CommandSet`]): What to draw from.
        seed (`int`): Seeds the draws.

    Returns:
        The same kind of data set; a list for a sequence.
    """

    def add(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        rng = random.Random(f"command {seed} {index}")
        drawn = {name: rng.choice(vars(commands)[name]) for name in DIRECTIONS}
        return {**row, **{f"{name}_prompt": with_command(row["prompt"], drawn[name]) for name in DIRECTIONS}}

    if hasattr(rows, "map"):
        return rows.map(add, with_indices=True)
    return [add(row, index) for index, row in enumerate(rows)]


def count_pairs(batch: Mapping[str, torch.Tensor]) -> int:
    """Commands with a baseline that a collated batch holds."""
    targets = {name: batch[f"{name}_labels"] for name in DIRECTIONS if f"{name}_labels" in batch}
    return sum(int((labels[:, 1:] != IGNORE_INDEX).any(dim=1).sum()) for labels in targets.values())


def of_baseline(batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What of a collated batch a model takes for the prompts without commands."""
    versions = tuple(f"{name}_" for name in DIRECTIONS)
    return {name: value for name, value in batch.items() if name != "labels" and not name.startswith(versions)}


@dataclass(frozen=True)
class ControlOutput:
    """The ranking loss of a batch, and the means that it ranked by version: `"low"`, `"base"` and `"high"`."""

    ranking: RankingLossOutput
    means: dict[str, RowMeans]


def control_loss(
    policy: DecodingPolicy,
    projection: Projection,
    batch: Mapping[str, torch.Tensor],
    hidden: torch.Tensor,
    config: RankingLossConfig,
    num_pairs: int | None = None,
) -> ControlOutput:
    """
    The ranking loss of a collated batch; the model runs once for each direction.

    Args:
        policy ([`DecodingPolicy`]): The heads.
        projection ([`Projection`]): The model, frozen or not.
        batch (mapping): What [`DecodingDataCollator`] makes.
        hidden (`torch.Tensor` of shape `[B, L, H]`): Hidden states of the baselines.
        config ([`RankingLossConfig`]): The margins.
        num_pairs (`int`, *optional*): Pairs of the optimiser step; the batch's own by default.
    """

    def predict(part: torch.Tensor, logits: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        parameters = policy(DecodeState(part, logits))
        return parameters.temperature, parameters.top_p

    def means(read: Callable[[torch.Tensor], torch.Tensor], target: torch.Tensor) -> RowMeans:
        kept = target.any(dim=1).nonzero().squeeze(1)
        target = target[kept]
        flat = read(kept)[:, :-1][target] if len(kept) else hidden[:0, 0]
        rows = kept[target.nonzero()[:, 0]]
        project = projection.logits if policy.needs_logits else None
        return mean_predictions(flat, rows, len(hidden), predict, project)

    def read_version(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        ids, mask = batch[f"{name}_input_ids"], batch[f"{name}_attention_mask"]
        return lambda kept: projection.hidden_states(input_ids=ids[kept], attention_mask=mask[kept])

    targets = {name: batch[f"{name}_labels"][:, 1:] != IGNORE_INDEX for name in DIRECTIONS}
    commanded = targets["low"].any(dim=1) | targets["high"].any(dim=1)
    of_base = (batch["labels"][:, 1:] != IGNORE_INDEX) & commanded[:, None]
    low, high = (means(read_version(name), targets[name]) for name in DIRECTIONS)
    base = means(lambda kept: hidden[kept], of_base)
    ranking = ranking_loss(low, base, high, config, num_pairs=num_pairs)
    return ControlOutput(ranking, {"low": low, "base": base, "high": high})

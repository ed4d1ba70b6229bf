"""Turns TRL's data formats into token ids and labels on completions alone, and prompts with commands into versions of
the same example; knows tokenizers, no model and no loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import AdaptiveDecodeError
from ..losses import IGNORE_INDEX
from .control import DIRECTIONS, CommandSet, with_commands

Example = dict[str, Any]
_COMMANDS = tuple(f"{name}_{what}" for name in DIRECTIONS for what in ("prompt", "prompt_ids"))
_FORMATS = "`input_ids` (with `labels`), `prompt` and `completion`, `messages`, or `text`"


class DataFormatError(AdaptiveDecodeError, ValueError):
    """A data set lacks the columns of every known format, or holds nothing to learn from."""


def tokenized(
    dataset: Any,
    tokenizer: Any,
    max_length: int | None,
    chat_template_kwargs: dict[str, Any] | None = None,
    num_proc: int | None = None,
    versions: bool = False,
) -> Any:
    """
    A data set with `input_ids` and `labels` (−100 on everything but completions).

    Args:
        dataset ([`~datasets.Dataset`], [`~datasets.IterableDataset`] or sequence of `dict`): In one of TRL's formats:
            tokenised, prompt/completion (plain or conversational), messages, or text.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The base model's.
        max_length (`int`, *optional*): Longer examples are cut at the end.
        chat_template_kwargs (`dict`, *optional*): For the chat template.
        num_proc (`int`, *optional*): Processes to tokenise with.
        versions (`bool`): Whether to also tokenise `low_prompt` and `high_prompt`, the prompt with commands, to
            `low_prompt_ids` and `high_prompt_ids`; empty where a row has none.

    Raises:
        [`DataFormatError`]: If the columns fit no format, or no example has a completion within `max_length`.
    """
    if isinstance(dataset, Sequence) and not hasattr(dataset, "map"):
        rows = list(dataset)
        if not rows:
            raise DataFormatError("the data set is empty.")
        read = _reader(column_names(rows), tokenizer, chat_template_kwargs or {}, versions)
        kept = [cut for row in rows if _teaches(cut := _cut(read(row), max_length))]
        return _not_empty(kept, max_length)
    columns = column_names(dataset)
    read = _reader(columns, tokenizer, chat_template_kwargs or {}, versions)
    how = {"num_proc": num_proc, "desc": "Tokenising"} if hasattr(dataset, "num_rows") else {}
    typed = {"features": _version_features()} if versions else {}
    prepared = dataset.map(lambda row: _cut(read(row), max_length), remove_columns=columns, **typed, **how)
    how = {"num_proc": num_proc, "desc": "Dropping examples without a completion"} if how else {}
    prepared = prepared.filter(_teaches, **how)
    return _not_empty(prepared, max_length) if how else prepared


def _version_features() -> Any:
    # Types are otherwise taken from the first rows, and if none of these has a command they say nothing.
    from datasets import Features, Sequence, Value

    names = ("input_ids", "labels", *(f"{name}_prompt_ids" for name in DIRECTIONS))
    return Features({name: Sequence(Value("int64")) for name in names})


def column_names(dataset: Any) -> list[str]:
    """The columns of a data set of any kind; of a stream or a sequence, those of its first row."""
    known = dataset.column_names if hasattr(dataset, "map") else None
    return list(known or sorted(next(iter(dataset))))


def has_commands(columns: Sequence[str]) -> bool:
    """Whether there is a prompt with a command among the columns."""
    return not set(_COMMANDS).isdisjoint(columns)


def commanded(dataset: Any, commands: CommandSet, seed: int) -> Any:
    """
    The data set with `low_prompt` and `high_prompt`, made from its `prompt` unless it has its own.

    Raises:
        [`DataFormatError`]: If there is no `prompt` to make them from.
    """
    columns = column_names(dataset)
    if has_commands(columns):
        return dataset
    if "prompt" not in columns:
        raise DataFormatError(f"the data set has the columns {columns}; commands are put behind a `prompt`.")
    return with_commands(dataset, commands, seed)


def _reader(
    columns: list[str], tokenizer: Any, template: dict[str, Any], versions: bool
) -> Callable[[Example], Example]:
    read = _baseline_reader(columns, tokenizer, template)
    if not versions:
        return read
    if not has_commands(columns) or not ("input_ids" in columns or {"prompt", "completion"} <= set(columns)):
        raise DataFormatError(
            f"the data set has the columns {columns}; to learn commands it needs `prompt` and `completion` with "
            "`low_prompt` and `high_prompt`, or set `control_commands` to have those made from `prompt`."
        )

    def read_versions(row: Example) -> Example:
        heads = {f"{name}_prompt_ids": _version_ids(row, name, tokenizer, template) for name in DIRECTIONS}
        return {**read(row), **heads}

    return read_versions


def _version_ids(row: Example, name: str, tokenizer: Any, template: dict[str, Any]) -> list[int]:
    ids, prompt = row.get(f"{name}_prompt_ids"), row.get(f"{name}_prompt")
    if ids is not None or prompt is None:
        return list(ids or [])
    if isinstance(prompt, str):
        return list(tokenizer(prompt)["input_ids"])
    return _chat(prompt, tokenizer, template, add_generation_prompt=True)


def _baseline_reader(columns: list[str], tokenizer: Any, template: dict[str, Any]) -> Callable[[Example], Example]:
    if "input_ids" in columns:
        return lambda row: {
            "input_ids": list(row["input_ids"]),
            "labels": list(row["labels"] if "labels" in columns else row["input_ids"]),
        }
    if "prompt" in columns and "completion" in columns:
        return lambda row: _prompt_completion(row["prompt"], row["completion"], tokenizer, template)
    if "messages" in columns:
        return lambda row: _messages(row["messages"], tokenizer, template)
    if "text" in columns:
        return lambda row: _text(row["text"], tokenizer)
    raise DataFormatError(f"the data set has the columns {columns}; it needs {_FORMATS}.")


def _prompt_completion(prompt: Any, completion: Any, tokenizer: Any, template: dict[str, Any]) -> Example:
    if not isinstance(prompt, str):
        head = _chat(prompt, tokenizer, template, add_generation_prompt=True)
        return _after(head, _chat([*prompt, *completion], tokenizer, template), "completion")
    head = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + completion)["input_ids"]
    if whole[: len(head)] != head:
        # A token spans the border. At generation time the prompt is tokenised alone, so that is what is learned on.
        whole = head + tokenizer(completion, add_special_tokens=False)["input_ids"]
    return _after(head, _ended(whole, tokenizer), "completion")


def _messages(messages: list[Example], tokenizer: Any, template: dict[str, Any]) -> Example:
    """Labels on every assistant turn, found by rendering the conversation up to and including it."""
    whole = _chat(messages, tokenizer, template)
    labels = [IGNORE_INDEX] * len(whole)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = _chat(messages[:index], tokenizer, template, add_generation_prompt=True)
        turn = _after(head, _chat(messages[: index + 1], tokenizer, template), f"messages[{index}]")["input_ids"]
        if whole[: len(turn)] != turn:
            raise DataFormatError(
                f"the chat template renders messages[{index}] differently once later messages follow; give such data "
                "as `prompt` and `completion`, one example a turn."
            )
        labels[len(head) : len(turn)] = turn[len(head) :]
    return {"input_ids": whole, "labels": labels}


def _text(text: str, tokenizer: Any) -> Example:
    ids = _ended(tokenizer(text)["input_ids"], tokenizer)
    return {"input_ids": ids, "labels": list(ids)}


def _chat(messages: list[Example], tokenizer: Any, template: dict[str, Any], **how: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **how, **template))


def _after(head: list[int], whole: list[int], name: str) -> Example:
    if whole[: len(head)] != head:
        raise DataFormatError(
            f"the chat template does not render the prompt as the beginning of prompt and `{name}`; pass "
            "`chat_template_kwargs` under which it does, or tokenised `input_ids` and `labels`."
        )
    return {"input_ids": whole, "labels": [IGNORE_INDEX] * len(head) + whole[len(head) :]}


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """`ids` with the end-of-sequence token, which belongs to what is to be decoded well."""
    end = tokenizer.eos_token_id
    return list(ids) if end is None or (ids and ids[-1] == end) else [*ids, end]


def _cut(example: Example, max_length: int | None) -> Example:
    # The completion is cut, and then stands as it is behind each version's prompt, however long a command is.
    return {name: ids[:max_length] if name in ("input_ids", "labels") else ids for name, ids in example.items()}


def _teaches(example: Example) -> bool:
    # The first token is predicted from nothing, so its label does not count.
    return any(label != IGNORE_INDEX for label in example["labels"][1:])


def _not_empty(prepared: Any, max_length: int | None) -> Any:
    if len(prepared) == 0:
        raise DataFormatError(f"no example has a token to learn from within `max_length` = {max_length} tokens.")
    return prepared


class DecodingDataCollator:
    """
    Pads `input_ids` and `labels` on the right and adds the `attention_mask`.

    Examples with `low_prompt_ids` and `high_prompt_ids` also give `low_input_ids`, `low_labels` and
    `low_attention_mask`, and the same for `high`: the example's completion behind another prompt. A row without that
    prompt is all padding there.

    Args:
        pad_token_id (`int`): Fills `input_ids`; masked out, so any id of the vocabulary serves.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """List of examples → `torch.long` tensors of shape `[B, L]`."""
        batch = self._padded(examples)
        for name in DIRECTIONS:
            if f"{name}_prompt_ids" in examples[0]:
                version = self._padded([_version(example, f"{name}_prompt_ids") for example in examples])
                batch |= {f"{name}_{column}": tensor for column, tensor in version.items()}
        return batch

    def _padded(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)

        def padded(name: str, fill: int) -> torch.Tensor:
            rows = [list(e[name]) + [fill] * (longest - len(e[name])) for e in examples]
            return torch.tensor(rows, dtype=torch.long)

        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORE_INDEX),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        }


def _version(example: Example, prompt: str) -> Example:
    """The example's completion behind the prompt of that column."""
    head = list(example[prompt])
    if not head:
        return {"input_ids": [], "labels": []}
    completion = [label for label in example["labels"] if label != IGNORE_INDEX]
    return {"input_ids": head + completion, "labels": [IGNORE_INDEX] * len(head) + completion}

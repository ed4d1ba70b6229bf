"""Turns TRL's data formats into token ids and labels on completions alone; knows tokenizers, no model and no loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import AdaptiveDecodeError
from ..losses import IGNORE_INDEX

Example = dict[str, Any]
_FORMATS = "`input_ids` (with `labels`), `prompt` and `completion`, `messages`, or `text`"


class DataFormatError(AdaptiveDecodeError, ValueError):
    """A data set lacks the columns of every known format, or holds nothing to learn from."""


def tokenized(
    dataset: Any,
    tokenizer: Any,
    max_length: int | None,
    chat_template_kwargs: dict[str, Any] | None = None,
    num_proc: int | None = None,
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

    Raises:
        [`DataFormatError`]: If the columns fit no format, or no example has a completion within `max_length`.
    """
    if isinstance(dataset, Sequence) and not hasattr(dataset, "map"):
        rows = list(dataset)
        if not rows:
            raise DataFormatError("the data set is empty.")
        read = _reader(sorted(rows[0]), tokenizer, chat_template_kwargs or {})
        kept = [cut for row in rows if _teaches(cut := _cut(read(row), max_length))]
        return _not_empty(kept, max_length)
    columns = dataset.column_names or sorted(next(iter(dataset)))
    read = _reader(columns, tokenizer, chat_template_kwargs or {})
    how = {"num_proc": num_proc, "desc": "Tokenising"} if hasattr(dataset, "num_rows") else {}
    prepared = dataset.map(lambda row: _cut(read(row), max_length), remove_columns=columns, **how)
    how = {"num_proc": num_proc, "desc": "Dropping examples without a completion"} if how else {}
    prepared = prepared.filter(_teaches, **how)
    return _not_empty(prepared, max_length) if how else prepared


def _reader(columns: list[str], tokenizer: Any, template: dict[str, Any]) -> Callable[[Example], Example]:
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
    return example if max_length is None else {name: ids[:max_length] for name, ids in example.items()}


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

    Args:
        pad_token_id (`int`): Fills `input_ids`; masked out, so any id of the vocabulary serves.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """List of examples → `torch.long` tensors of shape `[B, L]`."""
        longest = max(len(example["input_ids"]) for example in examples)

        def padded(name: str, fill: int) -> torch.Tensor:
            return torch.tensor([list(e[name]) + [fill] * (longest - len(e[name])) for e in examples])

        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORE_INDEX),
            "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        }

"""Turns TRL's data formats into token ids and labels on completions alone, and prompts with commands into versions of
the same example; knows tokenizers, no model and no loss.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch.nn.utils.rnn import pad_sequence

from ..errors import AdaptiveDecodeError, MissingExtraError
from ..losses import IGNORE_INDEX
from .control import DIRECTIONS, CommandSet, with_commands
from .epoch_cache_options import ROW_COLUMN

Example = dict[str, Any]
_COMMANDS = tuple(f"{name}_{what}" for name in DIRECTIONS for what in ("prompt", "prompt_ids"))
_FORMATS = "`input_ids` (with `labels`), `prompt` and `completion`, `messages` or `conversations`, or `text`"


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
            tokenised, prompt/completion (plain or conversational), messages (or conversations of from/value), or text;
            with them `tools` and `chat_template_kwargs` of a row's own.
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
    return _chat(prompt, tokenizer, _settings(row, template), add_generation_prompt=True)


def _baseline_reader(columns: list[str], tokenizer: Any, template: dict[str, Any]) -> Callable[[Example], Example]:
    if "input_ids" in columns:
        return lambda row: {
            "input_ids": list(row["input_ids"]),
            "labels": list(row["labels"] if "labels" in columns else row["input_ids"]),
        }
    if "prompt" in columns and "completion" in columns:
        return lambda row: _prompt_completion(row, tokenizer, template)
    if "messages" in columns or "conversations" in columns:
        return lambda row: _rendered(_messages, row, tokenizer, template)
    if "text" in columns:
        return lambda row: _text(row["text"], tokenizer)
    raise DataFormatError(f"the data set has the columns {columns}; it needs {_FORMATS}.")


def _prompt_completion(row: Example, tokenizer: Any, template: dict[str, Any]) -> Example:
    if not isinstance(row["prompt"], str):
        return _rendered(_conversation, row, tokenizer, template)
    head, whole = _joined(row["prompt"], row["completion"], tokenizer)
    return _after(head, _ended(whole, tokenizer))


def _joined(prompt: str, completion: str, tokenizer: Any, **how: Any) -> tuple[list[int], list[int]]:
    """Tokens of a prompt, and of the prompt with its completion."""
    head = list(tokenizer(prompt, **how)["input_ids"])
    whole = list(tokenizer(prompt + completion, **how)["input_ids"])
    if whole[: len(head)] != head:
        # A token spans the border. At generation time the prompt is tokenised alone, so that is what is learned on.
        whole = head + tokenizer(completion, add_special_tokens=False)["input_ids"]
    return head, whole


def _rendered(read: Callable[..., Example], row: Example, tokenizer: Any, template: dict[str, Any]) -> Example:
    """A conversational row; by TRL's training template where the tokenizer's own does not do, and TRL has one."""
    from jinja2 import TemplateError

    trl = _trl()
    columns = ("prompt", "completion", "messages", "conversations")
    said = trl.maybe_convert_to_chatml(copy.deepcopy({name: row[name] for name in columns if name in row}))
    settings = _settings(row, template)
    try:
        return read(said, tokenizer, settings)
    except DataFormatError:
        try:
            trained = trl.get_training_chat_template(tokenizer)
        except (ValueError, TemplateError):  # it does not know the template, or cannot try it
            trained = None
        if trained is None:
            raise
    return read(said, tokenizer, {**settings, "chat_template": trained})


def _settings(row: Example, template: dict[str, Any]) -> dict[str, Any]:
    """For the chat template: what the caller says, and the row's own `tools` and `chat_template_kwargs`."""
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return {**({"tools": tools} if tools else {}), **template, **(row.get("chat_template_kwargs") or {})}


def _conversation(said: Example, tokenizer: Any, settings: dict[str, Any]) -> Example:
    how = {name: value for name, value in settings.items() if name != "tools"}

    def render(*columns: str) -> dict[str, str]:
        example: Example = {name: said[name] for name in columns} | {"chat_template_kwargs": how}
        return cast(dict[str, str], _trl().apply_chat_template(example, tokenizer, settings.get("tools")))

    both, prompt = render("prompt", "completion"), render("prompt")["prompt"]
    if both["prompt"] != prompt:  # TRL cuts it to what the two have in common
        raise _no_beginning("completion")
    return _after(*_joined(prompt, both["completion"], tokenizer, add_special_tokens=False))


def _messages(said: Example, tokenizer: Any, settings: dict[str, Any]) -> Example:
    """Labels on every assistant turn, found by rendering the conversation up to and including it."""
    messages = said["messages"]
    whole = _chat(messages, tokenizer, settings)
    labels = [IGNORE_INDEX] * len(whole)
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = _chat(messages[:index], tokenizer, settings, add_generation_prompt=True)
        turn = _chat(messages[: index + 1], tokenizer, settings)
        if turn[: len(head)] != head:
            raise _no_beginning(f"messages[{index}]")
        if whole[: len(turn)] != turn:
            raise DataFormatError(
                f"the chat template renders messages[{index}] differently once later messages follow; give such data "
                "as `prompt` and `completion`, one example a turn."
            )
        labels[len(head) : len(turn)] = turn[len(head) :]
    return {"input_ids": whole, "labels": labels}


def _text(text: str, tokenizer: Any) -> Example:
    return _after([], _ended(tokenizer(text)["input_ids"], tokenizer))


def _chat(messages: list[Example], tokenizer: Any, template: dict[str, Any], **how: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **how, **template))


def _no_beginning(name: str) -> DataFormatError:
    return DataFormatError(
        f"the chat template does not render the prompt as the beginning of prompt and `{name}`; pass "
        "`chat_template_kwargs` under which it does, or tokenised `input_ids` and `labels`."
    )


def _after(head: list[int], whole: list[int]) -> Example:
    return {"input_ids": whole, "labels": [IGNORE_INDEX] * len(head) + whole[len(head) :]}


def _trl() -> Any:
    try:
        import trl
    except ImportError as error:
        raise MissingExtraError("trl", "train") from error
    return trl


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
    prompt is all padding there. A `cache_row`, a row's number, is passed on: `[B]`.

    Args:
        pad_token_id (`int`): Fills `input_ids`; masked out, so any id of the vocabulary serves.
    """

    def __init__(self, pad_token_id: int) -> None:
        self.pad_token_id = pad_token_id

    def __call__(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        """List of examples → `torch.long` tensors of shape `[B, L]`."""
        batch = self._padded(examples)
        if ROW_COLUMN in examples[0]:
            batch[ROW_COLUMN] = torch.tensor([example[ROW_COLUMN] for example in examples])
        for name in DIRECTIONS:
            if f"{name}_prompt_ids" in examples[0]:
                version = self._padded([_version(example, f"{name}_prompt_ids") for example in examples])
                batch |= {f"{name}_{column}": tensor for column, tensor in version.items()}
        return batch

    def _padded(self, examples: list[Example]) -> dict[str, torch.Tensor]:
        def padded(name: str, fill: int) -> torch.Tensor:
            rows = [torch.tensor(example[name], dtype=torch.long) for example in examples]
            return pad_sequence(rows, batch_first=True, padding_value=fill)

        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        return {
            "input_ids": padded("input_ids", self.pad_token_id),
            "labels": padded("labels", IGNORE_INDEX),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        }


def _version(example: Example, prompt: str) -> Example:
    """The example's completion behind the prompt of that column."""
    head = list(example[prompt])
    if not head:
        return {"input_ids": [], "labels": []}
    completion = [label for label in example["labels"] if label != IGNORE_INDEX]
    return {"input_ids": head + completion, "labels": [IGNORE_INDEX] * len(head) + completion}

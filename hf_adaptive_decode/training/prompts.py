"""What a trainer's groups are prompted with and may spend; knows data sets and templates, not models or rewards."""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch.utils.data import Dataset, IterableDataset

from ..budget import MAX_BUDGET, whole_budget
from ..errors import BudgetError
from .data import DataFormatError

Message = dict[str, Any]
Prompt = str | list[Message]

_ROLES = ("user", "system")
_PROMPT_WANTED = "a non-empty `str`, or a non-empty list of messages such as {'role': 'user', 'content': '...'}"
_CHOICES_WANTED = f"a whole number from 1 to {MAX_BUDGET}, a list of them, a `range` or {{'low': ..., 'high': ...}}"


@dataclass(frozen=True)
class CoTTemplate:
    """
    What is added to a prompt to ask for a chain of thought, or for an answer without one.

    Args:
        cot (`str`): Asks for a chain of thought; an empty text adds nothing.
        direct (`str`): Asks for an answer straight away; an empty text adds nothing.
        role (`str`): `"user"` appends the text to the last user message, or to a plain prompt after a newline.
            `"system"` appends it to the system message, which is put in front of a conversation that has none; in
            front of a plain prompt it is a first line.

    Raises:
        `ValueError`: If `role` is another one, or a text is no `str`.
    """

    cot: str
    direct: str = ""
    role: str = "user"

    def __post_init__(self) -> None:
        for name in ("cot", "direct"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"a template's `{name}` is {getattr(self, name)!r}; it has to be a `str`.")
        if self.role not in _ROLES:
            raise ValueError(f"a template's `role` is {self.role!r}; pass one of {list(_ROLES)}.")


# "math" and "code" are what appendix D.2 prints, character by character: it writes two backslashes, and `/nothink`
# where Qwen3's own switch is spelled `/no_think`. Results are compared with the paper's, so neither is mended here.
COT_TEMPLATES: dict[str, CoTTemplate] = {
    "math": CoTTemplate(
        cot=r"Provide the final answer within `\\boxed{}`. /think",
        direct=r"Provide the final answer within `\\boxed{}`. /nothink",
        role="user",
    ),
    "code": CoTTemplate(
        cot="You are a coding assistant. Please reason step by step. /think",
        direct="You are a coding assistant. /nothink",
        role="system",
    ),
    "step_by_step": CoTTemplate(cot="Let's think step by step.", direct="", role="user"),
}
_TEMPLATE_WANTED = (
    f"one of the presets {list(COT_TEMPLATES)}, the text itself (of several words), a `CoTTemplate` or a mapping with "
    "`cot`, `direct` and `role`"
)


def as_template(value: str | CoTTemplate | Mapping[str, Any]) -> CoTTemplate:
    """
    A template from the ways in which one can be named.

    Args:
        value (`str`, [`CoTTemplate`] or mapping): A preset's name, a text of several words to ask for a chain of
            thought with (as `role="user"`, with nothing for a direct answer), or the fields of a [`CoTTemplate`].

    Raises:
        `ValueError`: If it is none of them.
    """
    if isinstance(value, CoTTemplate):
        return value
    if isinstance(value, Mapping):
        known = [field.name for field in fields(CoTTemplate)]
        if "cot" not in value or not set(value) <= set(known):
            raise ValueError(f"the template has the keys {list(value)}; it needs `cot` and may have {known[1:]}.")
        return CoTTemplate(**value)
    if isinstance(value, str):
        if value in COT_TEMPLATES:
            return COT_TEMPLATES[value]
        # One word is a preset misspelled rather than a text to think by.
        if len(value.split()) > 1:
            return CoTTemplate(cot=value)
    raise ValueError(f"the template is {value!r}; pass {_TEMPLATE_WANTED}.")


def apply_template(prompt: Prompt, template: CoTTemplate, with_cot: bool) -> Prompt:
    """
    A new prompt of the same kind that asks for a chain of thought, or for none.

    Args:
        prompt (`str` or list of messages): Is left as it is.
        template ([`CoTTemplate`]): What to add, and where.
        with_cot (`bool`): Whether `template.cot` or `template.direct` is added.

    Raises:
        [`DataFormatError`]: If the text belongs to a user message and the conversation has none.
    """
    text = template.cot if with_cot else template.direct
    if isinstance(prompt, str):
        if not text:
            return prompt
        return f"{text}\n{prompt}" if template.role == "system" else f"{prompt}\n{text}"
    messages = list(prompt)
    if not text:
        return messages
    spoken = [index for index, message in enumerate(messages) if message["role"] == template.role]
    if spoken:
        index = spoken[0 if template.role == "system" else -1]
        messages[index] = _appended(messages[index], text)
        return messages
    if template.role == "system":
        return [{"role": "system", "content": text}, *messages]
    raise DataFormatError(
        f"the conversation has messages of the roles {[message['role'] for message in messages]}; the template's text "
        "is appended to a 'user' message, so add one or pass a template with `role='system'`."
    )


def _appended(message: Message, text: str) -> Message:
    changed = copy.deepcopy(message)
    content = changed["content"]
    if isinstance(content, list):
        content.append({"type": "text", "text": f"\n{text}"})
    else:
        changed["content"] = f"{content}\n{text}" if content else text
    return changed


class PromptDataset(Dataset[dict[str, Any]]):
    """
    Prompts with the columns that go with them, of one data set or of several mixed in equal parts.

    Of *m* sets, item *i* is item *i // m* of set *i % m*, around again in the smaller ones, as far as the largest goes.
    So every stretch of items is balanced, and an item's index names its prompt for good.

    Args:
        source ([`~datasets.Dataset`], sequence of `dict`, or mapping of names to those): Rows with a `prompt`, plain or
            conversational. What the sets of a mapping do not share is `None` where a set lacks it, and a column
            `dataset` holds the set's name, unless a set has a column of that name.
        name (`str`): What errors call it.

    Raises:
        [`DataFormatError`]: If a set is empty, cannot be indexed, or lacks a usable `prompt`.
    """

    def __init__(self, source: Any, name: str = "train_dataset") -> None:
        self._mixed = isinstance(source, Mapping)
        named = {f"{name}[{key!r}]": rows for key, rows in source.items()} if self._mixed else {name: source}
        if not named:
            raise DataFormatError(f"`{name}` is a mapping of no data sets; pass at least one.")
        self._keys = list(source) if self._mixed else []
        self._labels, self._sets = list(named), list(named.values())
        found = [_columns(rows, label) for label, rows in named.items()]
        self._columns = list(dict.fromkeys(column for columns in found for column in columns if column != "prompt"))
        self._names_sets = self._mixed and "dataset" not in self._columns
        for position in range(len(self._sets)):
            _ = self[position]

    def __len__(self) -> int:
        return len(self._sets) * max(map(len, self._sets))

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`index`, `prompt`, and the other `columns` of an item."""
        index, length = operator.index(index), len(self)
        if not -length <= index < length:
            raise IndexError(f"item {index} of {length}")
        index %= length
        turn, which = divmod(index, len(self._sets))
        rows, label = self._sets[which], self._labels[which]
        position = turn % len(rows)
        row = _checked_row(rows[position], label, position)
        columns = {**dict.fromkeys(self._columns), **row}
        prompt = _checked_prompt(columns.pop("prompt", None), label, position)
        if self._names_sets:
            columns["dataset"] = self._keys[which]
        return {"index": index, "prompt": prompt, "columns": columns}


def _columns(rows: Any, label: str) -> list[str]:
    """The columns of one set, once it is clear that it is a set of rows that can be drawn by their index."""
    sized = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
    if isinstance(rows, Iterable) and (isinstance(rows, IterableDataset) or not sized):
        raise DataFormatError(
            f"`{label}` is an iterable data set ({type(rows).__name__}); what a prompt is trained with is drawn by the "
            "index of its row, so pass a map-style data set: `Dataset.from_generator(...)`, or `list(...)` of it."
        )
    if not sized or isinstance(rows, str | bytes | Mapping):
        raise DataFormatError(f"`{label}` is {rows!r:.200}; pass a `datasets.Dataset` or a list of `dict`.")
    if len(rows) == 0:
        raise DataFormatError(f"`{label}` is empty; pass at least one row with a `prompt`.")
    columns = getattr(rows, "column_names", None)
    if columns is None:
        # Rows of a list may each lack other columns; those of a lazy sequence may be costly to load.
        known = rows if isinstance(rows, list | tuple) else [rows[0]]
        columns = dict.fromkeys(key for index, row in enumerate(known) for key in _checked_row(row, label, index))
    if "prompt" not in columns:
        raise DataFormatError(
            f"`{label}` has the columns {list(columns)}; it needs `prompt`, plain (`str`) or conversational (a list of "
            "messages)."
        )
    return list(columns)


def _checked_row(row: Any, label: str, index: int) -> Mapping[str, Any]:
    if not isinstance(row, Mapping):
        raise DataFormatError(f"`{label}[{index}]` is {row!r:.200}; every row has to be a `dict` with a `prompt`.")
    return row


def _checked_prompt(prompt: Any, label: str, index: int) -> Prompt:
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(prompt, list | tuple) and prompt and all(map(_is_message, prompt)):
        # Arrow tables give every message the keys of all others, filled with None.
        return [{k: v for k, v in said.items() if v is not None or k == "content"} for said in prompt]
    raise DataFormatError(f"the `prompt` of `{label}[{index}]` is {prompt!r:.200}; it has to be {_PROMPT_WANTED}.")


def _is_message(said: Any) -> bool:
    if not isinstance(said, Mapping) or not isinstance(said.get("role"), str) or "content" not in said:
        return False
    # A turn that only calls tools says nothing.
    return isinstance(said["content"], str | list) or bool(said.get("tool_calls"))


@dataclass(frozen=True)
class Draw:
    """
    What one group is given.

    Args:
        prompt (`str` or list of messages): The prompt with the template's text.
        with_cot (`bool`): Whether it asks for a chain of thought.
        tokens (`int`): Token budget of each completion.
        samples (`int`): Parallel budget B.
    """

    prompt: Prompt
    with_cot: bool
    tokens: int
    samples: int


class Drawer:
    """
    Draws what a group is given, from nothing but the seed, the step and the prompt's index.

    So a group gets the same in every process, however the batch around it is composed.

    Args:
        tokens (`int`, list of `int`, `range` or mapping): Token budget, or what to draw it from uniformly: one of a
            list, of a `range` (without its end, as in Python), or of `{"low": ..., "high": ...}` (with both ends).
        samples (`int`, list of `int`, `range` or mapping): Parallel budget B, likewise.
        cot_ratio (`float`): Part of the groups that is asked for a chain of thought.
        template (`str`, [`CoTTemplate`] or mapping, *optional*): As [`as_template`] takes it. With `cot_ratio` 0 every
            prompt gets the text for a direct answer.
        seed (`int`): For other draws.

    Raises:
        [`BudgetError`]: If `tokens` or `samples` holds anything but positive whole numbers.
        `ValueError`: If `cot_ratio` is outside [0, 1], or above 0 without a template, or the template is unknown.
    """

    def __init__(self, tokens: Any, samples: Any, cot_ratio: float = 0.0, template: Any = None, seed: int = 0) -> None:
        if isinstance(cot_ratio, bool) or not isinstance(cot_ratio, int | float) or not 0 <= cot_ratio <= 1:
            raise ValueError(f"`cot_ratio` is {cot_ratio!r}; it has to be a number from 0 to 1.")
        if template is None and cot_ratio > 0:
            raise ValueError(
                f"`cot_ratio` is {cot_ratio} and there is no template to ask with; pass {_TEMPLATE_WANTED}."
            )
        self._tokens, self._samples = _choices(tokens, "tokens"), _choices(samples, "samples")
        self.cot_ratio = float(cot_ratio)
        self.template = None if template is None else as_template(template)
        self.seed = operator.index(seed)

    @property
    def largest_tokens(self) -> int:
        """The largest token budget that can be drawn."""
        return _largest(self._tokens)

    @property
    def largest_samples(self) -> int:
        """The largest parallel budget that can be drawn."""
        return _largest(self._samples)

    def draw(self, index: int, step: int, prompt: Prompt) -> Draw:
        """What the group of a prompt, by its `index` in the data set, is given at a `step`; `prompt` stays as it is."""
        # Seeded by a string, which is hashed the same way everywhere. Only `random()` promises the same numbers from
        # one Python version to the next, and it takes one number a draw, so that no draw depends on another's settings.
        rng = random.Random(f"{self.seed} {operator.index(step)} {operator.index(index)}")
        with_cot = rng.random() < self.cot_ratio
        tokens, samples = (one_of[int(rng.random() * len(one_of))] for one_of in (self._tokens, self._samples))
        if self.template is not None:
            prompt = apply_template(prompt, self.template, with_cot)
        return Draw(prompt, with_cot, tokens, samples)


def _choices(value: Any, name: str) -> Sequence[int]:
    """The numbers to draw from, all of them checked; ranges stay ranges, however long."""
    if isinstance(value, Mapping):
        if set(value) != {"low", "high"}:
            raise BudgetError(f"`{name}` has the keys {list(value)}; it has to be {_CHOICES_WANTED}.")
        low, high = (_positive(value[end], f"{name}[{end!r}]") for end in ("low", "high"))
        numbers: Any = range(low, high + 1)
    else:
        numbers = value if isinstance(value, range | list | tuple) else (value,)
    if not numbers:
        raise BudgetError(f"`{name}` is {value!r}, which holds no number; it has to be {_CHOICES_WANTED}.")
    if isinstance(numbers, range):
        _positive(numbers[0], f"the first number of {name}")
        _positive(numbers[-1], f"the last number of {name}")
        return numbers
    return tuple(_positive(n, f"{name}[{i}]" if numbers is value else name) for i, n in enumerate(numbers))


def _positive(value: Any, name: str) -> int:
    number = whole_budget(value)
    if number is None:
        raise BudgetError(f"`{name}` is {value!r}; it has to be {_CHOICES_WANTED}.")
    return number


def _largest(one_of: Sequence[int]) -> int:
    # The maximum of a range would be looked for one by one.
    return max(one_of[0], one_of[-1]) if isinstance(one_of, range) else max(one_of)

"""Reads `--config` files into the words of a command line, checked name by name; knows argparse, and no command."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

Fill = Callable[[argparse.ArgumentParser, str], None]
_ARGUMENT_NAMED = re.compile(r"^argument [^:]*: ")


class UsageError(Exception):
    """Arguments that cannot be meant; ends a command with exit code 2."""


class ConfigFileError(Exception):
    """A config file that cannot be read, or a name or value in it that its command does not take."""


def with_config_file(command: str, words: Sequence[str], commands: Mapping[str, str], fill: Fill) -> list[str]:
    """
    The words of a command line with those of its `--config` file, wherever the user's own say nothing.

    A file holds `name: value` lines. A name that is a command's, with such lines of its own below it, makes them that
    command's; the lines outside of these are for all commands that know them. The whole file is checked, so that a run
    of several commands does not stop at the third for a name.

    Args:
        command (`str`): The command.
        words (sequence of `str`): What follows it.
        commands (mapping): The names of all commands.
        fill (`Callable`): Adds the arguments of a command to a parser.

    Raises:
        [`ConfigFileError`]: If there is something wrong with the file; names the file and the line's name.
    """
    words = list(words)
    path = _path(words)
    if path is None or {"-h", "--help"} & set(words):
        return words
    try:
        return _Reader(Path(path), commands, fill).words(command, words)
    except ConfigFileError as error:
        raise ConfigFileError(f"--config {path}: {error}") from error


def _path(words: Sequence[str]) -> str | None:
    only = _Parser(add_help=False, allow_abbrev=False)
    only.add_argument("--config")
    try:
        found: str | None = only.parse_known_args(words)[0].config
    except ConfigFileError:  # it has no value, which the command's own parser says
        return None
    return found


class _Parser(argparse.ArgumentParser):
    """A parser that raises where others exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigFileError(_ARGUMENT_NAMED.sub("", message))


def _tolerant(fill: Fill, command: str) -> _Parser:
    """A command's parser that needs nothing and tells what was given from what is only a default."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    fill(parser, command)
    for action in parser._actions:
        action.default, action.required = argparse.SUPPRESS, False
        if not action.option_strings and action.nargs is None:
            action.nargs = "?"
    parser._defaults.clear()
    return parser


class _Reader:
    """One file."""

    def __init__(self, path: Path, commands: Mapping[str, str], fill: Fill) -> None:
        self._fill, self._parsers = fill, dict[str, _Parser]()
        values = _read(path)
        self.sections: dict[str, dict[str, Any]] = {}
        self.shared: dict[str, Any] = {}
        for name, value in values.items():
            word = name.replace("_", "-")
            if word in commands and isinstance(value, dict):
                self.sections[word] = {_key(own): one for own, one in value.items()}
            else:
                self.shared[name] = value

    def words(self, command: str, given: list[str]) -> list[str]:
        """What the file and the user say to a command."""
        self._check(command)
        own = self.sections.get(command, {})
        names = self._actions(command)
        shared = {name: value for name, value in self.shared.items() if name in names}
        values = self._without(command, shared, own) | own
        try:
            asked = set(vars(self._parser(command).parse_known_args(given)[0]))
        except ConfigFileError:  # the command's own parser says it better
            return given
        by_user = {name: None for name, action in names.items() if action.dest in asked}
        values = {name: value for name, value in self._without(command, values, by_user).items() if value is not None}
        found = {name: _as_words(action, values[name]) for name, action in names.items() if name in values}
        flags = [word for name, part in found.items() if names[name].option_strings for word in part]
        places = [word for name, part in found.items() if not names[name].option_strings for word in part]
        # Behind the user's own, since places are filled from the left, and not as a part of the list before them.
        return [*flags, *given, *(["--"] if places and "--" not in given else []), *places]

    def _check(self, command: str) -> None:
        known = set[str]()
        for word in {command: None, **self.sections}:
            names = self._actions(word)
            known |= set(names)
            if word in self.sections:
                self._check_values(word, self.sections[word])
            self._check_values(word, {name: value for name, value in self.shared.items() if name in names})
        for name in self.shared:
            if name not in known:
                whom = f"`{command}`" if not self.sections else f"any of {', '.join({command: None, **self.sections})}"
                raise ConfigFileError(f"`{name}` is no argument of {whom}; --help lists them.")

    def _check_values(self, command: str, values: Mapping[str, Any]) -> None:
        names = self._actions(command)
        for name, value in values.items():
            if name not in names:
                raise ConfigFileError(f"`{name}` is no argument of `{command}`; --help lists them.")
            if value is None:
                continue
            try:
                words = _as_words(names[name], value)
                self._parser(command).parse_args(words if names[name].option_strings else ["--", *words])
            except ConfigFileError as error:
                raise ConfigFileError(f"`{name}` of `{command}`: {error}") from error
        for group in self._parser(command)._mutually_exclusive_groups:
            both = [name for name in values if values[name] is not None and names[name] in group._group_actions]
            if len(both) > 1:
                raise ConfigFileError(f"`{both[0]}` and `{both[1]}` of `{command}` exclude each other.")

    def _without(self, command: str, values: dict[str, Any], stronger: Mapping[str, Any]) -> dict[str, Any]:
        """The values that nothing stronger replaces or excludes."""
        names = self._actions(command)
        ruled_out = set(stronger)
        for group in self._parser(command)._mutually_exclusive_groups:
            members = {name for name, action in names.items() if action in group._group_actions}
            ruled_out |= members if members & set(stronger) else set()
        return {name: value for name, value in values.items() if name not in ruled_out}

    def _parser(self, command: str) -> _Parser:
        if command not in self._parsers:
            self._parsers[command] = _tolerant(self._fill, command)
        return self._parsers[command]

    def _actions(self, command: str) -> dict[str, argparse.Action]:
        """The arguments of a command by the names that a file may use."""
        found = {_name(action): action for action in self._parser(command)._actions}
        return {name: action for name, action in found.items() if name != "config"}


def _name(action: argparse.Action) -> str:
    long = [word for word in action.option_strings if word.startswith("--")]
    return (long[0][2:] if long else action.dest).replace("-", "_")


def _as_words(action: argparse.Action, value: Any) -> list[str]:
    """An argument with its value as one would type it."""
    flag = action.option_strings[0] if action.option_strings else None
    if flag is not None and (action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction)):
        if not isinstance(value, bool):
            raise ConfigFileError(f"{value!r} is neither true nor false.")
        off = [word for word in action.option_strings if word.startswith("--no-")]
        return [flag] if value else off[:1]
    if isinstance(action, argparse._AppendAction) and action.nargs is None:
        return [f"{flag}={_word(one)}" for one in _items(value)]
    repeats = isinstance(action, argparse._AppendAction) and isinstance(value, list)
    if repeats and any(isinstance(one, list) for one in value):
        return [word for one in value for word in [str(flag), *_listed(one)]]
    if action.nargs is None or action.nargs == "?":
        return [_word(value)] if flag is None else [f"{flag}={_word(value)}"]
    return [*([flag] if flag is not None else []), *_listed(value)]


def _items(value: Any) -> list[Any]:
    """What a repeatable flag is given, a mapping being NAME=VALUE for each of its lines."""
    if isinstance(value, dict):
        return [f"{name}={one if isinstance(one, str) else json.dumps(one)}" for name, one in value.items()]
    return value if isinstance(value, list) else [value]


def _listed(value: Any) -> list[str]:
    words = [_word(one) for one in _items(value)]
    if not words:
        raise ConfigFileError("the list is empty; leave the line out for the default.")
    for word in words:
        if word.startswith("-") and not re.fullmatch(r"-\.?\d[\d.eE+-]*", word):
            raise ConfigFileError(f"{word!r} begins like a flag.")
    return words


def _word(value: Any) -> str:
    if isinstance(value, bool):
        raise ConfigFileError(f"it takes a value, and {str(value).lower()} is none; put a text in quotes.")
    if isinstance(value, list | dict):
        what = "a list" if isinstance(value, list) else "lines of its own"
        raise ConfigFileError(f"it takes one value, and has {what}: {value!s:.80}.")
    if value is None:
        raise ConfigFileError("one of its values is empty.")
    return str(value)


def _read(path: Path) -> dict[str, Any]:
    """The lines of the file, with `_` for `-` in their names."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain values only; refuses what stands there twice, of which YAML's readers take the last in silence."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            lines: dict[Any, int] = {}
            for key, _ in node.value:
                line, name = key.start_mark.line + 1, str(key.value).replace("-", "_")
                if name in lines and name != "<<":
                    raise ConfigFileError(f"`{key.value}` stands there twice, in the lines {lines[name]} and {line}.")
                lines[name] = line
            return dict(super().construct_mapping(node, deep=deep))

    # As YAML 1.2 has it: in the readers' 1.1 `dft_weight: off` would be false, 12:30 a number, and 5e-6 a text.
    Loader.yaml_implicit_resolvers = {}
    for tag, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?(0|[1-9]\d*)", list("-+0123456789")),
        ("float", r"[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?", list("-+.0123456789")),
        ("merge", r"<<", ["<"]),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), first)
    try:
        loader = Loader(path.read_text(encoding="utf-8-sig"))
        values = loader.get_single_data()
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigFileError(f"it cannot be read: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigFileError(f"it holds a {type(values).__name__}; it has to hold `name: value` lines.")
    return {_key(name): value for name, value in values.items()}


def _key(name: Any) -> str:
    if not isinstance(name, str):
        raise ConfigFileError(f"`{name}` is no name.")
    return name.replace("-", "_")

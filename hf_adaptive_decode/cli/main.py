"""`hf-adaptive-decode COMMAND`: parses, runs, reports; knows each command's name and loads only the one asked for."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import AdaptiveDecodeError

COMMANDS = {
    "demo": "train heads on the embedded model and compare them with every baseline",
    "env": "print what a bug report needs",
    "evaluate": "measure adapters against every baseline on any tasks, with a verdict",
    "select-actions": "choose an action set by greedy coverage on validation problems",
    "trace": "show each token of a completion with what it was decoded with, as a page",
    "train-policy": "train a token or prompt policy by REINFORCE and compare it with every baseline",
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; only `command`'s own arguments are filled in, so that `--help` stays fast."""
    parser = argparse.ArgumentParser(prog="hf-adaptive-decode", description="Learned decoding for language models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        own = commands.add_parser(name, help=summary, description=summary)
        if name == command:
            own.add_argument("--config", metavar="FILE.yaml", help="read arguments from a file; flags win over it")
            own.add_argument("--json", metavar="FILE", help="write the result as JSON ('-' for standard output)")
            _module(name).add_arguments(own)
    return parser


def _module(command: str) -> Any:
    return importlib.import_module(f".{command.replace('-', '_')}", __package__)


def _config_flags(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    """The values of the `--config` file as flags, so that argparse checks their names and types too."""
    only_config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config")
    path = only_config.parse_known_args(words)[0].config
    if path is None:
        return []
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be read: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} holds a {type(values).__name__}; it has to hold `name: value` lines.")
    return [part for name, value in values.items() for part in _as_flags(str(name), value)]


def _as_flags(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag] if value else [f"--no-{name.replace('_', '-')}"]
    return [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0, or 1 if it failed; wrong usage exits with 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(words[0] if words else None)
    # In front of the user's own flags, which so win.
    args = parser.parse_args([*words[:1], *_config_flags(parser, words[1:]), *words[1:]])
    try:
        result = _module(args.command).run(args)
    except (AdaptiveDecodeError, ValueError, OSError) as error:
        print(f"hf-adaptive-decode {args.command}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    if args.json:
        text = json.dumps(result, indent=2) + "\n"
        if args.json == "-":
            print(text, end="")
        else:
            Path(args.json).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

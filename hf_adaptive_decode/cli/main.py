"""`hf-adaptive-decode COMMAND`: parses, runs, reports; knows each command's name and loads only the one asked for."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..errors import AdaptiveDecodeError
from .config_file import ConfigFileError, UsageError, with_config_file
from .launched import is_main

COMMANDS = {
    "demo": "train heads on the embedded model and compare them with every baseline",
    "sample": "sample a model's own solutions and keep the right ones, as a data set to train heads on",
    "train-heads": "train temperature and top-p heads on text, or on solutions that the model itself samples",
    "train-policy": "train a token or prompt policy by REINFORCE and compare it with every baseline",
    "select-actions": "choose an action set by greedy coverage on validation problems",
    "evaluate": "measure adapters against every baseline on any tasks, with a verdict",
    "trace": "show each token of a completion with what it was decoded with, as a page",
    "convert": "turn released AutoDeco checkpoints into adapters and back, merge and split",
    "push": "upload an adapter's folder with its card to the Hub",
    "env": "print what a bug report needs",
}
_PROGRAM = "hf-adaptive-decode"


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser; only `command`'s own arguments are filled in, so that `--help` stays fast."""
    parser = argparse.ArgumentParser(prog=_PROGRAM, description="Learned decoding for language models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, summary in COMMANDS.items():
        # A shortened `--conf` would be taken for `--config`, and nobody would read the file.
        own = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        if name == command:
            fill_parser(own, name)
    return parser


def fill_parser(parser: argparse.ArgumentParser, command: str) -> None:
    """Adds the arguments of a command, those that all have first."""
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="read arguments from a file of `name: value` lines, or with such lines for each command under its name; "
        "flags win over it",
    )
    parser.add_argument("--json", metavar="FILE", help="write the result as JSON ('-' for standard output)")
    _module(command).add_arguments(parser)


def _module(command: str) -> Any:
    return importlib.import_module(f".{command.replace('-', '_')}", __package__)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """
    The arguments that the words of a command line and its `--config` file say.

    Raises:
        `SystemExit`: With 2 if the usage is wrong, and with 0 where help was asked for.
    """
    command = words[0] if words else None
    parser = build_parser(command)
    if command in COMMANDS:
        try:
            words = [command, *with_config_file(command, words[1:], COMMANDS, fill_parser)]
        except ConfigFileError as error:
            _refuse(command, str(error))
    args, unknown = parser.parse_known_args(words)
    if unknown:
        _refuse(args.command, f"unrecognized arguments: {' '.join(unknown)}")
    return args


def _refuse(command: str, said: str) -> NoReturn:
    """Ends with exit code 2, as argparse does."""
    own = argparse.ArgumentParser(prog=f"{_PROGRAM} {command}", allow_abbrev=False)
    fill_parser(own, command)
    own.error(_in_one_line(said))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0, or 1 if it failed; wrong usage exits with 2."""
    try:
        try:
            return _run(parse(list(sys.argv[1:] if argv is None else argv)))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has left. Python would say so once more when it flushes at the end.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    return 1


def _run(args: argparse.Namespace) -> int:
    try:
        _refuse_unwritable(args)
        # Libraries print as well, and what reads JSON wants nothing else.
        with _silence() if not is_main() else _aside() if args.json == "-" else contextlib.nullcontext():
            result = _module(args.command).run(args)
        if args.json and is_main():
            text = json.dumps(_plain(result), indent=2, allow_nan=False) + "\n"
            if args.json == "-":
                print(text, end="")
            else:
                Path(args.json).parent.mkdir(parents=True, exist_ok=True)
                Path(args.json).write_text(text, encoding="utf-8")
    except BrokenPipeError:
        raise
    except UsageError as error:
        _refuse(args.command, str(error))
    except (AdaptiveDecodeError, ValueError, OSError, MemoryError) as error:
        said = _in_one_line(str(error)) or type(error).__name__
        print(f"{_PROGRAM} {args.command}: error: {said}", file=sys.stderr)
        return 1
    return 0


def _aside() -> AbstractContextManager[Any]:
    return contextlib.redirect_stdout(sys.stderr)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """One of several processes prints."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def _refuse_unwritable(args: argparse.Namespace) -> None:
    """Finds out before the work what would lose its result."""
    for flag, name in (("--output", vars(args).get("output")), ("--json", None if args.json == "-" else args.json)):
        if name is None:
            continue
        path = Path(name)
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        is_folder = there.is_dir() and not (flag == "--json" and there == path)
        is_file = flag == "--json" and there == path and path.is_file()
        if not (is_folder or is_file) or not os.access(there, os.W_OK):
            raise ValueError(f"{flag} {name} cannot be written: {there} {_is(there, is_folder or is_file)}.")


def _is(there: Path, may_be: bool) -> str:
    return "is read-only" if may_be else "is a folder" if there.is_dir() else "is no folder"


def _in_one_line(text: str) -> str:
    return " ".join(text.split())


def _plain(value: Any) -> Any:
    """Of JSON's types alone: it has no word for what is no number or infinite."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())

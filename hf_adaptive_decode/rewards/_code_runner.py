"""Runs inside the sandbox: a program on its input, a candidate that answers calls, or the tests that make them; knows
no verdict.

Tests and candidate never share a process. What crosses between them is data: values of exactly the built-in types,
taken apart on one side and built anew on the other, so no method of the candidate's ever runs where tests compare.
The text of this module is handed to the sandbox, which executes it; it uses the standard library alone.
"""

from __future__ import annotations

import ast
import builtins
import collections
import importlib
import itertools
import json
import os
import symtable
import sys
import types
from typing import Any

MAX_DEPTH = 60
MAX_ITEMS = 100_000
# Names that tests may use without importing them, always the real ones.
STANDARD_MODULES = ("math", "cmath", "itertools", "functools", "collections", "re", "string", "random", "json", "copy",
                    "operator", "heapq", "bisect", "datetime", "statistics", "fractions", "decimal")  # fmt: skip


class Iterator(list):  # type: ignore[type-arg]
    """What an iterator of the candidate's held; becomes an iterator again on the other side."""


ITERATORS = (types.GeneratorType, map, filter, zip, enumerate, reversed)


class CandidateError(Exception):
    """The candidate raised an exception of its own making."""


def run(payload: dict[str, Any]) -> None:
    """What the payload's `role` says: `program`, `candidate` or `tests`."""
    sys.set_int_max_str_digits(0)
    {"program": run_program, "candidate": run_candidate, "tests": run_tests}[payload["role"]](payload)


def run_program(payload: dict[str, Any]) -> None:
    """The candidate as a script: its input and output are the sandbox's."""
    sys.argv = ["main.py"]
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    exec(compile(payload["source"], "main.py", "exec"), main.__dict__)  # noqa: S102 (in the sandbox)


class Line:
    """JSON lines over two descriptors that the standard streams no longer name."""

    def __init__(self) -> None:
        self.reader = os.fdopen(os.dup(0), "rb")
        self.writer = os.fdopen(os.dup(1), "wb")
        nothing = os.open("/dev/null", os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)

    def send(self, message: dict[str, Any]) -> None:
        """Writes one message."""
        self.writer.write(json.dumps(message).encode() + b"\n")
        self.writer.flush()

    def receive(self) -> dict[str, Any]:
        """Reads one message; ends the process where there is none."""
        line = self.reader.readline()
        if not line:
            os._exit(0)
        message: dict[str, Any] = json.loads(line)
        return message


def run_candidate(payload: dict[str, Any]) -> None:
    """Defines what the candidate defines, then answers requests for names and calls until they end."""
    line = Line()
    module = type(sys)("solution")
    sys.modules["solution"] = module
    space = module.__dict__
    try:
        exec(compile(payload["source"], "solution.py", "exec"), space)  # noqa: S102 (in the sandbox)
    except Exception as error:
        line.send({"failed": type(error).__name__})
        return
    line.send({"loaded": True})
    while True:
        line.send(answer(space, line.receive()))


def answer(space: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
    try:
        found = space[request["name"]]
    except KeyError:
        return {"unknown": request["name"]}
    if "arguments" not in request:
        try:
            return {"callable": True} if callable(found) else {"value": encode(found)}
        except Exception:
            return {"opaque": True}
    try:
        arguments, named = decode(request["arguments"]), decode(request["named"])
        value = found(*arguments, **named)
        if type(value) in ITERATORS:
            value = Iterator(itertools.islice(value, MAX_ITEMS))
    except Exception as error:
        return {"raised": type(error).__name__, "text": str(error)[:1000]}
    try:
        # Lists, sets and dicts that the call changed in place are changed on the other side as well.
        return {"value": encode(value), "arguments": encode(arguments)}
    except Exception:
        return {"opaque": True}


class Proxy:
    """Stands for one of the candidate's functions among the tests."""

    def __init__(self, line: Line, name: str) -> None:
        self.line, self.name = line, name
        self.__name__ = name

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.line.send({"name": self.name, "arguments": encode(list(arguments)), "named": encode(named)})
        reply = self.line.receive()
        if "raised" in reply:
            kind = getattr(builtins, str(reply["raised"]), None)
            known = isinstance(kind, type) and issubclass(kind, Exception)
            try:
                error = kind(str(reply["text"])) if known else CandidateError(str(reply["text"]))  # type: ignore[misc]
            except TypeError:
                error = CandidateError(str(reply["text"]))
            raise error
        try:
            value = decode(reply["value"])
            write_back(arguments, decode(reply["arguments"]))
        except Exception:
            # No data. The tests end here: an exception could be caught by them, as if the program had raised it.
            self.line.send({"passed": False})
            os._exit(0)
        return value


def write_back(arguments: tuple[Any, ...], changed: list[Any]) -> None:
    """Gives mutable arguments the contents they had after the call."""
    if type(changed) is not list or len(changed) != len(arguments):
        raise ValueError("Other arguments came back than were given.")
    for mine, theirs in zip(arguments, changed, strict=True):
        if type(mine) is not type(theirs):
            continue
        if type(mine) is list:
            mine[:] = theirs
        elif type(mine) in (dict, set):
            mine.clear()
            mine.update(theirs)


def run_tests(payload: dict[str, Any]) -> None:
    """Runs the tests and says on its line whether they passed; the candidate's code is not in this process."""
    line = Line()
    tree = ast.parse(payload["tests"])
    space: dict[str, Any] = {"__name__": "tests"}
    passed = False
    try:
        for name in sorted(names_of_the_candidate(tree, payload["tests"])):
            if name in STANDARD_MODULES:
                space[name] = importlib.import_module(name)
            else:
                bind(line, space, name)
        sys.modules["solution"] = sys.modules["main"] = namespace = type(sys)("solution")
        namespace.__dict__.update(space)
        # Written for `assert` to stay: an optimised interpreter would drop them.
        exec(compile(tree, "<tests>", "exec", optimize=0), space)  # noqa: S102 (in the sandbox)
        passed = True
    except BaseException:
        passed = False
    line.send({"passed": passed})


def names_of_the_candidate(tree: ast.Module, tests: str) -> set[str]:
    """Names that the tests use and nowhere bind themselves; a builtin is never the candidate's."""
    used, imported = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            used.add(node.id)
        elif isinstance(node, ast.ImportFrom) and node.module in ("solution", "main"):
            imported |= {alias.name for alias in node.names}
    symbols = symtable.symtable(tests, "<tests>", "exec").get_symbols()
    own = {symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()}
    return (used - own | imported) - set(dir(builtins))


def bind(line: Line, space: dict[str, Any], name: str) -> None:
    """Binds a name of the candidate's: a function as a proxy, anything else as the data it is."""
    line.send({"name": name})
    reply = line.receive()
    if "value" in reply:
        space[name] = decode(reply["value"])
    elif "callable" in reply:
        space[name] = Proxy(line, name)


def encode(value: Any, depth: int = 0) -> Any:
    """A value of the built-in types as JSON; the type is in the first place. Anything else is a `TypeError`."""
    kind = type(value)
    if depth > MAX_DEPTH:
        raise TypeError("The value is nested too deeply.")
    if value is None or kind is bool:
        return value
    if kind is int:
        return ["int", hex(value)]
    if kind is float:
        return ["float", value.hex()]
    if kind is str:
        return ["str", value]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is complex:
        return ["complex", value.real.hex(), value.imag.hex()]
    if kind is range:
        return ["range", hex(value.start), hex(value.stop), hex(value.step)]
    if kind in (list, tuple, set, frozenset, Iterator):
        return [kind.__name__, *(encode(item, depth + 1) for item in value)]
    if kind in (dict, collections.OrderedDict, collections.defaultdict, collections.Counter):
        return ["dict", *([encode(key, depth + 1), encode(item, depth + 1)] for key, item in dict.items(value))]
    raise TypeError(f"A {kind.__name__} is no plain data.")


SCALARS: dict[str, Any] = {"int": lambda text: int(text, 16), "float": float.fromhex, "bytes": bytes.fromhex}
CONTAINERS: dict[str, Any] = {
    "Iterator": lambda items: iter(list(items)),
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
}


def decode(data: Any, depth: int = 0) -> Any:
    """The value that `encode` took apart, of exactly the built-in types whatever the other side wrote."""
    if data is None or data is True or data is False:
        return data
    if type(data) is not list or not data or type(data[0]) is not str or depth > MAX_DEPTH:
        raise ValueError("This is no encoded value.")
    kind, *parts = data
    if kind in CONTAINERS:
        return CONTAINERS[kind](decode(part, depth + 1) for part in parts)
    if kind == "dict":
        return {decode(key, depth + 1): decode(item, depth + 1) for key, item in parts}
    if not all(type(part) is str for part in parts):
        raise ValueError("This is no encoded value.")
    if kind == "complex":
        return complex(float.fromhex(parts[0]), float.fromhex(parts[1]))
    if kind == "range":
        return range(*(int(part, 16) for part in parts))
    (text,) = parts
    return text if kind == "str" else SCALARS[kind](text)

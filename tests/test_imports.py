"""Importing is cheap, the layers point one way, and files and functions stay of a size that can be read."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hf_adaptive_decode

PACKAGE = Path(hf_adaptive_decode.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "matplotlib", "evaluate", "vllm")
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60

# Each layer may import itself and the layers before it.
LAYERS = (
    ("_version", "types", "errors"),
    (
        "configuration",
        "configuration_checks",
        "blocks",
        "nucleus",
        "warping",
        "features",
        "checks",
        "budget",
        "actions",
        "randomness",
    ),
    ("policies",),
    ("sharding", "tap", "sampler", "projection", "request_slots", "losses", "hub"),
    ("capture", "settings", "generation", "request_sampler", "batching", "adapters", "storage", "detour", "modeling"),
    ("engines", "rewards"),
    ("training", "evaluation"),
    ("reports", "evaluate_modules"),
    ("cli", "serve"),
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
# The package's front door knows the names of its modules; the registration knows two of them, as strings.
RANK |= {"_registration": 0}
# Beside modeling: takes only what comes before it.
RANK |= {"serving": RANK["modeling"]}
BESIDE_MODELING = ("serving",)
APART = ("testbed",)


def label(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk_running_code(node: ast.AST):
    yield node
    for child in ast.iter_child_nodes(node):
        if not is_for_type_checkers(child):
            yield from walk_running_code(child)


def imported_parts(path: Path) -> set[str]:
    """The top-level parts of the package that a module imports, wherever in it the import stands."""
    found = set()
    here = ["hf_adaptive_decode", *path.relative_to(PACKAGE).parts[:-1]]
    for node in walk_running_code(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = here[: len(here) - node.level + 1] if node.level else []
            module = ".".join([*start, *([node.module] if node.module else [])])
            # `from .. import engines` names a part by its alias.
            names = [f"{module}.{a.name}" for a in node.names] if module == "hf_adaptive_decode" else [module]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("hf_adaptive_decode.")}
    return found - {"__version__", "__init__"}


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    code = f"import sys, hf_adaptive_decode; print([n for n in {HEAVY!r} if n in sys.modules])"
    assert run_python(code) == "[]"


def test_looking_at_the_package_loads_nothing_heavy():
    look = "dir(h); h.__version__; hasattr(h, 'nonsense')"
    code = f"import sys, hf_adaptive_decode as h; {look}; print([n for n in {HEAVY!r} if n in sys.modules])"
    assert run_python(code) == "[]"


def test_the_lazy_names_are_all_there_is():
    lazy = set(hf_adaptive_decode._WHERE)
    assert set(hf_adaptive_decode.__all__) == lazy | {"__version__"}
    assert dir(hf_adaptive_decode) == sorted(hf_adaptive_decode.__all__)


def test_type_checkers_see_the_lazy_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    guarded = [node for node in tree.body if is_for_type_checkers(node)]
    seen = {(alias.name, inner.module) for node in guarded for inner in node.body for alias in inner.names}
    assert seen == set(hf_adaptive_decode._WHERE.items())


@pytest.mark.parametrize("name", hf_adaptive_decode._WHERE)
def test_every_public_name_can_be_had(name):
    module = PACKAGE / hf_adaptive_decode._WHERE[name]
    assert module.with_suffix(".py").exists() or (module / "__init__.py").exists(), f"{name} points at no module"
    assert getattr(hf_adaptive_decode, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = hf_adaptive_decode.nonsense


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_imports_point_one_way(path):
    part = part_of(path)
    if part == "__init__":
        assert imported_parts(path) <= {"_registration", "_version"}
        return
    if part in APART:
        allowed = {name for name, rank in RANK.items() if rank <= RANK["engines"]} | {part}
    else:
        assert part in RANK, f"{label(path)} is in no layer"
        allowed = {name for name, rank in RANK.items() if rank <= RANK[part]}
        if part in BESIDE_MODELING:
            allowed = {name for name, rank in RANK.items() if rank < RANK[part]} | {part}
        elif RANK[part] >= RANK["training"]:
            allowed |= set(APART)
        allowed -= {name for name in BESIDE_MODELING if name != part and RANK[part] < RANK["engines"]}
    assert imported_parts(path) <= allowed, f"{label(path)} may not import {sorted(imported_parts(path) - allowed)}"


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_a_file_stays_short_and_opens_with_what_it_does(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES, f"{label(path)} has {len(text.splitlines())} lines"
    if path.name != "_version.py" and text.strip():
        assert ast.get_docstring(ast.parse(text)), f"{label(path)} opens with no sentence"


def test_functions_stay_short():
    long = [
        f"{label(path)}:{node.lineno} {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_nothing_prints_outside_the_command_line():
    printing = []
    for path in MODULES:
        if part_of(path) == "cli":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for function in ast.walk(tree):
            function.__dict__.setdefault("inside", "")
            for child in ast.iter_child_nodes(function):
                own = function.name if isinstance(function, ast.FunctionDef) else function.inside
                child.inside = own
        printing += [
            f"{label(path)}:{node.lineno}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "print"
            and node.inside != "print_trainable_parameters"
            and not (part_of(path) == "testbed" and node.inside == "main")  # scripts run with `python -m`
        ]
    assert not printing, printing

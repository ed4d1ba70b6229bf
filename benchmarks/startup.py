"""
What importing the package costs beside transformers alone, and how soon its command line answers.

    python benchmarks/startup.py [--json FILE] [--rounds 9] [--cells import model help]

Each start is a process of its own, and the two sides of a pair take turns; their seconds are the whole process's. What
the library adds is also timed within a process that has loaded transformers already, which the rest of the process
cannot blur. Bytecode is compiled before the first round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measure import add_arguments, begin, ratio, rotated, shown, spread, target, write

ROOT = Path(__file__).resolve().parents[1]
# Name to Python code of the two sides: the one without the library, and the one with it.
PAIRS = {
    "import": ("import transformers", "import transformers, hf_adaptive_decode"),
    "model": (
        "from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel",
        "from transformers import AutoModelForCausalLM, GenerationConfig, GenerationMixin, PreTrainedModel\n"
        "import hf_adaptive_decode\nhf_adaptive_decode.AutoDecoForCausalLM",
    ),
}
# As the installed script starts it.
HELP_CODE = "from hf_adaptive_decode.cli.main import main\nmain(['--help'])"
HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "matplotlib", "evaluate", "scipy", "pandas", "sympy")
# Neither side may load these for a model.
NOT_FOR_A_MODEL = ("trl", "peft", "datasets", "matplotlib", "evaluate")
TARGETS = [
    target("added ms", at_most=50.0, where={"start": "import"}),
    target("s to answer --help", at_most=0.5, where={"start": "help"}),
]


def start(code: str) -> float:
    """Seconds of a Python process that runs the code."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        raise RuntimeError(f"{code!r} failed:\n{done.stderr[-2000:]}")
    return seconds


def within(first: str, second: str) -> float:
    """Seconds that the second code takes in a process in which the first has just run."""
    code = (
        f"{first}\nimport time, sys\nt = time.perf_counter()\n{second}\nsys.stdout.write(str(time.perf_counter() - t))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def loaded(code: str) -> list[str]:
    """Which of the heavy modules the code has loaded at its end."""
    show = f"import sys, json\nsys.stdout.write('\\n' + json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    ends = f"import atexit\natexit.register(lambda: exec({show!r}, {{}}))\n{code}"  # `--help` leaves by an exception
    done = subprocess.run([sys.executable, "-c", ends], cwd=ROOT, capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_pair(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of both sides in turn."""
    sides = dict(zip(("without", "with"), PAIRS[name], strict=True))
    for code in sides.values():
        start(code)
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(rounds):
        for side in rotated(list(sides), number):
            seconds[side].append(start(sides[side]))
    modules = {side: loaded(code) for side, code in sides.items()}
    differences = [1e3 * (a - b) for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    added = [1e3 * within(*PAIRS[name]) for _ in range(rounds)]
    return {
        "start": name,
        "s a process": {side: spread(values) for side, values in seconds.items()},
        "ratios": {
            "added ms": spread(added),
            "added ms, whole process": spread(differences),
            "with / without": ratio(seconds, "with", "without"),
        },
        "modules": modules,
        "needlessly loaded": [m for m in modules["with"] if m in NOT_FOR_A_MODEL and m not in modules["without"]],
    }


def measure_help(rounds: int) -> dict[str, Any]:
    """Seconds until the command line has answered `--help`, beside an interpreter that does nothing."""
    codes = {"help": HELP_CODE, "python": "pass"}
    for code in codes.values():
        start(code)
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    for number in range(rounds):
        for name in rotated(list(codes), number):
            seconds[name].append(start(codes[name]))
    return {
        "start": "help",
        "s a process": {name: spread(values) for name, values in seconds.items()},
        "ratios": {"s to answer --help": spread(seconds["help"])},
        "modules": {"with": loaded(HELP_CODE)},
        "needlessly loaded": loaded(HELP_CODE),
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rounds=9)
    parser.add_argument("--cells", nargs="+", choices=[*PAIRS, "help"], default=[*PAIRS, "help"])
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    result = begin(args) | {"targets": TARGETS, "cells": [], "skipped": []}
    for name in args.cells:
        cell = measure_help(args.rounds) if name == "help" else measure_pair(name, args.rounds)
        result["cells"].append(cell)
        for between, value in cell["ratios"].items():
            print(f"{name:8} {between:24} {shown(value)}")
        print(f"{name:8} loads {cell['modules']}; needlessly {cell['needlessly loaded']}", flush=True)
    write(args.json, result)


if __name__ == "__main__":
    main()

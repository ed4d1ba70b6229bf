"""The modules for `evaluate` load by path from the package, offline, and give what the plain functions give."""

import doctest
import importlib.resources
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tomllib
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_adaptive_decode.evaluation.control import ControlEffect, control_effect
from hf_adaptive_decode.evaluation.metrics import bootstrap_interval, pass_at_k
from hf_adaptive_decode.evaluation.modules import MODULES, module_path
from hf_adaptive_decode.rewards import math_reward

evaluate = pytest.importorskip("evaluate")

ROOT = Path(__file__).parents[1]
FOLDERS = [Path(module_path(name)) for name in MODULES]
each_module = pytest.mark.parametrize("name", MODULES)
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=MODULES)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """`evaluate.load` with caches of its own, of which nothing stays behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", tmp_path_factory.mktemp("modules"))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path_factory.mktemp("metrics"))
        patch.setattr(sys, "path", [*sys.path])
        kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "evaluate_modules"}
        yield lambda name: evaluate.load(module_path(name))
        for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
            del sys.modules[name]
        sys.modules.update(kept)


def cases(name):
    return runpy.run_path(str(Path(module_path(name), "tests.py")))["test_cases"]


def inputs_of(case):
    return {key: value for key, value in case.items() if key != "result"}


# --- loading and layout -----------------------------------------------------------------------------------------------


@each_module
def test_a_module_loads_by_path_and_asks_no_network(load, name, monkeypatch):
    asked = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    module = load(name)
    case = cases(name)[0]
    module.compute(**inputs_of(case))
    assert module.name == name
    assert module.module_type == "metric"
    assert asked == []


@each_module
def test_a_module_gives_what_can_be_worked_out_by_hand(load, name):
    for case in cases(name):
        assert load(name).compute(**inputs_of(case)) == case["result"]


@each_module
def test_the_examples_of_a_module_are_true(load, name):
    text = load(name).inputs_description
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


@each_folder
def test_the_python_of_a_card_runs(load, folder):
    session = {}
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(block, session)


@each_folder
def test_a_folder_has_the_layout_of_a_space(folder):
    metadata = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert {"evaluate", "metric"} <= set(metadata["tags"])
    assert metadata["sdk"] == "gradio"
    assert metadata["description"].strip()
    assert (folder / metadata["app_file"]).exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (requirement,) = (folder / "requirements.txt").read_text().split()
    name, extras = re.fullmatch(r"(\w+)\[([\w,]+)\]", requirement).groups()
    assert name == project["name"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])


@each_folder
def test_the_page_of_a_space_computes_its_own_example(load, folder, monkeypatch):
    gradio = pytest.importorskip("gradio")
    made = []
    monkeypatch.setattr(gradio.Interface, "launch", lambda page: made.append(page))
    runpy.run_path(str(folder / "app.py"))
    (page,) = made
    assert page.fn(*[field.value for field in page.input_components])


def test_the_modules_lie_in_the_package():
    package = importlib.resources.files("hf_adaptive_decode")
    assert {Path(module_path(name)) for name in MODULES} == {
        Path(str(folder)) for folder in (package / "evaluate_modules").iterdir() if not folder.name.startswith("__")
    }
    for name in MODULES:
        assert (package / "evaluate_modules" / name / f"{name}.py").is_file()


def test_an_unknown_module_names_those_there_are():
    with pytest.raises(ValueError, match="'accuracy'; choose from pass_at_k, math_equivalence, decoding_control"):
        module_path("accuracy")


def test_a_wheel_holds_the_modules(tmp_path):
    pytest.importorskip("setuptools")
    shutil.copytree(ROOT / "hf_adaptive_decode", tmp_path / "hf_adaptive_decode")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
    for folder in FOLDERS:
        files = {path.relative_to(ROOT).as_posix() for path in folder.iterdir() if path.is_file()}
        assert f"hf_adaptive_decode/evaluate_modules/{folder.name}/{folder.name}.py" in files
        assert files <= held


# --- what all three do ------------------------------------------------------------------------------------------------


@each_module
def test_batches_and_single_examples_add_up_to_one_call(load, name):
    case = cases(name)[0]
    columns = {key: case[key] for key in ("predictions", "references") if key in case}
    arguments = {key: value for key, value in inputs_of(case).items() if key not in columns}
    in_batches, one_by_one = load(name), load(name)
    for start, end in pairwise(range(len(case["predictions"]) + 1)):
        in_batches.add_batch(**{key: column[start:end] for key, column in columns.items()})
        one_by_one.add(**{key.removesuffix("s"): column[start] for key, column in columns.items()})
    assert in_batches.compute(**arguments) == one_by_one.compute(**arguments) == case["result"]


@each_module
def test_no_examples_are_an_error(load, name):
    case = inputs_of(cases(name)[0])
    empty = {key: [] if key in ("predictions", "references") else value for key, value in case.items()}
    columns = {key: [] for key in empty if key in ("predictions", "references")}
    with pytest.raises(ValueError, match="`predictions` is empty"):
        load(name).compute(**empty)
    with pytest.raises(ValueError, match="`predictions` is empty"):
        load(name).add_batch(**columns)
    with pytest.raises(ValueError, match="add_batch"):
        load(name).compute(**{key: value for key, value in case.items() if key not in columns})


# --- pass@k -----------------------------------------------------------------------------------------------------------


def test_pass_at_k_agrees_with_the_plain_functions(load):
    rng = np.random.default_rng(0)
    rewards = [rng.choice([0.0, 0.5, 1.0, 2.0], size=rng.integers(4, 9)).tolist() for _ in range(30)]
    drawn, right = [len(r) for r in rewards], [sum(x >= 1 for x in r) for r in rewards]
    result = load("pass_at_k").compute(predictions=rewards, k=[1, 2, 4], seed=3)
    expected = {"problems": 30}
    for k in (1, 2, 4):
        interval = bootstrap_interval(pass_at_k(drawn, right, k), seed=3)
        expected |= {f"pass@{k}": interval.mean, f"pass@{k}_low": interval.low, f"pass@{k}_high": interval.high}
    assert result == expected


@pytest.mark.parametrize(
    "predictions",
    [[[True, False], [True, True]], np.array([[1, 0], [1, 1]]), torch.tensor([[1.0, 0.0], [2.0, 1.0]])],
    ids=["bools", "array", "tensor"],
)
def test_pass_at_k_takes_rewards_in_any_container(load, predictions):
    assert load("pass_at_k").compute(predictions=predictions)["pass@1"] == 0.75


def test_counts_say_the_same_as_rewards(load):
    rewards = [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]]
    metric = load("pass_at_k")
    expected = metric.compute(predictions=rewards, k=[1, 3])
    assert metric.compute(predictions=[2, 0, 4], samples=4, k=[1, 3]) == expected


@pytest.mark.parametrize(
    ("predictions", "arguments", "message"),
    [
        ([2, 1], {}, "pass `samples`"),
        ([True, False], {}, "pass `samples`"),
        ([5], {"samples": 4}, "between 0 and n"),
        ([[1, 0]], {"samples": 2}, "leave it out"),
        ([[1, 0]], {"k": 3}, "`k` is 3"),
        ([[1, 0], []], {}, "`k` is 1"),
        ([[1, 0]], {"k": 0}, "`k` is 0"),
        ([[1, 0]], {"k": 1.5}, "whole numbers"),
        ([[1, 0]], {"k": []}, "`k` is empty"),
        ([[1, 0], [1, None]], {}, "rewards of problem 1"),
        ([[float("nan"), 0]], {}, "rewards of problem 0"),
    ],
)
def test_pass_at_k_refuses_what_it_cannot_estimate(load, predictions, arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load("pass_at_k").compute(predictions=predictions, **arguments)


# --- math equivalence -------------------------------------------------------------------------------------------------


def test_math_equivalence_agrees_with_the_reward(load):
    answers = [r"\boxed{0.5}", "#### 12", r"\boxed{x^2-1}", "", "nothing", r"\boxed{7}"]
    solutions = [r"\frac{1}{2}", "12.0", "(x-1)(x+1)", "3", "nothing", "8"]
    result = load("math_equivalence").compute(predictions=answers, references=solutions)
    assert result["scores"] == math_reward(completions=answers, solution=solutions) == [1, 1, 1, 0, 1, 0]
    assert result["accuracy"] == pytest.approx(4 / 6)


def test_math_equivalence_hands_its_timeout_on(load):
    with pytest.raises(ValueError, match="`timeout`"):
        load("math_equivalence").compute(predictions=["1"], references=["1"], timeout=0)


def test_math_equivalence_misses_no_missing_text(load):
    with pytest.raises(ValueError, match="`references` has no text at index 1"):
        load("math_equivalence").compute(predictions=["1", "2"], references=["1", None])
    with pytest.raises(ValueError, match="`predictions` has no text at index 1"):
        load("math_equivalence").compute(predictions=["1", None], references=["1", "2"])


# --- decoding control -------------------------------------------------------------------------------------------------

numbers = st.floats(0, 2, width=32)
prompts = st.one_of(numbers, st.lists(numbers | st.just(float("nan")), min_size=1, max_size=5).map(lambda x: [*x, 0.5]))


@given(st.lists(st.tuples(prompts, prompts), min_size=1, max_size=8), st.sampled_from(["low", "high"]))
def test_control_effect_is_what_a_loop_over_prompts_says(pairs, direction):
    def mean(value):
        kept = [x for x in (value if isinstance(value, list) else [value]) if x == x]
        return sum(kept) / len(kept)

    means = [(mean(before), mean(after)) for before, after in pairs]
    effect = control_effect([b for b, _ in pairs], [c for _, c in pairs], direction)
    moved = [c - b if direction == "high" else b - c for b, c in means]
    assert effect.prompts == len(pairs)
    assert effect.mean_baseline == pytest.approx(sum(b for b, _ in means) / len(means))
    assert effect.mean_command == pytest.approx(sum(c for _, c in means) / len(means))
    assert effect.difference == pytest.approx(effect.mean_command - effect.mean_baseline, abs=1e-9)
    assert effect.consistency == pytest.approx(sum(m > 1e-6 for m in moved) / len(moved))
    assert effect.interval.mean == effect.difference
    assert min(c - b for b, c in means) - 1e-9 <= effect.interval.low <= effect.interval.high


def test_control_effect_of_three_prompts():
    effect = control_effect([0.5, 0.75, 1.0], [[0.25, 0.25], [0.75], [1.25, float("nan")]], "low")
    assert isinstance(effect, ControlEffect)
    assert (effect.mean_baseline, effect.mean_command, effect.difference) == (0.75, 0.75, 0.0)
    assert effect.consistency == pytest.approx(1 / 3)
    assert effect.interval == bootstrap_interval([-0.25, 0.0, 0.25])
    opposite = control_effect([0.5, 0.75, 1.0], [0.25, 0.75, 1.25], "high")
    assert opposite.consistency == pytest.approx(1 / 3)


@pytest.mark.parametrize("direction", ["low", "high"])
@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_a_model_that_ignores_the_command_is_never_consistent(direction, temperature):
    # A fixed temperature in answers of different lengths: the means differ in their last bit, and that is no move.
    before, after = [[temperature] * n for n in range(2, 60)], [[temperature] * n for n in range(5, 63)]
    assert len(set(map(np.mean, before))) > 1
    assert control_effect(before, after, direction).consistency == 0


@pytest.mark.parametrize(
    ("baseline", "command", "direction", "message"),
    [
        ([], [], "low", "`baseline` is empty"),
        ([0.5], [], "low", "`command` is empty"),
        ([0.5], [0.5, 0.6], "low", "1 prompts and `command` 2"),
        ([0.5], [0.5], "lower", "'lower'; it has to be one of 'low', 'high'"),
        ([0.5, float("nan")], [0.5, 0.5], "low", "`baseline` of prompt 1"),
        ([0.5], [[float("nan"), float("nan")]], "low", "`command` of prompt 0"),
        ([[0.5, float("inf")]], [0.5], "low", "`baseline` of prompt 0"),
        ([[]], [0.5], "low", "`baseline` of prompt 0"),
        ([[[0.5]]], [0.5], "low", "`baseline` of prompt 0"),
        ([None], [0.5], "low", "`baseline` of prompt 0"),
    ],
)
def test_control_effect_refuses_what_it_cannot_compare(baseline, command, direction, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        control_effect(baseline, command, direction)


def test_decoding_control_agrees_with_the_plain_function_on_a_models_own_traces(load, model):
    def trace_of(seed):
        ask = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_decoding_trace": True}
        return tiny.sample(model, tiny.prompts(4, 5, seed=seed), seed=seed, **ask).decoding_trace

    def rows(trace):
        return [{"temperature": t, "top_p": p} for t, p in zip(trace.temperature, trace.top_p, strict=True)]

    before, after = trace_of(1), trace_of(2)
    result = load("decoding_control").compute(
        predictions=rows(after), references=rows(before), direction="high", seed=5
    )
    expected = {"prompts": 4}
    for name in ("temperature", "top_p"):
        effect = control_effect(vars(before)[name], vars(after)[name], "high", seed=5)
        expected[f"{name}_baseline"], expected[f"{name}_command"] = effect.mean_baseline, effect.mean_command
        expected[f"{name}_difference"], expected[f"{name}_consistency"] = effect.difference, effect.consistency
        expected[f"{name}_difference_low"] = effect.interval.low
        expected[f"{name}_difference_high"] = effect.interval.high
    assert result == expected
    assert result["temperature_difference"] != 0

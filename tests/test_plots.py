"""Figures: whole PNGs, the same bytes twice, every text inside, nothing covered, and the numbers that were given."""

import builtins
import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_decode import (
    AutoDecoConfig,
    AutoDecoForCausalLM,
    AutoDecoTrainer,
    AutoDecoTrainingArguments,
    REINFORCEDecodingTrainer,
    REINFORCEDecodingTrainingArguments,
)
from hf_adaptive_decode.actions import coverage_curve
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.errors import MissingExtraError
from hf_adaptive_decode.reports import plots
from hf_adaptive_decode.reports.plots import style
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer, testbed_reward

pytest.importorskip("matplotlib")
from matplotlib import font_manager, rcParams
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.patches import StepPatch
from matplotlib.text import Text

ROOT = Path(plots.__file__).parents[3]
ODD = [
    "$x$",
    "$\\frac{",
    "_",
    "a_b",
    " the",
    "\n",
    "\n\n\t",
    "",
    "你好",
    "🙂",
    " \u202eabc",
    "%",
    "\\",
    "x" * 90,
    "\x00",
    "é",
]
LONG = "a decoder whose $name$ is _long_, with T=0.75, top-p 0.8, min-p 0.05, top-k 20, chosen on validation, number "
LABELS = ["T=0", "T=0.5", "T=1", "T=1.5, top-p 0.8"]


def interval(mean, half=0.03):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def demo_rows():
    """Lines of results as the demo's: an adapter, its baselines, and what else stands in such a file."""
    found = [
        ("learned heads", "adapter", None, 0.636, 0.965, None),
        ("greedy", "greedy", None, 0.488, 0.488, (0.148, 0.477)),
        ("default sampling (T=1)", "default", None, 0.396, 0.935, (0.241, 0.030)),
        ("T=0.754, top-p 0.922", "mean_shift", None, 0.470, 0.877, (0.166, 0.088)),
        (
            "T=0.75, top-p 0.8",
            "best_static",
            1,
            0.489,
            0.698,
            (0.147, 0.267),
        ),
        (
            "T=1.25, top-p 0.9",
            "best_static",
            8,
            0.430,
            0.957,
            (0.207, 0.008),
        ),
    ]
    lines = [{"kind": "provenance", "format": 1}]
    for decoder, role, for_k, first, eighth, gain in found:
        line = {"kind": "measure", "task": "testbed", "token_budget": 48, "adapter": "heads", "decoder": decoder}
        line |= {"role": role, "for_k": for_k, "pass@1": interval(first), "pass@8": interval(eighth, 0.015)}
        gains = (
            {} if gain is None else {"gain": {"pass@1": interval(gain[0], 0.02), "pass@8": interval(gain[1], 0.012)}}
        )
        lines.append(line | gains)
    return [*lines, {"kind": "verdict", "task": "testbed"}]


def budget_rows(decoders=3, budgets=(256, 512, 1024, 4096), name="decoder {}"):
    return [
        {"decoder": name.format(d), "token_budget": b, "pass@1": interval(0.2 + 0.04 * d + 0.03 * np.log2(b / 256))}
        for d in range(decoders)
        for b in budgets
    ]


def shares_by_step(actions, steps=40, seed=0):
    rng = np.random.default_rng(seed)
    return {step: rng.dirichlet(np.linspace(1, 1 + step / 4, actions)).tolist() for step in range(1, steps + 1)}


def log_of(shares, **evaluations):
    history = [
        {"step": step, "loss": -0.1, "reward": 0.4, **{f"action/{i}": share for i, share in enumerate(values)}}
        for step, values in shares.items()
    ]
    for name, values in evaluations.items():
        history += [{"step": s, f"{name}_runtime": 1.0, f"{name}_reward": value} for s, value in values.items()]
    return history


def losses(level, steps=60, **others):
    rng = np.random.default_rng(int(100 * level))
    return [{"step": s, "loss": level + np.exp(-s / 20) + rng.normal(0, 0.02), **others} for s in range(1, steps)]


@pytest.fixture(scope="module")
def sampled():
    """Tokens of a fresh policy's completions on the testbed: texts, actions, and entropies of no meaning."""
    config = AutoDecoConfig(policy="token_actions", actions=[{"temperature": t} for t in (0, 0.5, 1, 1.5)])
    tokenizer, model = load_tokenizer(), AutoDecoForCausalLM.from_base(load_base_model(), config)
    prompts = [problem["prompt"] for problem in build_problems("test", 12)]
    found = [one for group in complete(model, tokenizer, prompts, samples=2, token_budget=32) for one in group]
    ids = np.concatenate([one.token_ids for one in found])
    entropy = np.where(ids % 3 == 0, 0.0, np.random.default_rng(0).exponential(0.5, len(ids)))
    return {
        "tokens": [tokenizer.decode([token]) for token in ids],
        "action": np.concatenate([one.action for one in found]),
        "temperature": np.concatenate([one.temperature for one in found]),
        "top_p": np.concatenate([one.top_p for one in found]),
        "entropy": entropy,
        "lengths": [len(one.token_ids) for one in found],
    }


def one_panel(sampled, start, stop, shift=0.0):
    part = {key: sampled[key][start:stop] for key in ("tokens", "temperature", "top_p")}
    return part | {"temperature": part["temperature"] + shift}


CASES = {
    "generation": lambda s, path: plots.plot_generation(
        {"baseline": one_panel(s, 0, 40), "high diversity: $5_000$": one_panel(s, 0, 30, 0.4)}, path
    ),
    "generation, most tokens": lambda s, path: plots.plot_generation({LONG * 2: one_panel(s, 0, 80)}, path),
    "generation, one token": lambda s, path: plots.plot_generation(
        {"one": {"temperature": [0.7], "tokens": ["\n"]}}, path
    ),
    "generation, odd tokens and gaps": lambda s, path: plots.plot_generation(
        {"odd": {"top_p": np.where(np.arange(16) % 3, 0.9, np.nan), "temperature": None, "tokens": ODD}}, path
    ),
    "generation, long": lambda s, path: plots.plot_generation(
        {"long": {"temperature": np.abs(np.sin(np.arange(2000))), "top_p": np.full(2000, np.nan)}}, path
    ),
    "entropies": lambda s, path: plots.plot_entropy_by_action(
        s["entropy"], s["action"], LABELS, path, np.random.default_rng(1).exponential(0.3, 500)
    ),
    "entropies, twelve actions of which one is empty": lambda s, path: plots.plot_entropy_by_action(
        s["entropy"], np.arange(len(s["entropy"])) % 12 - 1, [LONG + str(i) for i in range(12)], path
    ),
    "entropies, one token of no entropy": lambda s, path: plots.plot_entropy_by_action([0.0], [0], ["greedy"], path),
    "lengths": lambda s, path: plots.plot_lengths({"policy": s["lengths"], "static": [7] * 40}, path, token_budget=32),
    "lengths, twelve decoders of which one is empty": lambda s, path: plots.plot_lengths(
        {LONG + str(i): np.random.default_rng(i).poisson(300 * i, 50 * i) for i in range(12)}, path
    ),
    "tokens": lambda s, path: plots.plot_tokens_by_action(s["tokens"], s["action"], LABELS, path),
    "tokens, odd ones and an empty action": lambda s, path: plots.plot_tokens_by_action(
        ODD * 2, [0] * len(ODD) + [-1] * len(ODD), ["$a$ and _b_", "empty"], path, top=40
    ),
    "tokens, one": lambda s, path: plots.plot_tokens_by_action(["a"], [0], ["greedy"], path),
    "tokens, twelve actions": lambda s, path: plots.plot_tokens_by_action(
        s["tokens"], np.arange(len(s["tokens"])) % 12, [LONG + str(i) for i in range(12)], path, top=3
    ),
    "actions in training": lambda s, path: plots.plot_action_training(
        log_of(shares_by_step(4), eval={10: 0.4, 20: 0.6}),
        path,
        {"with chain of thought": {1: [np.nan] * 4, **shares_by_step(4, 20, 1)}},
        labels=LABELS,
    ),
    "actions in training, twelve, two evaluations": lambda s, path: plots.plot_action_training(
        log_of(shares_by_step(12), eval_math={5: 0.4, 9: 0.6}, eval_code={5: 0.1}),
        path,
        {
            "coin": shares_by_step(12, 9, 1),
            LONG: {},
            "calc": shares_by_step(12, 9, 2),
            "fork": shares_by_step(12, 9, 3),
        },
        labels=[LONG + str(i) for i in range(12)],
    ),
    "actions in training, one of one step": lambda s, path: plots.plot_action_training(log_of({1: [1.0]}), path),
    "training curves": lambda s, path: plots.plot_training_curves(
        {"a_b": losses(0.1, temperature_mean=0.7, top_p_mean=0.9), "$c$": losses(0.2)}, path
    ),
    "training curves, twelve": lambda s, path: plots.plot_training_curves(
        {LONG + str(i): losses(i / 9) for i in range(12)}, path
    ),
    "coverage": lambda s, path: plots.plot_coverage(coverage_curve(np.random.default_rng(0).random((9, 6))), path),
    "coverage, many actions, all equal": lambda s, path: plots.plot_coverage(coverage_curve(np.ones((9, 40))), path),
    "accuracy by budget, twelve": lambda s, path: plots.plot_accuracy_by_budget(
        budget_rows(12, name=LONG + "{}"), path
    ),
    "accuracy at one budget": lambda s, path: plots.plot_accuracy_by_budget(demo_rows(), path),
    "accuracy by k": lambda s, path: plots.plot_accuracy_by_budget(demo_rows(), path, against="k"),
    "gains": lambda s, path: plots.plot_gains(demo_rows(), path),
    "gains, of what was chosen for each k": lambda s, path: plots.plot_gains(
        [{"decoder": LONG, "gain": {f"pass@{k}": interval(0.1 * k), "maj@8": interval(0.0)}} for k in (1, 2, 4)], path
    ),
    "gains, one": lambda s, path: plots.plot_gains([{"decoder": "_x", "gain": {"pass@1": interval(0.0)}}], path),
    "gains, many of long names": lambda s, path: plots.plot_gains(
        [{"decoder": f"{LONG}{i}", "gain": {"maj@8": interval(i / 99 - 0.2)}} for i in range(24)], path
    ),
    "soft top-p": lambda s, path: plots.plot_soft_top_p(path),
    "soft top-p, other example": lambda s, path: plots.plot_soft_top_p(
        path, logits=np.random.default_rng(0).normal(0, 3, 5000), temperature=0.5, top_p=1.0, alpha=5
    ),
}
# Of each function a figure that is quickly drawn.
TWICE = [
    "generation, one token",
    "entropies, one token of no entropy",
    "lengths",
    "tokens, one",
    "coverage",
    "gains, one",
]
TWICE += ["actions in training, one of one step", "training curves", "accuracy at one budget", "soft top-p"]


def after_writing(monkeypatch, look):
    write = FigureCanvasAgg.print_png

    def writing(canvas, *args, **kwargs):
        write(canvas, *args, **kwargs)
        look(canvas.figure)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", writing)


@pytest.fixture
def figures(monkeypatch):
    """The figures that were written, in order."""
    seen = []
    after_writing(monkeypatch, seen.append)
    return seen


def tick_labels(axes, axis):
    """Those that are in view, as boxes in the order of their places."""
    ways = {"x": (axes.xaxis, 0, axes.get_xlim()), "y": (axes.yaxis, 1, axes.get_ylim())}
    ticks, side, limits = ways[axis]
    low, high = sorted(limits)
    shown = [label for label in ticks.get_ticklabels() if label.get_text() and label.get_visible()]
    shown = [label for label in shown if low - 1e-9 <= label.get_position()[side] <= high + 1e-9]
    return [label.get_window_extent() for label in sorted(shown, key=lambda label: label.get_position()[side])]


def apart(one, other):
    return one.x1 <= other.x0 + 1 or other.x1 <= one.x0 + 1 or one.y1 <= other.y0 + 1 or other.y1 <= one.y0 + 1


def check_layout(figure):
    renderer = figure.canvas.get_renderer()
    taken, (width, height) = figure.get_tightbbox(renderer), figure.get_size_inches()
    assert min(taken.x0, taken.y0, width - taken.x1, height - taken.y1) > 0, f"{taken} of {width} x {height} inches"
    boxes = []
    for axes in (one for one in figure.axes if one.get_visible()):
        for axis in "xy":
            labels = tick_labels(axes, axis)
            assert all(apart(a, b) for a, b in itertools.pairwise(labels)), f"labels of {axis} overlap"
        boxes.append((axes.get_position().bounds, axes.get_tightbbox(renderer)))
    for (place, box), (other_place, other_box) in itertools.combinations(boxes, 2):
        assert place == other_place or apart(box, other_box), "axes overlap"  # or is the second of two y-axes
    for legend in figure.legends:
        assert all(apart(legend.get_window_extent(renderer), box) for _, box in boxes), "the legend covers something"


@pytest.mark.parametrize("case", CASES)
def test_a_figure_is_whole_and_the_same_twice(case, sampled, tmp_path, monkeypatch):
    after_writing(monkeypatch, check_layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a glyph that no font has, a layout that found no room
        CASES[case](sampled, tmp_path / "one.png")
        if case in TWICE:
            CASES[case](sampled, tmp_path / "two.png")
            assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    image = imread(tmp_path / "one.png")
    assert min(image.shape[:2]) > 200
    assert max(image.shape[:2]) < 4000
    assert 0.003 < (image[..., :3].min(axis=-1) < 0.9).mean() < 0.6  # neither empty nor covered


def test_every_figure_is_among_the_cases():
    source = Path(__file__).read_text(encoding="utf-8").split("CASES = {")[1].split("\n}")[0]
    assert {name for name in plots.__all__ if f"plots.{name}(" in source} == set(plots.__all__)


@pytest.mark.parametrize("case", ["generation, odd tokens and gaps", "tokens, odd ones and an empty action"])
def test_the_readers_own_settings_change_nothing(case, sampled, tmp_path, monkeypatch):
    CASES[case](sampled, tmp_path / "one.png")
    # With usetex a token such as `$\frac{` would stop LaTeX, if there is one.
    for name, value in {"text.usetex": True, "figure.facecolor": "red", "font.size": 30.0}.items():
        monkeypatch.setitem(rcParams, name, value)
    CASES[case](sampled, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert rcParams["font.size"] == 30.0


def test_no_display_and_no_global_state_is_used(tmp_path):
    code = (
        "import sys, matplotlib; from hf_adaptive_decode.reports import plots; before = matplotlib.rcParams.copy();"
        "plots.plot_lengths({'a': [1, 2]}, sys.argv[1]);"
        "print('matplotlib.pyplot' in sys.modules, 'torch' in sys.modules, before == matplotlib.rcParams.copy())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.png")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "", "HOME": str(tmp_path)},
    )
    assert done.stdout.split() == ["False", "False", "True"], done.stderr


def hide(monkeypatch, package):
    found = builtins.__import__

    def importing(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


@pytest.mark.parametrize("case", CASES)
def test_without_matplotlib_the_error_says_what_to_install(case, sampled, tmp_path, monkeypatch):
    hide(monkeypatch, "matplotlib")
    with pytest.raises(MissingExtraError, match=r"\[viz\]"):
        CASES[case](sampled, tmp_path / "one.png")


# --- marks and texts --------------------------------------------------------------------------------------------------


def test_no_two_series_look_alike_and_colour_is_never_all():
    looks = [style.series_style(number) for number in range(84)]
    assert len({tuple(look.items()) for look in looks}) == 84
    assert len({look["marker"] for look in looks[:12]}) == 12


def test_a_long_line_has_few_marks_and_they_are_apart():
    first, second = style.markers_at(1000, 0), style.markers_at(1000, 1)
    assert first != second
    assert 10 <= 1000 / first[1] <= 15
    assert style.markers_at(5, 3) == (0, 1)


@settings(max_examples=50)
@given(st.text(max_size=40))
def test_any_token_is_shown_in_one_line_of_glyphs_that_exist(token):
    shown = style.token_text(token)
    known = font_manager.get_font(font_manager.findfont("DejaVu Sans")).get_charmap()
    assert shown
    assert len(shown) <= 18
    assert all(ord(character) in known for character in shown)
    assert " " not in shown


@pytest.mark.parametrize(
    ("token", "shown"),
    [(" the", "␣the"), ("\n", "'\\n'"), ("", "''"), ("你", "\\u4f60"), ("$x_1$", "$x_1$"), ("a" * 20, "a" * 17 + "…")],
)
def test_a_token_is_shown_as_itself_where_it_can_be(token, shown):
    assert style.token_text(token) == shown


def test_a_character_that_the_readers_font_has_is_shown(monkeypatch):
    ring = "a\u20dd"  # not in DejaVu Sans
    assert style.token_text(ring) == "a\\u20dd"
    monkeypatch.setitem(rcParams, "font.sans-serif", ["STIXGeneral"])
    assert style.token_text(ring) == ring


def test_dollars_are_no_formulas(tmp_path, figures):
    plots.plot_lengths({"$a_1$ costs $5": [1, 2]}, tmp_path / "a.png")
    found = [text for text in figures[0].findobj(Text) if "$" in text.get_text()]
    assert {text.get_text() for text in found} == {"$a_1$ costs $5"}
    assert not any(text.get_parse_math() for text in found)


def test_a_name_that_begins_with_an_underscore_has_its_place_in_the_legend(tmp_path, figures):
    plots.plot_training_curves({"_hidden": losses(0.1), "b": losses(0.2)}, tmp_path / "a.png")
    assert [text.get_text().strip() for text in figures[0].legends[0].get_texts()] == ["_hidden", "b"]


def test_a_legend_gives_each_series_its_own_mark_and_reads_row_by_row(tmp_path, figures):
    names = [f"series {number}" for number in range(10)]
    plots.plot_training_curves({name: losses(0.1) for name in names}, tmp_path / "a.png")
    (legend,) = figures[0].legends
    shown = {text.get_text(): mark for text, mark in zip(legend.get_texts(), legend.legend_handles, strict=True)}
    for number, name in enumerate(names):
        look = style.series_style(number)
        assert (shown[name].get_color(), shown[name].get_marker()) == (look["color"], look["marker"])
    boxes = {text.get_text(): text.get_window_extent() for text in legend.get_texts()}
    read = sorted(boxes, key=lambda name: (-round(boxes[name].y0), boxes[name].x0))
    assert read == names
    assert len({round(box.y0) for box in boxes.values()}) > 1


# --- what is drawn ----------------------------------------------------------------------------------------------------


def curves(axes):
    """Lines with several points, by colour."""
    lines = [line for line in axes.get_lines() if len(line.get_xdata()) > 1]
    return {line.get_color(): np.array(line.get_data(), dtype=float).T for line in lines}


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def steps_of(axes, color):
    """Heights above their row of the filled bins of a colour."""
    wanted = to_rgba(color)[:3]
    found = [p for p in axes.findobj(StepPatch) if p.get_fill() and p.get_facecolor()[:3] == wanted]
    assert len(found) == 1
    data = found[0].get_data()
    return data.values - data.baseline, data.edges


def test_entropies_are_counted_in_bins_of_a_logarithm_and_tiny_ones_apart(tmp_path, figures):
    entropy = np.array([0.0] * 50 + [-1e-7] * 10 + [1e-5] * 20 + [0.013] * 120 + [np.nan] * 5 + [0.7] * 100)
    action = np.array([0] * 205 + [1] * 100)
    plots.plot_entropy_by_action(entropy, action, ["cold", "hot"], tmp_path / "a.png")
    axes = figures[0].axes[0]
    heights, edges = steps_of(axes, style.FILLS[0])
    # 80 of the 200 that are known are at most 0.0001 nats; the others stand where their logarithm does.
    np.testing.assert_allclose(heights[0] / heights.sum(), 80 / 200)
    (place,) = np.flatnonzero(heights[1:]) + 1
    assert edges[place] <= np.log10(0.013) < edges[place + 1]
    hot, _ = steps_of(axes, style.FILLS[1])
    (place,) = np.flatnonzero(hot)
    assert edges[place] <= np.log10(0.7) < edges[place + 1]
    # One scale for all rows.
    np.testing.assert_allclose(hot.sum(), heights.sum())
    assert {"200 tokens, median 0.013", "100 tokens, median 0.7", "≤ 0.0001"} <= set(texts(figures[0]))
    medians = sorted(line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "^")
    np.testing.assert_allclose(medians, np.log10([0.013, 0.7]))


def test_a_static_strategy_stands_behind_the_actions(tmp_path, figures):
    entropy = np.full(50, 0.5)
    plots.plot_entropy_by_action(entropy, np.zeros(50), ["a"], tmp_path / "a.png")
    plots.plot_entropy_by_action(entropy, np.zeros(50), ["a"], tmp_path / "b.png", [0.02] * 10)
    names = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in figures]
    assert "all tokens" in names[0]
    assert "static decoding" in names[1]
    behind = [
        p for p in figures[1].axes[0].findobj(StepPatch) if not p.get_fill() and p.get_edgecolor()[:3] == (0, 0, 0)
    ]
    (place,) = np.flatnonzero(behind[0].get_data().values)
    edges = behind[0].get_data().edges
    assert edges[place] <= np.log10(0.02) < edges[place + 1]


def test_a_row_of_few_values_does_not_flatten_the_others(tmp_path, figures):
    many = np.random.default_rng(0).exponential(0.5, 500)
    for few, name in ([], "a"), ([0.5], "b"):
        entropy, action = np.concatenate([many, few]), np.array([0] * 500 + [1] * len(few))
        plots.plot_entropy_by_action(entropy, action, ["many", "few"], tmp_path / f"{name}.png", many)
    (before, _), (after, _) = (steps_of(figure.axes[0], style.FILLS[0]) for figure in figures)
    np.testing.assert_allclose(before, after)
    assert any("rows of under 30 cut off" in " ".join(text.split()) for text in texts(figures[1]))


def test_lengths_are_counted_and_those_at_the_budget_named(tmp_path, figures):
    plots.plot_lengths({"a": [3] * 30 + [10] * 10, "none": []}, tmp_path / "a.png", token_budget=10)
    heights, edges = steps_of(figures[0].axes[0], style.FILLS[0])
    at = {int(edges[place] + 0.5): heights[place] / heights.sum() for place in np.flatnonzero(heights)}
    assert at == pytest.approx({3: 0.75, 10: 0.25})
    assert {"40 completions, mean 4.8\n25.0 % at the budget", "no completion"} <= set(texts(figures[0]))


def test_tokens_are_ranked_within_their_action_and_compared_with_all(tmp_path, figures):
    tokens = ["a"] * 6 + ["b"] * 2 + ["c"] * 4 + ["a"] * 8
    plots.plot_tokens_by_action(tokens, [0] * 8 + [1] * 4 + [-1] * 8, ["x", "y"], tmp_path / "a.png", top=1)
    panels = {axes.get_title(): axes for axes in figures[0].axes if axes.get_visible()}
    assert list(panels) == ["x\n8 tokens", "y\n4 tokens", "no decision\n8 tokens"]
    shown = []
    for axes in panels.values():
        (label,) = [label.get_text() for label in axes.get_yticklabels()]
        shown.append((label, [round(bar.get_width(), 6) for bar in axes.patches], [t.get_text() for t in axes.texts]))
    # "a" is 6 of 8 tokens of x, and 14 of all 20; "c" all of y's 4, and 4 of 20.
    assert shown == [("a", [75.0], ["×1.1"]), ("c", [100.0], ["×5.0"]), ("a", [100.0], ["×1.4"])]


def test_a_generation_is_drawn_over_the_first_ones_means(tmp_path, figures):
    base, high = np.array([0.2, 0.4, np.nan, 0.6]), np.array([1.0, 1.4])
    panels = {"base": {"temperature": base, "top_p": [0.9] * 4}, "high": {"temperature": high, "tokens": ["a", "\n"]}}
    plots.plot_generation(panels, tmp_path / "a.png")
    first, second = figures[0].axes
    assert [axes.get_title(loc="left") for axes in (first, second)] == [
        "base   (mean T 0.40, mean P 0.90)",
        "high   (mean T 1.20)",
    ]
    drawn = [line for line in first.get_lines() if len(line.get_xdata()) == 4]
    np.testing.assert_array_equal(drawn[0].get_ydata(), base)
    means = [line.get_ydata()[0] for line in second.get_lines() if line.get_linestyle() == ":"]
    np.testing.assert_allclose(means, [0.4, 0.9])
    assert [label.get_text() for label in second.get_xticklabels()] == ["a", "'\\n'"]
    assert first.get_ylim() == second.get_ylim()


def test_a_long_generation_is_drawn_with_its_running_mean(tmp_path, figures):
    rng = np.random.default_rng(0)
    values = np.where(rng.random(1000) < 0.1, np.nan, rng.random(1000))
    values[200:240] = np.nan
    plots.plot_generation({"long": {"temperature": values}}, tmp_path / "a.png")
    raw, smooth = (line.get_ydata() for line in figures[0].axes[0].get_lines())
    np.testing.assert_array_equal(raw, values)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mean of nothing
        expected = [np.nanmean(values[max(0, i - 10) : i + 11]) for i in range(1000)]
    np.testing.assert_allclose(smooth, expected)
    assert np.isnan(smooth[215:225]).all()


def test_actions_and_the_validation_reward_are_those_of_the_log(tmp_path, figures):
    shares = {1: [0.25, 0.75], 2: [0.5, 0.5], 9: [1.0, 0.0]}
    history = log_of(shares, eval_math={2: 0.3, 9: 0.6}, eval_code={9: 0.1})
    history.append({"step": 9, "train_runtime": 3.0, "train_loss": 0.1})
    by_type = {"cot": {"9": [1.0, 0.0], "10": [0.0, 1.0]}}  # steps are text when they come from JSON
    plots.plot_action_training(history, tmp_path / "a.png", by_type, labels=["cold", "hot"])
    by_label = {axes.get_ylabel(): axes for axes in figures[0].axes[::-1]}  # of the first panel
    found = curves(by_label["share of the decisions"])
    np.testing.assert_allclose(found[style.COLORS[0]], [[1, 0.25], [2, 0.5], [9, 1.0]])
    np.testing.assert_allclose(found[style.COLORS[1]], [[1, 0.75], [2, 0.5], [9, 0.0]])
    np.testing.assert_allclose(curves(by_label["reward"])["black"], [[2, 0.3], [9, 0.6]])
    assert [axes.get_title(loc="left") for axes in figures[0].axes if axes.get_title(loc="left")] == [
        "all prompts",
        "cot",
    ]
    cot = next(axes for axes in figures[0].axes if axes.get_title(loc="left") == "cot")
    np.testing.assert_allclose(curves(cot)[style.COLORS[1]], [[9, 0.0], [10, 1.0]])
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert sorted(names) == ["cold", "hot", "validation reward on code", "validation reward on math"]


def test_types_of_prompts_that_the_log_holds_have_panels_of_their_own(tmp_path, figures):
    history = log_of({1: [0.5, 0.5], 2: [0.5, 0.5], 3: [0.5, 0.5]})
    history[0] |= {"action/0/cot": 0.9, "action/1/cot": 0.1}
    history[2] |= {"action/0/cot": 0.7, "action/1/cot": 0.3, "action/0/a/b": 0.2, "action/1/a/b": 0.8}
    plots.plot_action_training(history, tmp_path / "a.png")
    left = {axes.get_title(loc="left"): axes for axes in figures[0].axes if axes.get_title(loc="left")}
    assert list(left) == ["all prompts", "cot", "a/b"]
    np.testing.assert_allclose(curves(left["cot"])[style.COLORS[0]], [[1, 0.9], [3, 0.7]])
    plots.plot_action_training(history, tmp_path / "b.png", {})
    assert len(figures[1].axes) == 2  # shares and reward of all prompts


def test_without_an_evaluation_the_training_reward_is_named_as_such(tmp_path, figures):
    plots.plot_action_training(log_of({1: [1.0], 2: [1.0]}), tmp_path / "a.png")
    assert "training reward" in texts(figures[0])


def test_the_trainers_logs_can_be_drawn_as_they_are(tmp_path, figures):
    shared = {"output_dir": tmp_path, "max_steps": 2, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    shared |= {"save_strategy": "no", "disable_tqdm": True, "eval_strategy": "steps", "eval_steps": 1}
    tokenizer, problems = load_tokenizer(), build_problems("train", 8)
    config = AutoDecoConfig(policy="token_actions", actions=[{"temperature": 0.0}, {"temperature": 1.0}])
    args = REINFORCEDecodingTrainingArguments(per_device_train_batch_size=4, num_generations=2, budget=16, **shared)
    sets = {"train_dataset": problems, "eval_dataset": problems[:2], "processing_class": tokenizer}
    policy = REINFORCEDecodingTrainer(load_base_model(), testbed_reward, args, decoding_config=config, **sets)
    policy.train()
    plots.plot_action_training(policy.state.log_history, tmp_path / "a.png", labels=["greedy", "T=1"])
    logged = [entry["action/1"] for entry in policy.state.log_history if "action/1" in entry]
    np.testing.assert_allclose(curves(figures[0].axes[0])[style.COLORS[1]][:, 1], logged)
    rewards = [curves(axes)["black"] for axes in figures[0].axes if axes.get_ylabel() == "reward"]
    assert [len(series) for series in rewards[:1]] == [2]
    kinds = {key.split("/")[2] for entry in policy.state.log_history for key in entry if key.startswith("action/0/")}
    titles = [axes.get_title(loc="left") for axes in figures[0].axes if axes.get_title(loc="left")]
    assert sorted(titles) == sorted({"all prompts", *kinds} if kinds else [])

    rows = [{"prompt": problem["prompt"], "completion": "so 7"} for problem in problems]
    sets = {"train_dataset": rows, "eval_dataset": rows, "processing_class": tokenizer}
    heads = AutoDecoTrainer(load_base_model(), AutoDecoTrainingArguments(**shared), **sets)
    heads.train()
    plots.plot_training_curves({"heads": heads.state.log_history}, tmp_path / "b.png")
    panels = {axes.get_ylabel(): curves(axes) for axes in figures[1].axes}
    assert list(panels) == ["loss", "mean temperature T", "mean top-p P"]
    logged = [entry["temperature_mean"] for entry in heads.state.log_history if "temperature_mean" in entry]
    np.testing.assert_allclose(panels["mean temperature T"][style.COLORS[0]][:, 1], logged)
    assert "hollow: on held-out data" in texts(figures[1])


def test_losses_that_are_not_numbers_are_left_out(tmp_path, figures):
    history = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": 0.5}]
    plots.plot_training_curves({"a": history}, tmp_path / "a.png")
    np.testing.assert_array_equal(curves(figures[0].axes[0])[style.COLORS[0]], [[1, 1.0], [3, 0.5]])


def test_both_ways_of_choosing_actions_are_drawn(tmp_path, figures):
    curve = coverage_curve(np.random.default_rng(0).random((9, 6)))
    plots.plot_coverage(curve, tmp_path / "a.png")
    found = curves(figures[0].axes[0])
    np.testing.assert_allclose(found[style.COLORS[0]].T, [curve["k"], curve["greedy_coverage"]])
    np.testing.assert_allclose(found[style.COLORS[1]].T, [curve["k"], curve["top_by_mean"]])


def test_accuracies_stand_in_bands_of_their_intervals(tmp_path, figures):
    rows = budget_rows(2, budgets=(48, 12, 24))
    plots.plot_accuracy_by_budget([{"kind": "verdict"}, *rows], tmp_path / "a.png")
    axes = figures[0].axes[0]
    found = curves(axes)
    for number in range(2):
        expected = [[r["token_budget"], 100 * r["pass@1"]["mean"]] for r in rows[3 * number : 3 * number + 3]]
        np.testing.assert_allclose(found[style.COLORS[number]], sorted(expected))
    band = axes.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(np.ptp(band[band[:, 0] == 12][:, 1]), 6.0)


def named(decoder, role, budget, for_k=None, adapter="heads", **metrics):
    row = {"decoder": decoder, "role": role, "token_budget": budget, "for_k": for_k, "adapter": adapter}
    return row | {f"{name}@{k}": interval(value) for name, values in metrics.items() for k, value in values.items()}


def legend_names(figure):
    return {text.get_text() for text in figure.legends[0].get_texts()}


def test_a_best_static_for_each_budget_is_one_line_and_two_statics_are_two(tmp_path, figures):
    best = [(12, "greedy"), (48, "T=0.75")]
    rows = [named(decoder, "best_static", budget, 1, **{"pass": {1: 0.4}}) for budget, decoder in best]
    grid = itertools.product((12, 48), ("T=1", "T=2"))
    rows += [named(decoder, "static", budget, **{"pass": {1: 0.3}}) for budget, decoder in grid]
    rows.append(named("greedy", "greedy", None, **{"pass": {1: 0.9}}))  # over all budgets
    plots.plot_accuracy_by_budget(rows, tmp_path / "a.png")
    assert legend_names(figures[0]) == {"best static", "T=1", "T=2"}


def test_of_several_adapters_each_has_its_lines_and_shares_what_is_the_same(tmp_path, figures):
    rows = []
    for adapter, accuracy in (("heads", 0.5), ("policy", 0.6)):
        rows.append(named("adapter", "adapter", 12, adapter=adapter, **{"pass": {1: accuracy}}))
        rows.append(named("greedy", "greedy", 12, adapter=adapter, **{"pass": {1: 0.2}}))
    plots.plot_accuracy_by_budget(rows, tmp_path / "a.png")
    assert legend_names(figures[0]) == {"heads: adapter", "policy: adapter", "greedy"}


def test_a_best_static_for_each_k_is_one_line_against_k_or_one_for_each(tmp_path, figures):
    one = [named("T=0.5", "best_static", 48, 1, **{"pass": {1: 0.4}})]
    one += [named("T=1", "best_static", 48, 8, **{"pass": {8: 0.9}})]
    plots.plot_accuracy_by_budget(one, tmp_path / "a.png", against="k")
    np.testing.assert_allclose(curves(figures[0].axes[0])[style.COLORS[0]], [[1, 40], [8, 90]])
    assert legend_names(figures[0]) == {"best static"}
    both = [named("T=0.5", "best_static", 48, 1, **{"pass": {1: 0.4, 8: 0.6}})]
    both += [named("T=1", "best_static", 48, 8, **{"pass": {1: 0.3, 8: 0.9}})]
    plots.plot_accuracy_by_budget(both, tmp_path / "b.png", against="k")
    assert legend_names(figures[1]) == {"best static for pass@1", "best static for pass@8"}


def test_against_k_every_metric_of_the_kind_is_drawn(tmp_path, figures):
    rows = [
        {"decoder": "a", "token_budget": 48, "pass@8": interval(0.9), "pass@1": interval(0.4), "maj@8": interval(0.5)}
    ]
    plots.plot_accuracy_by_budget(rows, tmp_path / "a.png", against="k")
    np.testing.assert_allclose(curves(figures[0].axes[0])[style.COLORS[0]], [[1, 40], [8, 90]])
    assert "k [samples]" in texts(figures[0])


def test_gains_stand_beside_the_zero_line_and_are_filled_where_they_exclude_it(tmp_path, figures):
    rows = [
        {"decoder": "sure", "gain": {"pass@1": {"mean": 0.1, "low": 0.05, "high": 0.2}}},
        {"decoder": "unsure", "gain": {"pass@1": {"mean": 0.01, "low": -0.02, "high": 0.03}, "pass@8": interval(-0.2)}},
        {"decoder": "the adapter", "pass@1": interval(0.5)},
    ]
    plots.plot_gains(rows, tmp_path / "a.png")
    first, second = figures[0].axes
    marks = [line for line in first.get_lines() if line.get_marker() == "o" and len(line.get_xdata())]
    assert [float(mark.get_xdata()[0]) for mark in marks] == pytest.approx([10, 1])
    assert [mark.get_markerfacecolor() == "white" for mark in marks] == [False, True]
    zero = [line for line in first.get_lines() if list(line.get_xdata()) == [0.0, 0.0]]
    assert len(zero) == 1
    assert [label.get_text() for label in first.get_yticklabels()] == ["sure", "unsure"]
    assert marks[0].get_ydata()[0] > marks[1].get_ydata()[0]
    assert [text.get_text() for text in first.texts] == ["+10.0 [+5.0, +20.0]", "+1.0 [-2.0, +3.0]"]
    assert [text.get_text() for text in second.texts] == ["-20.0 [-23.0, -17.0]"]
    assert [label.get_text() for label in second.get_yticklabels()] == ["unsure"]  # without a gap for the other


def test_gains_of_several_runs_are_told_apart_by_what_differs(tmp_path, figures):
    shared = {"task": "testbed", "decoder": "greedy", "gain": {"pass@1": interval(0.1)}}
    rows = [shared | {"token_budget": 12, "adapter": "heads"}, shared | {"token_budget": None, "adapter": "heads"}]
    plots.plot_gains(rows, tmp_path / "a.png")
    names = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert names == ["12 tokens: greedy", "all budgets: greedy"]


def test_gains_over_decoders_of_one_name_are_told_apart_by_their_role(tmp_path, figures):
    chosen = [("greedy", None), ("static", 1), ("best_static", 1)]
    rows = [named("greedy", role, 48, k) | {"gain": {"pass@1": interval(0.1)}} for role, k in chosen]
    plots.plot_gains(rows, tmp_path / "a.png")
    names = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert names == ["greedy", "greedy, static for pass@1", "best static for pass@1 (greedy)"]


def test_soft_and_hard_top_p_are_those_of_the_equations(tmp_path, figures):
    logits, temperature, top_p, alpha = np.random.default_rng(0).normal(0, 2, 40), 0.8, 0.7, 12.0
    plots.plot_soft_top_p(tmp_path / "a.png", logits=logits, temperature=temperature, top_p=top_p, alpha=alpha)
    left, right = figures[0].axes
    p = np.sort(np.exp(logits / temperature))[::-1]
    p /= p.sum()
    c = p.cumsum()
    soft = p * np.exp(-alpha * np.maximum(c - top_p, 0))
    hard = np.where(c - p < top_p, p, 0)
    np.testing.assert_allclose([bar.get_height() for bar in right.patches], p, rtol=1e-5)
    drawn = {line.get_color(): line.get_ydata() for line in right.get_lines()}
    np.testing.assert_allclose(drawn[style.COLORS[0]], soft / soft.sum(), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(drawn[style.COLORS[1]], hard / hard.sum(), rtol=1e-4, atol=1e-9)
    mask = next(line for line in left.get_lines() if isinstance(line, Line2D) and len(line.get_xdata()) > 100)
    x, y = mask.get_data()
    np.testing.assert_allclose(y, np.exp(-alpha * np.maximum(x - top_p, 0)))


# --- what cannot be drawn ---------------------------------------------------------------------------------------------

GOOD = {"low": 0.1, "mean": 0.2, "high": 0.3}
BAD = {
    "no panel": (lambda p: plots.plot_generation({}, p), "`panels` is {}"),
    "unknown column": (lambda p: plots.plot_generation({"a": {"top_k": [1]}}, p), r"\['top_k'\]"),
    "only gaps": (lambda p: plots.plot_generation({"a": {"top_p": [np.nan]}}, p), "no known value"),
    "unequal columns": (
        lambda p: plots.plot_generation({"a": {"top_p": [1.0], "tokens": ["x", "y"]}}, p),
        "'tokens': 2",
    ),
    "temperature below 0": (lambda p: plots.plot_generation({"a": {"temperature": [-0.5]}}, p), "holds -0.5"),
    "temperature as text": (
        lambda p: plots.plot_generation({"a": {"temperature": ["x"]}}, p),
        "'temperature'.*numbers",
    ),
    "infinite": (lambda p: plots.plot_generation({"a": {"temperature": [1, np.inf]}}, p), r"\[1\]` is infinite"),
    "table of entropies": (lambda p: plots.plot_entropy_by_action([[1.0]], [0], ["a"], p), r"`entropy`.*\[1, 1\]"),
    "negative entropy": (lambda p: plots.plot_entropy_by_action([-1.0], [0], ["a"], p), "`entropy` holds -1"),
    "no known entropy": (lambda p: plots.plot_entropy_by_action([np.nan], [0], ["a"], p), "`entropy` holds no known"),
    "static of nothing": (
        lambda p: plots.plot_entropy_by_action([1.0], [0], ["a"], p, []),
        "`static_entropy` holds no",
    ),
    "unknown action": (lambda p: plots.plot_entropy_by_action([1.0], [2], ["a", "b"], p), r"`action\[0\]` is 2"),
    "action below none": (lambda p: plots.plot_entropy_by_action([1.0], [-2], ["a", "b"], p), r"`action\[0\]` is -2"),
    "half an action": (lambda p: plots.plot_entropy_by_action([1.0], [0.5], ["a"], p), r"`action\[0\]` is 0.5"),
    "too few actions": (lambda p: plots.plot_entropy_by_action([1.0, 2.0], [0], ["a"], p), "1 entries for 2 tokens"),
    "labels as text": (lambda p: plots.plot_entropy_by_action([1.0], [0], "ab", p), "`labels` is 'ab'"),
    "no decoder": (lambda p: plots.plot_lengths({}, p), "`lengths_by_decoder` is {}"),
    "negative length": (lambda p: plots.plot_lengths({"a": [-3]}, p), r"`lengths_by_decoder\['a'\]` holds -3"),
    "length of NaN": (lambda p: plots.plot_lengths({"a": [np.nan]}, p), r"`lengths_by_decoder\['a'\]\[0\]` is nan"),
    "budget of no token": (lambda p: plots.plot_lengths({"a": [1]}, p, token_budget=0), "`token_budget` is 0"),
    "no token": (lambda p: plots.plot_tokens_by_action([], [], ["a"], p), r"`tokens` is \[\]"),
    "no bar": (lambda p: plots.plot_tokens_by_action(["a"], [0], ["a"], p, top=0), "`top` is 0"),
    "log of another trainer": (lambda p: plots.plot_action_training(losses(0.1), p), "`log_history` holds no entry"),
    "labels of another policy": (
        lambda p: plots.plot_action_training(log_of({1: [1.0]}), p, labels=["a", "b"]),
        "`labels` holds 2 names; the log has 1",
    ),
    "type of another policy": (
        lambda p: plots.plot_action_training(log_of({1: [1.0]}), p, {"cot": {1: [0.5, 0.5]}}),
        r"`by_type\['cot'\]\[1\]` holds 2 shares",
    ),
    "type of the log's name": (
        lambda p: plots.plot_action_training(log_of({1: [1.0]}), p, {"all prompts": {}}),
        "'all prompts'",
    ),
    "no loss": (lambda p: plots.plot_training_curves({"a": [{"step": 1}]}, p), r"`histories\['a'\]`"),
    "no training": (lambda p: plots.plot_training_curves({}, p), "`histories` is {}"),
    "part of a curve": (lambda p: plots.plot_coverage({"k": [1]}, p), r"\['greedy_coverage', 'top_by_mean'\]"),
    "unequal curve": (
        lambda p: plots.plot_coverage({"k": [1], "greedy_coverage": [1, 1], "top_by_mean": [1]}, p),
        "'greedy_coverage': 2",
    ),
    "unknown axis": (lambda p: plots.plot_accuracy_by_budget(budget_rows(), p, against="T"), "`against` is 'T'"),
    "unknown metric": (lambda p: plots.plot_accuracy_by_budget(budget_rows(), p, metric="pass@64"), "'pass@64'"),
    "no interval": (
        lambda p: plots.plot_accuracy_by_budget([{"decoder": "a", "token_budget": 1, "pass@1": 0.5}], p),
        "`pass@1 of a` is 0.5",
    ),
    "turned interval": (
        lambda p: plots.plot_gains([{"decoder": "a", "gain": {"pass@1": GOOD | {"low": 0.9}}}], p),
        "`low` not above `high`",
    ),
    "no budget": (
        lambda p: plots.plot_accuracy_by_budget([{"decoder": "a", "pass@1": GOOD}], p),
        "no 'pass@1' at a `token_budget`",
    ),
    "budget of 0": (
        lambda p: plots.plot_accuracy_by_budget([budget_rows(1)[0] | {"token_budget": 0}], p),
        "'decoder 0' has 0 for its token_budget",
    ),
    "two values": (
        lambda p: plots.plot_accuracy_by_budget([*budget_rows(1), budget_rows(1)[0] | {"pass@1": GOOD}], p),
        "'decoder 0' twice at 256",
    ),
    "two tasks": (
        lambda p: plots.plot_accuracy_by_budget([r | {"task": t} for t in "ab" for r in budget_rows()], p),
        r"`task`, \['a', 'b'\]",
    ),
    "two budgets against k": (
        lambda p: plots.plot_accuracy_by_budget(budget_rows(), p, against="k"),
        "several values of `token_budget`",
    ),
    "no decoder's name": (lambda p: plots.plot_gains([{"gain": {"pass@1": GOOD}}], p), "`decoder`"),
    "no gain": (lambda p: plots.plot_gains(budget_rows(), p), "no row with a `gain`"),
    "gain in nothing": (lambda p: plots.plot_gains(demo_rows(), p, ["maj@8"]), r"`metrics` is \['maj@8'\]"),
    "no alpha": (lambda p: plots.plot_soft_top_p(p, alpha=0), "`alpha` is 0"),
    "top-p above 1": (lambda p: plots.plot_soft_top_p(p, top_p=1.5), "`top_p` is 1.5"),
    "temperature 0": (lambda p: plots.plot_soft_top_p(p, temperature=0.0), "`temperature` is 0.0"),
    "no logit": (lambda p: plots.plot_soft_top_p(p, logits=[]), "`logits`"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_drawn_is_named_and_leaves_no_file(case, tmp_path):
    draw, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        draw(tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()

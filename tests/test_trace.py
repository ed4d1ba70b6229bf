"""The trace report: tokens as texts, a page that no text can break, its colours, and the command that writes it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.actions import ACTION_PRESETS
from hf_adaptive_decode.cli.main import main
from hf_adaptive_decode.engines.base import Completion
from hf_adaptive_decode.engines.transformers import complete
from hf_adaptive_decode.evaluation.tokens import token_table
from hf_adaptive_decode.evaluation.traces import Alternative, TokenTrace, Trace, traces_of
from hf_adaptive_decode.reports.colours import ACTION_COLOURS, STEPS, Scale, luminance, ramp, text_on
from hf_adaptive_decode.reports.escaping import script_json, visible
from hf_adaptive_decode.reports.trace_page import trace_page
from hf_adaptive_decode.testbed import BASE_MODEL_PATH, build_problems, load_base_model, load_tokenizer

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "</script ",
    "<!--<script",
    "</span></div><style>*{display:none}</style>",
    "<!-- ",
    "]]>",
    "\" onmouseover='alert(1)' x=\"",
    "&lt;b&gt; &amp;amp; &#60;",
    "javascript:alert(1)",
    "\n",
    "\n\n  \t",
    " ",
    "\r",
    "\r\n",
    "\u2028\u2029",
    "\u202eright to left",
    "\u200b\ufeff\x1b[31m\x85",
    "例え 🙂 n\u0303 👩\u200d💻",
    "",
]
# Any text, and what could break something anywhere in it.
TEXTS = st.lists(st.sampled_from([*HOSTILE, *"<>&\"'/!\0\ud800"]) | st.text(max_size=3), max_size=4).map("".join)
TAGS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "h1",
    "h2",
    "p",
    "div",
    "fieldset",
    "legend",
    "label",
    "input",
}
TAGS |= {"section", "span", "small", "i", "script"}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "dir", "type", "value", "checked", "role"}
ATTRIBUTES |= {"aria-label", "tabindex", "data-mark", "data-colour", "id", "hidden"}


class Page(HTMLParser):
    """A page's tags and attributes, and the text of each pane's tokens, headings and data."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.handlers = set(), set(), []
        self.panes: list[list[str]] = []
        self.classes: list[list[str]] = []
        self.text: dict[str, list[str]] = {}
        self.scripts: list[str] = []
        self.open: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert [tag for tag, _ in self.open] == [], "an element was left open"
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.add(tag)
        self.attributes |= set(attributes)
        kind = attributes.get("class", "")
        if kind == "tokens":
            self.panes.append([])
            self.classes.append([])
        if kind.startswith("token "):
            self.panes[-1].append("")
            self.classes[-1].append(kind.removeprefix("token "))
        if tag == "script":
            self.scripts.append("")
        if tag not in ("meta", "input"):
            self.open.append((tag, kind))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if any(kind.startswith("token ") for _, kind in self.open):
            self.panes[-1][-1] += data
        for tag, kind in self.open:
            self.text.setdefault(kind or tag, []).append(data)
        if self.open and self.open[-1][0] == "script":
            self.scripts[-1] += data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data!r}")


def token(text="word", *, position=0, budget=10, **changes) -> TokenTrace:
    usual = {
        "token_id": 7,
        "text": text,
        "temperature": 0.5,
        "top_p": 0.9,
        "action": None,
        "entropy": 1.25,
        "probability": 0.5,
        "remaining": budget - position,
        "alternatives": (Alternative(7, text, 0.5), Alternative(8, "<b>other</b>", 0.25)),
    }
    return TokenTrace(**{**usual, **changes})


def trace(texts=("a", " b"), name="heads", prompt="a prompt", actions=(), **changes) -> Trace:
    tokens = tuple(token(text, position=at) for at, text in enumerate(texts))
    return dataclasses.replace(Trace(name, prompt, tokens, actions, 10, True), **changes)


def of_actions(actions, names=("greedy", "T=0.5", "T=1"), **changes) -> Trace:
    tokens = tuple(token("x", position=at, action=action) for at, action in enumerate(actions))
    return dataclasses.replace(trace(name="policy", actions=names), tokens=tokens, **changes)


# What a page shows, whatever the texts


def test_hostile_texts_come_out_as_text_and_nothing_else():
    bad = "\"'><script>alert(1)</script>"
    traces = [
        trace(HOSTILE, name=bad + "1", prompt=bad, actions=(bad,)),
        of_actions([0, 1, None], names=(bad, "</script>", "T=1"), name=bad + "2", prompt=bad),
    ]
    page = Page(trace_page(traces, title=bad, note=bad))
    assert page.tags == TAGS
    assert page.attributes == ATTRIBUTES
    assert page.panes == [HOSTILE, ["x", "x", "x"]]
    assert "".join(page.text["h1"]) == "".join(page.text["title"]) == "".join(page.text["note"]) == bad
    assert "".join(page.text["h2"]) == f"{bad}1{bad}2"
    assert "".join(page.text["prompt"]) == bad
    assert len(page.scripts) == 2
    assert page.data[1]["actions"] == [bad, "</script>", "T=1"]


@settings(max_examples=40)
@given(st.lists(TEXTS, min_size=1, max_size=6))
def test_any_text_comes_through_a_page_unchanged(texts):
    written = trace_page([trace(texts)], title="t").encode()
    page = Page(written.decode())
    # HTML has no word for a NUL, nor UTF-8 for half a surrogate pair.
    assert page.panes == [[re.sub("[\0\ud800-\udfff]", "\ufffd", text) for text in texts]]
    assert b"\r" not in written  # which a browser, unlike this parser, would read as a line feed
    assert b"\0" not in written
    assert page.tags <= TAGS
    assert page.attributes <= ATTRIBUTES


def test_a_page_loads_nothing_and_lets_no_other_script_run():
    text = trace_page([trace(HOSTILE), trace()], title="t")
    page = Page(text)
    assert not page.attributes & {"src", "srcset", "href", "style", "action", "background"}
    assert not re.search(r"@import|url\(", "".join(page.text["style"]))
    assert not re.search(r"fetch|XMLHttp|import|innerHTML|eval|document\.write|https?:", page.scripts[1])
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert (
        f"default-src &#x27;none&#x27;; style-src &#x27;unsafe-inline&#x27;; script-src &#x27;sha256-{digest}" in text
    )


def test_what_cannot_be_seen_is_marked():
    _, text = trace_page([trace(["\n", " ", "\t", "two words", "\u202e", "\r"])], title="t").split("<body")
    assert re.findall(r'data-mark="([^"]*)"', text) == ["↵", "␣", "⇥", "U+202E", "U+000D"]
    assert visible("a b\n\u2028") == "a␣b↵⟨U+2028⟩"
    assert visible("a b", marks_spaces=False) == "a b"


@given(TEXTS)
def test_json_within_a_script_cannot_end_it(text):
    written = script_json({text: [text]})
    assert not re.search("[<>&\u2028\u2029]", written)
    assert json.loads(written) == {text: [text]}


def test_json_within_a_script_holds_no_nan():
    with pytest.raises(ValueError, match="not JSON compliant"):
        script_json(float("nan"))


def test_every_token_stands_once_in_its_pane_with_all_that_is_known_of_it():
    left = of_actions([0, None, 2])
    right = trace(["x", " y", "z", "<"])
    page = Page(trace_page([left, right], title="t"))
    assert [len(pane) for pane in page.panes] == [3, 4]
    for shown, given_ in zip(page.data, (left, right), strict=True):
        assert shown["text"] == [visible(one.text) for one in given_.tokens]
        for name in ("token_id", "action", "remaining", "temperature", "top_p", "entropy", "probability"):
            assert shown[name] == [vars(one)[name] for one in given_.tokens]
        assert shown["top_ids"] == [[7, 8]] * len(given_.tokens)
        assert shown["top_probabilities"] == [[0.5, 0.25]] * len(given_.tokens)
    assert page.data[1]["top_texts"][1] == ["␣y", "<b>other</b>"]
    assert page.data[0]["remaining"] == [10, 9, 8]


def test_a_pane_says_how_the_completion_went():
    ended, cut = trace(reward=1.0), trace(name="other", ended=False)
    facts = "".join(Page(trace_page([ended, cut], title="t")).text["facts"])
    assert "2 tokens of 10, ended by itself; mean T 0.500; mean P 0.900; mean entropy 1.250; reward 1" in facts
    assert "2 tokens of 10, cut off by its budget; mean T 0.500" in facts
    assert facts.count("reward") == 1


# Colours


def test_heads_are_coloured_by_temperature_at_first_and_action_policies_by_action():
    assert 'data-colour="temperature"' in trace_page([trace()], title="t")
    assert 'data-colour="action"' in trace_page([of_actions([0, 1])], title="t")
    assert 'data-colour="action"' in trace_page([trace(), of_actions([0, 1], prompt="a prompt")], title="t")
    assert 'data-colour="entropy"' in trace_page([of_actions([0, 1])], title="t", colour="entropy")
    static = trace(tokens=(token(action=0),), actions=("T=0.5",))
    assert 'value="action"' not in trace_page([static], title="t")


def test_higher_values_get_later_colours_on_one_scale_for_both_panes():
    values = [0.11, 0.5, 1.0, 1.89]
    left = trace(tokens=tuple(token(temperature=value) for value in values[:3]))
    right = trace(tokens=(token(temperature=values[1]), token(temperature=values[3])))
    page = Page(trace_page([left, right], title="t"))
    steps = [[int(name.removeprefix("s")) for name in pane] for pane in page.classes]
    assert steps[0] == sorted(set(steps[0]))
    assert steps[1][0] == steps[0][1]
    assert steps[1][1] > steps[0][2]
    assert "".join(page.text["legend temperature"]) == "T 0.1  1.9" * 2


def test_equal_configurations_look_alike_and_others_do_not():
    left = of_actions([0, 1, 2], names=("greedy", "T=0.5", "T=1"))
    right = of_actions([0, 1], names=("T=1", "T=2"))
    page = Page(trace_page([left, right], title="t"))
    assert page.classes[1][0] == page.classes[0][2]
    assert len({*page.classes[0], *page.classes[1]}) == 4


def test_a_token_without_an_action_is_plain_and_the_legend_counts_it():
    page = Page(trace_page([of_actions([0, None, 0, 1])], title="t"))
    assert page.classes[0] == ["a0", "plain", "a0", "a1"]
    legend = "".join(page.text["legend action"])
    assert legend == "0: greedy 50%1: T=0.5 25%2: T=1 0%none taken 25%"


def test_many_actions_are_told_apart_by_underlines_where_the_palette_ends():
    names = tuple(f"T={number}" for number in range(4 * len(ACTION_COLOURS)))
    page = Page(trace_page([of_actions(list(range(len(names))), names=names)], title="t"))
    assert len(set(page.classes[0])) == len(names)


def test_what_was_not_recorded_is_plain_and_cannot_be_chosen():
    bare = trace(tokens=(token(temperature=None, top_p=None),))
    page = trace_page([bare], title="t")
    assert 'data-colour="entropy"' in page
    assert 'value="temperature"' not in page
    both = Page(trace_page([bare, trace()], title="t", colour="temperature"))
    assert both.classes[0] == ["plain"]


def test_equal_traces_give_equal_pages():
    assert trace_page([trace(HOSTILE)], title="t") == trace_page([trace(HOSTILE)], title="t")


@pytest.mark.parametrize("background", [*ramp(), *ACTION_COLOURS])
def test_text_can_be_read_on_every_colour(background):
    light, dark = sorted((luminance(background), luminance(text_on(background))), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_ramp_darkens_from_step_to_step_so_that_it_needs_no_hue():
    shades = [luminance(colour) for colour in ramp()]
    assert shades == sorted(shades, reverse=True)
    assert len(set(ramp())) == STEPS
    assert luminance("#000000") == 0
    assert luminance("#ffffff") == pytest.approx(1)


@given(st.lists(st.floats(0, 12), min_size=1, max_size=9), st.sampled_from([0.1, 0.5]))
def test_a_scale_holds_its_values_in_order_and_is_short(values, grain):
    scale = Scale.around(values, grain)
    assert scale.low - 1e-4 <= min(values)
    assert max(values) <= scale.high + 1e-4
    assert scale.high - scale.low <= max(values) - min(values) + 2 * grain + 1e-9
    steps = [scale.step(value) for value in sorted(values)]
    assert steps == sorted(steps)
    assert 0 <= steps[0] <= steps[-1] < STEPS


def test_a_scale_of_round_values_ends_at_them_and_of_none_is_none():
    scale = Scale.around(map(float, np.float32([0.9, 1.2])), 0.1)
    assert (scale.low, scale.high) == pytest.approx((0.9, 1.2))
    assert Scale.around([], 0.1) is None


@pytest.mark.parametrize(
    ("traces", "how", "message"),
    [
        ([], {}, "0 traces"),
        ([trace()] * 3, {}, "3 traces"),
        ([trace(), trace(prompt="another")], {}, "same prompt"),
        ([trace()], {"colour": "red"}, "'red'; choose from temperature, top_p, entropy"),
        ([trace()], {"colour": "action"}, "'action'"),
    ],
)
def test_a_page_of_what_cannot_be_shown_is_refused(traces, how, message):
    with pytest.raises(ValueError, match=message):
        trace_page(traces, title="t", **how)


# From completions to traces


def byte_tokenizer():
    """One token a byte, so that most characters beyond ASCII take several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def table_of(completions):
    """A table of random numbers, but for the tokens."""
    from hf_adaptive_decode.evaluation.tokens import TokenTable

    ids = np.concatenate([one.token_ids for one in completions])
    lengths = [len(one.token_ids) for one in completions]
    fill = np.linspace(0.1, 0.9, len(ids)).astype(np.float32)
    return TokenTable(
        problem=np.zeros(len(ids), dtype=np.int64),
        sample=np.repeat(np.arange(len(lengths)), lengths),
        position=np.concatenate([np.arange(length) for length in lengths]),
        token_id=ids,
        temperature=np.full(len(ids), np.nan, dtype=np.float32),
        top_p=fill,
        action=np.full(len(ids), -1),
        entropy=fill,
        probability=fill,
        top_ids=np.stack([ids, ids[::-1]], axis=1),
        top_probabilities=np.stack([fill, fill], axis=1),
    )


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12))
def test_token_texts_join_to_the_completion_even_where_a_character_is_several_tokens(text):
    tokenizer = byte_tokenizer()
    ids = tuple(tokenizer(text)["input_ids"])
    completion = Completion(text, ids, True)
    (found,) = traces_of(table_of([completion]), tokenizer, "é says", [completion], name="n", token_budget=99)
    assert "".join(one.text for one in found.tokens) == text
    assert found.prompt == "é says"
    assert len(found.tokens) == len(ids)


def test_alternatives_are_what_they_would_have_added():
    tokenizer = byte_tokenizer()
    ids = tuple(tokenizer("né!")["input_ids"])
    completion = Completion("né!", ids, True)
    (found,) = traces_of(table_of([completion]), tokenizer, "x", [completion], name="n", token_budget=4)
    assert [one.text for one in found.tokens] == ["n", "", "é", "!"]
    # The other alternative at each place is the token from the other end.
    assert [one.alternatives[1].text for one in found.tokens] == ["!", "\ufffd", "\ufffd\ufffd", "n"]


def test_a_completion_cut_within_a_character_still_has_a_text_for_each_token():
    tokenizer = byte_tokenizer()
    ids = tuple(tokenizer("a🙂")["input_ids"])[:-1]
    completion = Completion("", ids, False)
    (found,) = traces_of(table_of([completion]), tokenizer, "x", [completion], name="n", token_budget=9)
    assert [one.text for one in found.tokens][:3] == ["a", "", ""]
    assert set(found.tokens[3].text) == {"\ufffd"}


def test_words_keep_the_space_before_them_and_special_tokens_show():
    tokenizer, prompt = load_tokenizer(), build_problems("test", 1)[0]["prompt"]
    completions = complete(load_base_model(), tokenizer, [prompt], samples=2, token_budget=48)
    table = token_table(load_base_model(), tokenizer, [prompt], completions)
    for found, completion in zip(
        traces_of(table, tokenizer, prompt, completions[0], name="n", token_budget=48), completions[0], strict=True
    ):
        joined = "".join(one.text for one in found.tokens)
        assert joined == f" {tokenizer.decode(completion.token_ids)}"
        assert [one.remaining for one in found.tokens] == list(range(48, 48 - len(found.tokens), -1))
        assert all(one.alternatives[0].text.startswith(" ") for one in found.tokens)
        assert found.ended == completion.ended


def test_unknown_values_are_none_and_actions_are_named():
    completion = Completion("ab", (10, 11), True)
    table = dataclasses.replace(table_of([completion]), action=np.array([1, -1]))
    actions = [{"temperature": 0.0}, {"temperature": 0.5, "top_k": 5}]
    how = {"name": "n", "token_budget": 9, "actions": actions, "rewards": [0.5]}
    (found,) = traces_of(table, byte_tokenizer(), "x", [completion], **how)
    assert found.actions == ("greedy", "T=0.5, top-k 5")
    assert [one.action for one in found.tokens] == [1, None]
    assert [one.temperature for one in found.tokens] == [None, None]
    assert found.reward == 0.5
    rows = list(found.rows())
    assert [row["configuration"] for row in rows] == ["T=0.5, top-k 5", None]
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    json.dumps(rows, allow_nan=False)


# The command


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """An adapter with heads and one with actions on the embedded model, each on disk."""
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    heads = AutoDecoForCausalLM.from_base(load_base_model(), AutoDecoConfig(policy="heads"))
    tiny.randomise_heads(heads).save_pretrained(root / "heads")
    config = AutoDecoConfig(policy="token_actions", actions=ACTION_PRESETS["token_math"], max_prob_mask=0.95)
    AutoDecoForCausalLM.from_base(load_base_model(), config).save_pretrained(root / "actions")
    return root


def traced(tmp_path, *words):
    """Runs the command; its result and its pages."""
    assert main(["trace", "--output", str(tmp_path / "out"), "--json", str(tmp_path / "r.json"), *map(str, words)]) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    pages = [Page(Path(path).read_text(encoding="utf-8")) for path in result["files"] if path.endswith(".html")]
    return result, pages


def test_the_command_writes_a_page_a_sample_of_two_decoders(adapters, tmp_path, capsys):
    result, pages = traced(tmp_path, "--adapter", adapters / "heads", "--versus", "greedy", "--samples", 3, "--save")
    assert [path.rpartition("/")[2] for path in result["files"]] == [
        *(f"trace-{number}.html" for number in range(3)),
        "tokens.jsonl",
    ]
    assert capsys.readouterr().out.split() == result["files"]
    assert [one["name"] for one in result["decoders"]] == [str(adapters / "heads"), "greedy"]
    assert all(reward in (0, 1) for one in result["decoders"] for reward in one["rewards"])
    for number, page in enumerate(pages):
        assert ["".join(pane) for pane in page.panes] == [one["texts"][number] for one in result["decoders"]]
        assert page.data[1]["actions"] == ["greedy"]
        assert set(page.data[1]["temperature"]) == {0}
    # What was decoded is what the engine decodes, and the prompt is the first problem.
    prompt = build_problems("test", 1)[0]["prompt"]
    assert result["prompt"] == prompt
    model = AutoDecoForCausalLM.from_pretrained(adapters / "heads")
    completions = complete(model, load_tokenizer(), [prompt], samples=3, token_budget=48)[0]
    assert [text.split() for text in result["decoders"][0]["texts"]] == [
        load_tokenizer().decode(one.token_ids).split() for one in completions
    ]
    temperatures = [value for page in pages for value in page.data[0]["temperature"]]
    assert temperatures == pytest.approx(np.concatenate([one.temperature for one in completions]).tolist(), rel=1e-3)


def test_the_saved_table_holds_every_token(adapters, tmp_path):
    words = ("--adapter", adapters / "actions", "--versus", "T=0.7,top_p=0.9", "--samples", 2, "--save", "--top", 3)
    result, pages = traced(tmp_path, *words, "--problem", 5, "--seed", 1)
    rows = [json.loads(line) for line in Path(result["files"][-1]).read_text(encoding="utf-8").splitlines()]
    assert len(rows) == sum(map(sum, (one["tokens"] for one in result["decoders"])))
    assert {tuple(row) for row in rows} == {tuple(rows[0])}
    of_adapter = [row for row in rows if row["decoder"] == str(adapters / "actions")]
    others = [row for row in rows if row["decoder"] != str(adapters / "actions")]
    assert {row["action"] for row in of_adapter} <= {None, 0, 1, 2, 3}
    # Where it took none, the base model was sure, and so the token greedy.
    assert all((row["action"] is None) == (row["max_probability"] > 0.95) for row in of_adapter)
    assert all(row["temperature"] == 0 for row in of_adapter if row["action"] is None)
    assert {row["configuration"] for row in others} == {"T=0.7, top-p 0.9"}
    assert all(len(row["top_ids"]) == len(row["top_texts"]) == len(row["top_probabilities"]) == 3 for row in rows)
    assert [row["remaining"] for row in rows] == [48 - row["position"] for row in rows]
    assert pages[0].data[0]["actions"] == ["greedy", "T=0.5", "T=1", "T=1.25"]
    assert result["prompt"] == build_problems("test", 6, seed=1)[5]["prompt"]


def test_two_adapters_stand_side_by_side_and_a_prompt_can_be_given(adapters, tmp_path):
    words = ("--adapter", adapters / "heads", "--versus", adapters / "actions", "--token-budget", 5)
    result, (page,) = traced(tmp_path, *words, "--prompt", "run 42 - 10 + 3 =>")
    assert result["prompt"] == "run 42 - 10 + 3 =>"
    assert [one["name"] for one in result["decoders"]] == [str(adapters / "heads"), str(adapters / "actions")]
    assert [pane["actions"] for pane in page.data] == [[], ["greedy", "T=0.5", "T=1", "T=1.25"]]
    assert result["decoders"][0]["rewards"] == [None]
    assert all(pane["token_budget"] == 5 for pane in page.data)


def test_without_an_adapter_the_base_model_decodes(tmp_path):
    result, (page,) = traced(tmp_path, "--versus", "default", "--split", "train")
    assert len(page.panes) == 1
    assert set(page.data[0]["temperature"]) == {1}
    assert result["prompt"] == build_problems("train", 1)[0]["prompt"]


def test_an_adapter_of_another_base_brings_it_along(adapters, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(BASE_MODEL_PATH, base)
    adapter = tmp_path / "adapter"
    shutil.copytree(adapters / "heads", adapter)
    config = json.loads((adapter / "config.json").read_text())
    (adapter / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    own, _ = traced(tmp_path, "--adapter", adapter)
    named, _ = traced(tmp_path, "--versus", adapter, "--model", base)
    first, _ = traced(tmp_path, "--adapter", adapters / "heads")
    assert own["decoders"][0]["texts"] == named["decoders"][0]["texts"] == first["decoders"][0]["texts"]
    shutil.rmtree(base)
    assert main(["trace", "--adapter", str(adapter)]) == 1
    assert "could not be loaded" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to trace: pass --adapter"),
        (["--adapter", "no/such/adapter"], "no adapter could be read from 'no/such/adapter'"),
        (["--versus", "nonsense"], "no adapter could be read from 'nonsense'"),
        (["--versus", "T=hot"], "T is 'hot'; it has to be a number"),
        (["--versus", "top_k=1.5"], "it has to be a whole number"),
        (["--versus", "T=-1"], "`temperature` is -1.0"),
        (["--versus", "heat=1"], "'heat' is no setting"),
        (["--versus", "T=1,temperature=1"], "twice"),
        (["--versus", "greedy", "--chat", "--prompt", "a"], "--chat needs a chat template"),
        (["--versus", "greedy", "--prompt", ""], "is empty"),
        (["--versus", "greedy", "--model", "no/such/model"], "--model no/such/model cannot be loaded"),
        (["--versus", "greedy", "--dataset", "x.jsonl"], "--reward testbed does not fit"),
    ],
)
def test_a_users_mistake_exits_with_one_and_says_what_is_wrong(words, message, tmp_path, capsys):
    assert main(["trace", "--output", str(tmp_path / "out"), *words]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [["--samples", "0"], ["--prompt", "a", "--problem", "1"], ["--problem", "-1"], ["--split", "dev"]]
)
def test_wrong_usage_exits_with_two(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["trace", "--versus", "greedy", *words])
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_chat_template_wraps_the_prompt(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE_MODEL_PATH, base)
    tokenizer = load_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}calc {{ m.content }} =>{% endfor %}"
    tokenizer.save_pretrained(base)
    words = ("--versus", "greedy", "--model", base, "--chat", "--prompt", "3 + 4")
    assert traced(tmp_path, *words)[0]["prompt"] == "calc 3 + 4 =>"

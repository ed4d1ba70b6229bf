"""Model cards: what they say is what was measured, names cannot break them, and a user's own text is never lost."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_hub import hub, run  # noqa: F401
from test_save_load import save_tokenizer
from transformers import GenerationConfig

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.configuration import POLICY_NAMES, read_config
from hf_adaptive_decode.errors import AdapterConfigError, AdapterLoadError, SamplingParameterError
from hf_adaptive_decode.hub.card import add_results, add_training, update_card
from hf_adaptive_decode.hub.card_text import NO_RESULTS, TrainingFacts
from hf_adaptive_decode.hub.markdown import code, escape, plain, table
from hf_adaptive_decode.hub.results import model_index, results_section
from hf_adaptive_decode.hub.static_setting import write_static_generation_config

MODEL_CARDS = Path(__file__).parents[1] / "model_cards"
MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HOSTILE = (
    'a|b\n# c `d` ``` <script>x</script> [e](http://f) <!-- /hf_adaptive_decode:results --> *g* _h_ \\ ": \u202e~~i~~'
)
ACTIONS = [{"temperature": 0.0}, {"temperature": 1.25, "top_k": 10, "min_p": 0.1}, {"top_p": 0.9}]
CONFIGS = {
    "heads": {},
    "token_actions": {"actions": ACTIONS, "max_prob_mask": 0.95},
    "sequence_actions": {"actions": ACTIONS},
    "static": {"actions": ACTIONS, "action_weights": [1, 1, 2]},
    "entropy": {"entropy_rule": {"name": "edt", "temperature": 1.0, "theta": 0.1}},
}


def interval(mean, half=0.021):
    return {"mean": mean, "low": mean - half, "high": mean + half}


def measured(**changes):
    """The lines of a small evaluation, with `changes` in every measure and verdict."""
    facts = {"task": "testbed", "token_budget": 48, "adapter": "heads", **changes}
    size = {"problems": 600, "samples": 8, "for_k": None, "settings": None}
    shift = {"temperature": 0.7537914514541626, "top_p": 0.9219760894775391}
    rows = [
        {"decoder": "learned heads", "role": "adapter", "pass@1": interval(0.6364583), "pass@8": interval(0.965)},
        {"decoder": "greedy", "role": "greedy", "settings": {"temperature": 0.0}, "pass@1": interval(0.48833)},
        {"decoder": "T=0.754, top-p 0.922", "role": "mean_shift", "settings": shift, "pass@1": interval(0.47)},
        {"decoder": "T=0.75", "role": "best_static", "settings": {"temperature": 0.75}, "pass@1": interval(0.489)},
    ]
    rows[0] |= {"mean_tokens": 21.34, "truncated": 0.02, "mean_temperature": 0.7538, "mean_top_p": 0.922}
    for row in rows[1:]:
        row |= {"pass@8": interval(0.876), "gain": {"pass@1": interval(0.148125), "pass@8": interval(-0.0001, 0.0003)}}
    rows[3]["for_k"] = 1
    versions = {"torch": "2.13.0", "transformers": "5.23.0", "python": "3.12.1", "trl": "not installed"}
    return [
        {
            "kind": "provenance",
            "format": 1,
            "library": "0.1.0",
            "versions": versions,
            "commit": "c0ffee",
            "command": ["hf-adaptive-decode", "evaluate", "--token", "hf_secret"],
            "hardware": {"machine": "Linux-6", "cpu": "two cores", "gpu": None},
            "seeds": [0, 1],
            "model": "someone/base",
            "started": "2026-01-02T03:04:05+00:00",
        },
        *({"kind": "measure", **facts, **size, **row} for row in rows),
        {
            "kind": "verdict",
            **facts,
            "k": 1,
            "verdict": "helps_beyond_mean",
            "sentence": "It helps, beyond its mean: +14.8 [+11.4, +18.2] against greedy decoding.",
            "static": None,
            "confidence": 0.98,
        },
    ]


def as_well(lines, static):
    lines[-1] |= {"verdict": "mean_does_as_well", "sentence": "A static setting does as well.", "static": static}
    return lines


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def adapter(tmp_path):
    """A saved adapter; its base is in `base`, beside it."""
    base_folder = tmp_path / "base"
    tiny.build_base().save_pretrained(base_folder)
    model = tiny.randomise_heads(AutoDecoForCausalLM.from_base(base_folder))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def card_of(folder):
    return (folder / "README.md").read_bytes().decode()


def rows_of(markdown):
    """The cells of the tables in a text, as a renderer shows them; the header's first."""
    rows, before = [], None
    for token in MARKDOWN.parse(markdown):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and before in ("th_open", "td_open"):
            rows[-1].append(shown(token))
        before = token.type
    return rows


def shown(token):
    return "".join(child.content for child in token.children if child.type in ("text", "code_inline", "text_special"))


# --- what a fresh card says -------------------------------------------------------------------------------------------


def test_the_template_is_the_card_of_fresh_heads(base, tmp_path):
    model = tiny.wrap(base, base_model_name_or_path="your-name/base-model")
    model.save_pretrained(tmp_path / "my-adapter")
    assert card_of(tmp_path / "my-adapter") == (MODEL_CARDS / "TEMPLATE.md").read_text(encoding="utf-8")


def test_the_code_in_the_folders_readme_does_what_it_says(adapter, tmp_path, monkeypatch):
    adapter.rename(tmp_path / "my-adapter")
    write_lines(tmp_path / "results.jsonl", measured())
    (tmp_path / "model_cards").mkdir()
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```python\n(.*?)```", (MODEL_CARDS / "README.md").read_text(), flags=re.DOTALL):
        exec(compile(block, "README", "exec"), {})
    for part in ("1,000 verified solutions", "63.6 [61.5, 65.7]"):
        assert part in card_of(tmp_path / "my-adapter")
    assert (tmp_path / "model_cards" / "TEMPLATE.md").read_bytes() == (MODEL_CARDS / "TEMPLATE.md").read_bytes()


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_policy_has_a_card_with_its_decisions(policy, tmp_path):
    config = AutoDecoConfig(policy=policy, **CONFIGS[policy], base_model_name_or_path="someone/base")
    text = update_card(tmp_path, config).read_text()
    card = ModelCard(text)
    assert card.data.tags == ["adaptive-decoding", f"adaptive-decoding-{policy}"]
    assert (card.data.base_model, card.data.base_model_relation) == ("someone/base", "adapter")
    assert card.data.library_name == "hf_adaptive_decode"
    assert NO_RESULTS in text
    assert ("not recorded" in text) == (policy not in ("static", "entropy"))
    if config.actions:
        rows = rows_of(text)
        shares = [["share"], ["25.0 %"], ["25.0 %"], ["50.0 %"]] if policy == "static" else [[]] * 4
        wanted = [
            ["action", "temperature", "top-k", "top-p", "min-p"],
            ["0", "0 (greedy)", "off", "off", "off"],
            ["1", "1.25", "10", "off", "0.1"],
            ["2", "1", "off", "0.9", "off"],
        ]
        assert rows[:4] == [row + share for row, share in zip(wanted, shares, strict=True)]


def test_the_code_of_a_card_runs_and_the_static_setting_is_the_base_models(adapter, tmp_path, monkeypatch, capsys):
    save_tokenizer(adapter)
    static = {"temperature": 0.6, "top_p": 0.8}
    add_results(adapter, as_well(measured(), static))
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", card_of(adapter), flags=re.DOTALL)
    assert len(blocks) == 2
    session: dict = {}
    for block in blocks:
        exec(compile(block, "card", "exec"), session)
    assert len(capsys.readouterr().out.splitlines()) >= 2
    # What the second block sampled with is those settings on the base alone, and not the adapter's own file.
    model, settings = session["model"], session["settings"]
    assert (settings.temperature, settings.top_p, settings.top_k, settings.do_sample) == (0.6, 0.8, 0, True)
    assert settings.eos_token_id == tiny.EOS
    with model.disable_adapter():
        found = tiny.sample(model, tiny.prompts(), generation_config=settings, max_new_tokens=12)
    expected = tiny.sample(
        tiny.build_base(), tiny.prompts(), do_sample=True, top_k=0, **static, max_new_tokens=12, pad_token_id=tiny.PAD
    )
    assert torch.equal(found, expected)
    own = GenerationConfig.from_pretrained(adapter)
    assert (own.temperature, own.top_p) == (1.0, 1.0)


# --- results ----------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(-1, 1), st.floats(0, 0.5)), min_size=3, max_size=3),
    st.permutations(["pass@1", "pass@16", "maj@16"]),
)
def test_every_number_in_the_table_is_the_lines_number_rounded(values, metrics):
    lines = measured()
    for line in lines[1:5]:
        for name in ("pass@1", "pass@8", "gain"):
            line.pop(name, None)
        for number, (metric, (mean, gain, half)) in enumerate(zip(metrics, values, strict=True)):
            line[metric] = interval(mean * (1 - 0.1 * number), half)
            if line["role"] != "adapter":
                line.setdefault("gain", {})[metric] = interval(gain, half)
    header, *rows = rows_of(results_section(lines))
    ordered = ["pass@1", "pass@16", "maj@16"]
    assert header == ["decoder", *ordered, *(f"adapter's gain at {name}" for name in ordered)]
    for row, line in zip(rows, lines[1:5], strict=True):
        own = [line[name] for name in ordered]
        gains = [line["gain"][name] for name in ordered] if "gain" in line else [None] * 3
        for place, (cell, wanted) in enumerate(zip(row[1:], own + gains, strict=True)):
            if wanted is None:
                assert cell == ""
                continue
            numbers = re.fullmatch(r"(\S+) \[(\S+), (\S+)\]", cell).groups()
            assert "-0.0" not in numbers
            assert all(number.startswith(("+", "-")) for number in numbers) or place < 3
            for number, exact in zip(numbers, (wanted["mean"], wanted["low"], wanted["high"]), strict=True):
                assert abs(float(number) - 100 * exact) <= 0.05 + 1e-9


def test_the_section_names_verdict_baselines_and_where_the_numbers_come_from():
    text = results_section(measured())
    rows = rows_of(text)
    assert [row[0] for row in rows[1:]] == [
        "learned heads",
        "greedy",
        "MeanShift (T=0.754, top-p 0.922)",
        "best static for pass@1 (T=0.75)",
    ]
    assert rows[1][1] == "63.6 [61.5, 65.7]"
    assert rows[2][3:] == ["+14.8 [+12.7, +16.9]", "+0.0 [+0.0, +0.0]"]
    assert "- **pass@1** (98 % intervals): It helps, beyond its mean: +14.8 [+11.4, +18.2] against greedy" in text
    assert "### testbed, 48 new tokens" in text
    assert "600 problems, 8 samples each" in text
    assert "21.3 tokens, temperature 0.754, top-p 0.922; 2.0 % are cut off by the budget" in text
    for part in ("hf_adaptive_decode 0.1.0", "torch 2.13.0", "seeds: `0, 1`", "two cores", "2026-01-02", "c0ffee"):
        assert part in text
    for part in ("trl", "None", "hf_secret", "static/"):
        assert part not in text


def test_each_task_and_budget_has_its_table_and_a_repeated_decoder_one_row():
    together = {"token_budget": None, "token_budgets": [24, 48]}
    lines = measured() + measured(task="gsm8k", **together)[1:]
    lines.append({**lines[4], "for_k": 8})
    lines[1]["by_training_seed"] = {"pass@1": [0.6, 0.65, 0.66]}
    text = results_section(lines)
    first, second = text.split("### gsm8k, 24 and 48 new tokens together")
    assert "8 samples each, mean of 3 training seeds" in first
    assert "training seeds" not in second
    assert [row[0] for row in rows_of(first)][-1] == "best static for pass@1 and pass@8 (T=0.75)"
    assert len(rows_of(first)) == len(rows_of(second)) == 5
    twins = results_section(measured() + measured(adapter="twin")[1:])
    assert "### testbed, 48 new tokens, heads" in twins
    assert "### testbed, 48 new tokens, twin" in twins


def test_the_metadata_holds_the_adapters_rates_and_loads_again(adapter):
    lines = measured() + measured(task="openai/gsm8k")[1:] + measured(task="my task: x/y/z")[1:]
    add_results(adapter, lines)
    card = ModelCard.load(adapter / "README.md")
    name, results = model_index_to_eval_results(metadata_load(adapter / "README.md")["model-index"])
    assert name == "adapter"
    assert results == card.data.eval_results == model_index(lines)
    assert [(one.metric_type, one.metric_value) for one in results[:2]] == [("pass@1", 0.6365), ("pass@8", 0.965)]
    assert results[0].metric_args["interval_95"] == [0.6155, 0.6575]
    assert [one.dataset_type for one in results[::2]] == ["testbed", "openai/gsm8k", "my-task-x-y-z"]
    # A second pass through the client changes nothing.
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


@given(st.text())
@example("my.org/task")
def test_any_task_name_gives_a_data_set_id_that_the_hub_takes(task):
    (one, *_) = model_index(measured(task=task))
    assert re.fullmatch(r"(?:[A-Za-z0-9_-]+/)?[A-Za-z0-9_.-]+", one.dataset_type)
    assert one.dataset_name.isprintable()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[1].update({"pass@1": 0.6}), "line 2 .*`pass@1` is 0.6"),
        (lambda lines: lines[1]["pass@8"].update(low=float("nan")), "line 2 .*`pass@8`"),
        (lambda lines: lines[2]["gain"].update({"pass@1": None}), "line 3 .*`pass@1` is None"),
        (lambda lines: lines[1].pop("decoder"), "line 2 .*`decoder` is None"),
        (lambda lines: lines[1].update(problems=True), "line 2 .*`problems` is True"),
        (lambda lines: lines[1].update(token_budget="48"), "`token_budget` is '48'"),
        (lambda lines: lines[1].update(by_training_seed={"pass@1": 3}), "by_training_seed"),
        (lambda lines: lines[5].update(static={"temperature": "hot"}), "line 6 .*'hot'"),
        (lambda lines: lines[0].update(format=2), "pip install -U"),
        (lambda lines: lines.pop(0), "provenance"),
        (lambda lines: lines.pop(1), 'role "adapter"'),
        (lambda lines: lines.append([]), "line 7: it has to be a JSON object"),
    ],
)
def test_damaged_results_are_refused_and_nothing_is_written(change, message, adapter, tmp_path):
    lines = measured()
    change(lines)
    before = sorted(os.listdir(adapter)), card_of(adapter)
    for results in (lines, write_lines(tmp_path / "damaged.jsonl", lines)):
        with pytest.raises(AdapterLoadError, match=message):
            add_results(adapter, results)
    assert (sorted(os.listdir(adapter)), card_of(adapter)) == before


def test_a_line_that_was_cut_off_is_named(adapter, tmp_path):
    path = write_lines(tmp_path / "cut.jsonl", measured())
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(AdapterLoadError, match=r"cut\.jsonl, line 6"):
        add_results(adapter, path)


# --- hostile names ----------------------------------------------------------------------------------------------------

NASTY = st.text(st.sampled_from("ab1_*`~<>&|[]()!#:\\\"'$-\n\t\r\u2028\u202e\x00\ud800 ") | st.characters())


@given(NASTY)
def test_escaped_text_is_shown_as_it_is(text):
    tokens = MARKDOWN.parse(f"x {escape(text)} y")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert {child.type for child in tokens[1].children} <= {"text", "text_special"}
    assert shown(tokens[1]) == f"x {plain(text)} y"
    assert "<" not in escape(text)  # wherever it stands, it opens no block of HTML


@given(NASTY)
def test_a_code_span_holds_its_text_and_nothing_else(text):
    (inline,) = [token for token in MARKDOWN.parse(f"x {code(text)} y") if token.type == "inline"]
    assert [child.type for child in inline.children] == ["text", "code_inline", "text"]
    assert inline.children[1].content.strip() == plain(text)


@given(st.lists(st.lists(NASTY, min_size=3, max_size=3), min_size=1, max_size=4))
def test_a_table_keeps_its_cells_whatever_they_hold(rows):
    found = rows_of(table(["a", "b", "c"], rows))
    assert found[1:] == [[plain(cell) for cell in row] for row in rows]


def test_hostile_names_break_neither_table_nor_metadata_nor_markers(tmp_path):
    # A file's name can hold no slash.
    folder = tmp_path / HOSTILE.replace("/", "")
    model = tiny.wrap(base_model_name_or_path=HOSTILE)
    model.save_pretrained(folder)
    lines = measured(task=HOSTILE, adapter=HOSTILE)
    for line in lines[1:5]:
        line["decoder"] = HOSTILE
    lines[0] |= {"model": HOSTILE, "hardware": {HOSTILE: HOSTILE}, "started": HOSTILE, "commit": HOSTILE}
    lines[5]["sentence"] = HOSTILE
    add_results(folder, lines)
    before = card_of(folder)
    add_results(folder, lines)
    assert card_of(folder) == before
    assert "base_model" not in metadata_load(folder / "README.md")
    assert ModelCard.load(folder / "README.md").data.eval_results[0].dataset_name.startswith("a|b # c `d`")
    tokens = MARKDOWN.parse(ModelCard(before).text)
    assert {token.content.strip() for token in tokens if token.type == "html_block"} == {
        f"<!-- {slash}hf_adaptive_decode:{name} -->" for name in ("usage", "training", "results") for slash in ("", "/")
    }
    inside = [child for token in tokens for child in token.children or ()]
    assert not [child for child in inside if child.type in ("html_inline", "image", "s_open")]
    # The one title in italics is the card's own.
    assert [after.content for child, after in itertools.pairwise(inside) if child.type == "em_open"] == [
        "Learning Adaptive LLM Decoding"
    ]
    links = [child.attrs["href"] for child in inside if child.type == "link_open"]
    assert set(links) == {"https://huggingface.co/papers/2510.26697"}
    header, *rows = rows_of(before)[-5:]
    assert all(len(row) == len(header) == 5 for row in rows)
    assert all(plain(HOSTILE) in row[0] for row in rows)
    (usage,) = [token.content for token in tokens if token.type == "fence"]
    assigned = next(line for line in usage.splitlines() if line.startswith("adapter ="))
    assert eval(assigned.removeprefix("adapter =")) == folder.name


@pytest.mark.parametrize("name", ["../base", "a/b/c", "日本/base", "a/b|c", "a/b\nc", "here/base", "a--b/c", "base"])
def test_only_an_id_that_the_hub_would_take_is_linked(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "base").mkdir(parents=True)
    update_card(tmp_path, AutoDecoConfig(base_model_name_or_path=name))
    assert "base_model" not in metadata_load(tmp_path / "README.md")


# --- what a user wrote ------------------------------------------------------------------------------------------------

OWN_TEXT = st.text(st.sampled_from("ab \n#`|<->:") | st.characters(codec="utf-8", exclude_characters="\r"), max_size=60)


@given(st.lists(OWN_TEXT, min_size=4, max_size=4), st.booleans())
def test_what_stands_around_the_sections_stays_byte_for_byte(tmp_path_factory, texts, windows):
    folder = tmp_path_factory.mktemp("card")
    marks = [
        (f"<!-- hf_adaptive_decode:{name} -->", f"<!-- /hf_adaptive_decode:{name} -->")
        for name in ("usage", "results", "training")
    ]
    body = texts[0] + "".join(f"\n{a}\nold {i}\n{b}\n{texts[i + 1]}" for i, (a, b) in enumerate(marks))
    whole = f"---\nlicense: mit\n---\n{body}"
    whole = whole.replace("\n", "\r\n") if windows else whole
    (folder / "README.md").write_bytes(whole.encode())
    config = AutoDecoConfig(base_model_name_or_path="someone/base")
    for _ in range(2):
        update_card(folder, config, measured(), training=TrainingFacts(data="words", steps=3))
        found = (folder / "README.md").read_bytes().decode()
        text = ModelCard(found).text
        for i, (a, b) in enumerate(marks):
            before, inside, text = re.split(f"{re.escape(a)}|{re.escape(b)}", text, maxsplit=2)
            own = f"{texts[i]}\n" if i == 0 else f"\n{texts[i]}\n"
            assert before == (own.replace("\n", "\r\n") if windows else own)
            assert f"old {i}" not in inside
            assert ("\r\n" in inside) == windows
        own = f"\n{texts[3]}"
        assert text == (own.replace("\n", "\r\n") if windows else own)
    assert ModelCard(found).data.license == "mit"


@pytest.mark.parametrize(
    "text", ["# Mine\n\nWith care.", "Mine\r\n\r\nSo.\r\n", "---\nlicense: mit\n---\nMine\n\n\n", ""]
)
def test_a_card_without_sections_gets_results_at_its_end_and_twice_is_once(adapter, text):
    (adapter / "README.md").write_bytes(text.encode())
    add_results(adapter, measured())
    card = card_of(adapter)
    own = text.rpartition("---\n")[2]
    assert own + ("\r\n" if "\r\n" in text else "\n") in card
    assert card.count("## Results") == 1
    assert "## How to use" not in card
    assert card.replace("\r\n", "").count("\r") == 0
    add_results(adapter, measured())
    assert card_of(adapter) == card


def test_metadata_that_says_it_all_is_not_touched(adapter):
    block = (
        "---\n# mine\nlibrary_name:   hf_adaptive_decode\nlanguage: no\npipeline_tag: text-generation\n"
        "tags: [mine, adaptive-decoding, adaptive-decoding-heads]\n---\n"
    )
    (adapter / "README.md").write_text(block + "Mine.\n")
    AutoDecoForCausalLM.from_pretrained(adapter).save_pretrained(adapter)
    assert card_of(adapter) == block + "Mine.\n"


def test_metadata_keeps_what_is_not_ours_in_its_order(adapter):
    own = "---\nlicense: mit\ntags:\n- zebra\n- adaptive-decoding-static\n- ape\ndatasets: [me/data]\n---\nMine.\n"
    (adapter / "README.md").write_text(own)
    update_card(adapter, read_config(adapter / "config.json"))
    found = metadata_load(adapter / "README.md")
    assert list(found) == ["license", "tags", "datasets", "library_name", "pipeline_tag"]
    assert found["tags"] == ["zebra", "ape", "adaptive-decoding", "adaptive-decoding-heads"]


def test_a_users_own_results_stay_in_the_metadata_and_ours_are_replaced(adapter):
    def result(name):
        return {
            "task": {"type": "text-generation"},
            "dataset": {"type": "testbed", "name": name, "extra": [1]},
            "metrics": [{"type": "accuracy", "value": 0.5, "verified": True, "note": "mine"}],
        }

    index = [{"name": "a", "results": [result("x"), result("y")]}, {"name": "b", "results": [result("z")]}]
    block = yaml.safe_dump({"model-index": index})
    (adapter / "README.md").write_text(f"---\n{block}---\nMine.\n")
    add_results(adapter, measured() + measured(task="gsm8k")[1:])
    first = metadata_load(adapter / "README.md")["model-index"]
    add_results(adapter, measured(token_budget=96))
    second = metadata_load(adapter / "README.md")["model-index"]
    for found, ours in ((first, ["testbed", "gsm8k"]), (second, ["testbed"])):
        assert found[0]["results"][:2] == index[0]["results"]
        assert [one["dataset"]["type"] for one in found[0]["results"][2:]] == ours
        assert found[1] == index[1]
    assert second[0]["results"][2]["dataset"]["config"] == "token_budget_96"


@pytest.mark.parametrize(
    "block",
    [
        "tags: [unclosed",
        "- a list",
        "model-index: [{name: x}]",
        "model-index: [{name: x, results: [{task: {type: y}, "
        "dataset: {type: z, name: z}, metrics: [], source: here}]}]",
        "1: x",
        "tags: 5",
        "[" * 600,
    ],
)
def test_metadata_that_cannot_be_read_is_refused_and_kept(adapter, block):
    (adapter / "README.md").write_text(f"---\n{block}\n---\nMine.\n")
    before = card_of(adapter)
    for change in (lambda: add_results(adapter, measured()), lambda: add_training(adapter, TrainingFacts())):
        with pytest.raises(AdapterConfigError, match=r"README\.md"):
            change()
    assert card_of(adapter) == before


def test_a_card_that_is_no_utf8_is_refused_and_kept(adapter):
    (adapter / "README.md").write_bytes(b"caf\xe9\n")
    with pytest.raises(AdapterConfigError, match=r"README\.md"):
        add_results(adapter, measured())
    assert (adapter / "README.md").read_bytes() == b"caf\xe9\n"


OPEN, CLOSE = "<!-- hf_adaptive_decode:results -->", "<!-- /hf_adaptive_decode:results -->"


@pytest.mark.parametrize("lines", [[OPEN], [CLOSE], [CLOSE, OPEN], [OPEN, CLOSE, OPEN, CLOSE], [OPEN, OPEN, CLOSE]])
def test_markers_that_do_not_pair_up_are_refused_and_nothing_is_lost(adapter, lines):
    text = "\n".join(["Mine.", *(f"{line}\nMine too." for line in lines)])
    (adapter / "README.md").write_text(text)
    with pytest.raises(AdapterConfigError, match="one of each"):
        add_results(adapter, measured())
    assert card_of(adapter) == text


@pytest.mark.parametrize(
    "text", [f"Between {OPEN} and {CLOSE} stand results.\n", f"From {OPEN}\nto {CLOSE}\nthey stand.\n"]
)
def test_a_marker_within_a_line_is_text(adapter, text):
    (adapter / "README.md").write_text(text)
    add_results(adapter, measured())
    assert text in card_of(adapter)


# --- over an adapter's life -------------------------------------------------------------------------------------------


def test_saving_again_keeps_results_training_and_the_users_text(adapter, tmp_path):
    path = write_lines(tmp_path / "results.jsonl", measured())
    add_results(adapter, path)
    add_training(adapter, TrainingFacts(data="1,000 | verified", loss="end_to_end", steps=200, seed=7))
    assert (adapter / "results.jsonl").read_bytes() == path.read_bytes()
    card = card_of(adapter).replace("## Limits\n", "## Limits\n\nMine.\n")
    (adapter / "README.md").write_bytes(card.encode())
    facts = [["data", "1,000 | verified"], ["loss", "end_to_end"], ["steps", "200"], ["seed", "7"]]
    assert rows_of(card)[2:6] == facts
    AutoDecoForCausalLM.from_pretrained(adapter).save_pretrained(adapter)
    assert card_of(adapter) == card
    add_results(adapter, adapter / "results.jsonl")
    assert card_of(adapter) == card


def test_results_that_lie_beside_the_weights_come_into_a_new_card(adapter):
    write_lines(adapter / "results.jsonl", measured())
    model = AutoDecoForCausalLM.from_pretrained(adapter)
    for prepare in (lambda: None, (adapter / "README.md").unlink):
        prepare()
        model.save_pretrained(adapter)
        assert "63.6 [61.5, 65.7]" in card_of(adapter)
        assert NO_RESULTS not in card_of(adapter)
        assert "SHA-256" not in card_of(adapter)  # nobody said that these weights were measured
        assert len(ModelCard.load(adapter / "README.md").data.eval_results) == 2


def test_results_of_other_weights_are_marked_until_measured_again(adapter):
    add_results(adapter, measured())
    good = card_of(adapter)
    model = AutoDecoForCausalLM.from_pretrained(adapter)
    model.decoding_adapter.top_p_head.out.bias.data += 1
    for _ in range(2):
        model.save_pretrained(adapter)
        assert card_of(adapter).count("Measure again") == 1
        assert "63.6 [61.5, 65.7]" in card_of(adapter)
        assert "model-index" not in card_of(adapter)
    add_results(adapter, measured())
    digest = re.compile("SHA-256 `[0-9a-f]{64}`")
    assert digest.sub("", card_of(adapter)) == digest.sub("", good)
    assert card_of(adapter) != good


def test_a_static_setting_is_written_only_where_it_does_as_well(adapter):
    own = (adapter / "generation_config.json").read_bytes()
    unsure = measured()
    unsure[-1] |= {"verdict": "no_evidence", "static": {"temperature": 0.5}}
    for lines in (measured(), unsure):
        add_results(adapter, lines)
        assert not (adapter / "static").exists()
        assert "A static setting instead" not in card_of(adapter)
    lines = as_well(measured(), {"temperature": 0.7537914514541626, "top_p": 0.9219760894775391})
    add_results(adapter, lines)
    static = GenerationConfig.from_pretrained(adapter, "static/generation_config.json")
    assert (static.do_sample, static.top_k) == (True, 0)
    assert {name: vars(static)[name] for name in ("temperature", "top_p")} == lines[-1]["static"]
    assert "- testbed, 48 new tokens, pass@1: T=0.754, top-p 0.922" in card_of(adapter)
    assert (adapter / "generation_config.json").read_bytes() == own


def test_a_static_setting_of_temperature_0_is_greedy_and_a_bad_one_is_refused(tmp_path):
    path = write_static_generation_config(tmp_path, {"temperature": 0.0}, {"eos_token_id": [2, 3], "other": 1})
    assert path == tmp_path / "static" / "generation_config.json"
    config = GenerationConfig.from_pretrained(tmp_path / "static")
    assert (config.do_sample, config.eos_token_id) == (False, [2, 3])
    for static in ({"temperature": -1.0}, {"top_p": 1.5}, {"warmth": 1.0}):
        with pytest.raises(SamplingParameterError, match=next(iter(static))):
            write_static_generation_config(tmp_path, static, {})


def test_another_base_model_for_the_same_weights_changes_what_the_card_says_of_use(tmp_path):
    first = AutoDecoConfig(policy="token_actions", actions=ACTIONS, base_model_name_or_path="someone/base")
    update_card(tmp_path, first)
    second = AutoDecoConfig(policy="token_actions", actions=ACTIONS[:2], base_model_name_or_path="other/base")
    text = update_card(tmp_path, second).read_text()
    assert metadata_load(tmp_path / "README.md")["base_model"] == "other/base"
    assert [row[0] for row in rows_of(text)][:4] == ["action", "0", "1", ""]


PUSH = """
import os, urllib.request
from pathlib import Path
from hf_adaptive_decode.hub.card import add_results
model = AutoDecoForCausalLM.from_base(base)
model.push_to_hub("me/heads")
print(urllib.request.urlopen(os.environ["HF_ENDPOINT"] + "/me/heads/resolve/main/README.md").read().decode())
here = Path(base).parent / "mine"
model.save_pretrained(here)
add_results(here, here.parent / "results.jsonl")
(here / "optimizer.pt").write_text("")
model.save_pretrained(here, push_to_hub=True, repo_id="me/heads")
"""


def test_pushing_brings_the_repositorys_card_up_to_date_or_takes_the_folders(hub, tmp_path):  # noqa: F811
    results = write_lines(tmp_path / "results.jsonl", as_well(measured(), {"temperature": 0.5}))
    hub.files["README.md"] = b"---\nlicense: mit\n---\nMine, on the Hub.\n"
    done = run(hub, tmp_path, PUSH)
    assert done.returncode == 0, done.stderr
    first = done.stdout[done.stdout.index("---") :].rstrip("\n")
    assert first.endswith("---\nMine, on the Hub.")
    assert ModelCard(first).data.to_dict()["license"] == "mit"
    assert ModelCard(first).data.library_name == "hf_adaptive_decode"
    own = {"config.json", "model.safetensors", "generation_config.json", "README.md"}
    assert set(hub.files) == own | {"results.jsonl", "static/generation_config.json"}
    assert hub.files["results.jsonl"] == results.read_bytes()
    second = hub.files["README.md"].decode()
    assert "63.6 [61.5, 65.7]" in second
    assert 'adapter = "me/heads"' in second
    assert second.replace('"me/heads"', '"mine"') == card_of(tmp_path / "mine")


# --- the cards in this repository -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in MODEL_CARDS.glob("*/config.json")), ids=lambda p: p.name
)
def test_a_filled_card_is_what_its_files_give(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / folder.name)
    add_results(copy, copy / "results.jsonl")
    assert card_of(copy) == card_of(folder)

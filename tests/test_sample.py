"""The command that samples a data set: what it writes, that a killed run goes on, and that heads train on it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch
import yaml
from datasets import load_dataset
from full_disks import in_a_child, no_file_beyond
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import load_file

from hf_adaptive_decode.cli import run_folder, sample_folder
from hf_adaptive_decode.cli.main import main, parse
from hf_adaptive_decode.cli.sample_folder import write_folder
from hf_adaptive_decode.cli.texts import load_texts
from hf_adaptive_decode.evaluation.lines import AppendedLines
from hf_adaptive_decode.evaluation.store import CompletionStore
from hf_adaptive_decode.evaluation.tasks import load_task
from hf_adaptive_decode.hub.dataset_card import dataset_card
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer, testbed_reward
from hf_adaptive_decode.training.rejection import Drawn, choose
from hf_adaptive_decode.training.selection import select

SIZES = ["--problems", "40", "--token-budget", "40", "--threads", "1"]
# What a card consists of.
TAGS = {"h1", "h2", "p", "em", "code", "pre", "ul", "li", "table", "thead", "tbody", "tr", "th", "td"}
OUTPUT = ("train.jsonl", "README.md")
HOSTILE = "a|b`<script>alert(1)</script>\n---\nlicense: mine\n---\n# T {x} \u202e\u2028 [a](javascript:b)"


def words(folder, *extra):
    return ["sample", "--output", str(folder), *SIZES, *map(str, extra)]


def sample(folder, *extra):
    """The JSON result."""
    path = folder.parent / f"{folder.name}.json"
    assert main([*words(folder, *extra), "--json", str(path)]) == 0
    return json.loads(path.read_text())


def rows_of(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def written(folder):
    """All that two runs have to agree on."""
    facts = json.loads((folder / "provenance.json").read_text())
    return [(folder / name).read_bytes() for name in OUTPUT], {**facts, "started": None, "command": None}


def drawn_lines(folder):
    lines = [json.loads(line) for line in (folder / "sampling" / "completions.jsonl").read_text().splitlines()]
    return [line for line in lines if "problem" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run: its folder and result."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    return folder, sample(folder)


# --- what it writes ---------------------------------------------------------------------------------------------------


def test_every_row_is_a_right_solution_that_ended_with_all_that_is_known_of_it(whole):
    folder, result = whole
    rows, problems = rows_of(folder), {row["prompt"]: row for row in build_problems("train", 40)}
    for row in rows:
        own = problems[row["prompt"]]
        assert {name: row[name] for name in own} == own
        ended = f"{row['completion']} <eos>"
        assert testbed_reward([row["prompt"]], [ended], type=[own["type"]], solution=[own["solution"]]) == [1.0]
        assert row["reward"] == 1
        assert row["tokens"] == len(ended.split()) <= 40
        assert set(row["sampling"]) == {"temperature", "top_p", "top_k", "min_p"}
        assert 0 < row["solve_rate"] <= 1
    assert [list(problems).index(row["prompt"]) for row in rows] == sorted(
        list(problems).index(row["prompt"]) for row in rows
    )
    assert len({(row["prompt"], row["completion"]) for row in rows}) == len(rows)
    assert len(rows) == result["counts"]["kept"]


def test_the_numbers_are_those_of_what_was_drawn(whole):
    folder, result = whole
    lines, counts = drawn_lines(folder), result["counts"]
    right = [line for line in lines if line["reward"] >= 1 and line["ended"]]
    assert counts["problems"] == 40 == counts["solved"] + counts["solved_never"]
    assert counts["sampled"] == len(lines) == sum(line["sampled"] for line in result["by_setting"])
    assert counts["verified"] == len(right) == sum(line["verified"] for line in result["by_setting"])
    assert counts["truncated"] == sum(not line["ended"] for line in lines)
    assert counts["tokens_sampled"] == sum(line["tokens"] for line in lines)
    assert counts["tokens_kept"] == sum(row["tokens"] for row in rows_of(folder))
    assert [line["name"] for line in result["by_setting"]] == ["greedy", "T=0.7", "T=1"]
    # One greedy completion of each, four of each that it left open, and so on.
    open_ones = 40
    for line, each in zip(result["by_setting"], (1, 4, 4), strict=True):
        assert line["sampled"] == each * open_ones
        heat = json.dumps(line["sampling"])
        solved = {
            row["prompt"]
            for row in rows_of(folder)
            if row["sampling"]["temperature"] == line["sampling"]["temperature"]
        }
        assert solved, heat
        open_ones -= len(solved)
    assert open_ones == counts["solved_never"]


def test_readers_of_data_sets_and_of_cards_take_the_folder(whole):
    folder, result = whole
    assert load_dataset("json", data_files=str(folder / "train.jsonl"), split="train").to_list() == rows_of(folder)
    assert load_dataset(str(folder))["train"].num_rows == result["counts"]["kept"]
    _, head, text = (folder / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["configs"][0]["data_files"] == [{"split": "train", "path": "train.jsonl"}]
    assert metadata["size_categories"] == ["n<1K"]
    assert f"| kept                                      | {result['counts']['kept']}" in text
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["sha256"]["train.jsonl"] == hashlib.sha256((folder / "train.jsonl").read_bytes()).hexdigest()
    assert facts["versions"]["torch"] == torch.__version__
    assert (facts["model"], facts["source"], facts["reward"]) == (
        "hf_adaptive_decode:testbed",
        "testbed",
        "testbed_reward",
    )
    assert facts["counts"] == result["counts"]
    assert str(folder) not in (folder / "provenance.json").read_text() + (folder / "README.md").read_text()


def test_nothing_but_json_goes_to_standard_output(whole, capsys):
    assert main([*words(whole[0]), "--json", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["counts"] == whole[1]["counts"]
    assert "| sampled with |" in said.err


def test_a_config_file_says_the_same(whole, tmp_path):
    values = {"problems": 40, "token_budget": 40, "threads": 1, "sampling": ["greedy", "T=0.7", "T=1"]}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"sample": {**values, "output": str(tmp_path / "out")}}))
    assert main(["sample", "--config", str(tmp_path / "run.yaml")]) == 0
    assert written(tmp_path / "out")[0] == written(whole[0])[0]


# --- what it keeps ----------------------------------------------------------------------------------------------------


def test_the_seed_decides_and_the_batch_does_not(whole, tmp_path):
    sample(tmp_path / "same", "--batch-rows", "7")
    sample(tmp_path / "other", "--seed", "1")
    assert written(tmp_path / "same")[0] == written(whole[0])[0]
    assert rows_of(tmp_path / "other") != rows_of(whole[0])


def test_another_choice_samples_nothing_again_and_more_samples_add_to_the_first(tmp_path):
    out, how = tmp_path / "out", ["--sampling", "T=1,top_p=0.95", "--problems", "16"]
    sample(out, *how, "--samples", "4", "--keep", "1")
    one, size = rows_of(out), (out / "sampling" / "completions.jsonl").stat().st_size
    two = sample(out, *how, "--samples", "4", "--keep", "3")
    assert (out / "sampling" / "completions.jsonl").stat().st_size == size
    assert [row for row in rows_of(out) if row in one] == one
    assert two["counts"]["kept"] > len(one)
    assert rows_of(out)[0]["sampling"] == {"temperature": 1.0, "top_p": 0.95, "top_k": None, "min_p": None}
    first = drawn_lines(out)
    more = sample(out, *how, "--samples", "6", "--keep", "3")
    assert drawn_lines(out)[: len(first)] == first
    assert more["counts"]["sampled"] == 16 * 6 == len(drawn_lines(out))
    fresh = sample(tmp_path / "fresh", *how, "--samples", "6", "--keep", "3")
    assert rows_of(tmp_path / "fresh") == rows_of(out)
    assert fresh["counts"] == more["counts"]


def test_problems_of_a_range_of_difficulty_alone(tmp_path):
    how = ["--sampling", "T=0.7", "--samples", "4", "--keep", "4"]
    everything = sample(tmp_path / "all", *how)
    inside = sample(tmp_path / "all", *how, "--solve-rate", "0.2", "0.8")
    rates = {row["prompt"]: row["solve_rate"] for row in rows_of(tmp_path / "all")}
    assert set(rates.values()) <= {0.25, 0.5, 0.75}
    counts = inside["counts"]
    assert counts["solved"] == everything["counts"]["solved"]
    assert counts["outside_solve_rate"] == counts["solved_always"] > 0
    assert len(rates) == counts["solved"] - counts["outside_solve_rate"]
    # Without a completion to write, the numbers say why.
    assert main(words(tmp_path / "all", *how, "--solve-rate", "0.3", "0.4")) == 1


@pytest.fixture
def everything_is_right(monkeypatch):
    """Whatever the model says."""
    monkeypatch.setattr(
        "hf_adaptive_decode.rewards.exact_match_reward", lambda completions, **_: [1.0] * len(completions)
    )


def test_what_is_right_and_was_cut_off_is_not_kept(tmp_path, everything_is_right):
    rows = [{"prompt": row["prompt"], "solution": "1"} for row in build_problems("train", 40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset", str(tmp_path / "rows.jsonl"), "--reward", "exact_match", "--token-budget", "18"]
    assert main(["sample", "--output", str(tmp_path / "out"), "--threads", "1", *flags]) == 0
    counts = json.loads((tmp_path / "out" / "provenance.json").read_text())["counts"]
    lines = drawn_lines(tmp_path / "out")
    assert counts["right_but_truncated"] == counts["truncated"] == sum(not line["ended"] for line in lines) > 0
    assert counts["verified"] == len(lines) - counts["truncated"]
    ended = {line["text"] for line in lines if line["ended"]}
    assert {row["completion"] for row in rows_of(tmp_path / "out")} <= ended


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.sampled_from([0.0, 0.5, 1.0]), st.integers(1, 4))))
def test_choosing_is_what_its_sentence_says(draws):
    """Against a loop: the first distinct ones that are right and ended."""
    group = [
        Drawn(0, 0, "run", (0, sample), reward, 5, ended, str(digest))
        for sample, (digest, ended, reward, _) in enumerate(draws)
    ]
    for keep in (1, 2, 5):
        expected, seen = [], set()
        for one in group:
            if one.ended and one.reward >= 1 and one.digest not in seen and len(expected) < keep:
                expected.append(one)
                seen.add(one.digest)
        assert choose(group, keep) == expected
        assert choose(group, keep, distinct=False) == [one for one in group if one.ended and one.reward >= 1][:keep]
    if group:
        counts = select([group], 1, 2).counts
        right = [one for one in group if one.ended and one.reward >= 1]
        assert counts["duplicates"] == len(right) - len({one.digest for one in right})
        assert counts["sampled"] == len(group)
        # Equal tokens of another problem are no duplicates.
        both = select([group, [replace(one, problem=1) for one in group]], 1, 2).counts
        assert both["duplicates"] == 2 * counts["duplicates"]


def test_several_tasks_of_one_reward_take_turns_and_a_shared_problem_counts_once(tmp_path):
    out = tmp_path / "out"
    sample(out, "--task", "testbed:coin", "testbed:run", "testbed:coin", "--problems", "24", "--sampling", "T=0.7")
    assert {row["type"] for row in rows_of(out)} == {"coin", "run"}
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["source"] == "testbed:coin, testbed:run"
    assert facts["counts"]["problems"] == 16


def test_continuous_batching_samples_the_same(whole, tmp_path):
    """Each request draws as its row does in transformers; the numbers that it adds up in another order may differ."""
    result = sample(tmp_path / "out", "--engine", "continuous_batching", "--problems", "16", "--batch-rows", "16")
    of_transformers = sample(tmp_path / "same", "--problems", "16")
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "same")
    assert result["counts"] == of_transformers["counts"]
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["engine"] == "continuous_batching"


def test_a_task_by_name_asks_as_evaluate_does_and_leaves_it_what_it_measures_on(tmp_path, monkeypatch):
    def half(completions, solution, **columns):
        return [float(one == "18") for one in solution]

    monkeypatch.setattr("hf_adaptive_decode.rewards.math_reward", half)
    # The testbed's training problems alone are none that the hash would hold out.
    problems = [row for split in ("train", "validation", "test") for row in build_problems(split, 40)]
    rows = [
        {"question": row["prompt"], "answer": f"Because.\n#### {18 + index % 2}"} for index, row in enumerate(problems)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--task", f"gsm8k={file}", "--token-budget", "40", "--threads", "1"]
    assert main(["sample", "--output", str(tmp_path / "out"), *flags]) == 0
    found = rows_of(tmp_path / "out")
    assert {row["solution"] for row in found} == {"18"}
    assert all("\n\nSolve this step by step" in row["prompt"] for row in found)
    task = load_task("gsm8k", str(file))
    assert not {row["prompt"] for row in found} & {row["prompt"] for row in (*task.validation, *task.test)}


# --- killed, and out of room ------------------------------------------------------------------------------------------


def kill_at_write(number, torn):
    """The process kills itself at the given write of completions, part of which may have reached the disk."""
    added, count = AppendedLines.append, iter(range(10**6))

    def append(self, entries):
        if next(count) == number:
            if torn:
                lines = "".join(json.dumps(entry) + "\n" for entry in entries)
                with self.path.open("a") as file:
                    file.write(lines[: len(lines) * 2 // 3])
            os.kill(os.getpid(), signal.SIGKILL)
        return added(self, entries)

    AppendedLines.append = append


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("number", [1, 4, 9])
def test_a_killed_run_goes_on_and_ends_the_same_to_the_byte(whole, tmp_path, number, torn):
    out = tmp_path / "out"

    def killed():
        kill_at_write(number, torn)
        main(words(out, "--batch-rows", "16"))

    assert in_a_child(killed) == -signal.SIGKILL
    assert not (out / "train.jsonl").exists()
    kept = len((out / "sampling" / "completions.jsonl").read_bytes().splitlines())
    sample(out)
    assert written(out) == written(whole[0])
    assert kept > 0
    # Nothing is there twice.
    places = [(line["run"], line["problem"], line["sample"]) for line in drawn_lines(out)]
    assert len(places) == len(set(places)) == whole[1]["counts"]["sampled"]


@pytest.mark.parametrize("file", ["train.jsonl", "provenance.json", "README.md"])
def test_a_run_killed_while_it_writes_leaves_what_was_there_and_goes_on(whole, tmp_path, file):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    before = rows_of(out)

    def killed():
        replaced = os.replace

        def replace_or_die(source, target):
            if os.path.basename(target) == file:
                os.kill(os.getpid(), signal.SIGKILL)
            replaced(source, target)

        run_folder.os.replace = replace_or_die
        main(words(out, "--keep", "1"))

    assert in_a_child(killed) == -signal.SIGKILL
    assert (rows_of(out) == before) == (file == "train.jsonl")
    sample(out)
    assert written(out) == written(whole[0])
    assert {path.name for path in out.iterdir()} == {*OUTPUT, "provenance.json", "sampling"}


@pytest.mark.parametrize("size", [600, 9_000])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(whole, tmp_path, capfd, size):
    out = tmp_path / "out"

    def full():
        with no_file_beyond(size):
            os._exit(main(words(out)))

    assert in_a_child(full) == 1
    said = capfd.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("hf-adaptive-decode sample: error: ")]
    assert "completions.jsonl could not be written: " in line
    assert "File too large" in line
    assert "Traceback" not in said
    sample(out)
    assert written(out) == written(whole[0])


def test_a_disk_that_is_full_at_the_end_keeps_the_rows_that_were_there(whole, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)

    def full():
        with no_file_beyond(2_000):
            os._exit(main(words(out, "--keep", "1")))

    assert in_a_child(full) == 1
    assert "train.jsonl could not be written: " in capfd.readouterr().err
    assert written(out) == written(whole[0])
    assert {path.name for path in out.iterdir()} == {*OUTPUT, "provenance.json", "sampling"}


def test_a_card_that_was_changed_by_hand_stays_and_one_that_was_not_does_not(whole, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole[0], out)
    sample(out, "--keep", "1")
    assert (out / "README.md").read_bytes() != (whole[0] / "README.md").read_bytes()
    assert "changed by hand" not in capsys.readouterr().out
    for text in ("# Mine\n", (out / "README.md").read_text().replace("## Limits", "## My limits"), "\udcff"):
        (out / "README.md").write_text(text, errors="surrogateescape")
        result = sample(out)
        assert (out / "README.md").read_text(errors="surrogateescape") == text
        assert [path.rpartition("/")[2] for path in result["files"]] == ["train.jsonl", "provenance.json"]
        assert "README.md was changed by hand" in capsys.readouterr().out


def test_rows_of_somebody_else_are_not_replaced(tmp_path, capsys):
    (tmp_path / "train.jsonl").write_text("mine\n")
    assert main(words(tmp_path)) == 1
    assert "was not sampled into it; choose another --output." in capsys.readouterr().err
    assert (tmp_path / "train.jsonl").read_text() == "mine\n"


def test_two_runs_in_one_folder_are_noticed(tmp_path):
    stores = [CompletionStore(tmp_path / "completions.jsonl") for _ in range(2)]
    for number, store in enumerate(stores):
        run = store.run({"a": 1}, "solutions")
        store.add([{"run": run, "problem": number, "sample": 0, "text": "x" * 9 * number, "token_ids": []}])
    with pytest.raises(ValueError, match="was changed meanwhile"):
        stores[1].whole(run, (1, 0))


def test_starting_over_throws_away_what_was_sampled(whole, tmp_path):
    out = tmp_path / "out"
    (out / "sampling").mkdir(parents=True)
    (out / "sampling" / "completions.jsonl").write_text("nonsense\n")
    assert main(words(out)) == 1
    sample(out, "--no-resume")
    assert written(out) == written(whole[0])


def test_training_on_solutions_of_its_own_goes_on_when_it_was_killed_in_sampling(tmp_path):
    sizes = ["--train-problems", "40", "--steps", "1", "--batch-size", "8", "--budget", "40", "--threads", "1"]

    def train(folder):
        return main(["train-heads", "--output", str(folder), *sizes])

    def killed():
        kill_at_write(4, torn=True)
        train(tmp_path / "killed")

    assert in_a_child(killed) == -signal.SIGKILL
    (left,) = (tmp_path / "killed" / "training").iterdir()
    assert left.name.endswith("-drawn.jsonl")
    assert train(tmp_path / "killed") == train(tmp_path / "whole") == 0
    assert not left.exists()
    solutions = [next((tmp_path / name / "training").glob("solutions-*.jsonl")) for name in ("killed", "whole")]
    assert solutions[0].read_bytes() == solutions[1].read_bytes()


# --- heads are trained on it ------------------------------------------------------------------------------------------


def train_heads(folder, *extra):
    sizes = ["--steps", "2", "--batch-size", "8", "--threads", "1"]
    assert main(["train-heads", "--output", str(folder), *sizes, *map(str, extra)]) == 0
    return load_file(folder / "adapter" / "model.safetensors")


def test_heads_learn_the_same_from_the_texts_and_from_the_tokens(whole, tmp_path):
    tokens = tmp_path / "tokens"
    sample(tokens, "--token-ids")
    assert [{n: v for n, v in row.items() if n not in ("input_ids", "labels")} for row in rows_of(tokens)] == rows_of(
        whole[0]
    )
    of_texts = train_heads(tmp_path / "a", "--dataset", whole[0] / "train.jsonl", "--no-hold-out")
    of_tokens = train_heads(tmp_path / "b", "--dataset", tokens / "train.jsonl", "--no-hold-out")
    assert all(torch.equal(of_texts[name], of_tokens[name]) for name in of_texts)
    card = (tmp_path / "a" / "adapter" / "README.md").read_text()
    assert f"{whole[1]['counts']['kept']} texts of train" in card


def test_it_samples_what_training_samples_for_itself(whole, tmp_path):
    train_heads(tmp_path / "own", "--train-problems", "40", "--budget", "40")
    (file,) = (tmp_path / "own" / "training").glob("solutions-*.jsonl")
    tokenizer, own = load_tokenizer(), set()
    for row in map(json.loads, file.read_text().splitlines()):
        at = row["labels"].count(-100)
        texts = (row["input_ids"][:at], row["input_ids"][at:])
        own.add(tuple(tokenizer.decode(ids, skip_special_tokens=True) for ids in texts))
    # But for equal ones, in whose place there may be others.
    sampled = {(row["prompt"], row["completion"]) for row in rows_of(whole[0])}
    assert own <= sampled
    assert len(sampled) <= len(own) + whole[1]["counts"]["duplicates"]


@pytest.fixture
def chatty(tmp_path):
    """The embedded model with a chat template, and problems as conversations."""
    tokenizer = load_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    load_base_model().save_pretrained(tmp_path / "chatty")
    tokenizer.save_pretrained(tmp_path / "chatty")
    rows = [
        {"prompt": [{"role": "user", "content": row["prompt"]}], "solution": row["solution"][0]}
        for row in build_problems("train", 60)
        if row["type"] in ("run", "calc")
    ]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "chatty", path


def test_conversations_are_answered_by_the_assistant_and_trained_on(chatty, tmp_path):
    model, data = chatty
    out = tmp_path / "out"
    flags = ["--model", model, "--token-budget", "40", "--threads", "1", "--dataset", data, "--reward", "exact_match"]
    assert main(["sample", "--output", str(out), *map(str, flags)]) == 0
    rows = rows_of(out)
    for row in rows:
        (asked,), (said,) = row["prompt"], row["completion"]
        assert asked["role"] == "user"
        assert said["role"] == "assistant"
        assert said["content"].split()[-1] == row["solution"]
    assert load_dataset("json", data_files=str(out / "train.jsonl"), split="train").to_list() == rows
    train_heads(tmp_path / "heads", "--model", model, "--dataset", out / "train.jsonl", "--no-hold-out")


# --- texts that others wrote ------------------------------------------------------------------------------------------


def test_hostile_names_do_nothing_in_the_card(tmp_path):
    facts = {"model": HOSTILE, "model_revision": HOSTILE, "source": HOSTILE, "reward": HOSTILE}
    by_setting = [{"name": HOSTILE, "sampled": 1, "verified": 1, "kept": 1}]
    counts = select([[Drawn(0, 0, "r", (0, 0), 1.0, 3, True, "d")]], 1, 1).counts
    card = dataset_card(
        {**facts, "by_setting": by_setting, "counts": counts, "keep": 2, "solve_rate": [0.1, 0.9], "token_ids": True}
    )
    assert card.count("\n---\n") == 1
    _, head, text = card.split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert set(metadata) == {"pretty_name", "task_categories", "tags", "size_categories", "configs"}
    assert "\n" not in metadata["pretty_name"]
    page = MarkdownIt("commonmark").enable("table").render(text)
    assert set(re.findall(r"<(\w+)", page)) == TAGS
    assert page.count("<h1>") == 1
    assert not re.search("[\u202e\u2028]", card)


def test_hostile_files_models_and_problems_are_only_text(tmp_path, monkeypatch, everything_is_right):
    monkeypatch.chdir(tmp_path)
    name = "a|b`<img src=x>: [c](d) {x}"
    load_base_model().save_pretrained(name)
    load_tokenizer().save_pretrained(name)
    rows = [
        {"prompt": f"{row['prompt'].removesuffix('=>')} {HOSTILE} \x00 =>", "solution": "so"}
        for row in build_problems("train", 40)
    ]
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", name, "--dataset", f"{name}.jsonl", "--reward", "exact_match", "--token-budget", "64"]
    assert main(["sample", "--output", "out", "--threads", "1", *flags]) == 0
    found = rows_of(tmp_path / "out")
    assert found
    assert all(HOSTILE in row["prompt"] for row in found)
    assert load_dataset("json", data_files="out/train.jsonl", split="train").to_list() == found
    card = (tmp_path / "out" / "README.md").read_text()
    _, head, text = card.split("---\n", 2)
    assert set(re.findall(r"<(\w+)", MarkdownIt("commonmark").enable("table").render(text))) == TAGS
    assert yaml.safe_load(head)["pretty_name"] == f"Sampled solutions of {name}"


def test_hostile_completions_come_back_as_they_were(tmp_path):
    store = CompletionStore(tmp_path / "completions.jsonl")
    run = store.run({"a": 1}, "solutions")
    texts = [HOSTILE, "\x00\x1c\x85\u2029 \\u0000", '"}\n{"prompt": "x"', "é漢字🙂"]
    store.add(
        [
            {"run": run, "problem": index, "sample": 0, "reward": 1.0, "text": text, "token_ids": [1]}
            for index, text in enumerate(texts)
        ]
    )
    again = CompletionStore(tmp_path / "completions.jsonl")
    assert [again.whole(run, (index, 0))["text"] for index in range(4)] == texts
    assert "text" not in again.done(run)[0, 0]
    rows = [{"prompt": f"{text}?", "completion": text} for text in texts]
    facts = json.loads((tmp_path / "completions.jsonl").read_text().split("\n")[0])
    assert facts["a"] == 1
    by_setting = [{"name": "greedy", "sampled": 1, "verified": 1, "kept": 1}]
    counts = select([[Drawn(0, 0, run, (0, 0), 1.0, 1, True, "d")]], 1, 1).counts
    card = {"model": "m", "model_revision": None, "source": "s", "reward": "r", "by_setting": by_setting}
    write_folder(tmp_path / "out", rows, {**card, "counts": counts, "keep": 1, "solve_rate": None, "token_ids": False})
    args = parse(["train-heads", "--dataset", str(tmp_path / "out" / "train.jsonl"), "--no-hold-out"])
    assert list(load_texts(args).rows) == rows
    assert load_dataset("json", data_files=str(tmp_path / "out" / "train.jsonl"), split="train").to_list() == rows
    assert sample_folder.ROWS_FILE == "train.jsonl"

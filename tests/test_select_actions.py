"""Choosing actions from sampled rewards: the resumable pool, the command, its figure, and where tasks come from."""

import argparse
import builtins
import json

import numpy as np
import pytest

from hf_adaptive_decode import AutoDecoConfig
from hf_adaptive_decode.actions import coverage, coverage_curve, select_actions, top_by_mean
from hf_adaptive_decode.cli.main import main
from hf_adaptive_decode.cli.tasks import add_task_arguments, load_model, load_problems, reward_function
from hf_adaptive_decode.errors import AdapterConfigError, BudgetError, MissingExtraError
from hf_adaptive_decode.evaluation.pool import evaluate_pool
from hf_adaptive_decode.reports.plots import plot_coverage
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer, testbed_reward

POOL = [{"temperature": 1.0}, {"temperature": 0.0}, {"temperature": 0.5, "top_p": 0.9}]
PNG = b"\x89PNG\r\n\x1a\n"


# --- the pool ---------------------------------------------------------------------------------------------------------


def partial_reward(prompts, completions, **columns):
    """Neither 0 nor 1, so that a count of right completions would show."""
    return [len(text) / 64 for text in completions]


@pytest.fixture(scope="module")
def loaded():
    return load_base_model(), load_tokenizer()


def evaluate(loaded, pool=POOL, folder=None, problems=6, reward=testbed_reward, **changes):
    how = {"samples": 2, "token_budget": 12, "seed": 3, "show_progress": False, **changes}
    rows = build_problems("validation", problems)
    return evaluate_pool(*loaded, rows, reward, pool, folder=folder, **how)


@pytest.fixture(scope="module")
def whole(loaded, tmp_path_factory):
    """The rewards and the file of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    table = evaluate(loaded, folder=folder, reward=partial_reward)
    return table, (folder / "pool.jsonl").read_bytes()


def test_each_candidates_mean_reward_on_each_problem(whole):
    table, content = whole
    assert table.shape == (6, 3)
    assert ((table > 0) & (table != 1)).all()
    header, *lines = [json.loads(line) for line in content.splitlines()]
    assert header["samples"] == 2
    assert [line["settings"] for line in lines] == POOL
    assert np.array_equal(np.array([line["rewards"] for line in lines]).T, table)
    assert all(0 < line["mean_tokens"] <= 12 for line in lines)


def test_draws_depend_on_the_seed_and_not_on_the_order_the_batch_or_what_else_is_in_the_pool(loaded, whole):
    table, _ = whole
    assert np.array_equal(evaluate(loaded, POOL[::-1], reward=partial_reward)[:, ::-1], table)
    assert np.array_equal(evaluate(loaded, POOL[2:], reward=partial_reward, batch_rows=3)[:, 0], table[:, 2])
    assert not np.array_equal(evaluate(loaded, POOL[:1], reward=partial_reward, seed=4)[:, 0], table[:, 0])


def cuts(content):
    """One length of every kind: around each line's end, within each line, nothing and all."""
    ends = [index + 1 for index, byte in enumerate(content) if byte == ord("\n")]
    starts = [0, *ends[:-1]]
    within = [(start + end) // 2 for start, end in zip(starts, ends, strict=True)]
    return sorted({0, 1, *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1]), *within})


def test_a_killed_run_goes_on_from_wherever_its_file_ends(loaded, whole, tmp_path, monkeypatch):
    table, content = whole
    from hf_adaptive_decode.evaluation import pool

    ran = []

    def counted(*args, **kwargs):
        ran.append(kwargs["settings"])
        return complete(*args, **kwargs)

    complete = pool.complete
    monkeypatch.setattr(pool, "complete", counted)
    for cut in cuts(content):
        (tmp_path / "pool.jsonl").write_bytes(content[:cut])
        ran.clear()
        assert np.array_equal(evaluate(loaded, folder=tmp_path, reward=partial_reward), table), cut
        assert (tmp_path / "pool.jsonl").read_bytes() == content, cut
        finished = max(content[:cut].count(b"\n") - 1, 0)
        assert ran == POOL[finished:], cut


def test_a_larger_pool_runs_what_is_new_and_a_repeated_candidate_once(loaded, whole, tmp_path):
    table, content = whole
    (tmp_path / "pool.jsonl").write_bytes(content)
    # The same setting in other words: an int, and another order of keys.
    pool = [{"temperature": 0.75}, {"top_p": 0.9, "temperature": 0.5}, {"temperature": 1}, {"temperature": 0.75}]
    found = evaluate(loaded, pool, folder=tmp_path, reward=partial_reward)
    assert np.array_equal(found[:, 1:3], table[:, [2, 0]])
    assert np.array_equal(found[:, 0], found[:, 3])
    assert (tmp_path / "pool.jsonl").read_bytes().count(b"\n") == content.count(b"\n") + 1


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"samples": 3}, "`samples` is 2 there and 3 here"),
        ({"token_budget": 13}, "`token_budget` is 12 there and 13 here"),
        ({"seed": 4}, "`seed` is 3 there and 4 here"),
        ({"problems": 5}, "`problems`"),
        ({"reward": testbed_reward}, "`reward` is 'partial_reward' there and 'testbed_reward' here"),
    ],
)
def test_another_evaluations_file_is_refused_and_kept(loaded, whole, tmp_path, change, named):
    _, content = whole
    (tmp_path / "pool.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="another folder or delete") as caught:
        evaluate(loaded, folder=tmp_path, **{"reward": partial_reward, **change})
    assert named in str(caught.value)
    assert (tmp_path / "pool.jsonl").read_bytes() == content


def test_other_weights_of_the_same_architecture_are_another_model(loaded, whole, tmp_path):
    _, content = whole
    (tmp_path / "pool.jsonl").write_bytes(content)
    tuned = load_base_model()
    tuned.get_input_embeddings().weight.data.mul_(1.01)
    with pytest.raises(ValueError, match="`model`"):
        evaluate((tuned, loaded[1]), folder=tmp_path, reward=partial_reward)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"my notes", "no JSON Lines file"),
        (b"my notes\n", "line 1 of .* damaged"),
        (b"[1]\n{}\n", "line 1 of .* damaged"),
        (b"\xff\xfe\n", "line 1 of .* damaged"),
        (b'{"run": "of something else"}\n', "no record of a pool"),
    ],
)
def test_a_file_that_is_something_else_is_refused_and_kept(loaded, tmp_path, content, said):
    (tmp_path / "pool.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        evaluate(loaded, folder=tmp_path)
    assert (tmp_path / "pool.jsonl").read_bytes() == content


@pytest.mark.parametrize(
    "line", [b"{}", b"garbage", b"\x00\x00", b'{"settings": {"temperature": 1.0}, "rewards": [1]}']
)
def test_a_damaged_line_within_the_file_is_named(loaded, whole, tmp_path, line):
    first, _, *rest = whole[1].splitlines(keepends=True)
    (tmp_path / "pool.jsonl").write_bytes(b"".join([first, line + b"\n", *rest]))
    with pytest.raises(ValueError, match=r"line 2 of .*damaged"):
        evaluate(loaded, folder=tmp_path, reward=partial_reward)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"samples": 0}, BudgetError),
        ({"token_budget": 0}, BudgetError),
        ({"pool": []}, AdapterConfigError),
        ({"pool": [{"temperature": -1.0}]}, AdapterConfigError),
        ({"pool": [{"heat": 1.0}]}, AdapterConfigError),
        ({"problems": 0}, ValueError),
    ],
)
def test_a_bad_argument_is_refused_before_a_file_is_begun(loaded, tmp_path, change, error):
    with pytest.raises(error):
        evaluate(loaded, folder=tmp_path, **change)
    assert not list(tmp_path.iterdir())


def test_a_reward_that_is_not_finite_is_refused_and_not_kept(loaded, tmp_path):
    def broken(completions, **columns):
        return [float("nan")] * len(completions)

    with pytest.raises(ValueError, match="on problem 0 is nan"):
        evaluate(loaded, folder=tmp_path, reward=broken)
    assert (tmp_path / "pool.jsonl").read_bytes().count(b"\n") == 1


# --- the figure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("candidates", [1, 6, 40])
def test_the_figure_is_a_png(tmp_path, candidates):
    pytest.importorskip("matplotlib")
    curve = coverage_curve(np.random.default_rng(0).random((9, candidates)))
    plot_coverage(curve, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(PNG)


def hide(monkeypatch, package):
    """As if the package were not installed."""
    found = builtins.__import__

    def importing(name, *args, **kwargs):
        if name.split(".")[0] == package:
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", importing)


def test_without_matplotlib_the_error_says_what_to_install(tmp_path, monkeypatch):
    hide(monkeypatch, "matplotlib")
    with pytest.raises(MissingExtraError, match=r"\[viz\]"):
        plot_coverage({"k": [1], "greedy_coverage": [1.0], "top_by_mean": [1.0]}, tmp_path / "curve.png")


# --- the command ------------------------------------------------------------------------------------------------------


def select(tmp_path, *words, pool=POOL):
    (tmp_path / "pool.json").write_text(json.dumps(pool))
    sizes = ["--problems", "12", "--samples", "2", "--token-budget", "24", "--k", "2"]
    pool_words = [] if "--grid" in words else ["--pool", str(tmp_path / "pool.json")]
    return main(["select-actions", *pool_words, "--output", str(tmp_path / "out"), *sizes, *words])


def read_back(folder):
    _, *lines = [json.loads(line) for line in (folder / "pool.jsonl").read_text().splitlines()]
    return [line["settings"] for line in lines], np.array([line["rewards"] for line in lines]).T


def test_the_command_chooses_measures_again_and_writes(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pool = [*POOL[:1], {"temperature": 0.8, "top_p": 0.8}, {"temperature": 1.25}]
    assert select(tmp_path, "--json", str(tmp_path / "result.json"), pool=pool) == 0
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    settings, table = read_back(tmp_path / "out")
    assert settings == [*pool, {"temperature": 0.0}]
    assert table.shape == (12, 4)
    assert result["indices"] == select_actions(table, 2)
    assert result["coverage"] == pytest.approx(coverage(table, result["indices"]))
    assert result["top_by_mean"]["indices"] == top_by_mean(table, 2)
    assert result["best_static"]["index"] == top_by_mean(table, 1)[0]
    assert result["curve"] == coverage_curve(table, [1, 2])
    actions = json.loads((tmp_path / "out" / "actions.json").read_text())
    assert actions == result["actions"] == [settings[index] for index in result["indices"]]
    AutoDecoConfig(policy="sequence_actions", actions=actions)
    assert (tmp_path / "out" / "coverage.png").read_bytes().startswith(PNG)
    assert result["check"]["problems"] == 12
    assert {"mean", "low", "high"} == set(result["check"]["coverage_minus_top_by_mean"])
    assert result["arguments"]["samples"] == 2
    assert "torch" in result["environment"]
    for words in ("greedy coverage", "top k by mean reward", "12 fresh problems", "optimistic", "actions.json"):
        assert words in printed


def test_the_check_is_on_other_problems_with_other_draws(tmp_path, capsys, monkeypatch):
    from hf_adaptive_decode.evaluation import pool

    calls = []

    def kept(model, tokenizer, problems, reward, candidates, **how):
        calls.append(({row["prompt"] for row in problems}, how["seed"]))
        return np.eye(len(problems), len(candidates))

    monkeypatch.setattr(pool, "evaluate_pool", kept)
    (tmp_path / "out").mkdir()
    assert select(tmp_path, "--check-problems", "5", "--seed", "7") == 0
    (chosen_on, seed), (fresh, other_seed) = calls
    assert (len(chosen_on), len(fresh)) == (12, 5)
    assert not chosen_on & fresh
    assert seed == 7 != other_seed


def test_a_second_call_reads_the_rewards_and_can_leave_out_the_check(tmp_path, capsys, monkeypatch):
    assert select(tmp_path, "--check-problems", "0", "--json", "-") == 0
    first = json.loads(capsys.readouterr().out)
    assert first["check"] is None
    hide(monkeypatch, "matplotlib")
    (tmp_path / "out" / "coverage.png").unlink(missing_ok=True)
    before = (tmp_path / "out" / "pool.jsonl").read_bytes()
    assert select(tmp_path, "--check-problems", "0", "--json", "-") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["actions"] == first["actions"]
    assert (tmp_path / "out" / "pool.jsonl").read_bytes() == before
    assert "coverage.png is left out" in said.err
    assert not (tmp_path / "out" / "coverage.png").exists()


def test_pools_hold_each_candidate_once_and_greedy_if_asked(tmp_path):
    from hf_adaptive_decode.cli.select_actions import _pool, add_arguments

    def pool(*words):
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        return _pool(parser.parse_args(list(words)))

    assert len(pool()) == 181
    assert len(pool("--no-extra-greedy")) == 180
    assert len(pool("--grid", "small")) == 16
    (tmp_path / "pool.json").write_text(json.dumps([{"temperature": 1}, {"temperature": 1.0}, {"temperature": 0}]))
    assert pool("--pool", str(tmp_path / "pool.json")) == [{"temperature": 1}, {"temperature": 0}]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--k", "9"], "--k is 9 and there are 3 candidates"),
        (["--problems", "5000"], "validation split has only"),
        (["--dataset", "no_such.jsonl", "--reward", "exact_match"], "no_such.jsonl cannot be read"),
        (["--reward", "exact_match"], "does not fit --dataset testbed"),
        (["--model", "no/such_model"], "--model no/such_model cannot be loaded"),
    ],
)
def test_a_users_mistake_is_a_message_and_exit_code_1(tmp_path, capsys, words, said):
    assert select(tmp_path, *words) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "pool", ["", "{}", "[]", "[1]", '[{"heat": 1}]', '[{"temperature": "hot"}]', '[{"temperature": null}]', None]
)
def test_a_bad_pool_file_is_a_message_and_exit_code_1(tmp_path, capsys, pool):
    if pool is not None:
        (tmp_path / "bad.json").write_text(pool)
    assert main(["select-actions", "--pool", str(tmp_path / "bad.json"), "--output", str(tmp_path / "out")]) == 1
    assert "error:" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words", [("--k", "0"), ("--samples", "many"), ("--check-problems", "-1"), ("--threads", "0"), ("--grid", "huge")]
)
def test_wrong_usage_exits_with_2(tmp_path, capsys, words):
    with pytest.raises(SystemExit) as caught:
        main(["select-actions", "--output", str(tmp_path), *words])
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


# --- where tasks come from --------------------------------------------------------------------------------------------


def task(*words):
    parser = argparse.ArgumentParser()
    add_task_arguments(parser)
    return parser.parse_args(list(words))


def load_rows(dataset, args, split, n, seed):
    """Of one data set alone."""
    return load_problems(argparse.Namespace(**{**vars(args), "dataset": [dataset]}), split, n, seed)


GSM8K = ["--reward", "exact_match", "--prompt-column", "question", "--solution-column", "answer"]


def write_rows(path, count=60):
    rows = [
        {"question": f"What is {n} + 1?", "answer": f"{n} #### and 1\n#### {n + 1} ", "id": n} for n in range(count)
    ]
    as_list = path.suffix == ".json"
    path.write_text(json.dumps(rows) if as_list else "\n".join(map(json.dumps, rows)) + "\n\n")
    return str(path)


def test_the_testbed_is_the_default(loaded):
    args = task()
    assert load_rows("testbed", args, "validation", 7, 3) == build_problems("validation", 7, seed=3)
    assert load_problems(args, "train", 5, 1) == build_problems("train", 5, seed=1)
    assert reward_function(args.reward) is testbed_reward
    model, tokenizer = load_model(args)
    assert model.config.vocab_size == len(tokenizer) == len(loaded[1])


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_file_is_read_renamed_and_split_by_prompt(tmp_path, name):
    path = write_rows(tmp_path / name)
    args = task(*GSM8K, "--solution-after", "####", "--dataset", path)
    parts = {split: load_rows(path, args, split, None, 0) for split in ("train", "validation", "test")}
    prompts = [row["prompt"] for rows in parts.values() for row in rows]
    assert len(prompts) == len(set(prompts)) == 60
    assert len(parts["train"]) > 35
    for row in parts["train"]:
        number = int(row["prompt"].split()[2])
        assert row == {"prompt": f"What is {number} + 1?", "solution": str(number + 1)}
    without = load_rows(path, task(*GSM8K), "test", 1, 0)
    assert "####" in without[0]["solution"]


def test_which_rows_depends_on_the_seed_and_the_prompts_and_not_on_the_files_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path)
    args = task(*GSM8K)
    rows = load_rows(str(path), args, "train", None, 5)
    assert load_rows(str(path), args, "train", 9, 5) == rows[:9]
    assert load_rows(str(path), args, "train", 9, 6) != rows[:9]
    lines = path.read_text().splitlines()
    # A repeated prompt counts once.
    path.write_text("\n".join([*lines[::-1], lines[0]]))
    assert load_rows(str(path), args, "train", None, 5) == rows


def test_several_sources_take_turns(tmp_path):
    paths = [write_rows(tmp_path / "a.jsonl", 30), str(tmp_path / "b.jsonl")]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"question": f"b{n}", "answer": 1}) + "\n" for n in range(30)))
    args = task(*GSM8K, "--dataset", *paths, paths[0])
    rows = load_problems(args, "train", 7, 0)
    assert [row["prompt"].startswith("b") for row in rows] == [False, True, False, True, False, True, False]
    assert load_problems(args, "train", 4, 0) == rows[:4]
    everything = load_problems(args, "train", None, 0)
    assert len(everything) == sum(len(load_rows(path, args, "train", None, 0)) for path in paths)


def test_code_rows_have_tests_and_the_function_to_call(tmp_path):
    rows = [{"prompt": f"p{n}", "test_list": ["assert f()"], "entry_point": "f"} for n in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = task("--reward", "code", "--solution-column", "test_list")
    row = load_rows(str(tmp_path / "rows.jsonl"), args, "train", 1, 0)[0]
    assert row == {"prompt": row["prompt"], "tests": ["assert f()"], "entry_point": "f"}


@pytest.mark.parametrize(
    ("content", "words", "said"),
    [
        ('{"question": "q", "a": "1"}', [], r"\['a', 'question'\] and not \['answer'\]"),
        ('{"question": "q", "answer": "1"}\n{nonsense', [], "line 2"),
        ('{"question": "q", "answer": "1"}\n[1]', [], "JSON objects"),
        ("", [], "JSON objects"),
        ('{"question": "", "answer": "1"}', [], "`question` of row 0"),
        ('{"question": 7, "answer": "1"}', [], "a text or a list of messages"),
        ('{"question": "q", "answer": null}', [], "`answer` of row 0"),
        ('{"question": "q", "answer": "1"}', ["--solution-after", "####"], "nothing behind '####'"),
        ('{"question": "q", "answer": "1"}', ["--reward", "testbed"], "does not fit"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, content, words, said):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=said):
        load_rows(str(path), task(*GSM8K, *words), "train", None, 0)


def test_too_few_rows_is_an_error_that_says_how_many_there_are(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"the test part of .* has \d+ different prompts, and 50 are needed"):
        load_rows(path, task(*GSM8K), "test", 50, 0)
    with pytest.raises(ValueError, match="no split 'dev'"):
        load_rows(path, task(*GSM8K), "dev", 1, 0)


def dataset_folder(folder, splits):
    datasets = pytest.importorskip("datasets")
    tables = {
        name: datasets.Dataset.from_dict(
            {"question": [f"{name} {n}" for n in range(50)], "answer": ["1"] * 50, "more": list(range(50))}
        )
        for name in splits
    }
    datasets.DatasetDict(tables).save_to_disk(folder)
    return str(folder)


def test_a_data_sets_own_splits_are_used_and_those_it_lacks_come_from_train(tmp_path):
    path = dataset_folder(tmp_path / "two", ["train", "test"])
    parts = {split: load_rows(path, task(*GSM8K), split, None, 0) for split in ("train", "validation", "test")}
    assert len(parts["test"]) == 50
    assert all(row["prompt"].startswith("test") for row in parts["test"])
    assert len(parts["train"]) + len(parts["validation"]) == 50
    assert all(set(row) == {"prompt", "solution"} for row in parts["train"])
    assert not {row["prompt"] for row in parts["train"]} & {row["prompt"] for row in parts["validation"]}


def test_a_single_split_is_divided_even_if_it_is_called_test(tmp_path):
    path = dataset_folder(tmp_path / "one", ["test"])
    found = [len(load_rows(path, task(*GSM8K), split, None, 0)) for split in ("train", "validation", "test")]
    assert sum(found) == 50
    assert found[0] == max(found)


def test_a_named_split_is_divided(tmp_path):
    path = dataset_folder(tmp_path / "three", ["main", "other"])
    with pytest.raises(ValueError, match=r"\['main', 'other'\] and no `train`"):
        load_rows(path, task(*GSM8K), "train", 3, 0)
    rows = load_rows(f"{path}:main", task(*GSM8K), "train", None, 0)
    assert 30 < len(rows) < 50
    assert all(row["prompt"].startswith("main") for row in rows)
    for name in (f"{path}:none", f"{path}:a:b:c", str(tmp_path / "nowhere")):
        with pytest.raises(ValueError, match="--dataset"):
            load_rows(name, task(*GSM8K), "train", None, 0)


def test_missing_columns_of_a_data_set_are_listed_with_those_it_has(tmp_path):
    path = dataset_folder(tmp_path / "one", ["train"])
    with pytest.raises(ValueError, match=r"\['answer', 'more', 'question'\] and not \['prompt', 'solution'\]"):
        load_rows(path, task("--reward", "exact_match"), "train", 3, 0)


def test_without_datasets_the_error_says_what_to_install(monkeypatch):
    hide(monkeypatch, "datasets")
    with pytest.raises(MissingExtraError, match=r"datasets.*\[train\]"):
        load_rows("some/dataset", task("--reward", "exact_match"), "train", 3, 0)


def test_rewards_that_cannot_work_here_fail_before_anything_is_sampled(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "math_verify" else found(name, *a)
    )
    with pytest.raises(MissingExtraError, match="math"):
        reward_function("math")
    assert reward_function("exact_match")(completions=["so 4"], solution=["4"]) == [1.0]
    with pytest.raises(ValueError, match="no reward 'nice'"):
        reward_function("nice")


def test_a_model_folder_and_an_adapter_folder_are_loaded(folder, tmp_path):
    load_tokenizer().save_pretrained(tmp_path / "base")
    model, _ = load_model(task("--model", str(tmp_path / "base")))
    assert not model.training
    load_tokenizer().save_pretrained(folder)
    adapted, _ = load_model(task("--model", str(folder)))
    assert adapted.decoding_config.policy == "heads"
    (tmp_path / "base" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(task("--model", str(tmp_path / "base")))

"""The command that trains heads: on the model's own solutions, on texts, resumed, measured, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file

from hf_adaptive_decode import AutoDecoForCausalLM, AutoDecoTrainer
from hf_adaptive_decode.cli import heads_run
from hf_adaptive_decode.cli.main import main, parse
from hf_adaptive_decode.cli.texts import load_texts
from hf_adaptive_decode.cli.train_heads import _arguments, _config
from hf_adaptive_decode.evaluation import Evaluation, load_task
from hf_adaptive_decode.evaluation.sources import Source
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer, testbed_reward

SIZES = {"train-problems": 24, "steps": 4, "batch-size": 8, "budget": 16, "save-steps": 2, "threads": 1}
ADAPTER = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
ADAPTER |= {"tokenizer.json", "tokenizer_config.json"}


def words(folder, *extra, **changes):
    sizes = SIZES | {name.replace("_", "-"): value for name, value in changes.items()}
    flags = [word for name, value in sizes.items() if value is not None for word in (f"--{name}", str(value))]
    return ["train-heads", "--output", str(folder), *flags, *map(str, extra)]


def train(folder, *extra, **changes):
    """The JSON result."""
    path = folder.parent / f"{folder.name}.json"
    assert main([*words(folder, *extra, **changes), "--json", str(path)]) == 0
    return json.loads(path.read_text())


def weights(folder):
    return load_file(folder / "adapter" / "model.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def solved(count=24):
    """Texts with prompt and completion, in the testbed's words."""
    return [
        {"prompt": row["prompt"], "completion": f" so {row['solution'][0]}"} for row in build_problems("train", count)
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run: its folder and result."""
    folder = tmp_path_factory.mktemp("trained") / "out"
    return folder, train(folder)


# --- from end to end --------------------------------------------------------------------------------------------------


def test_the_embedded_model_learns_from_its_own_verified_solutions(trained, capsys):
    folder, result = trained
    assert {path.name for path in (folder / "adapter").iterdir()} == ADAPTER
    card = (folder / "adapter" / "README.md").read_text()
    assert "solutions of its own to 24 problems of testbed, verified" in card
    assert "| steps      | 4 " in card
    assert result["lines"] == []
    assert result["url"] is None
    assert result["arguments"]["steps"] == 4
    log = result["training"]["learned heads"]
    assert {"loss", "temperature_mean", "top_p_mean"} <= set(log[0])
    (file,) = (folder / "training").glob("solutions-*.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    tokenizer = load_tokenizer()
    problems = {row["prompt"]: row for row in build_problems("train", 24)}
    for row in rows:
        at = row["labels"].count(-100)
        prompt, text = tokenizer.decode(row["input_ids"][:at]), tokenizer.decode(row["input_ids"][at:])
        (score,) = testbed_reward([prompt], [text], **{name: [problems[prompt][name]] for name in ("type", "solution")})
        assert score == 1
    model = AutoDecoForCausalLM.from_pretrained(folder / "adapter")
    inputs = tokenizer("run 42 - 10 + 3 =>", return_tensors="pt")
    assert model.generate(**inputs, budget=8).shape[1] > inputs["input_ids"].shape[1]
    fresh = heads_run.heads_trainer(load_base_model(), tokenizer, rows, heads_run.heads_arguments("unused"))
    assert not equal(weights(folder), fresh.model.decoding_adapter.state_dict())


def test_it_ends_with_a_table_against_every_baseline_and_the_card_has_it(tmp_path, capsys):
    extra = ["--evaluate", "--test-problems", "6", "--validation-problems", "4", "--eval-samples", "2"]
    result = train(tmp_path / "out", *extra, "--heads", "temperature")
    printed = capsys.readouterr().out
    found = Evaluation(result["lines"])
    roles = {line["role"] for line in found.measures}
    # The mixture and the masked static are of policies with actions.
    assert roles == {"adapter", "greedy", "default", "mean_shift", "best_static"}
    assert found.find("adapter")["task"] == "testbed"
    assert found.table() in printed
    assert found.summary() in printed
    assert Evaluation.load(tmp_path / "out" / "evaluation" / "results.jsonl").lines == found.lines
    assert "6 problems are too few to tell" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert AutoDecoForCausalLM.from_pretrained(tmp_path / "out" / "adapter").decoding_config.heads == ["temperature"]
    # Measured again it is neither trained nor sampled again, and on other tasks only what is new is.
    completions = tmp_path / "out" / "evaluation" / "completions.jsonl"
    size = completions.stat().st_size
    again = train(tmp_path / "out", *extra, "--heads", "temperature")
    assert again["lines"][1:] == result["lines"][1:]
    assert completions.stat().st_size == size
    others = train(
        tmp_path / "out", *extra, "--heads", "temperature", "--task", "testbed:coin", "--baselines", "greedy"
    )
    assert {line["task"] for line in Evaluation(others["lines"]).measures} == {"testbed:coin"}
    assert completions.stat().st_size > size


def test_nothing_but_json_goes_to_standard_output(trained, capsys):
    assert main([*words(trained[0]), "--json", "-"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["adapter"] == str(trained[0] / "adapter")
    assert "Load it in one line" in said.err


def test_the_same_seed_gives_the_same_heads_and_another_gives_others(trained, tmp_path):
    train(tmp_path / "same")
    train(tmp_path / "other", seed=1)
    assert equal(weights(tmp_path / "same"), weights(trained[0]))
    assert not equal(weights(tmp_path / "other"), weights(trained[0]))


# --- resuming ---------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_not_trained_again(trained, monkeypatch):
    folder, result = trained
    monkeypatch.setattr(AutoDecoTrainer, "train", lambda *_, **__: pytest.fail("it was trained again"))
    assert train(folder, save_steps=0)["training"] == result["training"]


@pytest.mark.parametrize(
    ("left", "length"), [([], "steps"), ([2], "steps"), ([2, 4], "steps"), ([2], "epochs"), ([2, 4], "epochs")]
)
def test_a_killed_run_goes_on_from_its_last_checkpoint_and_ends_the_same(trained, tmp_path, left, length, monkeypatch):
    folder, _ = trained
    how = {"steps": None, "epochs": 2} if length == "epochs" else {}
    out = tmp_path / "out"
    if how:
        folder = tmp_path / "whole"
        train(folder, **how)
    shutil.copytree(folder, out)
    shutil.rmtree(out / "adapter")
    for checkpoint in (out / "training").glob("checkpoint-*"):
        if int(checkpoint.name.rpartition("-")[2]) not in left:
            shutil.rmtree(checkpoint)
    record = json.loads((out / "training" / "run.json").read_text())
    (out / "training" / "run.json").write_text(json.dumps({**record, "finished": False, "log": []}))
    # Neither is anything sampled again.
    monkeypatch.setattr(
        "hf_adaptive_decode.training.rejection.verified_completions", lambda *_, **__: pytest.fail("sampled again")
    )
    steps = []
    computed = AutoDecoTrainer.compute_loss
    monkeypatch.setattr(
        AutoDecoTrainer,
        "compute_loss",
        lambda self, *args, **kwargs: (steps.append(self.state.global_step), computed(self, *args, **kwargs))[1],
    )
    result = train(out, **how)
    last = max(left, default=0)
    total = 4
    assert steps == list(range(last, total))
    assert equal(weights(out), weights(folder))
    assert f"| steps      | {total} " in (out / "adapter" / "README.md").read_text()
    assert [entry for entry in result["training"]["learned heads"] if "loss" in entry]


def test_other_arguments_are_refused_unless_told_to_start_over(trained, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(trained[0], out)
    assert main(words(out, "--set", "weight_decay=0.5", alpha=10)) == 1
    said = capsys.readouterr().err
    for part in (
        "`alpha` is None there and 10.0 here",
        "`set` is [] there and ['weight_decay=0.5'] here",
        "--no-resume",
    ):
        assert part in said
    train(out, "--no-resume", "--set", "weight_decay=0.5", alpha=10)
    assert not equal(weights(out), weights(trained[0]))


def test_what_only_measures_or_stores_is_no_other_argument(trained):
    train(trained[0], "--report-to", "none", "--eval-samples", "2", "--task", "aime", save_steps=1, threads=2)


# --- texts ------------------------------------------------------------------------------------------------------------


def messages(row):
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


FORMS = {
    "prompt and completion": lambda row: {"prompt": row["prompt"], "completion": row["completion"], "id": 3},
    "text": lambda row: {"text": row["prompt"] + row["completion"]},
    "input_ids": lambda row: {"input_ids": load_tokenizer()(row["prompt"] + row["completion"])["input_ids"]},
    "other names": lambda row: {"question": row["prompt"], "answer": row["completion"]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet", ""])
def test_texts_are_read_from_files_in_every_format(tmp_path, form, kind):
    rows = [FORMS[form](row) for row in solved()]
    path = tmp_path / f"data{kind}"
    if kind == ".jsonl":
        written(path, rows)
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    else:
        Dataset.from_list(rows).save_to_disk(path)
    names = ["--prompt-column", "question", "--completion-column", "answer"] if form == "other names" else []
    texts = load_texts(parse(["train-heads", "--dataset", str(path), *names]))
    wanted = {"text": ["text"], "input_ids": ["input_ids"]}.get(form, ["prompt", "completion"])
    assert list(texts.rows[0])[: len(wanted)] == wanted
    assert "id" not in texts.rows[0]
    assert texts.found == 24
    if form in ("text", "input_ids"):
        assert len(texts.rows) == 24
    else:
        # What `evaluate` would measure on is held out, and everything else is there.
        kept = {row["prompt"] for row in Source(solved(), lambda **_: []).rows("train")}
        assert {row["prompt"] for row in texts.rows} == kept
        assert 0 < len(texts.rows) < 24
        assert "held out" in texts.note
        everything = load_texts(parse(["train-heads", "--dataset", str(path), *names, "--no-hold-out"]))
        assert len(everything.rows) == 24


def test_several_completions_of_a_prompt_are_all_learned_from(tmp_path):
    rows = [{**row, "completion": f"{row['completion']}{end}"} for row in solved() for end in ("", " yes")]
    texts = load_texts(parse(["train-heads", "--dataset", str(written(tmp_path / "data.jsonl", rows))]))
    prompts = [row["prompt"] for row in texts.rows]
    assert all(prompts.count(prompt) == 2 for prompt in prompts)


def test_no_prompt_that_is_learned_from_is_evaluated_on(tmp_path):
    # Those of the testbed's train split are all in the train part of any file.
    problems = [row for split in ("train", "validation", "test") for row in build_problems(split, 20)]
    rows = [{"prompt": row["prompt"], "completion": " so 1", "solution": "1"} for row in problems]
    path = str(written(tmp_path / "data.jsonl", rows))
    learned = {row["prompt"] for row in load_texts(parse(["train-heads", "--dataset", path])).rows}
    task = load_task(Source(path, "exact_match"))
    measured = {row["prompt"] for row in [*task.validation, *task.test]}
    assert learned
    assert measured
    assert not learned & measured
    assert learned | measured == {row["prompt"] for row in problems}


def test_a_data_sets_own_splits_are_used(tmp_path):
    rows = solved(30)
    parts = {"train": rows[:20], "test": rows[20:]}
    DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(tmp_path / "data")
    args = parse(["train-heads", "--dataset", str(tmp_path / "data")])
    texts = load_texts(args)
    source = Source(str(tmp_path / "data"), lambda **_: [])
    assert {row["prompt"] for row in texts.rows} == {row["prompt"] for row in source.rows("train")}
    assert texts.found == 20


def test_fewer_texts_are_the_same_ones_for_a_seed(tmp_path):
    path = str(written(tmp_path / "data.jsonl", [FORMS["text"](row) for row in solved()]))
    few = [load_texts(parse(["train-heads", "--dataset", path, "--train-problems", "8", "--seed", s])) for s in "001"]
    assert [len(one.rows) for one in few] == [8, 8, 8]
    assert few[0].rows == few[1].rows != few[2].rows


def test_plain_prompts_become_conversations_if_asked_to(tmp_path):
    rows = [{**row, "low_prompt": row["prompt"], "high_prompt": None} for row in solved()]
    path = str(written(tmp_path / "data.jsonl", rows))
    (first, *_) = load_texts(parse(["train-heads", "--dataset", path, "--chat", "--no-hold-out"])).rows
    user = [{"role": "user", "content": rows[0]["prompt"]}]
    assert first["prompt"] == first["low_prompt"] == user
    assert first["completion"] == [{"role": "assistant", "content": rows[0]["completion"]}]
    assert first["high_prompt"] is None
    template = ["--prompt-template", "Q: {prompt} {tests}"]
    (first, *_) = load_texts(parse(["train-heads", "--dataset", path, "--no-hold-out", *template])).rows
    assert first["prompt"] == first["low_prompt"] == f"Q: {rows[0]['prompt']} {{tests}}"
    assert first["completion"] == rows[0]["completion"]


def test_heads_are_trained_on_texts(tmp_path, capsys):
    data = written(tmp_path / "mine.jsonl", [FORMS["text"](row) for row in solved(32)])
    train(tmp_path / "out", "--dataset", data, train_problems=None)
    assert "32 examples to train on" in capsys.readouterr().out
    assert "32 texts of mine" in (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert not list((tmp_path / "out" / "training").glob("solutions-*"))
    # The data is part of what a run is.
    written(data, [FORMS["text"](row) for row in solved(31)])
    assert main(words(tmp_path / "out", "--dataset", data, train_problems=None)) == 1
    assert "`data` is" in capsys.readouterr().err


def test_problems_of_ones_own_are_solved_by_the_model(tmp_path):
    pytest.importorskip("math_verify")
    rows = [
        {"question": row["prompt"], "answer": f"... #### {row['solution'][0]}"} for row in build_problems("train", 40)
    ]
    extra = ["--dataset", written(tmp_path / "rows.jsonl", rows), "--sample", "--reward", "math"]
    extra += ["--prompt-column", "question", "--solution-column", "answer", "--solution-after", "####"]
    result = train(tmp_path / "out", *extra, "--num-generations", "8", train_problems=None, budget=48)
    assert result["training"]["learned heads"]
    assert "problems of rows, verified" in (tmp_path / "out" / "adapter" / "README.md").read_text()


def test_problems_are_asked_in_the_same_way_in_training_and_evaluation(tmp_path, monkeypatch):
    problems = [row for split in ("train", "validation", "test") for row in build_problems(split, 20)]
    rows = [{"prompt": row["prompt"].removesuffix(" =>"), "solution": row["solution"][0]} for row in problems]
    extra = ["--dataset", written(tmp_path / "rows.jsonl", rows), "--sample", "--reward", "exact_match", "--evaluate"]
    extra += ["--prompt-template", "{prompt} =>", "--eval-samples", "1", "--baselines", "greedy"]
    extra += ["--validation-problems", "2", "--test-problems", "2"]
    seen = {}

    def sampled(model, tokenizer, given, reward, **how):
        seen["trained on"] = [row["prompt"] for row in given]
        return [{"input_ids": list(range(8)), "labels": [-100] * 4 + list(range(4))}]

    def evaluated(model, tokenizer, tasks, adapters, **how):
        seen["measured on"] = [row["prompt"] for task in tasks for row in (*task.validation, *task.test)]
        raise ValueError("enough")

    monkeypatch.setattr("hf_adaptive_decode.training.rejection.verified_completions", sampled)
    monkeypatch.setattr("hf_adaptive_decode.evaluation.evaluate_decoding", evaluated)
    assert main(words(tmp_path / "out", *extra, train_problems=None)) == 1
    assert all(prompt.endswith(" =>") for prompts in seen.values() for prompt in prompts)
    assert not set(seen["trained on"]) & set(seen["measured on"])


def test_commands_are_learned_with_texts_and_with_solutions(tmp_path):
    commands = tmp_path / "commands.json"
    commands.write_text(json.dumps({"low": ["calc"], "high": ["coin"]}))
    extra = ["--control-loss-weight", "2", "--control-commands", str(commands)]
    data = written(tmp_path / "mine.jsonl", solved(32))
    for name, more, few in (("texts", ["--dataset", data], {"train_problems": None}), ("own", [], {})):
        result = train(tmp_path / name, *extra, *more, steps=2, **few)
        log = result["training"]["learned heads"]
        assert any("control_loss" in entry and "control_temperature_low" in entry for entry in log)


def test_a_lora_learns_together_with_the_heads_and_is_measured_with_them(tmp_path, capsys):
    pytest.importorskip("peft")
    out = tmp_path / "out"
    extra = ["--lora-rank", "2", "--lora-learning-rate", "0.1"]
    few = ["--validation-problems", "2", "--test-problems", "2", "--token-budget", "8", "--samples", "1"]
    first = train(out, *extra)
    assert (out / "adapter" / "peft" / "adapter_model.safetensors").exists()
    card = (out / "adapter" / "README.md").read_text()
    assert "the base's LoRA learned together with the heads" in card
    lora = {
        name: t for name, t in load_file(out / "adapter" / "peft" / "adapter_model.safetensors").items() if "B" in name
    }
    assert all(tensor.abs().sum() > 0 for tensor in lora.values())
    # Killed behind the last step, both are brought back; finished, both are loaded.
    shutil.rmtree(out / "adapter")
    record = out / "training" / "run.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "finished": False}))
    log = [entry for entry in first["training"]["learned heads"] if "loss" in entry]
    assert train(out, *extra)["training"]["learned heads"] == log
    again = load_file(out / "adapter" / "peft" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in lora.items())
    adapter = str(out / "adapter")
    assert main(["evaluate", "--adapter", adapter, "--output", str(out / "e"), "--baselines", "greedy", *few]) == 0
    measured = Evaluation.load(out / "e" / "results.jsonl").find("adapter")["mean_temperature"]
    shutil.rmtree(out / "adapter" / "peft")
    assert main(["evaluate", "--adapter", adapter, "--output", str(out / "f"), "--baselines", "greedy", *few]) == 0
    assert Evaluation.load(out / "f" / "results.jsonl").find("adapter")["mean_temperature"] != measured
    capsys.readouterr()


def test_a_lora_is_not_lent_to_other_adapters(tmp_path, capsys):
    pytest.importorskip("peft")
    for name, extra in (("plain", []), ("tuned", ["--lora-rank", "2"])):
        train(tmp_path / name, *extra, steps=1)
    plain, tuned = (str(tmp_path / name / "adapter") for name in ("plain", "tuned"))
    for words in (["evaluate", "--adapter", plain, "--rival", tuned], ["trace", "--adapter", tuned, "--versus", plain]):
        assert main([*words, "--output", str(tmp_path / "e")]) == 1
        assert "comes with a LoRA" in capsys.readouterr().err


def test_a_solution_gets_its_own_prompts_command():
    from hf_adaptive_decode.engines.transformers import encode_prompt
    from hf_adaptive_decode.training import CommandSet

    tokenizer = load_tokenizer()
    problems = build_problems("train", 6)
    rows = []
    for row in reversed(problems):
        head = encode_prompt(tokenizer, row["prompt"])
        rows.append({"input_ids": [*head, 5, 6], "labels": [-100] * len(head) + [5, 6]})
    told = heads_run.with_command_ids(rows, problems, tokenizer, CommandSet(low=("calc",), high=("coin",)), seed=0)
    for row, problem, one in zip(rows, reversed(problems), told, strict=True):
        assert one["low_prompt_ids"] == encode_prompt(tokenizer, f"{problem['prompt']} calc")
        assert one["high_prompt_ids"] == encode_prompt(tokenizer, f"{problem['prompt']} coin")
        assert {name: one[name] for name in row} == row


# --- what flags mean --------------------------------------------------------------------------------------------------


def asked(*flags):
    args = parse(["train-heads", *flags])
    return _arguments(args), _config(args)


def test_the_defaults_are_the_recipe_of_the_testbed():
    arguments, config = asked()
    assert {name: vars(arguments)[name] for name in heads_run.RECIPE} == heads_run.RECIPE
    assert (config.policy, config.heads, config.head_hidden_size) == ("heads", ["temperature", "top_p"], 256)


def test_the_papers_recipe_is_there_by_name_and_flags_win_over_it():
    arguments, _ = asked("--recipe", "paper")
    assert (arguments.learning_rate, arguments.max_steps, arguments.dft_weight) == (5e-6, 400, "base")
    assert (arguments.gradient_accumulation_steps, arguments.max_length) == (32, 16384)
    arguments, _ = asked("--recipe", "paper", "--learning-rate", "1e-4", "--steps", "7", "--dft-weight", "scaled")
    assert (arguments.learning_rate, arguments.max_steps, arguments.dft_weight) == (1e-4, 7, "scaled")
    assert arguments.gradient_accumulation_steps == 32


def test_every_flag_arrives_where_it_belongs(tmp_path):
    flags = "--batch-size 3 --gradient-accumulation-steps 2 --max-length 99 --loss-type two_loss --alpha 12 --bf16 "
    flags += "--easy-token-mask-ratio 0.5 --easy-token-mask-target temperature --epochs 2 --save-steps 0 --seed 9"
    arguments, _ = asked(*flags.split())
    given = (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps, arguments.max_length)
    assert given == (3, 2, 99)
    assert (arguments.loss_type, arguments.alpha, arguments.bf16, arguments.seed) == ("two_loss", 12.0, True, 9)
    assert (arguments.easy_token_mask_ratio, arguments.easy_token_mask_target) == (0.5, "temperature")
    assert (arguments.max_steps, arguments.num_train_epochs, str(arguments.save_strategy.value)) == (-1, 2.0, "no")
    flags = "--heads top_p --features hidden statistics --hidden-size 16 --detach-temperature "
    flags += "--temperature-range 0.2 1.2 --top-p-range 0.5 1"
    _, config = asked(*flags.split())
    assert (config.heads, config.features, config.head_hidden_size) == (["top_p"], ["hidden", "statistics"], 16)
    assert (config.detach_temperature, config.temperature_range, config.top_p_range) == (True, [0.2, 1.2], [0.5, 1.0])


SET = [
    ("weight_decay=0.1", "weight_decay", 0.1),
    ("warmup-steps=3", "warmup_steps", 3),
    ("optim=adafactor", "optim", "adafactor"),
    ("lr_scheduler_type=linear", "lr_scheduler_type", "linear"),
    ("bf16_full_eval=true", "bf16_full_eval", True),
    ("lr_scheduler_kwargs={\"num_cycles\": 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
    ("chat_template_kwargs={\"enable_thinking\": false}", "chat_template_kwargs", {"enable_thinking": False}),
    ("control_top_p_margin=0.05", "control_top_p_margin", 0.05),
    ("dataset_num_proc=none", "dataset_num_proc", None),
    ("label_names=[\"a\", \"b\"]", "label_names", ["a", "b"]),
    ("epoch_cache=distribution", "epoch_cache", "distribution"),
    ("logging_steps=7", "logging_steps", 7),
    ("run_name=a=b", "run_name", "a=b"),
]  # fmt: skip


@pytest.mark.parametrize(("pair", "name", "value"), SET)
def test_any_other_argument_of_the_trainer_can_be_set(pair, name, value):
    assert vars(asked("--set", pair)[0])[name] == value


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("weight_dekay=1", "Is it weight_decay"),
        ("weight_decay", "NAME=VALUE"),
        ("=1", "NAME=VALUE"),
        ("weight_decay=much", "invalid float value: 'much'"),
        ("optim=magic", "invalid choice: 'magic'"),
        ("bf16_full_eval=perhaps", "Truthy value expected"),
        ("lr_scheduler_kwargs={1", "it is no JSON"),
        ("max_steps=5", "`max_steps` is what --steps is for"),
        ("per_device_train_batch_size=5", "--batch-size"),
        ("output_dir=x", "--output"),
        ("hub_token=hf_secret", "--token-file"),
        ("remove_unused_columns=true", "NAME=VALUE"),
        ("_n_gpu=2", "NAME=VALUE"),
    ],
)
def test_what_cannot_be_set_is_wrong_usage(tmp_path, capsys, pair, said):
    for command in ("train-heads", "train-policy"):
        if command == "train-policy" and pair.startswith(("per_device", "max_steps")):
            continue
        with pytest.raises(SystemExit) as caught:
            main([command, "--output", str(tmp_path / "out"), "--set", pair])
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert "usage:" in error
        assert said in error.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_an_argument_set_twice_is_wrong_usage(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(words(tmp_path / "out", "--set", "optim=sgd", "--set", "optim=adafactor"))
    assert "set twice" in capsys.readouterr().err


def test_what_is_set_is_trained_with(tmp_path):
    train(tmp_path / "plain", steps=2)
    train(tmp_path / "set", "--set", "optim=sgd", "--set", "logging_steps=2", steps=2)
    assert not equal(weights(tmp_path / "plain"), weights(tmp_path / "set"))


# --- mistakes ---------------------------------------------------------------------------------------------------------

TEXT = [{"text": "run 1 =>"}]


@pytest.mark.parametrize(
    ("rows", "extra", "said"),
    [
        (None, ["--dataset", "missing.jsonl"], "missing.jsonl"),
        (None, ["--dataset", "missing.parquet"], "missing.parquet"),
        ([{"question": "a", "answer": "b"}], [], "has the columns ['answer', 'question']"),
        ([{"prompt": "a", "solution": "b"}], [], "take --sample"),
        ([{"prompt": "a", "solution": "b"}], ["--sample"], "--sample needs --reward"),
        ([{"prompt": "a", "completion": "b"}], ["--evaluate"], "--evaluate needs problems with a reward"),
        ([{"prompt": "a", "completion": [{"role": "user", "content": "b"}]}], [], "is a text and the other"),
        ([{"prompt": [{"rolle": "user"}], "completion": [{"role": "a", "content": "b"}]}], [], "no list of messages"),
        ([{"text": 5}], [], "the `text` of row 0"),
        ([*TEXT, {"text": ""}], [], "the `text` of row 1"),
        ([*TEXT, {"texts": "b"}], [], "the `text` of row 1"),
        ([{"input_ids": [5]}], [], "no example has a token"),
        (TEXT, ["--chat"], "has none"),
        (TEXT, ["--prompt-template", "Q:"], "has no {prompt}"),
        (TEXT, ["--sample", "--reward", "exact_match"], "not ['prompt', 'solution']"),
        (None, ["--no-sample"], "leave --no-sample out"),
        (None, ["--dataset", "testbed", "rows.jsonl"], "testbed"),
        (None, ["--lora-learning-rate", "1"], "pass --lora-rank"),
        (None, ["--control-commands", "diversity"], "--control-loss-weight 0"),
        (None, ["--control-commands", "none.json", "--control-loss-weight", "1"], "none.json cannot be read"),
        (None, ["--control-commands", "mood", "--control-loss-weight", "1"], "'mood'"),
        (None, ["--control-loss-weight", "1"], "`control_commands`"),
        (None, ["--control-loss-weight", "-1"], "weight"),
        (None, ["--easy-token-mask-ratio", "2"], "easy_token_mask_ratio"),
        (None, ["--max-length", "1"], "`max_length` is 1"),
        (None, ["--temperature-range", "2", "1"], "`temperature_range`"),
        (None, ["--report-to", "nothing_of_the_kind"], "--report-to is nothing_of_the_kind"),
        (None, ["--model", "no/such_model"], "--model no/such_model cannot be loaded"),
        (None, ["--evaluate", "--task", "nonsense"], "nonsense"),
        (None, ["--evaluate", "--baselines", "gredy"], "no baseline 'gredy'"),
        (None, ["--budget", "1"], "none of 24 problems was solved within 1 tokens"),
        (None, ["--push-to-hub", "me/it"], "HF_HUB_OFFLINE=1 is set"),
        (None, ["--push-to-hub", "me/it", "--token-file", "none.txt"], "--token-file none.txt cannot be read"),
        (None, ["--set", "eval_strategy=steps"], "eval_dataset"),
    ],
)  # fmt: skip
def test_a_users_mistake_is_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys, rows, extra, said):
    monkeypatch.chdir(tmp_path)
    if rows is not None:
        extra = ["--dataset", written(tmp_path / "rows.jsonl", rows), *extra]
    assert main(words(tmp_path / "out", *extra)) == 1
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("hf-adaptive-decode train-heads: error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize(
    "extra",
    [
        ["--steps", "0"],
        ["--steps", "3", "--epochs", "1"],
        ["--learning-rate", "nan"],
        ["--learning-rate", "-1"],
        ["--alpha", "inf"],
        ["--heads", "mood"],
        ["--temperature-range", "1"],
        ["--dft-weight", "strong"],
        ["--recipe", "secret"],
        ["--push-to-hub", "a/b/c"],
    ],
)
def test_wrong_usage_exits_with_2(tmp_path, capsys, extra):
    with pytest.raises(SystemExit) as caught:
        main([*words(tmp_path / "out", steps=None), *extra])
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_commands_that_train_call_the_same_things_the_same():
    def flags(command):
        return {name: value for name, value in vars(parse([command])).items() if name != "command"}

    heads, policy = flags("train-heads"), flags("train-policy")
    shared = {"model", "threads", "dataset", "prompt_column", "solution_column", "solution_after", "reward", "chat"}
    shared |= {
        "prompt_template",
        "seed",
        "output",
        "train_problems",
        "steps",
        "num_generations",
        "budget",
        "learning_rate",
        "save_steps",
    }
    shared |= {"resume", "report_to", "set", "validation_problems", "test_problems", "eval_samples", "eval_batch_rows"}
    shared |= {
        "rollout_batch_rows",
        "features",
        "hidden_size",
        "push_to_hub",
        "private",
        "token_file",
        "json",
        "config",
    }
    assert shared == heads.keys() & policy.keys()

"""What the first epoch keeps for the later ones: the same training at the price of reading it, or a clear refusal."""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
from pathlib import Path

import pytest
import torch
from full_disks import can_mount, in_a_child, mount_small, no_file_beyond
from safetensors import safe_open
from safetensors.torch import load_file
from test_training import adapter_of, arguments, build_rows, build_tokenizer
from tiny import build_base
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, AutoDecoTrainer, AutoDecoTrainingArguments
from hf_adaptive_decode.errors import AdaptiveDecodeError, EpochCacheSpaceError
from hf_adaptive_decode.losses import IGNORE_INDEX
from hf_adaptive_decode.training import DecodingDataCollator
from hf_adaptive_decode.training.data import tokenized
from hf_adaptive_decode.training.row_store import Field, RowStore

KINDS = ("hidden", "distribution")
VOCABULARY = 1500  # more than a sketch keeps whole
BATCHES, EPOCHS = 4, 3


def wide_base():
    """A tiny Qwen3 whose vocabulary has a tail."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=256, initializer_range=0.3,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def trainer_of(folder, base=None, rows=None, evaluation=None, heads=None, **settings):
    torch.manual_seed(0)
    model = AutoDecoForCausalLM.from_base(base or wide_base(), heads)
    # Adam divides by the gradient's size and so blows up the smallest difference.
    given = {"max_steps": -1, "num_train_epochs": EPOCHS, "save_strategy": "no", "dft_weight": "off"}
    given |= {"optim": "sgd", "learning_rate": 0.3, **settings}
    return AutoDecoTrainer(
        model,
        arguments(folder, **given),
        train_dataset=build_rows() if rows is None else rows,
        eval_dataset=evaluation,
        processing_class=build_tokenizer(),
    )


def runs_of_the_base(trainer):
    """A list that grows by the step at which the base runs."""
    seen = []
    trainer.model.get_input_embeddings().register_forward_hook(lambda *_: seen.append(trainer.state.global_step))
    return seen


def trained(*args, **settings):
    trainer = trainer_of(*args, **settings)
    seen = runs_of_the_base(trainer)
    trainer.train()
    return adapter_of(trainer.model), [entry for entry in trainer.state.log_history if "loss" in entry], seen


def store_of(folder, name="train"):
    return Path(folder, "epoch_cache", f"{name}.safetensors")


# --- the same training ------------------------------------------------------------------------------------------------

HOW = {
    "plain": {},
    "two losses": {"loss_type": "two_loss", "easy_token_mask_target": "temperature", "dft_weight": "scaled"},
    "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "dft_weight": "base"},
    "incomplete": {"per_device_train_batch_size": 5, "dataloader_drop_last": True, "easy_token_mask_ratio": 0.0},
    "temperature alone": {"heads": AutoDecoConfig(heads=["temperature"])},
    "top-p alone": {"heads": AutoDecoConfig(heads=["top_p"])},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Trainings without a cache, each once."""
    return functools.cache(lambda name: trained(tmp_path_factory.mktemp("plain"), **HOW[name]))


# To what keeps hidden states a policy is a policy.
PAIRS = [(kind, how) for how in HOW for kind in KINDS if kind == "distribution" or not how.endswith("alone")]


@pytest.mark.parametrize(("kind", "how"), PAIRS)
def test_three_epochs_end_where_they_end_without_a_cache(kind, how, plain, tmp_path):
    expected, expected_log, _ = plain(how)
    kept, kept_log, _ = trained(tmp_path, epoch_cache=kind, **HOW[how])
    begin = adapter_of(trainer_of(tmp_path, **HOW[how]).model)
    moved = max(float((expected[name] - tensor).abs().max()) for name, tensor in begin.items())
    for name, tensor in expected.items():
        torch.testing.assert_close(kept[name], tensor, rtol=0, atol=1e-3 * moved, msg=name)
    assert len(kept_log) == len(expected_log)
    for one, other in zip(kept_log, expected_log, strict=True):
        assert one.keys() == other.keys()
        assert one["kept_fraction"] == other["kept_fraction"]
        assert one == pytest.approx(other, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("how", [{}, {"bf16": True}, {"base": "gemma2"}, {"base": "bf16"}], ids=str)
def test_hidden_states_alone_give_the_same_training_bit_for_bit(how, tmp_path):
    # One row a batch: what stands beside a row in a batch changes the rounding of the base's own products.
    results = []
    for kind in (None, "hidden"):
        build = {"gemma2": lambda: build_base("gemma2"), "bf16": lambda: wide_base().bfloat16()}
        settings = {**how, "base": build.get(how.get("base"), wide_base)(), "rows": build_rows(5)}
        settings |= {"per_device_train_batch_size": 1, "num_train_epochs": 2, "optim": "adamw_torch"}
        results.append(trained(tmp_path / str(kind), epoch_cache=kind, **settings))
    (expected, expected_log, _), (kept, kept_log, seen) = results
    for name, tensor in expected.items():
        assert torch.equal(kept[name], tensor), name
    assert kept_log == expected_log
    assert max(seen) < 5
    dtype = torch.bfloat16 if how.get("base") == "bf16" else torch.float32
    assert load_file(store_of(tmp_path / "hidden"))["hidden"].dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_runs_in_the_first_epoch_alone(kind, tmp_path):
    trainer = trainer_of(tmp_path, epoch_cache=kind)
    inner, outer = runs_of_the_base(trainer), []
    trainer.model.get_output_embeddings().register_forward_hook(lambda *_: outer.append(trainer.state.global_step))
    trainer.train()
    assert inner == list(range(BATCHES))
    assert trainer.state.global_step == BATCHES * EPOCHS
    assert (max(outer) >= BATCHES) == (kind == "hidden")


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_evaluations_do_not_run_the_base_and_give_the_same_numbers(kind, tmp_path):
    rows = build_rows(20, seed=3)
    sets = {"one": rows[:8], "two/b": rows[8:]}
    trainer = trainer_of(tmp_path, evaluation=sets, epoch_cache=kind)
    plain = trainer_of(tmp_path / "plain", evaluation=sets)
    first, expected = trainer.evaluate(), plain.evaluate()
    seen = runs_of_the_base(trainer)
    again = trainer.evaluate()
    assert not seen
    for name in [name for name in first if name.endswith(("loss", "_mean", "_std", "_fraction"))]:
        assert first[name] == expected[name]
        assert again[name] == pytest.approx(first[name], rel=1e-5, abs=1e-5)
    assert sorted(os.listdir(tmp_path / "epoch_cache")) == [
        "eval_one.safetensors", "eval_two%2Fb.safetensors", "train.safetensors",
    ]  # fmt: skip
    # Data that the trainer did not know of is evaluated as ever.
    other = tokenized(rows[:5], build_tokenizer(), None)
    assert trainer.evaluate(other)["eval_loss"] == plain.evaluate(other)["eval_loss"]


def test_evaluation_and_training_do_not_mix_their_rows(tmp_path):
    settings = {"evaluation": build_rows(9, seed=5), "eval_strategy": "epoch", "epoch_cache": "hidden"}
    trainer = trainer_of(tmp_path / "kept", **settings)
    trainer.train()
    plain = trainer_of(tmp_path / "plain", **{**settings, "epoch_cache": None})
    plain.train()
    kept, expected = ([e["eval_loss"] for e in t.state.log_history if "eval_loss" in e] for t in (trainer, plain))
    assert kept == pytest.approx(expected, rel=1e-5)
    assert len(set(kept)) == EPOCHS


def test_data_sets_are_taken_like_lists(finished, tmp_path):
    datasets = pytest.importorskip("datasets")
    where = {"epoch_cache": "hidden", "epoch_cache_dir": str(finished("hidden"))}
    trainer = trainer_of(tmp_path, rows=datasets.Dataset.from_list(build_rows()), **where)
    seen = runs_of_the_base(trainer)
    trainer.train()
    assert not seen  # what was kept of the same rows as a list is used


# --- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_is_safetensors_and_holds_what_the_model_computes(kind, tmp_path):
    trainer = trainer_of(tmp_path, epoch_cache=kind)
    trainer.train()
    kept = load_file(store_of(tmp_path))
    row = trainer.train_dataset[5]
    span = slice(*kept["offsets"][5:7].tolist())
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
    targets = labels[1:] != IGNORE_INDEX
    assert span.stop - span.start == int(targets.sum())
    with torch.no_grad():
        hidden = trainer.model.model(ids).last_hidden_state[0, :-1][targets]
        logits = trainer.model.lm_head(hidden)
    torch.testing.assert_close(kept["hidden"][span], hidden, rtol=1e-4, atol=1e-4)
    assert kept["filled"].tolist() == [1] * 32
    if kind == "distribution":
        base = torch.log_softmax(logits, 1).gather(1, labels[1:][targets][:, None])[:, 0]
        torch.testing.assert_close(kept["base_log_prob"][span], base, rtol=1e-4, atol=1e-4)
    with safe_open(store_of(tmp_path), "pt") as file:
        assert file.metadata()["kind"] == kind
        assert {"base", "data", "precision"} <= file.metadata().keys()


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory):
    @functools.cache
    def folder_of(kind):
        folder = tmp_path_factory.mktemp("finished")
        trained(folder, epoch_cache=kind, num_train_epochs=1)
        return folder / "epoch_cache"

    return folder_of


@pytest.fixture
def finished(finished_once, tmp_path):
    """A copy of what a finished run kept, by kind."""
    return lambda kind: shutil.copytree(finished_once(kind), tmp_path / "copy")


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_finished_run_left_is_used_by_another(kind, finished, plain, tmp_path):
    kept = finished(kind)
    before = (kept / "train.safetensors").read_bytes()
    adapter, _, seen = trained(tmp_path, epoch_cache=kind, epoch_cache_dir=str(kept))
    assert not seen
    assert (kept / "train.safetensors").read_bytes() == before
    for name, tensor in plain("plain")[0].items():
        torch.testing.assert_close(adapter[name], tensor, rtol=0, atol=1e-4)


def test_a_finished_cache_knows_what_a_model_does_behind_its_output_layer(tmp_path):
    # Gemma 2 caps its logits, which is found out when the base runs.
    results = []
    for kind in (None, "hidden", "hidden"):
        settings = {"rows": build_rows(5), "num_train_epochs": 1, "epoch_cache": kind}
        results.append(trained(tmp_path, base=build_base("gemma2"), **settings))
    (_, expected, _), (_, first, _), (_, second, seen) = results
    assert not seen
    assert second[0]["temperature_loss"] == pytest.approx(first[0]["temperature_loss"], rel=1e-5)
    assert second[0]["temperature_loss"] == pytest.approx(expected[0]["temperature_loss"], rel=1e-5)


class Stop(TrainerCallback):
    """Ends the process as a kill does, without a chance to tidy up."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os._exit(9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_with_what_it_kept(kind, plain, tmp_path):
    settings = {"epoch_cache": kind, "save_strategy": "steps", "save_steps": 2}
    whole, _, _ = plain("plain")

    def killed():
        trainer = trainer_of(tmp_path / "run", **settings)
        trainer.add_callback(Stop())
        trainer.train()

    assert in_a_child(killed) == 9
    assert int(load_file(store_of(tmp_path / "run"))["filled"].sum()) == 16  # two batches came with the checkpoint
    trainer = trainer_of(tmp_path / "run", **settings)
    seen = runs_of_the_base(trainer)
    trainer.train(resume_from_checkpoint=True)
    assert seen == [2, 3]
    for name, tensor in adapter_of(trainer.model).items():
        torch.testing.assert_close(tensor, whole[name], rtol=0, atol=1e-4)


CHANGES = {
    "base": lambda: {"base": wide_base_changed()},
    "data": lambda: {"rows": build_rows(32, seed=1)},
    "length": lambda: {"max_length": 6},
    "labels": lambda: {"rows": [{"text": row["prompt"] + row["completion"]} for row in build_rows()]},
    "precision": lambda: {"bf16": True},
    "dtype": lambda: {"base": wide_base().bfloat16()},
}


def wide_base_changed():
    """One number of one weight is another."""
    base = wide_base()
    with torch.no_grad():
        base.model.layers[1].mlp.up_proj.weight[3, 7] += 0.5
    return base


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_of_something_else_is_made_anew_and_that_is_said(change, finished, tmp_path, caplog):
    where = {"epoch_cache": "hidden", "epoch_cache_dir": str(finished("hidden"))}
    file = Path(where["epoch_cache_dir"], "train.safetensors")
    with caplog.at_level(logging.WARNING, "hf_adaptive_decode"):
        trainer_of(tmp_path, **where)
        assert not caplog.text
        trainer_of(tmp_path, **where, **CHANGES[change]())
    assert "made anew" in caplog.text
    assert str(file) in caplog.text
    assert not load_file(file)["filled"].any()


def test_a_damaged_or_cut_file_is_made_anew(finished, tmp_path):
    where = {"epoch_cache": "hidden", "epoch_cache_dir": str(finished("hidden"))}
    file = Path(where["epoch_cache_dir"], "train.safetensors")
    whole = file.read_bytes()
    for left in (whole[:-8], b"", b"x" * len(whole)):
        file.write_bytes(left)
        trainer_of(tmp_path, **where)
        assert not load_file(file)["filled"].any()
        assert file.stat().st_size == len(whole)


def test_a_row_counts_as_filled_only_once_its_numbers_are_on_disk(tmp_path):
    store = RowStore(tmp_path / "s.safetensors", [2, 0, 3], {"x": Field(torch.float32, (2,))}, {"made": "here"})
    store.open()
    rows = torch.tensor([2, 0])
    values = torch.arange(10.0).view(5, 2)
    store.write(rows, {"x": values})
    assert load_file(store.path)["filled"].tolist() == [0, 0, 0]
    assert store.has(rows)
    store.commit()
    assert load_file(store.path)["filled"].tolist() == [1, 0, 1]
    again = RowStore(tmp_path / "s.safetensors", [2, 0, 3], {"x": Field(torch.float32, (2,))}, {"made": "here"})
    again.open()
    assert not again.has(torch.tensor([0, 1]))
    assert torch.equal(again.read(torch.tensor([0, 2]))["x"], values[[3, 4, 0, 1, 2]])
    assert again.counts(rows).tolist() == [3, 2]


# --- size and room ----------------------------------------------------------------------------------------------------


def test_the_size_is_said_before_training(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "hf_adaptive_decode"):
        trainer = trainer_of(tmp_path, epoch_cache="distribution")
    positions = sum(sum(label != IGNORE_INDEX for label in row["labels"][1:]) for row in trainer.train_dataset)
    assert f"{positions:,} positions" in caplog.text
    assert f"{store_of(tmp_path).stat().st_size:,} bytes" in caplog.text
    assert str(store_of(tmp_path)) in caplog.text
    # All of it is taken from the disk at once, though nothing is written yet.
    assert store_of(tmp_path).stat().st_blocks * 512 >= store_of(tmp_path).stat().st_size > positions * (931 + 128)


def test_a_file_that_may_not_grow_is_an_error_before_training_and_leaves_nothing(tmp_path):
    with no_file_beyond(4096), pytest.raises(EpochCacheSpaceError, match="epoch_cache_dir") as caught:
        trainer_of(tmp_path, epoch_cache="distribution")
    assert isinstance(caught.value, OSError)
    for part in ('epoch_cache="hidden"', "max_length", "epoch_cache=None", str(tmp_path / "epoch_cache"), "bytes"):
        assert part in str(caught.value)
    assert not any((tmp_path / "epoch_cache").iterdir())


def test_a_small_disk_is_an_error_that_names_what_is_missing(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("this machine lets no process make a file system of its own")
    said = tmp_path / "said.json"
    (tmp_path / "disk").mkdir()

    def attempt():
        mount_small(tmp_path / "disk", 1 << 15)
        try:
            trainer_of(tmp_path / "out", epoch_cache="hidden", epoch_cache_dir=str(tmp_path / "disk" / "deeper"))
        except EpochCacheSpaceError as error:
            said.write_text(json.dumps(str(error)))
            here = str(tmp_path / "disk")
            trainer_of(tmp_path / "out", epoch_cache="hidden", epoch_cache_dir=here, rows=build_rows(4))

    assert in_a_child(attempt) == 0
    error = json.loads(said.read_text())
    assert "has 32,768 bytes free" in error
    assert 'take epoch_cache="hidden"' not in error


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"epoch_cache": "logits"}, "'distribution', 'hidden'"),
        ({"epoch_cache": "hidden", "train_peft": True}, "train_peft"),
        ({"epoch_cache": "hidden", "control_loss_weight": 1.0}, "control_loss_weight"),
        ({"epoch_cache": "hidden", "bf16_full_eval": True}, "bf16_full_eval"),
        ({"epoch_cache": "hidden", "push_to_hub": True}, "epoch_cache_dir"),
        ({"epoch_cache_dir": "somewhere"}, "epoch_cache"),
    ],
)
def test_combinations_that_cannot_be_are_refused_at_once(bad, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        AutoDecoTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **bad)


@pytest.mark.parametrize(
    ("heads", "said"),
    [
        (AutoDecoConfig(features=["hidden", "statistics"]), 'epoch_cache="hidden"'),
        (AutoDecoConfig(temperature_range=(0.0, 4.0)), "temperature_range"),
    ],
)
def test_a_policy_that_a_sketch_cannot_serve_is_refused_and_served_by_hidden_states(heads, said, tmp_path):
    with pytest.raises(AdaptiveDecodeError, match=said):
        trainer_of(tmp_path, heads=heads, epoch_cache="distribution")
    _, log, seen = trained(tmp_path, heads=heads, epoch_cache="hidden", num_train_epochs=2)
    assert len(log) == BATCHES * 2
    assert max(seen) < BATCHES


def test_a_stream_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    stream = datasets.Dataset.from_list(build_rows(4)).to_iterable_dataset()
    with pytest.raises(AdaptiveDecodeError, match="stream"):
        trainer_of(tmp_path, rows=stream, epoch_cache="hidden", max_steps=2)


def test_a_collator_that_drops_the_rows_numbers_is_told(tmp_path):
    trainer = trainer_of(tmp_path, epoch_cache="hidden")
    own = DecodingDataCollator(0)
    trainer.data_collator = lambda rows: own([{k: row[k] for k in ("input_ids", "labels")} for row in rows])
    with pytest.raises(AdaptiveDecodeError, match="cache_row"):
        trainer.train()


def test_without_a_cache_nothing_is_kept(tmp_path):
    trainer = trainer_of(tmp_path)
    assert not (tmp_path / "epoch_cache").exists()
    assert "cache_row" not in trainer.train_dataset[0]

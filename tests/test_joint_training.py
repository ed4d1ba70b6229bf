"""Heads and a LoRA of the base trained together: the reference loss's gradients, nothing else moved, both kept."""

from __future__ import annotations

import pytest
import torch
from test_training import arguments, build_rows, build_tokenizer
from tiny import FAMILIES, build_base, randomise_heads, wrap
from tiny_lora import build_lora, heads_of, lora_of, same
from transformers import AutoModelForCausalLM, CohereConfig, GraniteConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_adaptive_decode import AutoDecoForCausalLM, AutoDecoTrainer, AutoDecoTrainingArguments
from hf_adaptive_decode.errors import AdapterConfigError, AdapterLoadError
from hf_adaptive_decode.losses import chunked, decoding_loss_reference, stable_mask_uniform
from hf_adaptive_decode.types import DecodeState

peft = pytest.importorskip("peft")

ITEMS = 50


def scaled(kind):
    """A tiny model of a family that multiplies its logits."""
    config, setting = {"cohere": (CohereConfig, "logit_scale"), "granite": (GraniteConfig, "logits_scaling")}[kind]
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    tokens = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        factor = {"cohere": 0.25, "granite": 4.0}[kind]
        settings = config(hidden_size=32, initializer_range=0.3, **tokens, **shape, **{setting: factor})
        return AutoModelForCausalLM.from_config(settings).eval()


def build(family="qwen3", heads=None, **settings):
    """An adaptive model with a LoRA in its base, both of random weights."""
    base = scaled(family) if family in ("cohere", "granite") else None
    return randomise_heads(wrap(build_lora(family, base=base, **settings), **(heads or {})))


def build_trainer(folder, model, rows=None, **settings):
    settings = {"train_peft": True, "save_strategy": "no", **settings}
    return AutoDecoTrainer(
        model,
        arguments(folder, **settings),
        train_dataset=build_rows() if rows is None else rows,
        processing_class=build_tokenizer(),
    )


def collated(trainer, count=6):
    return trainer.data_collator([trainer.train_dataset[index] for index in range(count)])


def learned(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(model):
    found = {name: parameter.grad for name, parameter in learned(model).items()}
    model.zero_grad()
    return found


def joint_gradients(trainer, batch):
    model = trainer.model
    model.train()
    loss = trainer.compute_loss(model, batch, num_items_in_batch=ITEMS)
    loss.backward()
    return loss.detach(), gradients(model)


def reference_gradients(trainer, batch):
    """The loss of the equations from full logits, everything by autograd, the hidden state by a hook of our own."""
    model, heard = trainer.model, []
    model.eval()
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    handle.remove()
    logits, hidden = logits[:, :-1].flatten(0, 1), heard[-1][:, :-1].flatten(0, 1)
    parameters = model.decoding_adapter(DecodeState(hidden, logits))
    config = trainer.args.loss_config()
    uniform = stable_mask_uniform(batch["input_ids"], trainer.args.seed << 32)[:, :-1].flatten()
    loss = decoding_loss_reference(
        logits,
        batch["labels"][:, 1:].flatten(),
        parameters.temperature,
        parameters.top_p,
        config,
        mask_uniform=uniform,
        num_items=ITEMS,
    )
    loss.backward()
    return loss.detach(), gradients(model)


def assert_same_gradients(found, expected, rtol=1e-3):
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert gradient is not None, name
        size = float(gradient.norm())
        assert size > 0, name
        assert float((found[name] - gradient).norm()) <= rtol * size, name


# --- the gradients are the equations' ---------------------------------------------------------------------------------

OPTIONS = (
    {},
    {"loss_type": "two_loss", "easy_token_mask_target": "temperature", "dft_weight": "scaled"},
    {"easy_token_mask_target": "temperature", "dft_weight": "off"},
)


@pytest.mark.parametrize("family", [*FAMILIES, "cohere", "granite"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_value_and_every_gradient_are_the_references(family, options, tmp_path):
    # GPT-2 and OPT have dropout of their own, which must be off: the reference runs without.
    trainer = build_trainer(tmp_path, build(family), **options)
    batch = collated(trainer)
    loss, found = joint_gradients(trainer, batch)
    expected_loss, expected = reference_gradients(trainer, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-6)
    assert any(".lora_" in name for name in found)
    assert_same_gradients(found, expected)


SPECIAL = {
    "the output layer's own lora": ({"target_modules": ["lm_head", "q_proj"]}, {}),
    "embeddings": ({"target_modules": ["embed_tokens", "lm_head"]}, {}),
    "dora": ({"use_dora": True}, {}),
    "heads that read statistics": ({}, {"features": ["hidden", "statistics"]}),
    "temperature alone": ({}, {"heads": ["temperature"]}),
    "top-p alone": ({}, {"heads": ["top_p"]}),
}


@pytest.mark.parametrize("case", SPECIAL)
@pytest.mark.parametrize("loss_type", ["end_to_end", "two_loss"])
def test_it_holds_wherever_the_lora_is_and_whatever_the_heads_read(case, loss_type, tmp_path):
    settings, heads = SPECIAL[case]
    model = build("gemma2", heads=heads, **settings)
    trainer = build_trainer(tmp_path, model, loss_type=loss_type)
    batch = collated(trainer)
    loss, found = joint_gradients(trainer, batch)
    expected_loss, expected = reference_gradients(trainer, batch)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-4, atol=1e-6)
    assert_same_gradients(found, expected)


def test_in_double_precision_only_the_losss_own_arithmetic_is_rounded(tmp_path):
    model = build("gemma2").double()
    trainer = build_trainer(tmp_path, model)
    for parameter in learned(model).values():
        parameter.data = parameter.data.double()
    batch = collated(trainer)
    loss, found = joint_gradients(trainer, batch)
    expected_loss, expected = reference_gradients(trainer, batch)
    torch.testing.assert_close(loss.double(), expected_loss.double(), rtol=1e-5, atol=1e-7)
    assert_same_gradients(found, expected, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gemma2"])
def test_gradient_checkpointing_changes_no_gradient_and_does_checkpoint(family, tmp_path):
    trainer = build_trainer(tmp_path, build(family))
    batch = collated(trainer)
    loss, plain = joint_gradients(trainer, batch)
    trainer.model.gradient_checkpointing_enable()
    calls = []
    layer = next(part for part in trainer.model.modules() if isinstance(part, GradientCheckpointingLayer))
    handle = next(layer.children()).register_forward_hook(lambda *_: calls.append(1))
    again, found = joint_gradients(trainer, batch)
    handle.remove()
    assert len(calls) == 2  # once forwards, once more for the backward pass
    torch.testing.assert_close(again, loss)
    assert_same_gradients(found, plain, rtol=1e-5)


def in_bf16(how):
    """A model, and what its passes run in."""
    model = build("gemma2")
    if how == "bf16 base":
        for name, parameter in model.named_parameters():
            if "decoding_adapters." not in name:
                parameter.data = parameter.data.bfloat16()
    return model, torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "bf16 autocast")


@pytest.mark.parametrize("how", ["bf16 base", "bf16 autocast"])
def test_in_bf16_it_is_no_further_from_fp32_than_full_logits_are(how, tmp_path):
    # Without a choice of easy tokens, which may tip over.
    exact = build_trainer(tmp_path / "fp32", build("gemma2"), easy_token_mask_ratio=0.0)
    batch = collated(exact)
    loss, expected = joint_gradients(exact, batch)
    model, autocast = in_bf16(how)
    trainer = build_trainer(tmp_path / how, model, easy_token_mask_ratio=0.0, bf16=how == "bf16 autocast")
    assert {p.dtype for p in learned(model).values()} == {torch.float32}
    found_loss, found = joint_gradients(trainer, batch)
    with autocast:
        naive_loss, naive = reference_gradients(trainer, batch)

    def error(one):
        return {name: float((one[name] - gradient).norm() / gradient.norm()) for name, gradient in expected.items()}

    assert abs(found_loss - loss) <= abs(naive_loss - loss) + 0.01 * loss
    ours, theirs = error(found), error(naive)
    assert max(ours.values()) < 0.3
    assert all(ours[name] <= 1.2 * theirs[name] + 0.03 for name in ours)


def test_no_graph_ever_holds_the_batchs_logits(tmp_path, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 4 * 96 * 8)  # 8 positions a chunk, after a first one of 16
    trainer = build_trainer(tmp_path, build("gemma2"), easy_token_mask_ratio=0.0)
    batch = collated(trainer, 8)
    weights = {parameter.untyped_storage().data_ptr() for parameter in trainer.model.parameters()}
    kept = []

    def note(tensor):
        if tensor.shape[-1:] == (96,) and tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor.numel() // 96)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        joint_gradients(trainer, batch)
    assert kept
    assert max(kept) <= 16 < int((batch["labels"] != -100).sum()) / 3


def test_accumulation_makes_no_difference(tmp_path):
    plain = {"optim": "sgd", "learning_rate": 0.3, "max_steps": 2}
    whole = build()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    build_trainer(tmp_path / "a", whole, **plain).train()
    parts = build()
    build_trainer(tmp_path / "b", parts, **plain, per_device_train_batch_size=1, gradient_accumulation_steps=8).train()
    moved = 0.0
    for name, parameter in learned(whole).items():
        torch.testing.assert_close(learned(parts)[name], parameter, rtol=0, atol=2e-6)
        moved = max(moved, float((parameter - before[name]).detach().abs().max()))
    assert moved > 1e-3


def test_commands_move_the_lora_too(tmp_path):
    rows = [
        {"prompt": f"w{i}", "completion": " w5 w6", "low_prompt": f"w{i} w7", "high_prompt": f"w{i} w8"}
        for i in range(8)
    ]
    found = {}
    for weight in (1.0, 2.0):
        trainer = build_trainer(tmp_path, build(), rows=rows, control_loss_weight=weight, easy_token_mask_ratio=0.0)
        _, found[weight] = joint_gradients(trainer, collated(trainer, 8))
    name = next(name for name in found[1.0] if ".lora_" in name)
    assert not torch.allclose(found[1.0][name], found[2.0][name], rtol=1e-3)


# --- what moves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_both_moves_and_no_other(family, tmp_path):
    model = build(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    build_trainer(tmp_path, model).train()
    for name, tensor in model.state_dict().items():
        learns = ".lora_" in name or name.startswith("decoding_adapters.")
        assert (not torch.equal(tensor, before[name])) == learns, name


@pytest.mark.parametrize(
    ("settings", "moves"),
    [
        ({"train_peft": False}, (True, False)),
        ({"peft_learning_rate": 0.0}, (True, False)),
        ({"learning_rate": 0.0, "peft_learning_rate": 1e-2}, (False, True)),
    ],
    ids=["frozen", "lora at rate 0", "heads at rate 0"],
)
def test_each_has_a_rate_of_its_own(settings, moves, tmp_path):
    model = build()
    heads, lora = heads_of(model), lora_of(model)
    trainer = build_trainer(tmp_path, model, **settings)
    trainer.train()
    assert (not same(heads_of(model), heads), not same(lora_of(model), lora)) == moves


def test_a_frozen_lora_runs_without_a_graph_and_without_its_dropout(tmp_path):
    model = build(lora_dropout=0.5)
    build_trainer(tmp_path, model)  # left the LoRA learning
    trainer = build_trainer(tmp_path, model, train_peft=False)
    seen = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0].requires_grad))
    model.train()
    batch = collated(trainer)
    assert trainer.compute_loss(model, batch) == trainer.compute_loss(model, batch)
    assert seen
    assert not any(seen)


def test_a_lora_that_learns_has_its_dropout_and_the_base_none(tmp_path):
    model = build("gpt2", lora_dropout=0.5)  # this base has dropout of 0.5, too
    trainer = build_trainer(tmp_path, model)
    batch = collated(trainer)
    model.train()
    on = [m for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.training]
    assert on == [layer.lora_dropout["default"] for layer in model.modules() if hasattr(layer, "lora_dropout")]
    assert trainer.compute_loss(model, batch) != trainer.compute_loss(model, batch)
    model.eval()
    with torch.no_grad():
        assert trainer.compute_loss(model, batch) == trainer.compute_loss(model, batch)


def test_a_base_that_peft_wrapped_after_its_heads_learns_both(tmp_path):
    tuned = peft.get_peft_model(wrap(), peft.LoraConfig(r=2, target_modules=["v_proj"]))
    trainer = build_trainer(tmp_path, tuned)
    assert {name.split(".")[0] for name in learned(trainer.model)} == {"model", "decoding_adapters"}
    heads, lora = heads_of(trainer.model), lora_of(trainer.model)
    trainer.train()
    assert not same(heads_of(trainer.model), heads)
    assert not same(lora_of(trainer.model), lora)


def test_without_a_lora_there_is_nothing_to_train_jointly(tmp_path):
    with pytest.raises(AdapterConfigError, match="get_peft_model"):
        build_trainer(tmp_path, wrap())


def test_a_merged_lora_is_refused(tmp_path):
    tuned = build_lora()
    tuned.merge_adapter()
    with pytest.raises(AdapterConfigError, match="unmerge_adapter"):
        build_trainer(tmp_path, tuned)


@pytest.mark.parametrize(
    "bad", [{"peft_learning_rate": 1e-3}, {"train_peft": True, "peft_learning_rate": -1.0}], ids=str
)
def test_a_rate_for_no_lora_is_refused(bad, tmp_path):
    with pytest.raises(ValueError, match="peft_learning_rate"):
        AutoDecoTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **bad)


# --- both are kept ----------------------------------------------------------------------------------------------------


def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_does(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "peft_learning_rate": 1e-3}
    whole = build(lora_dropout=0.1)
    build_trainer(tmp_path, whole, **saving).train()
    resumed = build(lora_dropout=0.1)
    build_trainer(tmp_path, resumed, **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(lora_of(resumed), lora_of(whole))
    assert same(heads_of(resumed), heads_of(whole))
    loaded = AutoDecoForCausalLM.from_pretrained(tmp_path / "checkpoint-4", base_model=build_base())
    assert same(lora_of(loaded), lora_of(whole))
    assert same(heads_of(loaded), heads_of(whole))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    build_trainer(tmp_path / "both", build(), **saving).train()
    build_trainer(tmp_path / "heads", wrap(), train_peft=False, **saving).train()
    with pytest.raises(AdapterLoadError, match="the model has none"):
        build_trainer(tmp_path, wrap(), train_peft=False)._load_from_checkpoint(str(tmp_path / "both/checkpoint-2"))
    with pytest.raises(AdapterLoadError, match="the checkpoint has none"):
        build_trainer(tmp_path, build())._load_from_checkpoint(str(tmp_path / "heads/checkpoint-2"))
    with pytest.raises(AdapterLoadError, match="shape"):
        build_trainer(tmp_path, build(r=4))._load_from_checkpoint(str(tmp_path / "both/checkpoint-2"))


def test_the_best_checkpoint_brings_its_lora_back(tmp_path):
    torch.manual_seed(0)
    model, rows = build(), build_rows()
    settings = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, max_steps=6, train_peft=True
    )
    settings.learning_rate = 0.1  # far too high, so that the best is not the last
    trainer = AutoDecoTrainer(
        model, settings, train_dataset=rows, eval_dataset=rows[:8], processing_class=build_tokenizer()
    )
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert min(losses) < losses[-1]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)

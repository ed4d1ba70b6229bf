"""Conversion to and fro: bit by bit the same, never over anything, little in memory, and nothing half done."""

import json
import os
import resource
import shutil
import signal
import traceback
from pathlib import Path

import pytest
import tiny
import torch
from released_checkpoints import predict_by_hand, write_merged, write_released
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, DecodeState
from hf_adaptive_decode.cli.main import main
from hf_adaptive_decode.errors import AdapterConfigError, AdapterLoadError
from hf_adaptive_decode.hub import merging
from hf_adaptive_decode.hub.autodeco_import import load_released, load_released_base, locate_released
from hf_adaptive_decode.hub.merging import merge, split, to_adapter, to_released
from hf_adaptive_decode.policies import build_policy
from hf_adaptive_decode.testbed import BASE_MODEL_PATH, load_base_model


def tensors_in(folder):
    """Every tensor of a folder by name, whatever the files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        assert not set(tensors) & set(found)
        found |= tensors
    return found


def assert_same_tensors(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def settings_in(folder):
    return json.loads((folder / "config.json").read_text())


def make_adapter(base_folder, folder, **settings):
    """An adapter folder with random heads for the base in another one."""
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    model = AutoDecoForCausalLM.from_base(base, AutoDecoConfig(**{"top_p_statistics": True, **settings}))
    for parameter in model.decoding_adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder


def make_pair(tmp_path, family="qwen3", shard="5GB", dtype=torch.float32, **settings):
    base = tiny.build_base(family).to(dtype)
    base.save_pretrained(tmp_path / "base", max_shard_size=shard)
    return make_adapter(tmp_path / "base", tmp_path / "adapter", **settings), tmp_path / "base"


# --- round trips ------------------------------------------------------------------------------------------------------


FLOAT, HALF = torch.float32, torch.bfloat16
TRIPS = [(family, *sizes) for family in tiny.FAMILIES for sizes in (("5GB", "20KB", HALF), ("20KB", "5GB", FLOAT))]
TRIPS += [("qwen3", "5GB", "5GB", HALF), ("gpt2", "20KB", "30KB", FLOAT)]


@pytest.mark.parametrize(("family", "read", "written", "dtype"), TRIPS)
def test_merged_and_split_again_nothing_has_changed(family, read, written, dtype, tmp_path):
    adapter, base = make_pair(tmp_path, family, read, dtype)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (read == "20KB")
    merged = merge(adapter, base, tmp_path / "merged", max_shard_size=written)
    assert (len(list(merged.glob("*.safetensors"))) > 1) == (written != "5GB")
    base_again, adapter_again = split(merged, tmp_path / "split", max_shard_size=read)

    assert_same_tensors(tensors_in(base_again), tensors_in(base))
    assert_same_tensors(tensors_in(adapter_again), tensors_in(adapter))
    assert settings_in(adapter_again) == settings_in(adapter)
    assert settings_in(base_again) == settings_in(base)

    ids = tiny.prompts()
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (base, base_again)]
    assert type(models[0]) is type(models[1])
    assert torch.equal(models[0](ids).logits, models[1](ids).logits)
    own = load_released_base(locate_released(merged))
    assert torch.equal(own(ids).logits, models[0](ids).logits)
    if family == "gpt2":
        assert models[1].lm_head.weight is models[1].transformer.wte.weight
        assert "lm_head.weight" not in tensors_in(base_again)


def test_a_merged_checkpoint_is_what_others_read(tmp_path):
    adapter, base = make_pair(tmp_path, head_hidden_size=256)
    merged = merge(adapter, base, tmp_path / "merged", max_shard_size="20KB")
    tensors, heads = tensors_in(merged), tensors_in(adapter)
    names = {"temp_head.mlp.0": "temperature_head.up", "temp_head.mlp.2": "temperature_head.out"}
    names |= {"top_p_head.mlp.0": "top_p_head.up", "top_p_head.mlp.2": "top_p_head.out"}
    wanted = {f"llm.{name}": tensor for name, tensor in tensors_in(base).items()}
    wanted |= {
        f"{theirs}.{part}": heads[f"{ours}.{part}"] for theirs, ours in names.items() for part in ("weight", "bias")
    }
    assert_same_tensors(tensors, wanted)

    settings, own = settings_in(merged), settings_in(base)
    assert settings["model_type"] == "autodeco"
    assert settings["architectures"] == ["AutoDecoModelForCausalLM"]
    assert settings["base_model_type"] == "qwen3"
    assert settings["temperature_hidden_size"] == settings["top_p_hidden_size"] == settings["hidden_size"] == 32
    assert (
        settings["use_enhanced_features"]
        is settings["enable_top_p_head"]
        is settings["enable_temperature_head"]
        is True
    )
    assert {**own, **{name: settings[name] for name in ("model_type", "architectures")}}.items() <= settings.items()

    index = json.loads((merged / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for file in merged.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            assert set(opened.keys()) == {name for name, where in index["weight_map"].items() if where == file.name}
            assert opened.metadata() == {"format": "pt"}
        part = load_file(file)
        assert sum(tensor.nbytes for tensor in part.values()) <= 20_000 or len(part) == 1


def test_tensors_of_any_type_are_copied_as_they_are(tmp_path):
    adapter, base = make_pair(tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors |= {
        "spare.float8": torch.randn(4, 8).to(torch.float8_e4m3fn),
        "spare.packed": torch.randint(0, 255, (3, 5), dtype=torch.uint8),
        "spare.truth": torch.tensor([True, False]),
        "spare.long": torch.tensor(-7),
        "spare.half": torch.tensor([float("nan"), float("inf")], dtype=torch.float16),
        "spare.none": torch.zeros(0, 3),
    }
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    again, _ = split(merge(adapter, base, tmp_path / "merged", max_shard_size="9KB"), tmp_path / "split")
    assert_same_tensors(tensors_in(again), tensors)


@pytest.mark.parametrize("heads", [["temperature", "top_p"], ["temperature"], ["top_p"]], ids="+".join)
@pytest.mark.parametrize("statistics", [True, False])
def test_an_adapter_in_the_released_format_predicts_the_same(heads, statistics, tmp_path):
    adapter, _ = make_pair(tmp_path, heads=heads, top_p_statistics=statistics and "top_p" in heads)
    released = to_released(adapter, tmp_path / "released")
    assert not locate_released(released).is_merged
    model = AutoDecoForCausalLM.from_pretrained(adapter)
    hidden, logits = (value.flatten(0, 1) for value in tiny.hidden_and_logits(model, tiny.prompts(3, 9)))
    found = model.decoding_adapter(DecodeState(hidden, logits))
    wanted = predict_by_hand(load_file(released / "model.safetensors"), hidden, logits, statistics)
    for value, by_hand in zip((found.temperature, found.top_p), wanted, strict=True):
        assert (value is None) == (by_hand is None)
        assert value is None or torch.allclose(value.double(), by_hand, atol=2e-5)
    back = to_adapter(released, tmp_path / "back")
    assert_same_tensors(tensors_in(back), tensors_in(adapter))
    assert settings_in(back) == settings_in(adapter)


def test_a_released_checkpoint_becomes_an_adapter_that_works_alone(tmp_path):
    base = tiny.build_base()
    base.generation_config = GenerationConfig(eos_token_id=[2, 7], pad_token_id=0, temperature=0.3, do_sample=True)
    base.save_pretrained(tmp_path / "base")
    write_released(tmp_path / "released", base, dtype=torch.bfloat16)
    shutil.copy(tmp_path / "base" / "generation_config.json", tmp_path / "released")
    folder = to_adapter(tmp_path / "released", tmp_path / "some" / "adapter", base_name=str(tmp_path / "base"))
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    assert {tensor.dtype for tensor in tensors_in(folder).values()} == {torch.float32}
    generation = GenerationConfig.from_pretrained(folder)
    assert (generation.temperature, generation.top_p, generation.top_k) == (1.0, 1.0, 0)
    assert (generation.eos_token_id, generation.pad_token_id) == ([2, 7], 0)
    card = (folder / "README.md").read_text()
    assert 'adapter = "adapter"' in card
    assert "converted from the released AutoDeco checkpoint released" in card
    loaded = AutoDecoForCausalLM.from_pretrained(folder)
    assert loaded.generate(tiny.prompts(), max_new_tokens=3).shape == (3, 8)


def test_a_merged_checkpoint_by_others_is_split(tmp_path):
    base = tiny.build_base("gpt_oss")
    heads = write_merged(tmp_path / "merged", base, tmp_path / "base", 4, base_name="owner/base", dtype=torch.bfloat16)
    base_folder, adapter = split(tmp_path / "merged", tmp_path / "split")
    assert_same_tensors(tensors_in(base_folder), tensors_in(tmp_path / "base"))
    assert settings_in(adapter)["base_model_name_or_path"] == "owner/base"
    assert torch.equal(tensors_in(adapter)["temperature_head.up.weight"], heads["temp_head.mlp.0.weight"].float())
    model = AutoDecoForCausalLM.from_pretrained(adapter, base_model=base_folder)
    assert torch.equal(model(tiny.prompts()).logits, base(tiny.prompts()).logits)
    write_merged(tmp_path / "nameless", base, tmp_path / "base")
    _, adapter = split(tmp_path / "nameless", tmp_path / "again")
    assert AutoDecoForCausalLM.from_pretrained(adapter).config.model_type == "gpt_oss"
    _, adapter = split(tmp_path / "nameless", tmp_path / "named", base_name="owner/other")
    assert settings_in(adapter)["base_model_name_or_path"] == "owner/other"


def test_released_heads_merge_with_the_base_that_they_name(tmp_path):
    base = tiny.build_base("llama")
    base.save_pretrained(tmp_path / "base")
    heads = write_released(tmp_path / "released", base, base_name=str(tmp_path / "base"), widths=(256, 256))
    merged = merge(tmp_path / "released", None, tmp_path / "merged")
    assert_same_tensors({name: t for name, t in tensors_in(merged).items() if name in heads}, heads)
    assert torch.equal(load_released_base(locate_released(merged)).lm_head.weight, base.lm_head.weight)


def test_the_packaged_base_goes_by_its_name(tmp_path):
    AutoDecoForCausalLM.from_base(load_base_model()).save_pretrained(tmp_path / "adapter")
    merged = merge(tmp_path / "adapter", None, tmp_path / "merged")
    base, adapter = split(merged, tmp_path / "split")
    assert_same_tensors(tensors_in(base), tensors_in(BASE_MODEL_PATH))
    assert settings_in(adapter)["base_model_name_or_path"] == "hf_adaptive_decode:testbed"
    for folder in (merged, base, adapter):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / name).read_bytes() == (BASE_MODEL_PATH / name).read_bytes()


def test_only_files_of_known_names_are_carried_along(tmp_path):
    adapter, base = make_pair(tmp_path)
    extras = (
        "tokenizer.json",
        "chat_template.jinja",
        "modeling_evil.py",
        "pytorch_model.bin",
        "notes.txt",
        "README.md",
    )
    for name in extras:
        (base / name).write_text(name)
    merged = merge(adapter, base, tmp_path / "merged")
    kept = ["chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(path.name for path in merged.iterdir()) == kept
    base_again, adapter_again = split(merged, tmp_path / "split")
    assert sorted(path.name for path in base_again.iterdir()) == kept
    assert sorted(path.name for path in adapter_again.iterdir()) == sorted([*kept, "README.md"])


def test_code_named_in_a_base_config_goes_nowhere(tmp_path):
    adapter, base = make_pair(tmp_path)
    settings = settings_in(base)
    bait = {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "trust_remote_code": True, "_name_or_path": "/home/me"}
    (base / "config.json").write_text(json.dumps({**settings, **bait}))
    merged = merge(adapter, base, tmp_path / "merged")
    base_again, adapter_again = split(merged, tmp_path / "split")
    for folder in (merged, base_again, adapter_again):
        assert not set(bait) & set(settings_in(folder))


# --- what cannot be said in the released format -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature_range": [0.2, 1.5]}, "temperature_range"),
        ({"top_p_range": [0.5, 1.0]}, "top_p_range"),
        ({"features": ["hidden", "statistics"]}, "statistics"),
        ({"policy": "token_actions", "actions": [{"temperature": 0.0}, {"temperature": 1.0}]}, "token_actions"),
        ({"policy": "static", "actions": [{"temperature": 0.5}]}, "static"),
    ],
    ids=str,
)
def test_an_adapter_that_the_format_cannot_express_is_refused(settings, named, tmp_path):
    tiny.build_base().save_pretrained(tmp_path / "base")
    AutoDecoForCausalLM.from_base(tmp_path / "base", AutoDecoConfig(**settings)).save_pretrained(tmp_path / "adapter")
    for convert in (to_released, lambda adapter, target: merge(adapter, None, target)):
        with pytest.raises(AdapterConfigError, match=f"no place for it.*{named}"):
            convert(tmp_path / "adapter", tmp_path / "target")
        assert not (tmp_path / "target").exists()


def test_a_range_without_its_head_does_not_matter(tmp_path):
    adapter, _ = make_pair(tmp_path, heads=["temperature"], top_p_range=[0.5, 1.0], top_p_statistics=False)
    assert load_released(to_released(adapter, tmp_path / "released"))[0].heads == ["temperature"]


def test_a_lora_is_not_left_behind_in_silence(tmp_path):
    adapter, _ = make_pair(tmp_path)
    (adapter / "peft").mkdir()
    (adapter / "peft" / "adapter_config.json").write_text("{}")
    save_file({"lora": torch.zeros(1)}, adapter / "peft" / "adapter_model.safetensors")
    with pytest.raises(AdapterConfigError, match="LoRA"):
        merge(adapter, None, tmp_path / "merged")


def test_heads_that_the_released_code_could_not_build_are_told(tmp_path):
    adapter, _ = make_pair(tmp_path, head_hidden_size=16, top_p_head_hidden_size=24)
    with pytest.warns(UserWarning, match="256.*16 and 24"):
        to_released(adapter, tmp_path / "released")


def test_a_base_of_another_shape_or_kind_is_refused(tmp_path):
    adapter, _ = make_pair(tmp_path)
    tiny.build_base("opt").save_pretrained(tmp_path / "narrow")
    with pytest.raises(AdapterLoadError, match=r"hidden_size 32.*24"):
        merge(adapter, tmp_path / "narrow", tmp_path / "merged")
    with pytest.raises(AdapterLoadError, match="an adapter or a merged checkpoint itself"):
        merge(adapter, adapter, tmp_path / "merged")
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    with pytest.raises(AdapterLoadError, match="no causal language model of type 't5'"):
        merge(adapter, tmp_path / "t5", tmp_path / "merged")
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(AdapterLoadError, match="'no_such_model'"):
        merge(adapter, tmp_path / "t5", tmp_path / "merged")
    (tmp_path / "t5" / "config.json").unlink()
    with pytest.raises(AdapterLoadError, match=r"config\.json missing"):
        merge(adapter, tmp_path / "t5", tmp_path / "merged")


def test_what_is_of_another_form_is_named(tmp_path):
    adapter, base = make_pair(tmp_path)
    released = to_released(adapter, tmp_path / "released")
    merged = merge(released, base, tmp_path / "merged")
    with pytest.raises(AdapterLoadError, match="is an adapter of this library"):
        to_adapter(adapter, tmp_path / "target")
    with pytest.raises(AdapterLoadError, match="is a model of type 'qwen3'"):
        split(base, tmp_path / "target")
    with pytest.raises(AdapterLoadError, match="heads alone"):
        split(released, tmp_path / "target")
    with pytest.raises(AdapterLoadError, match="merged with a base model already"):
        merge(merged, base, tmp_path / "target")
    assert len(tensors_in(to_adapter(merged, tmp_path / "target"))) == 8


# --- nothing is overwritten, followed or left half done ---------------------------------------------------------------


def everything_under(folder):
    """What there is, with the contents of files."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_nothing_is_overwritten(tmp_path):
    adapter, base = make_pair(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = everything_under(tmp_path)
    for target in ("full", "file", "dangling", "base", "adapter"):
        for convert in (lambda to: merge(adapter, base, to), lambda to: to_released(adapter, to)):
            with pytest.raises(AdapterLoadError, match=r"there already|lies in"):
                convert(tmp_path / target)
    assert everything_under(tmp_path) == before
    (tmp_path / "empty").mkdir()
    assert (merge(adapter, base, tmp_path / "empty") / "config.json").exists()
    with pytest.raises(AdapterLoadError, match="there already"):
        merge(adapter, base, tmp_path / "empty")


def test_nothing_is_written_into_what_is_read(tmp_path):
    adapter, base = make_pair(tmp_path)
    (tmp_path / "link").symlink_to(base)
    merged = merge(adapter, base, tmp_path / "merged")
    before = everything_under(tmp_path)
    for target in (
        adapter / "new",
        base / "a" / "b",
        tmp_path / "link" / "new",
        tmp_path / "merged" / ".." / "base" / "x",
    ):
        with pytest.raises(AdapterLoadError, match="lies in"):
            merge(adapter, base, target)
        with pytest.raises(AdapterLoadError, match="lies in"):
            merge(adapter, None, target)  # the same base, by the adapter's word
    with pytest.raises(AdapterLoadError, match="lies in"):
        split(merged, merged / "split")
    assert everything_under(tmp_path) == before


def test_links_out_of_a_folder_are_refused_and_the_hubs_own_cache_is_not(tmp_path):
    adapter, base = make_pair(tmp_path)
    repository = tmp_path / "hub" / "models--owner--base"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(base.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", str(number)))
    merged = merge(adapter, snapshot, tmp_path / "merged")
    assert len(tensors_in(merged)) == len(tensors_in(base)) + 8

    (tmp_path / "secret").write_text("secret")
    for name in ("tokenizer.json", "model.safetensors"):
        shutil.copytree(base, tmp_path / name)
        (tmp_path / name / name).unlink(missing_ok=True)
        (tmp_path / name / name).symlink_to(tmp_path / "secret")
        with pytest.raises(AdapterLoadError, match=f"{name} is a link to .*secret"):
            merge(adapter, tmp_path / name, tmp_path / "target")
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterLoadError, match="is a link to"):
        merge(adapter, snapshot, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["../adapter/model.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_that_points_elsewhere_is_refused(name, tmp_path):
    adapter, base = make_pair(tmp_path, shard="20KB")
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(AdapterLoadError, match="as a file"):
        merge(adapter, base, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_index_and_files_that_differ_are_told(tmp_path):
    adapter, base = make_pair(tmp_path, shard="20KB")
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    whole = json.dumps(index)
    index["weight_map"]["spare.weight"] = index["weight_map"].pop("lm_head.weight")
    path.write_text(json.dumps(index))
    with pytest.raises(AdapterLoadError, match=r"spare\.weight is missing.*lm_head\.weight in .* is not in the index"):
        merge(adapter, base, tmp_path / "merged")
    path.write_text(whole)
    file = sorted(base.glob("*.safetensors"))[1]
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    with pytest.raises(AdapterLoadError, match="damaged"):
        merge(adapter, base, tmp_path / "merged")
    file.unlink()
    with pytest.raises(AdapterLoadError, match=f"{file.name} missing"):
        merge(adapter, base, tmp_path / "merged")
    file.write_bytes(content)
    merge(adapter, base, tmp_path / "merged")
    shutil.copy(file, base / "model.safetensors")
    with pytest.raises(AdapterLoadError, match="stale"):
        merge(adapter, base, tmp_path / "again")


def test_a_base_of_pickles_is_refused(tmp_path):
    adapter, base = make_pair(tmp_path)
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    with pytest.raises(AdapterLoadError, match=r"pytorch_model\.bin.*pickles"):
        merge(adapter, base, tmp_path / "merged")


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    adapter, base = make_pair(tmp_path)
    before = everything_under(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, hard))  # no file grows beyond
    try:
        with pytest.raises(OSError, match=r"model.*\.safetensors could not be written"):
            merge(adapter, base, tmp_path / "deep" / "merged", max_shard_size="20KB")
        assert main(["convert", str(adapter), str(tmp_path / "cli"), "--to", "merged"]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert everything_under(tmp_path) == before


def in_a_child(job):
    """Runs a job in a copy of this process, which so has imported everything; returns how that ended."""
    child = os.fork()
    if child == 0:
        try:
            job()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_kill_leaves_no_target(tmp_path):
    adapter, _ = make_pair(tmp_path)

    def die_when_all_tensors_are_written():
        merging._carry = lambda files, folder: os.kill(os.getpid(), signal.SIGKILL)
        merge(adapter, None, tmp_path / "merged")

    assert in_a_child(die_when_all_tensors_are_written) == -signal.SIGKILL
    assert not (tmp_path / "merged").exists()
    left = list(tmp_path.glob(".converting-*/*/*"))
    assert [path.name for path in left] == ["model.safetensors"]  # in a folder of another name, and without a config


def peak_memory(job):
    """MB by which a job raises the most memory that this process has had at once."""

    def read(name):
        lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[name].split()[0]) / 1000

    before = read("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    job()
    return read("VmHWM") - before


@pytest.mark.parametrize("shard", ["5GB", "4MB"])
def test_no_more_than_a_file_is_in_memory(shard, tmp_path):
    config = LlamaConfig(
        vocab_size=500, hidden_size=512, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=8
    )
    model = LlamaForCausalLM(config).eval()
    assert sum(parameter.nbytes for parameter in model.parameters()) > 80e6
    model.save_pretrained(tmp_path / "base", max_shard_size=shard)
    AutoDecoForCausalLM.from_base(model).save_pretrained(tmp_path / "adapter")
    folders = [tmp_path / name for name in ("adapter", "base", "merged", "split")]

    def measure():
        merge(*folders[:2], tmp_path / "first", max_shard_size="4MB")  # what is loaded only once
        peaks = [peak_memory(lambda: merge(*folders[:3], max_shard_size="4MB"))]
        peaks += [peak_memory(lambda: split(*folders[2:], max_shard_size="4MB"))]
        # A file as it is read and once more as it may be written, with headers and settings.
        assert max(peaks) < 16, peaks

    assert in_a_child(measure) == 0
    assert len(list((tmp_path / "split" / "base").glob("*.safetensors"))) > 15


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_does_all_four(tmp_path, capsys):
    adapter, base = make_pair(tmp_path, head_hidden_size=256)
    capsys.readouterr()
    steps = [
        (adapter, "released", ["--base", base]),
        (tmp_path / "released", "merged", ["--max-shard-size", "20KB"]),
        (tmp_path / "merged", "split", []),
        (tmp_path / "merged", "adapter", ["--base", "owner/base", "--base-revision", "v2"]),
    ]
    for source, form, more in steps:
        target = tmp_path / ("back" if form == "adapter" else form)
        assert main(["convert", str(source), str(target), "--to", form, *map(str, more)]) == 0
        assert str(target) in capsys.readouterr().out
    assert_same_tensors(tensors_in(tmp_path / "split" / "base"), tensors_in(base))
    assert_same_tensors(tensors_in(tmp_path / "split" / "adapter"), tensors_in(adapter))
    assert_same_tensors(tensors_in(tmp_path / "back"), tensors_in(adapter))
    named = settings_in(tmp_path / "back")
    assert (named["base_model_name_or_path"], named["base_model_revision"]) == ("owner/base", "v2")


def test_the_command_takes_a_file_and_writes_json(tmp_path, capsys):
    adapter, base = make_pair(tmp_path)
    (tmp_path / "convert.yaml").write_text(f"to: merged\nbase: {base}\nmax_shard_size: 20KB\n")
    words = ["convert", str(adapter), str(tmp_path / "merged"), "--config", str(tmp_path / "convert.yaml")]
    capsys.readouterr()
    assert main([*words, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["folders"] == {"merged": str(tmp_path / "merged")}
    assert found["files"]["merged"] == sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert (found["source"], found["to"]) == (str(adapter), "merged")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["source"],
        ["source", "target"],
        ["source", "target", "--to", "elsewhere"],
        ["source", "target", "--to", "merged", "--max-shard-size", "big"],
        ["source", "target", "--to", "merged", "--max-shard-size", "-1GB"],
        ["source", "target", "--to", "merged", "--max-shard-size", "0KB"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["convert", *words])
    assert caught.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_a_users_mistake_is_one_line_and_exit_code_1(tmp_path, capsys):
    adapter, _ = make_pair(tmp_path)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    capsys.readouterr()
    for source, form, said in (
        (tmp_path / "nowhere", "adapter", "nowhere"),
        (tmp_path / "damaged", "split", "no valid JSON"),
        (adapter, "adapter", "adapter of this library"),
        (adapter, "split", "adapter of this library"),
    ):
        assert main(["convert", str(source), str(tmp_path / "target"), "--to", form]) == 1
        message = capsys.readouterr().err
        assert said in message
        assert "Traceback" not in message
    assert not (tmp_path / "target").exists()


def test_a_policy_of_converted_heads_has_no_other_tensor(tmp_path):
    adapter, _ = make_pair(tmp_path)
    config, tensors = load_released(to_released(adapter, tmp_path / "released"))
    policy = build_policy(config)
    policy.load_state_dict(tensors, strict=True)

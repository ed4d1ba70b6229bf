"""Damaged, hostile and unlucky files: what is read, what is written over, and disks without room."""

from __future__ import annotations

import ast
import json
import os
import shlex
import shutil
import signal
import struct
import time
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from full_disks import can_mount, in_a_child, mount_small, no_file_beyond
from safetensors.torch import load_file, save_file
from test_cards import as_well, measured
from test_lora import saved  # noqa: F401 (a fixture)
from tiny import prompts, sample
from tiny_lora import build_lora
from transformers import AutoModelForCausalLM

import hf_adaptive_decode
from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.cli.main import main
from hf_adaptive_decode.errors import (
    AdapterConfigError,
    AdapterLoadError,
    AdaptiveDecodeError,
    PushError,
    UnknownAdapterError,
)
from hf_adaptive_decode.hub.card import add_results, update_card
from hf_adaptive_decode.hub.static_setting import write_static_generation_config

PACKAGE = Path(hf_adaptive_decode.__file__).parent


def edit_config(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def bytes_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- nothing half loaded ----------------------------------------------------------------------------------------------


def truncated(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def of_another_shape(folder):
    edit_config(folder, head_hidden_size=7)


def of_a_large_policy(folder):
    edit_config(folder, head_hidden_size=1 << 16, hidden_size=32)


@pytest.mark.parametrize(
    ("damage", "how", "error"),
    [
        (truncated, {}, AdapterLoadError),
        (of_another_shape, {}, AdapterLoadError),
        (of_a_large_policy, {"max_weight_bytes": 1 << 20}, AdapterLoadError),
        (lambda folder: None, {"adapter_name": "no/name"}, UnknownAdapterError),
        (lambda folder: None, {"adapter_name": "__base__"}, UnknownAdapterError),
    ],
    ids=["truncated", "another shape", "too large", "a path as a name", "a reserved name"],
)
def test_a_good_lora_beside_what_is_refused_does_not_stay_in_the_base(saved, damage, how, error):  # noqa: F811
    folder, _ = saved
    damage(folder)
    base = tiny.build_base()
    before = [(name, id(parameter)) for name, parameter in base.named_parameters()]
    with pytest.raises(error):
        AutoDecoForCausalLM.from_pretrained(folder, base_model=base, **how)
    assert [(name, id(parameter)) for name, parameter in base.named_parameters()] == before
    assert not hasattr(base, "peft_config")
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_a_model_that_is_wrapped_already_gets_no_lora_of_an_adapter_that_is_refused(saved):  # noqa: F811
    folder, _ = saved
    model = tiny.wrap()
    before = [name for name, _ in model.named_parameters()]
    with pytest.raises(AdapterConfigError, match="already"):
        AutoDecoForCausalLM.from_pretrained(folder, base_model=model)
    assert [name for name, _ in model.named_parameters()] == before


@pytest.mark.parametrize("damage", [truncated, of_another_shape], ids=["truncated", "another shape"])
def test_a_damaged_adapter_is_not_loaded_beside_others(folder, damage):
    damage(folder)
    model = tiny.randomise_heads(tiny.wrap())
    expected, state = sample(model, prompts(), max_new_tokens=4), set(model.state_dict())
    with pytest.raises(AdapterLoadError):
        model.load_adapter(folder, "other")
    assert set(model.state_dict()) == state
    assert list(model.decoding_configs) == ["default"]
    assert torch.equal(sample(model, prompts(), max_new_tokens=4), expected)


# --- headers and settings of any size ---------------------------------------------------------------------------------


@pytest.mark.parametrize("twice", [False, True])
def test_a_header_of_many_names_is_refused_at_once(folder, twice):
    names = [f"{number:x}" for number in range(80_000)]
    names += names[:1] if twice else []
    header = ("{" + ",".join(f'"{name}":1' for name in names) + "}").encode()
    assert len(header) < 1 << 20
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    begin = time.monotonic()
    with pytest.raises(AdapterLoadError, match=r"model\.safetensors.*" + ("0 more than once" if twice else "")):
        AutoDecoForCausalLM.from_pretrained(folder, base_model=tiny.build_base())
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"policy": "token_actions", "actions": [{"temperature": 1.0}] * 5000}, "actions"),
        ({"policy": "token_actions", "actions": {"0": {}}}, "actions"),
        ({"policy": "token_actions", "actions": [{"top_k": 10**30}]}, "top_k"),
        ({"policy_hidden_size": 10**9}, "policy_hidden_size"),
        ({"top_p_head_hidden_size": 10**9}, "top_p_head_hidden_size"),
        ({"max_token_budget": 10**12}, "max_token_budget"),
        ({"hidden_size": 10**12}, "hidden_size"),
        ({"vocab_size": 10**12}, "vocab_size"),
        ({"format_version": 10**12}, "format_version"),
        ({"format_version": True}, "format_version"),
        ({"base_model_name_or_path": ["/etc"]}, "base_model_name_or_path"),
        ({"base_model_revision": "../../../../tmp/x"}, "base_model_revision"),
        ({"base_model_revision": "/etc/passwd"}, "base_model_revision"),
        ({"base_model_revision": "a/../../b"}, "base_model_revision"),
        ({"base_model_revision": "-rf"}, "base_model_revision"),
        ({"base_model_revision": "a b"}, "base_model_revision"),
        ({"base_model_revision": "C:\\x"}, "base_model_revision"),
        ({"base_model_revision": "main?x=1"}, "base_model_revision"),
    ],
    ids=str,
)
def test_a_setting_out_of_bounds_is_refused_before_anything_is_made(folder, values, named):
    edit_config(folder, **values)
    with pytest.raises(AdapterConfigError, match=named):
        AutoDecoForCausalLM.from_pretrained(folder, base_model=tiny.build_base())


@pytest.mark.parametrize("revision", ["main", "refs/pr/3", "v1.0.2", "0" * 40, "feature/two_heads", "release@2"])
def test_branches_tags_and_commits_are_revisions(revision):
    assert AutoDecoConfig(base_model_revision=revision).base_model_revision == revision


def test_settings_that_mean_nothing_here_make_nothing(folder):
    edit_config(folder, num_actions=10**9, num_labels=10**9, n_positions=10**12)
    begin = time.monotonic()
    with pytest.warns(UserWarning, match=r"dropped: .*num_actions"):
        model = AutoDecoForCausalLM.from_pretrained(folder)
    assert time.monotonic() - begin < 10
    assert not hasattr(model.decoding_config, "num_actions")


@pytest.mark.parametrize("way", ["class", "auto"])
@pytest.mark.parametrize("trusts", [{}, {"trust_remote_code": False}], ids=str)
def test_code_that_a_config_names_is_not_run(folder, tmp_path, way, trusts):
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(
        f"open({str(ran)!r}, 'w')\nfrom transformers import PreTrainedConfig as Evil, PreTrainedModel as Worse\n"
    )
    evil = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Worse"}
    edit_config(folder, auto_map=evil, trust_remote_code=True, custom_generate="evil", architectures=["Popen"])
    kind = AutoDecoForCausalLM if way == "class" else AutoModelForCausalLM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = kind.from_pretrained(folder, **trusts)
    assert model.generate(prompts(), max_new_tokens=1).shape == (3, 6)
    assert not ran.exists()


# --- a base that cannot be had ----------------------------------------------------------------------------------------


def without(name):
    return lambda base: (base / name).unlink()


def written(name, content):
    return lambda base: (base / name).write_bytes(content)


def cut(base):
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def of_type(kind):
    return lambda base: edit_config(base, model_type=kind)


BAD_BASES = {
    "no folder": shutil.rmtree,
    "no config": without("config.json"),
    "no weights": without("model.safetensors"),
    "an empty config": written("config.json", b""),
    "no JSON": written("config.json", b"{"),
    "empty weights": written("model.safetensors", b""),
    "cut weights": cut,
    "an unknown type": of_type("never_heard_of"),
    "no type": of_type(""),
    "no causal model": of_type("vit"),
}


@pytest.mark.parametrize("kind", BAD_BASES)
def test_a_base_that_cannot_be_had_is_named_and_another_one_is_taken(folder, tmp_path, kind):
    BAD_BASES[kind](tmp_path / "base")
    with pytest.raises(AdapterLoadError) as caught:
        AutoDecoForCausalLM.from_pretrained(folder)
    message = str(caught.value)
    for part in (str(tmp_path / "base"), str(folder), "base_model="):
        assert part in message
    assert caught.value.__cause__ is not None
    given = AutoDecoForCausalLM.from_pretrained(folder, base_model=tiny.build_base())
    assert given.generate(prompts(), max_new_tokens=1).shape == (3, 6)


@pytest.mark.parametrize("chain", [1, 2])
def test_an_adapter_whose_base_is_an_adapter_says_so(folder, tmp_path, chain):
    """One that names itself would be loaded for ever."""
    if chain == 2:
        shutil.copytree(folder, tmp_path / "second")
    edit_config(folder, base_model_name_or_path=str(folder if chain == 1 else tmp_path / "second"))
    with pytest.raises(AdapterLoadError, match=r"an adapter itself.*base_model="):
        AutoDecoForCausalLM.from_pretrained(folder)
    model = AutoDecoForCausalLM.from_pretrained(folder, base_model=tmp_path / "base")
    assert model.generate(prompts(), max_new_tokens=1).shape == (3, 6)
    if chain == 2:  # the message left nothing behind
        assert AutoDecoForCausalLM.from_pretrained(tmp_path / "second").decoding_adapter is not None


# --- names that a shell would take to pieces --------------------------------------------------------------------------

NAMES = [
    "a b; touch pwned",
    "$(touch pwned)",
    "`touch pwned`",
    "it's",
    "-rf",
    "a\nb",
    '"q"',
    "%s%n{x}",
    "<script>",
    "*",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_a_name_whatever_its_signs(model, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    base = tmp_path / f"{name} base"
    tiny.build_base().save_pretrained(base)
    model.decoding_config.base_model_name_or_path = str(base)
    model.save_pretrained(name if not name.startswith("-") else f"./{name}")
    loaded = AutoDecoForCausalLM.from_pretrained(tmp_path / name)
    assert torch.equal(sample(loaded, prompts(), max_new_tokens=3), sample(model, prompts(), max_new_tokens=3))
    with pytest.raises(PushError) as caught:  # there is no Hub here
        loaded.push_to_hub("me/it", card_folder=tmp_path / name)
    folder = caught.value.folder
    said = str(caught.value).rpartition("run: ")[2]
    assert shlex.split(said)[:2] == ["hf-adaptive-decode", "push"]
    shutil.rmtree(folder)
    code = main(["convert", str(tmp_path / name), str(tmp_path / f"{name} merged"), "--to", "merged"])
    assert code == 0
    assert not list(tmp_path.rglob("pwned"))


def test_nothing_in_the_package_is_handed_to_a_shell():
    """Programs are started with lists of arguments, and only by what names `subprocess`."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            shell = any(keyword.arg == "shell" for keyword in node.keywords)
            if shell or called in (
                "os.system",
                "os.popen",
                "eval",
                "exec",
                "pickle.load",
                "pickle.loads",
                "torch.load",
            ):
                found.add((path.name, called))
    # Both are what runs inside the sandbox, where that is what they are for.
    assert found == {("_code_runner.py", "exec"), ("_jail.py", "exec")}


# --- what is there already --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["single", "sharded", "released", "with a LoRA"])
def test_an_adapter_is_not_saved_over_another_model(model, tmp_path, kind):
    model = AutoDecoForCausalLM.from_base(build_lora()) if kind == "with a LoRA" else model
    base = tiny.build_base()
    base.save_pretrained(tmp_path, **({"max_shard_size": "20KB"} if kind == "sharded" else {}))
    if kind == "released":
        edit_config(tmp_path, model_type="autodeco", architectures=["AutoDecoModelForCausalLM"])
    before = bytes_under(tmp_path)
    with pytest.raises(AdapterLoadError, match="would overwrite; name another folder"):
        model.save_pretrained(tmp_path)
    assert bytes_under(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == set(before)


def test_an_adapter_is_saved_over_an_older_one_and_beside_a_tokenizer(model, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    model.save_pretrained(tmp_path)
    tiny.randomise_heads(model, 5)
    model.save_pretrained(tmp_path)
    for name, tensor in model.decoding_adapter.state_dict().items():
        assert torch.equal(load_file(tmp_path / "model.safetensors")[name], tensor)
    assert (tmp_path / "tokenizer.json").read_text() == "{}"


OWN = ("config.json", "model.safetensors", "generation_config.json", "README.md")


def test_a_link_is_replaced_and_what_it_points_to_stays(model, tmp_path):
    """As in a folder of the Hub's cache, which is made of links to files that others share."""
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "adapter"
    elsewhere.mkdir()
    model.save_pretrained(folder)
    for name in OWN:
        shutil.move(folder / name, elsewhere / name)
        (folder / name).symlink_to(elsewhere / name)
    before = bytes_under(elsewhere)
    tiny.randomise_heads(model, 5)
    model.generation_config.eos_token_id = 7
    model.decoding_config.base_model_name_or_path = "other/base"
    model.save_pretrained(folder)
    assert bytes_under(elsewhere) == before
    assert all(not (folder / name).is_symlink() for name in OWN)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 7


# --- disks without room -----------------------------------------------------------------------------------------------


def test_a_save_without_room_keeps_what_was_there(model, tmp_path):
    model.save_pretrained(tmp_path)
    before = bytes_under(tmp_path)
    tiny.randomise_heads(model, 5)
    with no_file_beyond(20_000), pytest.raises((OSError, AdaptiveDecodeError), match=r"(?i)file too large"):
        model.save_pretrained(tmp_path)
    assert bytes_under(tmp_path) == before
    assert sorted(os.listdir(tmp_path)) == sorted(before)
    model.save_pretrained(tmp_path)  # it can be done again
    assert bytes_under(tmp_path)["model.safetensors"] != before["model.safetensors"]


@pytest.mark.parametrize("file", ["README.md", "static/generation_config.json", "results.jsonl"])
def test_small_files_are_whole_or_as_they_were_too(model, tmp_path, file):
    model.save_pretrained(tmp_path)
    with open(tmp_path / "README.md", "a") as card:
        card.write("My own words.\n")
    lines = measured()
    add_results(tmp_path, as_well(lines, {"temperature": 0.5}))
    before = bytes_under(tmp_path)
    assert file in before
    config = model.decoding_config
    config.base_model_name_or_path = "other/base"
    more = [{**lines[0], "command": ["-"] * 20_000}, *lines[1:]]
    size, write = {
        "README.md": (500, lambda: update_card(tmp_path, config)),
        "static/generation_config.json": (20, lambda: write_static_generation_config(tmp_path, {"top_p": 0.5}, {})),
        "results.jsonl": (50_000, lambda: add_results(tmp_path, more)),
    }[file]
    with no_file_beyond(size), pytest.raises(OSError, match="File too large"):
        write()
    after = bytes_under(tmp_path)
    assert after[file] == before[file]
    assert set(after) == set(before)
    assert b"My own words.\n" in after["README.md"]
    write()
    assert bytes_under(tmp_path)[file] != before[file]


def test_a_disk_that_is_really_full_costs_no_adapter_that_was_there(tmp_path):
    if not can_mount(tmp_path):
        pytest.skip("no file system can be mounted here")

    def job():
        disk = tmp_path / "disk"
        disk.mkdir()
        mount_small(disk, 160 * 1024)
        torch.manual_seed(0)
        model = tiny.randomise_heads(tiny.wrap())
        model.save_pretrained(disk / "adapter")
        before = bytes_under(disk)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free // 4096 * 4096))
        tiny.randomise_heads(model, 5)
        for target in ("adapter", "another"):
            with pytest.raises((OSError, AdaptiveDecodeError), match=r"(?i)no space left"):
                model.save_pretrained(disk / target)
        (disk / "filler").unlink()
        assert {name: data for name, data in bytes_under(disk).items() if name.startswith("adapter")} == before
        AutoDecoForCausalLM.from_pretrained(disk / "adapter", base_model=tiny.build_base())
        model.save_pretrained(disk / "adapter")
        loaded = AutoDecoForCausalLM.from_pretrained(disk / "adapter", base_model=tiny.build_base())
        assert torch.equal(sample(loaded, prompts(), max_new_tokens=3), sample(model, prompts(), max_new_tokens=3))

    assert in_a_child(job) == 0


# --- killed while it saves --------------------------------------------------------------------------------------------


def test_a_kill_in_the_middle_of_a_save_leaves_an_adapter_that_loads(tmp_path):
    """Whichever way between two versions: the weights are one of them, whole."""
    first, second = (tiny.randomise_heads(tiny.wrap(), seed) for seed in (1, 2))
    folder = tmp_path / "adapter"
    first.save_pretrained(folder)
    versions = [one.decoding_adapter.state_dict() for one in (first, second)]

    def save_for_ever():
        os.close(1)
        while True:
            second.save_pretrained(folder)
            first.save_pretrained(folder)

    seen = set()
    for attempt in range(12):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever()
            finally:
                os._exit(1)
        time.sleep(0.05 + 0.007 * attempt)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        loaded = AutoDecoForCausalLM.from_pretrained(folder, base_model=tiny.build_base())
        found = loaded.decoding_adapter.state_dict()
        match = [all(torch.equal(found[name], tensor) for name, tensor in version.items()) for version in versions]
        assert sum(match) == 1
        seen.add(match.index(True))
    assert seen == {0, 1}


def test_what_safetensors_lets_pass_is_seen(folder):
    """The format's own reader takes NaN; the library's does not."""
    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    assert load_file(folder / "model.safetensors")[name].isnan().any()
    with pytest.raises(AdapterLoadError, match=f"{name} holds NaN"):
        AutoDecoForCausalLM.from_pretrained(folder)


def test_a_lora_over_the_limit_is_refused_before_the_base_is_touched(tmp_path):
    model = AutoDecoForCausalLM.from_base(build_lora())
    model.save_pretrained(tmp_path)
    base = tiny.build_base()
    with pytest.raises(AdapterLoadError, match="max_peft_bytes"):
        AutoDecoForCausalLM.from_pretrained(tmp_path, base_model=base, max_peft_bytes=100)
    assert not hasattr(base, "peft_config")

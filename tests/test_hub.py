"""Pushing to and pulling from a Hub, through huggingface_hub's real client, against a small one on this machine."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from hub_server import Hub, environment, main, observe, said

PROMPT = "coin 4 7 47 - 11 =>"
TOKEN = "hf_write"


# --- what happens, in a process of its own ----------------------------------------------------------------------------


def adapter(mark: float = 0.0, width: int = 256, base=None):
    """An adapter on the embedded model whose temperatures change from token to token; `mark` tells it from others."""
    import torch

    from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
    from hf_adaptive_decode.testbed import load_base_model

    model = AutoDecoForCausalLM.from_base(base or load_base_model(), AutoDecoConfig(head_hidden_size=width))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.decoding_adapter.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.03)
        model.decoding_adapter.temperature_head.out.bias.fill_(mark)
        model.decoding_adapter.top_p_head.out.bias.fill_(3.0)
    return model


def mark_of(model) -> float:
    return round(model.decoding_adapter.temperature_head.out.bias.item(), 4)


def tokens(model, **kwargs) -> list[int]:
    import torch

    from hf_adaptive_decode.testbed import load_tokenizer

    torch.manual_seed(0)
    inputs = load_tokenizer()(PROMPT, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=16, **kwargs)[0].tolist()


def base_with_lora(rank: int):
    import torch
    from peft import LoraConfig

    from hf_adaptive_decode.testbed import load_base_model

    base = load_base_model()
    torch.manual_seed(0)
    base.add_adapter(LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.5)
    return base


def ranks(model) -> list[int]:
    """Of a model's LoRA, as its tensors have them."""
    return sorted({tensor.shape[0] for name, tensor in model.named_parameters() if "lora_A" in name})


def saved(folder: Path, *args, **kwargs) -> dict[str, bytes]:
    """The files of an adapter, by name."""
    adapter(*args, **kwargs).save_pretrained(folder)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish(hub: Hub, folder: Path) -> dict:
    """A private adapter on a base that is on the Hub too and moves on afterwards; pushed, and loaded in every way."""
    import torch
    from safetensors.torch import load, save
    from transformers import AutoModelForCausalLM, pipeline

    from hf_adaptive_decode import AdaptiveSamplerLogitsProcessor, AutoDecoForCausalLM
    from hf_adaptive_decode.hub.bases import PACKAGED_BASES
    from hf_adaptive_decode.testbed import load_tokenizer

    base_folder = PACKAGED_BASES["hf_adaptive_decode:testbed"]
    trained_on = hub.push("org/base", {path.name: path.read_bytes() for path in base_folder.iterdir()})
    model = adapter(3.0, base="org/base")
    address = model.push_to_hub("me/private", private=True, token=TOKEN)
    load_tokenizer().push_to_hub("me/private", token=TOKEN)
    weights = load(hub.read("org/base")["model.safetensors"])
    hub.push(
        "org/base", {"model.safetensors": save({name: torch.randn_like(tensor) for name, tensor in weights.items()})}
    )
    plain = AutoModelForCausalLM.from_pretrained("org/base")
    moved, loaded = tokens(plain, do_sample=False), AutoDecoForCausalLM.from_pretrained("me/private", token=TOKEN)
    plain = AutoModelForCausalLM.from_pretrained("org/base", revision=trained_on)
    processor = AdaptiveSamplerLogitsProcessor.from_pretrained("me/private", plain, token=TOKEN)
    by_auto = AutoModelForCausalLM.from_pretrained("me/private", token=TOKEN)
    pipe = pipeline("text-generation", model="me/private", token=TOKEN)
    torch.manual_seed(0)
    text = pipe(PROMPT, max_new_tokens=16, return_full_text=True)[0]["generated_text"]
    same = {
        "pushed": tokens(model),
        "AutoDecoForCausalLM": tokens(loaded),
        "AutoModelForCausalLM": tokens(by_auto),
        "processor": tokens(plain, do_sample=True, top_k=0, logits_processor=[processor]),
    }
    head = hub.repos["me/private"].refs["refs/heads/main"]
    first = hub.repos["me/private"].commits[head].parent
    return {
        "tokens": same,
        "greedy": tokens(model, do_sample=False),
        "greedy on the moved base": moved,
        "text": text,
        "expected text": load_tokenizer().decode(same["pushed"], skip_special_tokens=True),
        "address": address,
        "commit": first,
        "files": sorted(hub.repos["me/private"].commits[first].files),
        "card": hub.read("me/private")["README.md"].decode(),
        "private": hub.repos["me/private"].private,
        "large": sum("/storage/" in path for method, path, _ in hub.asked if method == "PUT"),
        "loaded commit": loaded.decoding_config._commit_hash,
        "head": head,
        "saved config": json.loads(loaded.decoding_config.to_json_string()),
        "base commit": trained_on,
        "is adaptive": isinstance(by_auto, AutoDecoForCausalLM),
    }


def doors(hub: Hub, folder: Path) -> dict:
    """Who gets in with which token, and what those who do not are told."""
    from hf_adaptive_decode import AutoDecoForCausalLM
    from hf_adaptive_decode.testbed import load_base_model

    files = saved(folder / "doors", 0.5)
    hub.create("me/secret", private=True)
    hub.create("me/gated", readers={"me"})
    for name in ("me/secret", "me/gated"):
        hub.push(name, files)
    base, seen = load_base_model(), {}

    def load(name: str, number: int, **kwargs):
        kwargs |= {"base_model": copy.deepcopy(base), "cache_dir": folder / f"doors-{number}"}
        return mark_of(AutoDecoForCausalLM.from_pretrained(name, **kwargs))

    attempts = [
        ("private, reader's token", "me/secret", {"token": "hf_read"}),
        ("private, no token", "me/secret", {}),
        ("private, another's token", "me/secret", {"token": "hf_other"}),
        ("private, a wrong token", "me/secret", {"token": "hf_wrong"}),
        ("gated, let in", "me/gated", {"token": "hf_read"}),
        ("gated, no token", "me/gated", {}),
        ("gated, another's token", "me/gated", {"token": "hf_other"}),
        ("missing", "me/nothing", {"token": "hf_read"}),
        ("no such revision", "me/secret", {"token": "hf_read", "revision": "v9"}),
        ("no id", "some/folder/that/is/not/here", {}),
    ]
    for number, (what, name, how) in enumerate(attempts):
        found: list[float] = []
        error = said(lambda name=name, n=number, how=how, found=found: found.append(load(name, n, **how)))
        seen[what] = found[0] if found else error
    return seen


def choose(hub: Hub, folder: Path) -> dict:
    """Branches, tags, commits, pull requests, subfolders, caches."""
    from huggingface_hub import HfApi

    from hf_adaptive_decode import AutoDecoForCausalLM
    from hf_adaptive_decode.testbed import load_base_model

    base, api = load_base_model(), HfApi(token=TOKEN)
    model = adapter(0.1)
    model.push_to_hub("me/many", token=TOKEN)
    first = hub.repos["me/many"].refs["refs/heads/main"]
    api.create_tag("me/many", tag="v1")
    adapter(0.2).push_to_hub("me/many", token=TOKEN)
    adapter(0.3).push_to_hub("me/many", token=TOKEN, revision="trial")
    adapter(0.4).push_to_hub("me/many", token=TOKEN, create_pr=True)
    hub.push("me/many", {f"best/one/{name}": content for name, content in saved(folder / "sub", 0.5).items()})

    def load(**kwargs):
        return AutoDecoForCausalLM.from_pretrained("me/many", base_model=copy.deepcopy(base), **kwargs)

    seen: dict = {"marks": {}}
    for what, how in {
        "main": {},
        "tag": {"revision": "v1"},
        "commit": {"revision": first},
        "branch": {"revision": "trial"},
        "pull request": {"revision": "refs/pr/1"},
        "subfolder": {"subfolder": "best/one"},
        "cache": {"cache_dir": folder / "elsewhere"},
    }.items():
        seen["marks"][what] = mark_of(load(**how))
    seen["in the cache"] = sorted(path.name for path in (folder / "elsewhere").rglob("*.safetensors"))
    seen["wrong subfolder"] = said(load, subfolder="best")
    seen["escaping"] = [said(load, subfolder="../.."), said(load, subfolder="/etc"), said(load, revision="../../x")]
    asked = {}
    for what, how in {
        "cold": {"cache_dir": folder / "cold"},
        "warm": {"cache_dir": folder / "cold"},
        "forced": {"cache_dir": folder / "cold", "force_download": True},
        "local": {"cache_dir": folder / "cold", "local_files_only": True},
        "pinned": {"cache_dir": folder / "cold", "revision": hub.repos["me/many"].refs["refs/heads/main"]},
    }.items():
        before = len(hub.asked)
        load(**how)
        asked[what] = [f"{method} {path}" for method, path, _ in hub.asked[before:]]
    del hub.repos["me/many"].refs["refs/heads/trial"]
    return {**seen, "asked": asked, "deleted": said(load, revision="trial")}


def found(hub: Hub, folder: Path) -> dict:
    """Adapters whose base models are on the Hub and cannot be loaded from it."""
    from hf_adaptive_decode import AutoDecoForCausalLM

    seen, model = {}, adapter(0.1)
    hub.create("org/gated-base", readers=set())
    hub.push("org/gated-base", {"config.json": b"{}"})
    hub.create("org/private-base", private=True)
    hub.push("org/unpulled-base", {"config.json": b"{}"})
    (folder / "base").mkdir()
    for what in ("gated", "private", "missing", "unpulled", "local"):
        name = str(folder / "base") if what == "local" else f"org/{what}-base"
        model.decoding_config.base_model_name_or_path = name
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.push_to_hub(f"me/on-{what}", token=TOKEN)
        seen[f"pushing {what}"] = [str(warning.message) for warning in caught if "base_model=" in str(warning.message)]
        local = {"cache_dir": folder / "bases"}
        if what == "unpulled":
            said(
                AutoDecoForCausalLM.from_pretrained, "me/on-unpulled", base_model=copy.deepcopy(model).unload(), **local
            )
            local["local_files_only"] = True
        seen[what] = said(AutoDecoForCausalLM.from_pretrained, f"me/on-{what}", **local)
    return seen


def move(hub: Hub, folder: Path) -> dict:
    """The branch is moved before each request of a load in turn, between versions that do not fit each other."""
    from transformers import AutoModelForCausalLM

    from hf_adaptive_decode import AutoDecoForCausalLM
    from hf_adaptive_decode.testbed import load_base_model

    base = load_base_model()
    pushed = adapter(2.0, base=base_with_lora(4))
    pushed.push_to_hub("me/with-lora", token=TOKEN)
    seen: dict = {"lora": [tokens(pushed), tokens(AutoDecoForCausalLM.from_pretrained("me/with-lora"))]}
    seen["lora"].append(tokens(AutoDecoForCausalLM.from_pretrained("me/with-lora", base_model=copy.deepcopy(base))))
    seen["no lora"] = tokens(adapter(2.0))
    hub.before("GET", "/storage/", 404)  # of the two large files the first
    seen["cut short"] = [said(AutoDecoForCausalLM.from_pretrained, "me/with-lora", cache_dir=folder / "cut")]
    cut = {"cache_dir": folder / "cut", "local_files_only": True}
    seen["cut short"].append(said(AutoDecoForCausalLM.from_pretrained, "me/with-lora", **cut))
    versions = {
        name: saved(folder / name, mark, width, base=base_with_lora(rank))
        for name, mark, width, rank in (("old", 0.1, 8, 2), ("new", 0.2, 16, 3))
    }

    def facts(model):
        found = [model.decoding_config.head_hidden_size, mark_of(model), ranks(model)]
        return *found, model.decoding_config._commit_hash

    def by_class(**kwargs):
        return facts(AutoDecoForCausalLM.from_pretrained("me/moving", base_model=copy.deepcopy(base), **kwargs))

    def by_auto(**kwargs):
        return facts(AutoModelForCausalLM.from_pretrained("me/moving", **kwargs))

    for way in (by_class, by_auto):
        rows, nth, moved = [], 0, True
        while moved:
            nth += 1
            hub.repos.pop("me/moving", None)
            commits = {hub.push("me/moving", versions["old"]): "old"}

            def push(commits=commits):
                commits[hub.push("me/moving", versions["new"])] = "new"

            hub.before("GET|HEAD", "me/moving", push, nth)
            cache = folder / f"{way.__name__}-{nth}"
            *what, commit = way(cache_dir=cache)
            moved = len(commits) == 2
            hub.rules.clear()
            # What the cache has noted of the branch is of the same commit, so that it loads without the Hub.
            *again, later = way(cache_dir=cache, local_files_only=True)
            rows.append([*what, commits[commit], again == what and later == commit])
        seen[way.__name__] = rows
    return seen


def refuse(hub: Hub, folder: Path) -> dict:
    """What is not downloaded, and what is said when the Hub does not answer."""
    from hf_adaptive_decode import AdaptiveSamplerLogitsProcessor
    from hf_adaptive_decode.testbed import load_base_model

    base, files, seen = load_base_model(), saved(folder / "whole", 0.5), {}
    weights = files["model.safetensors"]
    lora = {"peft/adapter_config.json": b"{}", "peft/adapter_model.safetensors": bytes(5000)}
    broken = {
        "large weights": (files, {"max_weight_bytes": 1000}),
        "large lora": (files | lora, {"max_peft_bytes": 1000}),
        "large config": ({**files, "config.json": b" " * ((1 << 20) + 1)}, {}),
        "only a pickle": ({"config.json": files["config.json"], "pytorch_model.bin": b"x" * 99}, {}),
        "no weights": ({"config.json": files["config.json"]}, {}),
        "no config": ({"model.safetensors": weights}, {}),
        "half a lora": ({**files, "peft/adapter_config.json": b"{}", "peft/adapter_model.bin": b"x"}, {}),
        "damaged weights": ({**files, "model.safetensors": weights[:-5]}, {}),
    }

    def load(name: str, **kwargs):
        AdaptiveSamplerLogitsProcessor.from_pretrained(name, base, **kwargs)

    for number, (what, (contents, how)) in enumerate(broken.items()):
        hub.push(f"me/broken-{number}", contents)
        before = len(hub.asked)
        error = said(load, f"me/broken-{number}", **how)
        got = [path for method, path, _ in hub.asked[before:] if method == "GET" and "/api/" not in path]
        seen[what] = [error, [path.rpartition("/")[2] if "/storage/" not in path else "storage" for path in got]]
    hub.push("me/whole", files)
    for what, action in {"503": 503, "no answer": "no answer"}.items():
        hub.before("GET|HEAD", "me/whole", action)
        seen[f"cold, {what}"] = said(load, "me/whole", cache_dir=folder / "nothing")
        hub.rules.clear()
    hub.sizes_are_listed = False
    seen["large weights, unlisted"] = [said(load, "me/broken-0", max_weight_bytes=1000, cache_dir=folder / "unlisted")]
    seen["large weights, unlisted"].append([path for _, path, _ in hub.asked[-3:]])
    hub.sizes_are_listed = True
    load("me/whole")
    for what, action in {"503": 503, "no answer": "no answer"}.items():
        hub.before("GET|HEAD", "me/whole", action)
        seen[f"warm, {what}"] = said(load, "me/whole")
        seen[f"forced, {what}"] = said(load, "me/whole") if hub.rules else "the rule was used"
        hub.rules.clear()
    hub.before("GET|HEAD", "me/whole", 503)
    seen["forced without a Hub"] = said(load, "me/whole", force_download=True)
    hub.rules.clear()
    return seen


def offline(hub: Hub, folder: Path) -> dict:
    """With HF_HUB_OFFLINE=1, in a process that starts with the cache that the others have left."""
    from transformers import AutoModelForCausalLM

    from hf_adaptive_decode import AutoDecoForCausalLM
    from hf_adaptive_decode.testbed import load_base_model

    base = load_base_model()

    def load(name: str, **kwargs):
        return AutoDecoForCausalLM.from_pretrained(name, base_model=copy.deepcopy(base), **kwargs)

    model = AutoDecoForCausalLM.from_pretrained("me/private")
    by_auto = AutoModelForCausalLM.from_pretrained("me/private")
    return {
        "tokens": [tokens(model), tokens(by_auto)],
        "branch": mark_of(load("me/many", revision="trial")),
        "never pulled": said(load, "me/unknown"),
        "never pulled, local": said(load, "me/unknown", local_files_only=True),
        "config alone": said(load, "me/broken-4"),
        "push": said(model.push_to_hub, "me/private", token=TOKEN),
        "asked": hub.asked,
    }


ACTS = {act.__name__: act for act in (publish, doors, choose, found, move, refuse, offline)}


# --- what is seen of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    seen = observe(__file__, folder, *[act for act in ACTS if act != "offline"])
    return seen | observe(__file__, folder, "offline", HF_HUB_OFFLINE="1")


@pytest.fixture
def seen(everything, request):
    """What the act reported that the test's class is named after."""
    facts = everything[request.cls.__name__.removeprefix("Test").lower()]
    assert "failure" not in facts, facts["failure"]
    return facts


class TestPublish:
    def test_a_pushed_adapter_decides_the_same_wherever_it_is_loaded(self, seen):
        pushed = seen["tokens"]["pushed"]
        assert pushed != seen["greedy"]
        assert seen["tokens"] == dict.fromkeys(seen["tokens"], pushed)
        assert seen["text"].replace(" ", "") == seen["expected text"].replace(" ", "")
        assert seen["is adaptive"]

    def test_the_adapters_own_files_go_up_in_one_commit(self, seen):
        own = ["README.md", "config.json", "generation_config.json", "model.safetensors"]
        assert seen["files"] == [".gitattributes", *own]
        assert seen["address"].endswith(f"/me/private/commit/{seen['commit']}")
        assert seen["private"]
        assert seen["large"] == 1  # of all pushes: the weights alone are large files

    def test_the_card_speaks_of_the_repository(self, seen):
        assert 'adapter = "me/private"' in seen["card"]
        assert "base_model: org/base" in seen["card"]

    def test_what_commit_was_loaded_is_remembered_and_not_saved(self, seen):
        assert seen["loaded commit"] == seen["head"]
        assert "_commit_hash" not in seen["saved config"]

    def test_the_base_is_loaded_at_the_commit_that_the_adapter_was_trained_on(self, seen):
        assert seen["saved config"]["base_model_revision"] == seen["base commit"]
        assert seen["greedy on the moved base"] != seen["greedy"]


class TestDoors:
    def test_a_token_that_may_read_gets_in(self, seen):
        assert seen["private, reader's token"] == 0.5
        assert seen["gated, let in"] == 0.5

    @pytest.mark.parametrize("who", ["no token", "another's token"])
    def test_a_private_repository_asks_for_a_token(self, seen, who):
        message = seen[f"private, {who}"]
        assert message.startswith("AdapterLoadError: ")
        for part in ("'me/secret'", "private", "hf auth login", "`token=`"):
            assert part in message

    def test_a_wrong_token_is_called_that(self, seen):
        assert "does not accept the token" in seen["private, a wrong token"]

    @pytest.mark.parametrize("who", ["no token", "another's token"])
    def test_a_gated_repository_says_where_to_ask(self, seen, who):
        assert "AdapterLoadError" in seen[f"gated, {who}"]
        assert "gated" in seen[f"gated, {who}"]
        assert "Ask for access" in seen[f"gated, {who}"]

    def test_what_is_not_there_is_named(self, seen):
        assert "'me/nothing'" in seen["missing"]
        assert "no such repository" in seen["missing"]
        assert "'v9'" in seen["no such revision"]
        assert "no folder here" in seen["no id"]
        assert all(seen[what].startswith("AdapterLoadError: ") for what in ("missing", "no such revision", "no id"))


class TestChoose:
    def test_revision_subfolder_and_cache_reach_the_files(self, seen):
        assert seen["marks"] == {
            "main": 0.2,
            "tag": 0.1,
            "commit": 0.1,
            "branch": 0.3,
            "pull request": 0.4,
            "subfolder": 0.5,
            "cache": 0.2,
        }
        assert seen["in the cache"] == ["model.safetensors"]

    def test_a_wrong_subfolder_names_the_right_one(self, seen):
        assert "AdapterLoadError: 'me/many/best' " in seen["wrong subfolder"]
        assert "subfolder='best/one'" in seen["wrong subfolder"]

    def test_a_branch_that_was_deleted_is_not_taken_from_the_cache(self, seen):
        assert "no branch, tag or commit 'trial'" in seen["deleted"]

    def test_nothing_leads_out_of_the_repository(self, seen):
        for message in seen["escaping"]:
            assert message.startswith("AdapterLoadError: ")
            assert "without '..'" in message

    def test_one_request_asks_for_commit_and_sizes_and_nothing_for_a_lora_that_is_not_there(self, seen):
        asked = seen["asked"]
        assert sum("/api/models/" in line for line in asked["cold"]) == 1
        assert not any("peft" in line for lines in asked.values() for line in lines)
        downloads = [line for line in asked["cold"] if line.startswith("GET") and "/api/" not in line]
        assert len(downloads) == 2
        assert len(asked["warm"]) == len(asked["pinned"]) == 1
        assert asked["local"] == []
        assert len([line for line in asked["forced"] if line.startswith("GET") and "/api/" not in line]) == 2


class TestFound:
    @pytest.mark.parametrize(
        ("what", "parts"),
        {
            "gated": ["gated", "Ask for access"],
            "private": ["private", "`token=`"],
            "missing": ["no such repository"],
            "unpulled": ["Load it once with the network"],
        }.items(),
    )
    def test_a_base_that_cannot_be_had_says_why_and_that_another_can_be_passed(self, seen, what, parts):
        message = seen[what]
        assert message.startswith("AdapterLoadError: ")
        for part in [f"'org/{what}-base'", f"'me/on-{what}'", "base_model=", *parts]:
            assert part in message

    def test_a_downloaded_adapter_cannot_name_a_local_path_as_its_base(self, seen):
        assert "local path" in seen["local"]
        assert "base_model=" in seen["local"]

    def test_who_pushes_one_that_names_a_folder_is_warned(self, seen):
        (warning,) = seen["pushing local"]
        assert "names the folder" in warning
        assert seen["pushing gated"] == []


class TestMove:
    @pytest.mark.parametrize("way", ["by_class", "by_auto"])
    def test_a_load_is_of_one_commit_whenever_the_branch_moves(self, seen, way):
        rows = seen[way]
        assert len(rows) > 6
        for *what, version, is_the_same_offline in rows:
            assert what == {"old": [8, 0.1, [2]], "new": [16, 0.2, [3]]}[version]
            assert is_the_same_offline
        # The first request settles it: also for transformers' classes, which make it themselves.
        assert [row[3] for row in rows] == ["new"] + ["old"] * (len(rows) - 1)

    def test_a_load_that_was_cut_short_leaves_no_adapter_without_its_lora(self, seen):
        assert all(message.startswith("AdapterLoadError: ") for message in seen["cut short"])
        assert "is not in the cache" in seen["cut short"][1]

    def test_a_lora_goes_up_and_comes_down_with_its_adapter(self, seen):
        assert seen["lora"] == [seen["lora"][0]] * 3
        assert seen["lora"][0] != seen["no lora"]


class TestRefuse:
    @pytest.mark.parametrize("what", ["large weights", "large lora", "large config"])
    def test_what_is_too_large_is_not_downloaded(self, seen, what):
        error, downloads = seen[what]
        assert error.startswith("AdapterLoadError: ")
        assert "over the limit" in error
        assert ("max_weight_bytes=" in error, "max_peft_bytes=" in error) == (what[6] == "w", what[6:] == "lora")
        heavy = "config.json" if what == "large config" else "storage"
        assert heavy not in downloads

    def test_what_the_listing_does_not_tell_the_size_of_is_asked_for_it(self, seen):
        error, last = seen["large weights, unlisted"]
        assert "over the limit" in error
        assert last[-1].endswith("/model.safetensors")

    def test_pickles_are_neither_downloaded_nor_loaded(self, seen):
        error, downloads = seen["only a pickle"]
        assert "model.safetensors missing" in error
        assert "pytorch_model.bin" in error
        assert downloads == []
        error, downloads = seen["half a lora"]
        assert "peft/adapter_model.safetensors" in error
        assert "adapter_model.bin" not in downloads

    @pytest.mark.parametrize(("what", "name"), [("no weights", "model.safetensors"), ("no config", "config.json")])
    def test_a_missing_file_is_named(self, seen, what, name):
        error, downloads = seen[what]
        assert f"{name} missing" in error
        assert downloads == []

    def test_damaged_weights_are_named(self, seen):
        assert "model.safetensors is damaged" in seen["damaged weights"][0]

    @pytest.mark.parametrize("how", ["503", "no answer"])
    def test_a_hub_that_fails_is_done_without_where_the_cache_has_it(self, seen, how):
        assert seen[f"warm, {how}"] == "nothing"
        assert seen[f"cold, {how}"].startswith("AdapterLoadError: ")
        assert "try again" in seen[f"cold, {how}"].lower()
        assert "AdapterLoadError" in seen["forced without a Hub"]


class TestOffline:
    def test_what_was_pulled_once_loads_without_a_request(self, seen, everything):
        assert seen["tokens"] == [everything["publish"]["tokens"]["pushed"]] * 2
        assert seen["branch"] == 0.3
        assert seen["asked"] == []

    @pytest.mark.parametrize("what", ["never pulled", "never pulled, local", "config alone"])
    def test_what_was_not_pulled_says_what_to_do(self, seen, what):
        assert seen[what].startswith("AdapterLoadError: ")
        assert "HF_HUB_OFFLINE" in seen[what]
        assert "or pass a folder" in seen[what]

    def test_a_push_is_refused_and_keeps_the_adapter(self, seen):
        assert seen["push"].startswith("PushError: ")
        assert "HF_HUB_OFFLINE=1 is set" in seen["push"]


# --- for the tests of cards -------------------------------------------------------------------------------------------


@pytest.fixture
def hub():
    with Hub() as running:
        yield running


def run(hub, tmp_path, code):
    """Runs code in a process whose Hub is `hub`; with `base`, a folder with a base model, and `torch` at hand."""
    from tiny import build_base

    base = tmp_path / "base"
    if not base.exists():
        build_base("qwen3").save_pretrained(base)
    start = f"import torch\nfrom hf_adaptive_decode import AutoDecoForCausalLM\nbase = {str(base)!r}\n"
    settings = environment(tmp_path, HF_ENDPOINT=hub.address, HF_TOKEN=TOKEN)
    return subprocess.run(
        [sys.executable, "-c", start + code], env=settings, capture_output=True, text=True, check=False
    )


if __name__ == "__main__":
    main(ACTS)

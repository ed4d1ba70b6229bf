"""Pushes that fail, pushes that are done again, and what of a folder goes up; through huggingface_hub's real client."""

from __future__ import annotations

import copy
import resource
import shlex
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
from hub_server import LOST, NO_ANSWER, Hub, Refusal, main, observe, said
from test_hub import TOKEN, adapter, mark_of

OWN = {".gitattributes", "README.md", "config.json", "generation_config.json", "model.safetensors"}
HAND_WRITTEN = b"---\nlicense: mit\n---\nWritten by hand.\n"
COMMIT, LARGE, CREATE = ("POST", "/commit/"), ("PUT", "/storage/"), ("POST", "/repos/create")
# What happens at which request with which token, and what has to be said of it.
FAILURES = {
    "the Hub breaks": (COMMIT, 500, TOKEN, ["answers 500", "Try again later"]),
    "the Hub breaks at once": (CREATE, 502, TOKEN, ["answers 502", "Try again later"]),
    "the token is taken away": (COMMIT, 401, TOKEN, ["does not accept the token", "hf auth login"]),
    "the account is full": (COMMIT, Refusal(403, "Storage limit reached."), TOKEN, ["Storage limit reached."]),
    "the disk of the Hub is full": (COMMIT, Refusal(507, "Insufficient storage."), TOKEN, ["no room", "Insufficient"]),
    "the connection drops": (COMMIT, NO_ANSWER, TOKEN, ["cannot be reached", "Check the connection"]),
    "the answer is lost": (COMMIT, LOST, TOKEN, ["cannot be reached", "Check the connection"]),
    "the weights do not go through": (LARGE, 403, TOKEN, ["the Hub forbids it"]),
    "a token that may only read": (None, None, "hf_read", ["the Hub forbids it", "write token", "write scope"]),
    "the token of another": (None, None, "hf_other", ["the Hub forbids it", "allowed to write to"]),
    "a wrong token": (None, None, "hf_wrong", ["does not accept the token", "hf auth login"]),
    "no token": (None, None, None, ["the Hub does not accept the token", "hf auth login", "`token=`"]),
}


# --- what happens, in a process of its own ----------------------------------------------------------------------------


def fail(hub: Hub, folder: Path) -> dict:
    """A push that fails in each way, and is done again by what the message says."""
    from hf_adaptive_decode import AutoDecoForCausalLM
    from hf_adaptive_decode.errors import PushError
    from hf_adaptive_decode.hub.push import push_local
    from hf_adaptive_decode.testbed import load_base_model

    base, model, seen = load_base_model(), adapter(0.7), {}
    kept_in = folder / "kept"
    kept_in.mkdir()
    tempfile.tempdir = str(kept_in)
    for number, (what, (request, action, token, _)) in enumerate(FAILURES.items()):
        name = f"me/failing-{number}"
        hub.push(name, {"README.md": HAND_WRITTEN})
        hub.large.clear()
        if request:
            hub.before(*request, action)
        before = len(hub.repos[name].commits)
        try:
            model.push_to_hub(name, token=token)
            seen[what] = {"message": "nothing"}
            continue
        except PushError as error:
            kept, message, repo_id = error.folder, str(error), error.repo_id
        hub.rules.clear()
        commits = [len(hub.repos[name].commits) - before]
        loaded = AutoDecoForCausalLM.from_pretrained(kept, base_model=copy.deepcopy(base))
        addresses = []
        for _ in range(2):
            addresses.append(push_local(kept, name, token=TOKEN))
            commits.append(len(hub.repos[name].commits) - before)
        seen[what] = {
            "message": message,
            "folder": kept,
            "repository": repo_id,
            "mark": mark_of(loaded),
            "commits": commits,
            "addresses": addresses,
            "head": hub.repos[name].refs["refs/heads/main"],
            "files": sorted(hub.read(name)),
            "card": hub.read(name)["README.md"].decode(),
            "weights": hub.read(name)["model.safetensors"] == Path(kept, "model.safetensors").read_bytes(),
        }
        shutil.rmtree(kept)
    model.push_to_hub("me/going-well", token=TOKEN)
    return {"failures": seen, "left behind": [path.name for path in kept_in.iterdir()]}


def fill(hub: Hub, folder: Path) -> dict:
    """No room on this machine for the adapter; and a folder of one's own, whose push fails."""
    (folder / "full").mkdir()
    tempfile.tempdir = str(folder / "full")
    model = adapter(0.7)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    asked = len(hub.asked)
    no_room = said(model.push_to_hub, "me/heads", token=TOKEN)
    sent = hub.asked[asked:]
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    hub.before(*COMMIT, 503)
    mine = folder / "a place; of $(mine)"
    own = said(
        model.save_pretrained, mine, push_to_hub=True, repo_id="me/heads", revision="trial", private=True, token=TOKEN
    )
    return {
        "no room": no_room,
        "sent": sent,
        "left behind": [path.name for path in (folder / "full").iterdir()],
        "own folder": own,
        "expected": str(mine),
        "is there": sorted(path.name for path in mine.iterdir()),
    }


def gather(hub: Hub, folder: Path) -> dict:
    """What of a training run's folder goes up, and how a later push without its LoRA changes that."""
    from safetensors.torch import save_file

    from hf_adaptive_decode.hub.push import push_local
    from hf_adaptive_decode.hub.store import locate
    from hf_adaptive_decode.testbed import load_tokenizer

    mine, model = folder / "mine", adapter(0.7)
    model.save_pretrained(mine)
    with open(mine / "README.md", "a") as card:
        card.write("\nMy own words.\n")
    load_tokenizer().save_pretrained(mine)
    (mine / "additional_chat_templates").mkdir()
    (mine / "peft").mkdir()
    (mine / "checkpoint-1").mkdir()
    (mine / "additional_chat_templates" / "terse.jinja").write_text("{{ messages }}")
    (mine / "peft" / "adapter_config.json").write_text("{}")
    save_file({"lora": model.decoding_adapter.temperature_head.out.bias.data}, mine / "peft/adapter_model.safetensors")
    strays = (
        "optimizer.pt",
        "training_args.bin",
        "checkpoint-1/model.safetensors",
        "peft/adapter_model.bin",
        ".secret",
    )
    for stray in (*strays, "notes.txt"):
        (mine / stray).write_text("x")
    before = {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = push_local(mine, "gathered", token=TOKEN)
    files, commits = sorted(hub.read("me/gathered")), len(hub.repos["me/gathered"].commits)
    repeated = push_local(str(mine), "me/gathered", token=TOKEN, commit_message="again")
    commits = [commits, len(hub.repos["me/gathered"].commits)]
    lora = locate("me/gathered", cache_dir=folder / "cache").peft
    card = hub.read("me/gathered")["README.md"].decode()
    seen = {
        "files": files,
        "first": first,
        "repeated": repeated,
        "commits": commits,
        "warnings": [str(warning.message) for warning in caught],
        "is unchanged": before == {path: path.read_bytes() for path in mine.rglob("*") if path.is_file()},
        "lora": sorted(path.name for path in lora.iterdir()),
        "card": card,
    }
    model.push_to_hub("me/gathered", token=TOKEN)
    seen["without the lora"] = sorted(hub.read("me/gathered"))
    seen["lora then"] = locate("me/gathered", cache_dir=folder / "cache").peft
    request = push_local(mine, "me/gathered", token=TOKEN, create_pr=True)
    seen["of a branch"] = said(push_local, mine, "me/gathered", token=TOKEN, create_pr=True, revision="trial")
    seen["of nothing"] = said(push_local, mine, "me/gathered", token=TOKEN, revision="refs/pr/99")
    branch = push_local(mine, "me/gathered", token=TOKEN, revision="trial")
    refs = hub.repos["me/gathered"].refs
    theirs = push_local(mine, "me/gathered", token="hf_other", create_pr=True)
    seen["request of another"] = theirs.endswith(refs["refs/pr/2"])
    seen["request"] = [request.endswith(refs["refs/pr/1"]), "peft/adapter_config.json" in hub.read("me/gathered")]
    seen["branch"] = [branch.endswith(refs["refs/heads/trial"]), sorted(hub.read("me/gathered", "trial")) == files]
    seen["public"] = said(push_local, mine, "me/gathered", token=TOKEN, private=True)
    return seen


def spoil(hub: Hub, folder: Path) -> dict:
    """Folders that hold no whole adapter, none of which sends a request."""
    from hf_adaptive_decode.hub.push import push_local

    whole = folder / "whole"
    adapter(0.7).save_pretrained(whole)
    (folder / "diary.txt").write_text("private")

    def copied(name: str) -> Path:
        return Path(shutil.copytree(whole, folder / name))

    def link(path: Path) -> None:
        (path / "README.md").unlink()
        (path / "README.md").symlink_to(folder / "diary.txt")

    def link_lora(path: Path) -> None:
        (folder / "elsewhere").mkdir()
        (folder / "elsewhere" / "adapter_config.json").write_text("{}")
        (folder / "elsewhere" / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        (path / "peft").symlink_to(folder / "elsewhere")

    def halve(path: Path) -> None:
        (path / "peft").mkdir()
        (path / "peft" / "adapter_config.json").write_text("{}")

    def damage_lora(path: Path) -> None:
        halve(path)
        (path / "peft" / "adapter_model.safetensors").write_bytes(b"nonsense")

    def truncate(path: Path) -> None:
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-4])

    def misfit(path: Path) -> None:
        config = path / "config.json"
        config.write_text(config.read_text().replace('"head_hidden_size": 256', '"head_hidden_size": 128'))

    def unsaved(path: Path) -> None:
        config = path / "config.json"
        config.write_text(config.read_text().replace('"hidden_size": 128', '"hidden_size": null'))

    def pickle(path: Path) -> None:
        (path / "model.safetensors").rename(path / "pytorch_model.bin")

    seen = {}
    for spoiling in (link, link_lora, halve, damage_lora, truncate, misfit, unsaved, pickle, shutil.rmtree):
        path = copied(spoiling.__name__)
        spoiling(path)
        seen[spoiling.__name__] = said(push_local, path, "me/spoiled", token=TOKEN)
    return {**seen, "asked": list(hub.asked)}


ACTS = {act.__name__: act for act in (spoil, fail, fill, gather)}


# --- what is seen of it -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    return observe(__file__, tmp_path_factory.mktemp("hub"), *ACTS)


@pytest.fixture
def seen(everything, request):
    """What the act reported that the test's class is named after."""
    facts = everything[request.cls.__name__.removeprefix("Test").lower()]
    assert "failure" not in facts, facts["failure"]
    return facts


class TestFail:
    @pytest.mark.parametrize("what", FAILURES)
    def test_the_message_says_why_and_what_to_do(self, seen, what):
        message = seen["failures"][what]["message"]
        for part in FAILURES[what][3]:
            assert part in message
        assert TOKEN not in message

    @pytest.mark.parametrize("what", FAILURES)
    def test_the_adapter_is_kept_where_the_message_says(self, seen, what):
        facts = seen["failures"][what]
        assert f"It is kept in {facts['folder']};" in facts["message"]
        assert facts["mark"] == 0.7
        command = shlex.split(facts["message"].rpartition("run: ")[2])
        assert command == ["hf-adaptive-decode", "push", facts["folder"], facts["repository"]]

    @pytest.mark.parametrize("what", FAILURES)
    def test_done_again_it_arrives_once_and_whole(self, seen, what):
        facts = seen["failures"][what]
        assert facts["commits"] == ([1, 1, 1] if what == "the answer is lost" else [0, 1, 1])
        assert all(address.endswith(f"/{facts['repository']}/commit/{facts['head']}") for address in facts["addresses"])
        assert set(facts["files"]) == OWN
        assert facts["weights"]
        assert facts["card"].endswith("---\nWritten by hand.\n")
        assert "license: mit" in facts["card"]
        assert "library_name: hf_adaptive_decode" in facts["card"]

    def test_a_push_that_arrives_leaves_nothing_behind(self, seen):
        assert seen["left behind"] == []


class TestFill:
    def test_no_room_for_the_folder_sends_nothing_and_says_how_to_go_on(self, seen):
        assert seen["no room"].startswith("PushError: ")
        assert "nothing was sent" in seen["no room"]
        assert "hf-adaptive-decode push FOLDER me/heads" in seen["no room"]
        assert seen["sent"] == []
        assert seen["left behind"] == []

    def test_a_folder_of_ones_own_is_the_one_that_is_kept(self, seen):
        assert set(seen["is there"]) == OWN - {".gitattributes"}
        command = shlex.split(seen["own folder"].rpartition("run: ")[2])
        flags = ["--revision=trial", "--private"]
        assert command == ["hf-adaptive-decode", "push", seen["expected"], "me/heads", *flags]


class TestGather:
    def test_the_adapter_its_tokenizer_and_its_lora_go_up_and_nothing_else(self, seen):
        tokenizer = {"tokenizer.json", "tokenizer_config.json", "additional_chat_templates/terse.jinja"}
        lora = {"peft/adapter_config.json", "peft/adapter_model.safetensors"}
        assert set(seen["files"]) == OWN | tokenizer | lora
        assert "me/gathered/commit/" in seen["first"]
        (warning,) = [text for text in seen["warnings"] if text.startswith("not uploaded")]
        for stray in ("optimizer.pt", "training_args.bin", "checkpoint-1/model.safetensors", "peft/adapter_model.bin"):
            assert stray in warning
        assert ".secret" not in warning

    def test_the_folder_stays_as_it_is_and_its_card_goes_under_the_repositorys_name(self, seen):
        assert seen["is unchanged"]
        assert 'adapter = "me/gathered"' in seen["card"]
        assert seen["card"].endswith("\nMy own words.\n")
        assert "### The LoRA beside it" in seen["card"]

    def test_a_second_push_makes_no_commit(self, seen):
        assert seen["commits"] == [2, 2]
        assert seen["repeated"] == seen["first"]

    def test_a_lora_of_an_earlier_push_is_not_taken_for_this_adapters(self, seen):
        assert seen["lora"] == ["adapter_config.json", "adapter_model.safetensors"]
        assert not any("peft" in name for name in seen["without the lora"])
        assert "tokenizer.json" in seen["without the lora"]
        assert seen["lora then"] is None

    def test_branches_are_made_and_pull_requests_leave_the_branch_alone(self, seen):
        assert seen["request"] == [True, False]
        assert seen["request of another"]
        assert seen["branch"] == [True, True]

    def test_a_pull_request_takes_no_branch(self, seen):
        assert seen["of a branch"].startswith("ValueError: ")
        assert "create_pr" in seen["of a branch"]

    def test_a_reference_that_is_not_there_is_named(self, seen):
        assert seen["of nothing"].startswith("PushError: ")
        assert "refs/pr/99" in seen["of nothing"]

    def test_private_does_not_publish(self, seen):
        assert seen["public"].startswith("PushError: ")
        assert "is public already" in seen["public"]


class TestSpoil:
    @pytest.mark.parametrize(
        ("what", "parts"),
        {
            "link": ["README.md is a link to", "diary.txt"],
            "link_lora": ["peft/adapter_config.json is a link to"],
            "halve": ["without peft/adapter_model.safetensors"],
            "damage_lora": ["the LoRA in", "is damaged"],
            "truncate": ["model.safetensors is damaged"],
            "misfit": ["does not hold the policy that its config describes"],
            "unsaved": ["says no `hidden_size`"],
            "pickle": ["model.safetensors missing", "pytorch_model.bin"],
            "rmtree": ["is no folder"],
        }.items(),
    )
    def test_what_is_no_whole_adapter_is_refused(self, seen, what, parts):
        assert seen[what].startswith("AdapterLoadError: ")
        for part in parts:
            assert part in seen[what]

    def test_nothing_is_asked_of_the_hub_before_the_folder_is_checked(self, seen):
        assert seen["asked"] == []


if __name__ == "__main__":
    main(ACTS)

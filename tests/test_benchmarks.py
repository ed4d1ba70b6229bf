"""The benchmarks run at a size that takes seconds, take fair turns, and are reported as what they found."""

import json
import runpy
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import logging

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
sys.path.insert(0, str(FOLDER))

import contenders
import decoding
import measure
import models
import report
import report_plot
import turns
from run import FULL, QUICK

SPREAD = {"median", "min", "max", "q25", "q75", "n"}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a benchmark's command line in this process and gives its result file."""

    def script(name, *words):
        path = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--json", str(path), *words])
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
        return json.loads(path.read_text())

    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    yield script
    torch.set_num_threads(threads)
    logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def tiny():
    """A tiny adaptive model and transformers' own on the same weights."""
    return models.with_plain_twin(models.build_base("tiny", 200, torch.float32))


def every_summary(value):
    """The summaries within a result."""
    if isinstance(value, dict):
        if value.keys() >= SPREAD:
            yield value
        else:
            for inner in value.values():
                yield from every_summary(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from every_summary(inner)


def check_result(found):
    assert {"about", "settings", "targets", "cells", "skipped"} <= found.keys()
    assert {"device", "processor", "cores", "threads", "torch", "transformers", "python", "seed"} <= found[
        "about"
    ].keys()
    assert "load_average_at_start" in found["about"]
    summaries = list(every_summary(found["cells"]))
    assert summaries
    assert all(s["min"] <= s["q25"] <= s["median"] <= s["q75"] <= s["max"] and s["n"] >= 1 for s in summaries)


def test_the_warping_benchmark_runs(run):
    found = run("warping", *QUICK["warping"])
    check_result(found)
    places = {(c["kind"], c["logits"], c["rows"]) for c in found["cells"]}
    kinds = ("top-p", "top-k", "min-p", "T + top-p")
    assert places == {(kind, logits, rows) for kind in kinds for logits in ("peaked", "flat") for rows in (1, 4)}
    assert all(cell["ratios"].keys() == {"transformers / ours"} for cell in found["cells"])
    assert {cell["vocab"] for cell in found["growth"]} == {1024, 4096}
    assert found["peakedness"].keys() == {"peaked, 1 rows", "peaked, 4 rows", "flat, 1 rows", "flat, 4 rows"}


def test_the_decoding_benchmark_runs(run):
    found = run("decoding", *QUICK["decoding"])
    check_result(found)
    assert [(c["shape"], c["batch"], c["prompt"]) for c in found["cells"]] == [("tiny", 1, 16), ("tiny", 2, 40)]
    for cell in found["cells"]:
        assert cell["ms a token"].keys() == set(contenders.SETTINGS)
        pairs = ("adaptive / plain sampling", "adaptive / static T + top-p")
        assert cell["ratios"].keys() == {f"{pair}{what}" for pair in pairs for what in ("", ", same forward")}
        assert all({"low", "high"} <= value.keys() and value["n"] == 2 for value in cell["ratios"].values())
        assert cell["operations a token"]["adaptive"] > cell["operations a token"]["plain"]
    (model,) = found["models"]
    for side in ("plain", "adaptive"):
        assert model[f"operations counted / on paper, {side}"] == pytest.approx(1.0, rel=1e-3)
    assert model["adapter bytes"] == 4 * model["adapter parameters"]
    assert found["fixed_cost"]["ms a call"].keys() == set(contenders.SETTINGS)


def test_what_does_not_fit_is_listed_as_skipped(run):
    words = "--cells 8B:1:64 tiny:1:16 --rounds 1 --vocab 500 --max-memory-gib 0.1 --dtype float32"
    found = run("decoding", *words.split())
    assert [skipped["cell"] for skipped in found["skipped"]] == ["8B:1:64"]
    assert [cell["shape"] for cell in found["cells"]] == ["tiny"]


def test_greedy_goes_before_what_is_compared():
    small = models.cache_bytes("0.6B", 1, 4096, torch.float32)
    fits = {n: decoding.that_fit("0.6B", 1, 4096, torch.float32, (n + 0.5) * small, vocab=100) for n in (1, 2, 3, 4)}
    assert fits[1] == []
    assert fits[2] == [contenders.PLAIN, contenders.ADAPTIVE]
    assert fits[3] == [contenders.PLAIN, contenders.FIXED, contenders.ADAPTIVE]
    assert fits[4] == list(contenders.SETTINGS)


def test_the_training_benchmark_runs(run):
    found = run("training_step", *QUICK["training_step"])
    check_result(found)
    ratios = {(c["part"], c["logits"]): set(c["ratios"]) for c in found["cells"]}
    assert ratios.keys() == {
        ("a", "peaked"),
        ("a", "flat"),
        ("b", "peaked"),
        ("c", "peaked"),
        ("c", "flat"),
        ("d", "peaked"),
    }
    growth = found["cells"][-1]
    assert [point["tokens"] for point in growth["tokens"]] == [32, 64]
    assert [point["vocabulary"] for point in growth["vocabulary"]] == [1000, 2000]
    kinds = {f"{kind} over {over}" for kind in ("seconds", "bytes") for over in ("tokens", "vocabulary")}
    assert growth["ratios"].keys() == kinds


def test_the_profile_runs(run):
    found = run("profile_steps", *QUICK["profile_steps"])
    assert [(c["step"], c["contender"]) for c in found["cells"]] == [
        ("decoding", contenders.PLAIN),
        ("decoding", contenders.FIXED),
        ("decoding", contenders.ADAPTIVE),
        ("training", "heads"),
    ]
    for cell in found["cells"]:
        assert sum(part["share"] for part in cell["parts"].values()) == pytest.approx(1.0, abs=0.01)
        assert cell["bound"]["ms"] > 0
    assert {"heads", "warping", "drawing", "base: layers"} <= found["cells"][2]["parts"].keys()
    assert "heads" not in found["cells"][0]["parts"]
    assert all(cell["parts not found"] == [] for cell in found["cells"])


def test_all_of_it_runs_and_is_rendered(tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--quick", "--only", "startup", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((tmp_path / "startup.json").read_text())
    check_result(found)
    assert found["cells"][0]["needlessly loaded"] == []
    assert (tmp_path / "RESULTS.md").read_text() == report.render(tmp_path)
    assert (tmp_path / "RESULTS.png").stat().st_size > 1000


def test_the_parts_are_scripts():
    assert FULL.keys() == QUICK.keys() == set(report.PARTS)


def test_the_report_is_what_the_result_files_say():
    assert (FOLDER / "RESULTS.md").read_text(encoding="utf-8") == report.render(FOLDER / "results")


def test_every_section_renders_what_a_run_found(run, tmp_path):
    for name in ("warping", "decoding"):
        run(name, *QUICK[name])
    text = report.render(tmp_path)
    assert "## Warping" in text
    assert "## Decoding" in text
    assert "Not measured: no GPU." in text
    table = report.readme_table(report.load(tmp_path))
    assert "| milliseconds that" not in table  # of what was not measured there is no row
    assert "top-p of 8 rows" not in table
    assert report_plot.draw(report.load(tmp_path), tmp_path / "r.png")


def a_cell(value, **fields):
    summary = {"median": value, "min": value, "max": value, "q25": value, "q75": value, "n": 3}
    return {"logits": "flat", "kind": "top-p", "rows": 8, **fields, "ratios": {"transformers / ours": summary}}


def test_a_missed_target_is_said_in_words():
    wanted = [measure.target("transformers / ours", at_least=1.0, where={"logits": "flat"}, unless={"rows": 1})]
    result = {
        "targets": wanted,
        "cells": [a_cell(2.0), a_cell(0.5, rows=64), a_cell(0.1, rows=1), a_cell(0.2, logits="x")],
    }
    text = report.targets({"warping": result})
    assert "| 1 of 2 | **missed** |" in text
    assert "is to be at least 1 and is 0.5 (top-p, flat, 64 rows)." in text
    assert "0.1" not in text
    assert "0.2" not in text
    held = report.targets({"warping": result | {"cells": [a_cell(2.0)]}})
    assert "holds" in held
    assert "No target was missed." in held


def test_results_of_a_gpu_have_a_section_of_their_own(tmp_path):
    result = {
        "about": {},
        "targets": [],
        "cells": [a_cell(7.0, dtype="float32") | {"ms a call": {"ours": {"median": 1.0}}}],
    }
    result["cells"][0]["vocab"] = 1000
    result["peakedness"] = {"flat, 8 rows": {"largest probability": [0.1, 0.1, 0.1]}}
    (tmp_path / "NVIDIA-H200").mkdir()
    (tmp_path / "NVIDIA-H200" / "warping.json").write_text(json.dumps(result))
    text = report.render(tmp_path)
    assert "### NVIDIA-H200" in text
    assert "7.00 (7.00 to 7.00)" in text
    assert "no GPU." not in text


class Sleeps(torch.nn.Module):
    def forward(self, seconds):
        time.sleep(seconds)
        return seconds


def decoder_of(log, name, tokens, fails_at=None, model=None, seconds=0.0):
    model = model or Sleeps()

    def decode(streamer):
        streamer.put("prompt")
        for number in range(tokens):
            log.append((name, number))
            if number == fails_at:
                raise ValueError(name)
            model(seconds)
            streamer.put(number)
        streamer.end()

    return decode, model


def test_decoders_take_turns_token_by_token():
    log = []
    decoders = {name: decoder_of(log, name, tokens=6) for name in "abc"}
    seconds, _ = turns.in_turns(decoders, 6, 2, measure.Timer(), limit=60)
    rounds = [log[start : start + 3] for start in range(0, 18, 3)]
    assert [{number for _, number in r} for r in rounds] == [{n} for n in range(6)]
    assert ["".join(name for name, _ in r) for r in rounds] == ["cba", "bca", "acb", "cab", "bac", "abc"]
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("abc", 4)


def test_rounds_end_when_their_time_is_over():
    log = []
    decoders = {name: decoder_of(log, name, tokens=20) for name in "ab"}
    seconds, _ = turns.in_turns(decoders, 20, 1, measure.Timer(), limit=0, at_least=3)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys("ab", 3)


def test_a_tokens_forward_pass_is_timed_apart_and_each_decoders_own():
    model = Sleeps()
    decoders = {name: decoder_of([], name, 4, model=model, seconds=s) for name, s in (("a", 0.02), ("b", 0.0))}
    seconds, forward = turns.in_turns(decoders, 4, 0, measure.Timer(), limit=60)
    assert all(0.02 <= f <= s for f, s in zip(forward["a"], seconds["a"], strict=True))
    assert max(forward["b"]) < 0.02
    assert not model._forward_hooks


def test_a_decoder_that_fails_ends_them_all():
    log = []
    decoders = {"a": decoder_of(log, "a", 5), "b": decoder_of(log, "b", 5, fails_at=2)}
    with pytest.raises(ValueError, match="b"):
        turns.in_turns(decoders, 5, 0, measure.Timer(), limit=60)


@pytest.mark.parametrize("side", [0, 1], ids=["adaptive", "plain"])
def test_after_a_long_prompts_cache_only_the_last_token_is_read(tiny, side):
    model, lengths = tiny[side], []
    handle = model.get_input_embeddings().register_forward_hook(lambda _m, args, _o: lengths.append(args[0].shape[1]))
    cache = models.cache_after(model, 2, 29)
    found = model.generate(torch.ones(2, 30, dtype=torch.long), max_new_tokens=3, past_key_values=cache)
    handle.remove()
    assert lengths == [1, 1, 1]
    assert found.shape == (2, 33)
    assert cache.get_seq_length() == 32


def test_the_plain_model_has_the_adaptive_ones_weights(tiny):
    adaptive, plain = tiny
    own = {id(parameter) for parameter in adaptive.parameters()}
    assert all(id(parameter) in own for parameter in plain.parameters())
    assert not hasattr(plain, "decoding_adapter")
    ids = torch.ones(1, 5, dtype=torch.long)
    assert torch.equal(adaptive(ids).logits, plain(ids).logits)


def test_who_begins_changes_from_round_to_round():
    log = []
    seconds = measure.interleaved({name: lambda name=name: log.append(name) for name in "ab"}, 3, measure.Timer(), 0.0)
    assert "".join(log[-6:]) == "abbaba"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_a_ratio_is_taken_within_its_round():
    found = measure.ratio({"a": [2.0, 20.0, 200.0], "b": [1.0, 10.0, 100.0]}, "a", "b")
    assert (found["median"], found["min"], found["max"], found["low"], found["high"]) == (2.0, 2.0, 2.0, 2.0, 2.0)


def test_the_interval_of_a_median_narrows_and_holds_it():
    generator = torch.Generator().manual_seed(0)
    few, many = (torch.randn(n, generator=generator).tolist() for n in (10, 1000))
    (low_few, high_few), (low, high) = measure.median_interval(few), measure.median_interval(many)
    assert low < 0.0 < high
    assert high - low < 0.5 * (high_few - low_few)


def test_the_slope_of_a_power_law_is_its_exponent():
    amounts = [256, 512, 4096]
    assert measure.log_slope(amounts, [3.0 * n**1.5 for n in amounts]) == 1.5
    assert measure.log_slope(amounts, [7.0, 7.0, 7.0]) == 0.0


def test_peak_memory_is_what_was_taken_and_given_back():
    with measure.PeakMemory() as peak:
        torch.ones(16 << 20)
    assert 60 << 20 < peak.bytes < 90 << 20


def test_operations_on_paper_are_the_weights_and_the_attention():
    with torch.device("meta"):
        model = models.Qwen3ForCausalLM(models.configuration("4B", 1000))
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2) - model.get_input_embeddings().weight.numel()
    attention = 36 * 2 * 2 * 32 * 128 * 101
    assert models.base_flops("4B", 1000, 100) == 2 * matrices + attention
    assert models.parameter_count("4B", 1000) == sum(p.numel() for p in model.parameters())


def test_an_unknown_cell_is_refused():
    with pytest.raises(SystemExit, match="is no cell"):
        decoding.parse_cell("7B:1:64")


def test_a_dtype_that_was_asked_for_is_taken():
    assert contenders.pick_dtype("tiny", Namespace(dtype="bfloat16")) == torch.bfloat16


def test_the_readmes_table_has_the_medians_of_the_cells():
    cells = [a_cell(7.25, logits="peaked", dtype="float32"), a_cell(1.5, dtype="float32")]
    table = report.readme_table({"warping": {"cells": cells}})
    assert "| top-p of 8 rows: transformers / ours, time | 7.25 (7.25 to 7.25) | 1.50 (1.50 to 1.50) |" in table


def test_random_models_are_neither_flat_nor_certain():
    low, middle, high = models.peakedness(models.build_base("tiny", 2000, torch.float32))
    assert 0.05 < low < middle < high
    assert 0.2 < middle < 0.9

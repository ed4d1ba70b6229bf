"""lm-evaluation-harness takes a wrapped model as it is: likelihoods are the base's, generation is the adapter's."""

import json
from pathlib import Path

import pytest
import torch

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM
from hf_adaptive_decode.testbed import build_problems, load_base_model, load_tokenizer

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).parent / "lm_eval_tasks"
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def base():
    return load_base_model()


@pytest.fixture(scope="module")
def rows():
    problems = build_problems("test", 8)
    answers = [f"so {row['solution'][0]}" for row in problems]
    wrong = [["so 1", "so 40 2 no", f"+ 3 {answer}"] for answer in answers]
    return [
        {"prompt": row["prompt"], "target": answer, "choices": [answer, *others]}
        for row, answer, others in zip(problems, answers, wrong, strict=True)
    ]


@pytest.fixture
def run(rows, tokenizer, tmp_path, monkeypatch):
    """Responses of a model to a task, one an example and choice."""
    monkeypatch.chdir(tmp_path)  # where the tasks look for their data
    Path("problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # The harness asks pip what is installed, which takes longer than the rest.
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False)

    def run(model, task, **arguments):
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
        results = lm_eval.simple_evaluate(lm, tasks=[task], task_manager=manager, bootstrap_iters=0, **arguments)
        samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
        assert len(samples) == len(rows)
        return [[response[0] for response in sample["resps"]] for sample in samples], results["results"][task]

    return run


@pytest.fixture(scope="module")
def greedy(base, tokenizer, rows):
    """What the base writes by greedy search, prompt by prompt."""
    texts = []
    for row in rows:
        inputs = tokenizer(row["prompt"], return_tensors="pt")
        tokens = base.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
        texts.append([tokenizer.decode(tokens, skip_special_tokens=True)])
    return texts


def with_heads(temperature, top_p):
    """Heads that choose the same everywhere, given as what their sigmoids are of."""
    model = AutoDecoForCausalLM.from_base(load_base_model(), AutoDecoConfig(policy="heads"))
    adapter = model.decoding_adapter
    with torch.no_grad():
        for head, bias in ((adapter.temperature_head, temperature), (adapter.top_p_head, top_p)):
            head.out.weight.zero_()
            head.out.bias.fill_(bias)
    return model


def with_action(**action):
    config = AutoDecoConfig(policy="static", actions=[action])
    return AutoDecoForCausalLM.from_base(load_base_model(), config)


HOT, COLD, WIDE, NARROW = 40.0, -40.0, 40.0, -40.0  # T of 2 and 0, top-p of 1 and 0


def test_log_likelihoods_are_the_bases(run, base, tokenizer, rows):
    answers, results = run(with_heads(HOT, NARROW), "testbed_choose")
    right = 0
    for row, found in zip(rows, answers, strict=True):
        prompt = tokenizer(row["prompt"])["input_ids"]
        expected = []
        for choice in row["choices"]:
            tokens = torch.tensor(tokenizer(f"{row['prompt']} {choice}")["input_ids"])
            with torch.no_grad():
                scores = base(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
            places = range(len(prompt), len(tokens))
            expected.append(sum(float(scores[place - 1, tokens[place]]) for place in places))
        assert [value for value, _ in found] == pytest.approx(expected, abs=1e-4)
        right += expected[0] == max(expected)
    assert results["acc,none"] == pytest.approx(right / len(rows))
    assert 0 < right < len(rows)


def test_a_task_that_names_no_sampling_is_the_bases_greedy_search(run, greedy, rows):
    answers, results = run(with_heads(HOT, WIDE), "testbed_generate")
    assert answers == greedy
    right = sum(text == row["target"] for (text,), row in zip(greedy, rows, strict=True))
    assert results["exact_match,none"] == pytest.approx(right / len(rows))


def test_in_a_task_that_samples_the_adapter_chooses_what_the_task_does_not(run, greedy):
    narrow = with_heads(HOT, NARROW)
    assert run(narrow, "testbed_sample")[0] == greedy
    with narrow.disable_adapter():
        assert run(narrow, "testbed_sample")[0] != greedy
    assert run(with_heads(HOT, WIDE), "testbed_sample")[0] != greedy


def test_gen_kwargs_turn_a_greedy_task_into_one_that_samples(run, greedy):
    sampling = "do_sample=True,temperature=1.0"
    wide = run(with_heads(HOT, WIDE), "testbed_generate", gen_kwargs=sampling)[0]
    assert wide == run(with_heads(HOT, WIDE), "testbed_sample")[0] != greedy
    assert run(with_heads(HOT, NARROW), "testbed_generate", gen_kwargs=sampling)[0] == greedy


def test_a_greedy_action_is_greedy_though_the_task_samples(run, greedy):
    assert run(with_action(top_k=1), "testbed_sample")[0] == greedy
    assert run(with_action(top_k=0), "testbed_sample")[0] != greedy


def test_the_temperature_of_a_task_beats_the_adapters(run, greedy):
    as_asked = run(with_heads(HOT, WIDE), "testbed_sample")[0]
    assert run(with_heads(COLD, WIDE), "testbed_sample")[0] == as_asked != greedy
    assert run(with_action(temperature=0.0), "testbed_sample")[0] == as_asked


def test_where_a_task_samples_and_names_no_temperature_the_adapter_chooses_all(run, greedy):
    # The harness then passes a temperature of 0, which transformers refuses together with `do_sample=True`.
    sampling = {"gen_kwargs": {"do_sample": True}}
    hot, cold = with_heads(HOT, WIDE), with_heads(COLD, WIDE)
    assert run(cold, "testbed_generate", **sampling)[0] == greedy
    assert run(with_action(temperature=0.0), "testbed_generate", **sampling)[0] == greedy
    assert run(hot, "testbed_generate", **sampling)[0] != greedy
    as_hot = run(with_action(temperature=2.0), "testbed_generate", **sampling)[0]
    assert run(hot, "testbed_generate", **sampling)[0] == as_hot


def test_a_budget_is_a_generation_setting_like_others(run, tokenizer):
    texts, _ = run(with_heads(HOT, WIDE), "testbed_sample", gen_kwargs={"budget": 5})
    lengths = [len(tokenizer(text)["input_ids"]) for (text,) in texts]
    assert max(lengths) == 5

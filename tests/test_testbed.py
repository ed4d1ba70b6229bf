"""The testbed: its verifier, splits, author, tokenizer, training recipe and shipped weights."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_adaptive_decode import testbed
from hf_adaptive_decode.testbed import BASE_MODEL_PATH, build_problems, is_correct, testbed_reward, to_dataset
from hf_adaptive_decode.testbed.corpus import FORK_KINDS, AuthorSettings, generate_corpus, write_completion
from hf_adaptive_decode.testbed.forks import ForkRule, fork_kind
from hf_adaptive_decode.testbed.problems import EOS, TYPES, VOCABULARY, draw_problem, parse_prompt
from hf_adaptive_decode.testbed.quality import mode_accuracy, pass_rates, sample_completions
from hf_adaptive_decode.testbed.tasks import EOS_TOKEN_ID, in_training_split, split_of
from hf_adaptive_decode.testbed.train import TrainingSettings, batches, make_model, save, train

FLAWLESS = AuthorSettings(calc_bare=0.5, slips=dict.fromkeys(TYPES, 0.0), verdict_flip=0.0, give_up=0.0, longest=10_000)

problems = st.builds(
    lambda kind, seed: draw_problem(kind, random.Random(seed)), st.sampled_from(TYPES), st.integers(0, 10**9)
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return testbed.load_base_model()


@pytest.fixture(scope="module")
def tokenizer():
    return testbed.load_tokenizer()


RIGHT = [
    ("calc 42 - 10 + 3 - 7 =>", "so 28 <eos>"),
    ("calc 42 - 10 + 3 - 7 =>", "well - 10 32 + 3 35 - 7 28 so 28 <eos>"),
    ("run 42 - 10 - 3 =>", "- 10 32 - 3 29 so 29 <eos> <pad> <pad>"),
    # The working does not count, only the answer does.
    ("run 42 - 10 - 3 =>", "- 10 31 - 3 28 so 29 <eos>"),
    ("coin 4 7 46 - 6 =>", "- 6 40 2 8 32 4 no 3 12 28 0 yes so 3 4 <eos>"),
    # A solution that the author would not think of, with y = 0.
    ("coin 4 7 46 - 6 =>", "so 10 0 <eos>"),
    ("sign 42 10 3 = 35 =>", "- 10 32 + 3 35 so - + <eos>"),
]
WRONG = [
    ("calc 42 - 10 + 3 - 7 =>", "so 27 <eos>"),
    ("calc 42 - 10 + 3 - 7 =>", "28 <eos>"),
    ("calc 42 - 10 + 3 - 7 =>", "so <eos>"),
    ("calc 42 - 10 + 3 - 7 =>", "so 28 28 <eos>"),
    ("calc 42 - 10 + 3 - 7 =>", "so 27 so 28 <eos>"),
    ("calc 42 - 10 + 3 - 7 =>", "<eos> so 28 <eos>"),
    ("run 42 - 10 - 3 =>", "- 10 32 - 3 29 <eos>"),
    ("coin 4 7 46 - 6 =>", "so 3 5 <eos>"),
    ("coin 4 7 46 - 6 =>", "so 4 3 <eos>"),
    ("coin 4 7 46 - 6 =>", "so 3 <eos>"),
    ("sign 42 10 3 = 35 =>", "so + - <eos>"),
    ("sign 42 10 3 = 35 =>", "so 35 <eos>"),
]


@pytest.mark.parametrize(("prompt", "completion"), RIGHT)
def test_verifier_accepts(prompt, completion):
    assert is_correct(prompt, completion)


@pytest.mark.parametrize(("prompt", "completion"), WRONG)
def test_verifier_rejects(prompt, completion):
    assert not is_correct(prompt, completion)


@pytest.mark.parametrize(("prompt", "completion"), RIGHT)
def test_truncated_completion_earns_nothing(prompt, completion):
    words = completion[: completion.index(EOS)].split()
    for length in range(len(words) + 1):
        cut = words[:length]
        assert testbed_reward([prompt], [" ".join(cut)]) == [0.0]
        ids = [VOCABULARY.index(word) for word in cut]
        assert testbed_reward([prompt], [" ".join(cut)], completion_ids=[ids]) == [0.0]
    assert testbed_reward([prompt], [" ".join(words)], completion_ids=[[*ids, EOS_TOKEN_ID]]) == [1.0]


def test_reward_takes_trl_arguments_and_rejects_unpaired_ones():
    rows = build_problems("train", 8)
    texts = [f"so {row['solution'][0]} {EOS}" for row in rows]
    columns = {key: [row[key] for row in rows] for key in ("type", "solution")}
    assert testbed_reward(prompts=[row["prompt"] for row in rows], completions=texts, **columns) == [1.0] * 8
    with pytest.raises(ValueError, match="pair up"):
        testbed_reward(["a"], [])
    with pytest.raises(ValueError, match="completion_ids"):
        testbed_reward([rows[0]["prompt"]], texts[:1], completion_ids=[])


@pytest.mark.parametrize(
    "prompt",
    ["", "=>", "walk 1 - 2 =>", "run 1 -", "run - 1 =>", "run 1 2 - =>", "coin 0 7 4 - 1 =>", "sign 1 2 = 3 =>"],
)
def test_unreadable_prompt_is_named(prompt):
    with pytest.raises(ValueError, match="Not a prompt"):
        parse_prompt(prompt)


@given(problems)
def test_prompt_and_problem_are_two_spellings(problem):
    assert parse_prompt(problem.prompt) == problem
    assert problem.answers
    assert all(is_correct(problem.prompt, f"so {answer} {EOS}") for answer in problem.answers)
    assert set(problem.prompt.split()) <= set(VOCABULARY)
    assert len(problem.answers) == 1 or problem.type == "coin"


@given(problems, st.integers(0, 10**9))
def test_author_without_flaws_is_right_and_forks_are_where_the_rule_says(problem, seed):
    tokens = write_completion(problem, random.Random(seed), FLAWLESS)
    words = [token.text for token in tokens]
    if problem.type != "sign":  # the habit is a guess by design
        assert is_correct(problem.prompt, " ".join(words))
    assert all(token.right in (None, token.text) for token in tokens)
    written = write_completion(problem, random.Random(seed))
    for i, token in enumerate(written):
        assert (fork_kind(problem.type, i, written[i - 1].text) is not None) == (token.kind in FORK_KINDS), (i, written)
    assert {token.text for token in written} <= set(VOCABULARY)


def test_splits_are_disjoint_balanced_and_large_enough():
    seen = {split: {row["prompt"] for seed in (0, 1) for row in build_problems(split, seed=seed)}
            for split in ("train", "validation", "test")}  # fmt: skip
    for first, second in itertools.combinations(seen.values(), 2):
        assert not first & second
    rows = build_problems("test")
    assert len({row["prompt"] for row in rows}) == len(rows) >= 600
    assert {kind: sum(row["type"] == kind for row in rows) for kind in TYPES} == dict.fromkeys(TYPES, len(rows) // 4)
    assert [row["type"] for row in rows[:4]] == list(TYPES)
    shares = [split_of(draw_problem("run", random.Random(i)).prompt) for i in range(5000)]
    # Standard errors are .38 and .34 points; five of them either way.
    assert shares.count("test") / 5000 == pytest.approx(0.08, abs=0.02)
    assert shares.count("validation") / 5000 == pytest.approx(0.06, abs=0.02)


def test_problems_follow_their_seed():
    assert build_problems("validation", 40, seed=3) == build_problems("validation", 40, seed=3)
    assert build_problems("validation", 40, seed=3) != build_problems("validation", 40, seed=4)
    assert build_problems("test", 12) == build_problems("test", 40)[:12]
    assert {row["type"] for row in build_problems("test", 10, types=["coin"])} == {"coin"}
    for wrong in ({"split": "dev"}, {"split": "test", "types": ["sum"]}, {"split": "test", "types": []}):
        with pytest.raises(ValueError, match="Unknown"):
            build_problems(**wrong)
    with pytest.raises(ValueError, match="only about"):
        build_problems("test", 5000, types=["coin"])


def test_rows_become_a_dataset():
    rows = build_problems("train", 8)
    assert list(to_dataset(rows)) == rows


def test_corpus_follows_its_seed_and_stays_in_the_training_split():
    first, again, other = (list(itertools.islice(generate_corpus(s, in_training_split), 300)) for s in (0, 0, 1))
    assert first == again != other
    assert all(split_of(problem.prompt) == "train" for problem, _ in first)


def test_tokenizer_round_trips_everything_generated(tokenizer):
    texts = [f"{p.prompt} {' '.join(t.text for t in c)}" for p, c in itertools.islice(generate_corpus(5, bool), 2000)]
    encoded = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(encoded) == texts
    assert all(tokenizer.unk_token_id not in ids for ids in encoded)
    assert [len(ids) for ids in encoded] == [len(text.split()) for text in texts]
    assert tokenizer.decode(encoded[0], skip_special_tokens=True) == texts[0].replace(f" {EOS}", "")
    assert tokenizer.padding_side == "left"
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (EOS, EOS_TOKEN_ID)


def test_shipped_folder_is_small_safe_and_loads(model, tokenizer):
    files = {path.name: path.stat().st_size for path in BASE_MODEL_PATH.iterdir()}
    assert sum(files.values()) <= 4 * 2**20
    assert {name for name in files if not name.endswith(".json")} == {"model.safetensors"}
    assert AutoConfig.from_pretrained(BASE_MODEL_PATH).vocab_size == len(tokenizer) == len(VOCABULARY)
    assert not model.training
    generation = model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert not set(generation.to_diff_dict()) & {"do_sample", "temperature", "top_k", "top_p", "min_p"}


def test_import_stays_light():
    code = (
        "import sys, hf_adaptive_decode.testbed.corpus, hf_adaptive_decode.testbed.train, hf_adaptive_decode.testbed;"
        "sys.exit(bool({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_base_model_calculates(model):
    accuracy = mode_accuracy(model, documents=150)
    for kind, least in {"copy": 0.97, "result": 0.93, "product": 0.97, "difference": 0.9, "remainder": 0.85,
                        "verdict": 0.97, "answer": 0.97, "end": 0.99}.items():  # fmt: skip
        assert accuracy[kind] >= least, (kind, accuracy)
    assert accuracy["bare"] <= 0.5


def test_base_model_makes_decoding_matter(model, tokenizer):
    """Slack is at least three standard errors of 28 problems a type, about 25 points on a single greedy answer."""
    rows = build_problems("validation", 112)
    torch.manual_seed(0)
    greedy, hot, rule = (
        pass_rates(rows, sample_completions(model, tokenizer, rows, {"temperature": t}, n, fork_temperatures=forks))
        for t, n, forks in ((0.0, 1, None), (1.0, 4, None), (0.0, 4, {"opening": 2.0, "guess": 2.0}))
    )
    assert greedy["run"] >= 0.85 > 0.65 > hot["run"]
    assert greedy["calc"] <= 0.45
    assert greedy["coin"] <= 0.6
    assert rule["all"] >= max(greedy["all"], hot["all"]) + 0.08
    best_of_four = pass_rates(rows, sample_completions(model, tokenizer, rows, {"temperature": 1.0}, 4), k=4)
    assert best_of_four["sign"] > greedy["sign"] - 0.1
    assert best_of_four["all"] > hot["all"]


def test_greedy_does_not_reward_a_cut_coin(model, tokenizer):
    rows = build_problems("validation", 8, types=["coin"])
    completions = sample_completions(model, tokenizer, rows, {"temperature": 0.0}, max_new_tokens=4)
    assert pass_rates(rows, completions)["coin"] == 0.0


def test_fork_rule_is_greedy_off_the_forks():
    scores = torch.randn(4, len(VOCABULARY), generator=torch.Generator().manual_seed(0))
    rule = ForkRule(["calc", "run"], prompt_width=3, temperatures={"opening": 2.0})
    warped = rule(torch.zeros(4, 3, dtype=torch.long), scores)
    assert torch.equal(warped[:2], scores[:2] / 2.0)
    assert torch.equal(warped.argmax(-1), scores.argmax(-1))
    assert torch.isfinite(warped[2:]).sum(-1).tolist() == [1, 1]


def test_batches_carry_no_loss_on_prompts_and_padding():
    input_ids, labels = next(batches(TrainingSettings(batch_size=8)))
    arrow = VOCABULARY.index("=>")
    for ids, targets in zip(input_ids, labels, strict=True):
        start = ids.tolist().index(arrow) + 1
        assert (targets[:start] == -100).all()
        assert targets[start] == ids[start]
        assert ((targets == ids) | (targets == -100)).all()
        assert not (targets == 0).any()


@settings(max_examples=20)
@given(st.integers(1, 5000))
def test_learning_rate_stays_in_its_range(steps):
    recipe = TrainingSettings(steps=steps)
    rates = [recipe.rate_at(step) for step in range(steps)]
    assert all(0.0 < rate <= recipe.learning_rate for rate in rates)


def test_training_learns_and_repeats(tmp_path):
    recipe = TrainingSettings(seed=7, steps=12, batch_size=16, warmup_steps=2)
    (first, losses), (second, again) = train(recipe, progress=False), train(recipe, progress=False)
    assert losses == again
    assert sum(losses[-3:]) / 3 < losses[0] - 0.3
    for (name, left), right in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert not torch.equal(first.lm_head.weight, make_model(7).lm_head.weight)
    save(first, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.weight, first.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path).eos_token_id == loaded.config.eos_token_id

"""A base model of the testbed that knows commands: a few new words, an author who obeys them, and more training of the
shipped base on both; it knows no decoding policy.

`python -m hf_adaptive_decode.testbed.commands --output DIR` makes it. A command is the last thing that a prompt says,
as in `coin 4 7 46 - 6 => be steady`. Under a low-diversity command the author does what is habitual and never slips,
under a high-diversity one the choices vary more; without a command everything is as in the shipped base's corpus. The
folder `base/` is not touched.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .corpus import AUTHOR, AuthorSettings, Token, write_completion
from .problems import ARROW, PAD, SIGN_PATTERNS, VOCABULARY, Problem, draw_problem, parse_prompt
from .tasks import build_problems, in_training_split, testbed_reward
from .train import IGNORED, POOL_DOCUMENTS, TrainingSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

VERB: Final = "be"
# What an adapter may be trained with, and what is kept from it. The base knows all of these words.
COMMANDS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "train": {
        "low": ("be steady", "be certain", "be exact", "be strict"),
        "high": ("be varied", "be bold", "be fresh", "be free"),
    },
    "held_out": {"low": ("be calm", "be sure"), "high": ("be diverse", "be wild")},
}
WORDS: Final = (
    VERB,
    *(command.split()[-1] for part in COMMANDS.values() for kind in part.values() for command in kind),
)
AUTHORS: Final[dict[str | None, AuthorSettings]] = {
    None: AUTHOR,
    "low": replace(
        AUTHOR, calc_bare=0.9, slips=dict.fromkeys(AUTHOR.slips, 0.0), verdict_flip=0.0, give_up=0.0, guess_decay=3.0
    ),
    "high": replace(AUTHOR, calc_bare=0.25, guess_decay=0.4),
}
# How often each pattern is written where `sign` is a habit without a command.
SIGN_HABITS: Final[dict[str | None, dict[tuple[str, str], float]]] = {
    None: dict(SIGN_PATTERNS),
    "low": {signs: float(weight == max(SIGN_PATTERNS.values())) for signs, weight in SIGN_PATTERNS.items()},
    "high": dict.fromkeys(SIGN_PATTERNS, 0.25),
}
# Documents without a command, with a low-diversity and with a high-diversity one.
SHARES: Final[dict[str | None, float]] = {None: 0.4, "low": 0.3, "high": 0.3}
STEPS: Final = 2000


def split_command(prompt: str) -> tuple[str, str]:
    """
    A prompt without its command, and the command (empty if there is none).

    Example:
        >>> split_command("run 42 - 10 + 3 => be calm")
        ('run 42 - 10 + 3 =>', 'be calm')
    """
    plain, arrow, command = prompt.partition(ARROW)
    return plain + arrow, command.strip()


def build_command_problems(
    split: str, n: int, direction: str, words: str = "held_out", seed: int = 0
) -> list[dict[str, Any]]:
    """
    Problems of `build_problems` with a command behind each prompt, the commands taking turns.

    Args:
        split, n, seed: As `build_problems` takes them.
        direction (`str`): `"low"` or `"high"`.
        words (`str`): `"train"` or `"held_out"`, which commands.

    Returns:
        `list[dict]`: Rows with `prompt`, `type`, `solution` and the `command`; [`command_reward`] scores them.
    """
    commands = COMMANDS[words][direction]
    rows = build_problems(split, n, seed=seed)
    chosen = [commands[index % len(commands)] for index in range(n)]
    return [
        {**row, "prompt": f"{row['prompt']} {command}", "command": command}
        for row, command in zip(rows, chosen, strict=True)
    ]


def command_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """`testbed_reward` of prompts that may have a command; what is right does not depend on it."""
    return testbed_reward([split_command(prompt)[0] for prompt in prompts], completions, **columns)


def write_obeying(problem: Problem, direction: str | None, rng: random.Random) -> list[Token]:
    """
    One completion by the author who obeys a command.

    Args:
        problem (`Problem`): The problem to answer.
        direction (`str`, *optional*): `"low"`, `"high"`, or `None` for no command.
        rng (`random.Random`): The source of all randomness.
    """
    habits = SIGN_HABITS[direction]
    (wanted,) = rng.choices(list(habits), weights=list(habits.values()))
    while True:
        tokens = write_completion(problem, rng, AUTHORS[direction])
        # The corpus has its habit of signs built in, so another habit is had by drawing again.
        if problem.type != "sign" or tuple(token.text for token in tokens if token.kind == "sign") == wanted:
            return tokens


def command_corpus(seed: int) -> Iterator[tuple[str, list[Token]]]:
    """An endless stream of prompts, with and without commands, and completions; the same seed gives the same."""
    rng = random.Random(f"commands {seed}")
    kinds, weights = list(AUTHOR.shares), list(AUTHOR.shares.values())
    directions, shares = list(SHARES), list(SHARES.values())
    known = {kind: [c for part in COMMANDS.values() for c in part[kind]] for kind in ("low", "high")}
    while True:
        problem = draw_problem(rng.choices(kinds, weights)[0], rng)
        (direction,) = rng.choices(directions, shares)
        command = "" if direction is None else f" {rng.choice(known[direction])}"
        if in_training_split(problem.prompt):
            yield problem.prompt + command, write_obeying(problem, direction, rng)


def extended_tokenizer() -> PreTrainedTokenizerFast:
    """The shipped tokenizer with the words of the commands behind its own, one token each."""
    from tokenizers import AddedToken

    from . import load_tokenizer

    tokenizer = load_tokenizer()
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in WORDS])
    return tokenizer


def _batches(settings: TrainingSettings) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless `(input_ids, labels)` of documents of similar length, padded on the right; prompts carry no loss."""
    import torch

    index = {word: i for i, word in enumerate((*VOCABULARY, *WORDS))}
    documents, rng = command_corpus(settings.seed), random.Random(f"command batches {settings.seed}")
    while True:
        pool: list[tuple[list[int], int]] = []
        for text, completion in itertools.islice(documents, POOL_DOCUMENTS):
            prompt = text.split()
            pool.append(([index[word] for word in (*prompt, *(token.text for token in completion))], len(prompt)))
        pool.sort(key=lambda item: len(item[0]))
        chunks = [pool[i : i + settings.batch_size] for i in range(0, len(pool), settings.batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            ids = torch.full((len(chunk), max(len(row) for row, _ in chunk)), index[PAD])
            labels = torch.full_like(ids, IGNORED)
            for place, (row, prompt_length) in enumerate(chunk):
                ids[place, : len(row)] = torch.tensor(row)
                labels[place, prompt_length : len(row)] = ids[place, prompt_length : len(row)]
            yield ids, labels


def build_command_base(
    seed: int = 0, steps: int = STEPS, progress: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """
    The shipped base with new words in its vocabulary, trained on until it knows what they ask for.

    Args:
        seed (`int`): Seeds the corpus, the order of the batches and the new words' embeddings.
        steps (`int`): Updates; the default takes two to four minutes on one CPU thread.
        progress (`bool`): Whether to show a bar.

    Returns:
        `tuple`: The model, in evaluation mode, and its tokenizer.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    from . import load_base_model

    settings = TrainingSettings(seed=seed, steps=steps, learning_rate=1e-3, warmup_steps=50)
    tokenizer, model = extended_tokenizer(), load_base_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    for step, (ids, labels) in enumerate(
        tqdm(itertools.islice(_batches(settings), steps), total=steps, disable=not progress)
    ):
        optimizer.param_groups[0]["lr"] = settings.rate_at(step)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
        (total / settings.loss_scale).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval(), tokenizer


def entropy_under_commands(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: int = 100, words: str = "held_out", seed: int = 1
) -> dict[str, float]:
    """
    Mean entropy in nats of the model's next token, on the same texts about validation prompts under each direction.

    Args:
        model, tokenizer: What [`build_command_base`] returns.
        texts (`int`): How many prompts; their completions are the author's own without a command.
        words (`str`): `"train"` or `"held_out"`, which commands.
        seed (`int`): Seeds the prompts and the author.

    Returns:
        `dict`: Entropies by `"none"`, `"low"` and `"high"`.
    """
    import torch

    rng = random.Random(f"entropy {seed}")
    rows = build_problems("validation", texts, seed=seed)
    written = [" ".join(t.text for t in write_obeying(parse_prompt(row["prompt"]), None, rng)) for row in rows]
    found: dict[str, float] = {}
    for direction in ("none", "low", "high"):
        commands = [""] if direction == "none" else [f" {command}" for command in COMMANDS[words][direction]]
        total, count = 0.0, 0
        for index, (row, text) in enumerate(zip(rows, written, strict=True)):
            head = tokenizer(row["prompt"] + commands[index % len(commands)])["input_ids"]
            ids = torch.tensor([head + tokenizer(text)["input_ids"]])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits[0, len(head) - 1 : -1].log_softmax(-1)
            total += float(-(log_p.exp() * log_p).sum())
            count += len(log_p)
        found[direction] = total / count
    return found


def main(argv: list[str] | None = None) -> int:
    """
    The command line.

    Args:
        argv (`list[str]`, *optional*): The arguments, by default the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m hf_adaptive_decode.testbed.commands", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model and its tokenizer to")
    parser.add_argument("--seed", type=int, default=0, help="seed (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")

    import torch

    torch.set_num_threads(1)
    started = time.process_time()
    model, tokenizer = build_command_base(arguments.seed, arguments.steps, progress=True)
    seconds = time.process_time() - started
    model.save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    entropies = entropy_under_commands(model, tokenizer)
    shown = ", ".join(f"{name} {value:.3f}" for name, value in entropies.items())
    print(f"{seconds:.0f} CPU-seconds; mean entropy by command on the same texts: {shown}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())

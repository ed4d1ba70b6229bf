"""Trains the testbed's base model from generated text and reports how good it became; it knows no decoding policy.

`python -m hf_adaptive_decode.testbed.train --seed 0 --output DIR` makes the shipped weights. It runs on one thread,
because the tensors are so small that a second thread costs more than it brings.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .corpus import generate_corpus
from .problems import EOS, PAD, VOCABULARY
from .tasks import in_training_split

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

IGNORED = -100
# A batch holds about this many completion tokens on average; see `TrainingSettings.loss_scale`.
MEAN_COMPLETION = 20
# Documents are sorted by length within pools of this many, which keeps padding rare.
POOL_DOCUMENTS = 3200


@dataclass(frozen=True)
class TrainingSettings:
    """
    How the base model is trained.

    Args:
        seed (`int`): Seeds the corpus, the order of the batches and the initial weights.
        steps (`int`): Updates.
        batch_size (`int`): Documents an update, of similar length.
        learning_rate (`float`): Reached after the warm-up, held, and brought down linearly over the last part.
        warmup_steps (`int`): Length of the warm-up.
        decay_part (`float`): The part of all steps over which the learning rate falls to zero.
        weight_decay (`float`): AdamW's.
    """

    seed: int = 0
    steps: int = 6500
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_part: float = 0.4
    weight_decay: float = 0.01

    @property
    def loss_scale(self) -> float:
        """
        The constant that every batch's summed loss is divided by.

        Batches hold documents of similar length. Dividing by each batch's own number of tokens would give the tokens of
        short documents a larger gradient, and the model would learn short answers to be likelier than they are.
        """
        return float(self.batch_size * MEAN_COMPLETION)

    def rate_at(self, step: int) -> float:
        """The learning rate of one step."""
        falling = (self.steps - step) / max(self.decay_part * self.steps, 1.0)
        return self.learning_rate * min(1.0, (step + 1) / max(self.warmup_steps, 1), falling)


def make_model(seed: int = 0) -> PreTrainedModel:
    """
    A new model with random weights, 442,112 parameters.

    Args:
        seed (`int`): Seeds the weights.
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        # Three times the usual scale: at this width the usual one costs hundreds of steps before anything is copied.
        initializer_range=0.06,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(EOS),
        pad_token_id=VOCABULARY.index(PAD),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def batches(settings: TrainingSettings) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    Endless `(input_ids, labels)` of shape `[batch_size, longest of the batch]`, padded on the right.

    Prompts carry no loss: they are random, and there is nothing to learn in them.

    Args:
        settings (`TrainingSettings`): Seed and batch size.
    """
    import torch

    index = {word: i for i, word in enumerate(VOCABULARY)}
    documents = generate_corpus(settings.seed, in_training_split)
    rng = random.Random(f"batches {settings.seed}")
    while True:
        pool: list[tuple[list[int], int]] = []
        for problem, completion in itertools.islice(documents, POOL_DOCUMENTS):
            prompt = problem.prompt.split()
            pool.append(([index[w] for w in (*prompt, *(t.text for t in completion))], len(prompt)))
        pool.sort(key=lambda item: len(item[0]))
        chunks = [pool[i : i + settings.batch_size] for i in range(0, len(pool), settings.batch_size)]
        rng.shuffle(chunks)
        for chunk in chunks:
            width = max(len(ids) for ids, _ in chunk)
            input_ids = torch.full((len(chunk), width), index[PAD])
            labels = torch.full((len(chunk), width), IGNORED)
            for row, (ids, prompt_length) in enumerate(chunk):
                input_ids[row, : len(ids)] = torch.tensor(ids)
                labels[row, prompt_length : len(ids)] = input_ids[row, prompt_length : len(ids)]
            yield input_ids, labels


def train(settings: TrainingSettings, progress: bool = True) -> tuple[PreTrainedModel, list[float]]:
    """
    Train a new model.

    Args:
        settings (`TrainingSettings`): All of the recipe.
        progress (`bool`): Whether to show a bar.

    Returns:
        `tuple`: The model and the mean loss a completion token of each step.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from tqdm import tqdm

    model = make_model(settings.seed)
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    losses: list[float] = []
    bar = tqdm(itertools.islice(batches(settings), settings.steps), total=settings.steps, disable=not progress)
    for step, (input_ids, labels) in enumerate(bar):
        optimizer.param_groups[0]["lr"] = settings.rate_at(step)
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        targets = labels[:, 1:]
        total = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        (total / settings.loss_scale).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total.item() / int((targets != IGNORED).sum()))
        if step % 50 == 0:
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}")
    return model.eval(), losses


def save(model: PreTrainedModel, output: Path) -> None:
    """
    Write the folder that the Auto classes read: weights, configuration, plain generation settings and the tokenizer.

    Args:
        model (`PreTrainedModel`): The trained model.
        output (`Path`): The folder.
    """
    from transformers import GenerationConfig

    from .tokenizer import build_tokenizer

    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id
    )
    model.save_pretrained(output)
    build_tokenizer().save_pretrained(output)


def main(argv: list[str] | None = None) -> int:
    """
    The command line.

    Args:
        argv (`list[str]`, *optional*): The arguments, by default the process's own.
    """
    parser = argparse.ArgumentParser(prog="python -m hf_adaptive_decode.testbed.train", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0, help="the shipped weights are seed 0 (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=TrainingSettings.steps, help="updates (default: %(default)s)")
    parser.add_argument("--problems", type=int, default=300, help="validation problems in the report")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write settings, losses and the report here")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1 or arguments.problems < 1:
        parser.error("--steps and --problems must be at least 1")

    import torch

    from .quality import format_report, measure_quality
    from .tokenizer import build_tokenizer

    torch.set_num_threads(1)
    settings = TrainingSettings(seed=arguments.seed, steps=arguments.steps)
    started = time.process_time()
    model, losses = train(settings)
    seconds = time.process_time() - started
    save(model, arguments.output)
    report: dict[str, Any] = measure_quality(model, build_tokenizer(), problems=arguments.problems)
    report["training"] = {
        **asdict(settings),
        "cpu_seconds": round(seconds, 1),
        "final_loss": sum(losses[-100:]) / len(losses[-100:]),
    }
    print(format_report(report))  # noqa: T201
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""
What a training step costs in the first epoch, with and without an epoch cache, and in later ones; what is kept.

    python benchmarks/epoch_cache.py [--json FILE] [--shape 0.6B] [--vocab 151936] [--tokens 2048] [--rounds 5]

A step is the base's forward pass, the loss and its backward into the heads, by the code that the trainer runs: `plain`
keeps nothing, `first` is a step of the first epoch, with what is kept brought to disk, and `later` one of a later
epoch. All see the same tokens, whose targets the model itself drew, and take turns, round by round, so that a slow
minute hits all of them. Weights are random, the logits as peaked as a trained model's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measure import Timer, add_arguments, begin, faster_dtype, interleaved, ratio, shown, spread, target, write
from models import SHAPES, build_base, with_plain_twin

from hf_adaptive_decode import DecodeState
from hf_adaptive_decode.losses import DecodingLossConfig, chunked_decoding_loss
from hf_adaptive_decode.projection import FrozenProjection
from hf_adaptive_decode.training.epoch_cache import EpochCache, numbered

ROWS = 4  # sequences a step
KINDS = ("hidden", "distribution")
TARGETS = [
    target("later, distribution / plain", at_most=0.1),
    target("first, distribution / plain", at_most=1.15),
    target("first, hidden / plain", at_most=1.15),
]


class Steps:
    """Training steps on one batch of tokens, which is kept under other numbers of its rows each time."""

    def __init__(self, args: argparse.Namespace, model: Any, folder: Path) -> None:
        self.policy, self.projection = model.decoding_adapter, FrozenProjection(model)
        generator = torch.Generator().manual_seed(args.seed)
        length = args.tokens // ROWS + 1
        self.ids = torch.randint(1, args.vocab, (ROWS, length), generator=generator).to(args.device)
        hidden = self.projection.hidden_states(input_ids=self.ids)[:, :-1].flatten(0, 1)
        drawn = [
            torch.multinomial(self.projection.logits(part).float().softmax(-1), 1).squeeze(1)
            for part in hidden.split(64)
        ]
        self.targets = torch.cat(drawn)
        self.uniform = torch.rand(len(self.targets), generator=generator).to(args.device)
        labels = torch.cat([self.ids[:, :1], self.targets.view(ROWS, -1)], dim=1)
        rows = [{"input_ids": i.tolist(), "labels": own.tolist()} for i, own in zip(self.ids, labels, strict=True)]
        self.batches = args.rounds + 2
        data = numbered({"train": rows * self.batches})
        self.caches = {kind: EpochCache(kind, folder / kind, model, self.projection, data, "no") for kind in KINDS}
        self.next = {kind: count() for kind in KINDS}

    def predict(self, part: torch.Tensor, _logits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The policy."""
        parameters = self.policy(DecodeState(part))
        return parameters.temperature, parameters.top_p

    def first(self, kind: str | None) -> None:
        """A step of the first epoch; `None` keeps nothing."""
        hidden = self.projection.hidden_states(input_ids=self.ids)[:, :-1].flatten(0, 1)
        given = (hidden, self.targets, self.predict, self.projection.logits, DecodingLossConfig())
        if kind is None:
            chunked_decoding_loss(*given, mask_uniform=self.uniform).loss.backward()
            return
        cache = self.caches[kind]
        seen = cache.recorder()
        chunked_decoding_loss(*given, mask_uniform=self.uniform, observe=seen).loss.backward()
        cache.keep(self.numbers(next(self.next[kind]) % self.batches), hidden, seen)
        cache.commit()

    def later(self, kind: str) -> None:
        """A step of a later epoch."""
        how = {"mask_uniform": self.uniform, "num_items": None}
        found = self.caches[kind].loss(self.numbers(0), self.targets, self.predict, DecodingLossConfig(), **how)
        found.loss.backward()

    def numbers(self, batch: int) -> torch.Tensor:
        """Those of a batch's rows."""
        return torch.arange(ROWS) + ROWS * batch


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each step, and its ratios to the plain one."""
    dtype = faster_dtype(SHAPES[args.shape]["hidden_size"], 256, args.device)
    model, _ = with_plain_twin(build_base(args.shape, args.vocab, dtype, args.device, args.seed))
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        steps = Steps(args, model, Path(folder))
        contenders: dict[str, Any] = {"plain": lambda: steps.first(None)}
        contenders |= {f"first, {kind}": lambda kind=kind: steps.first(kind) for kind in KINDS}
        contenders |= {f"later, {kind}": lambda kind=kind: steps.later(kind) for kind in KINDS}
        seconds = interleaved(contenders, args.rounds, Timer(args.device))
        kept = {kind: cache.bytes_a_position for kind, cache in steps.caches.items()}
    return {
        "shape": args.shape,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes_a_position": kept,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratios": {f"{name} / plain": ratio(seconds, name, "plain") for name in contenders if name != "plain"},
    }


def main() -> None:
    """Parses the command line, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, rounds=5)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.6B")
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=2048, help="positions of a step; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where caches are put; the system's for temporary files by default")
    args = parser.parse_args()
    result = begin(args) | {"targets": TARGETS}
    cell = measure(args)
    for name, value in cell["ratios"].items():
        print(f"{name:30} {shown(value)}", flush=True)
    print(f"bytes a position: {cell['bytes_a_position']}; seconds of a plain step: {shown(cell['seconds']['plain'])}")
    write(args.json, result | {"cells": [cell], "ratios": cell["ratios"]})


if __name__ == "__main__":
    main()

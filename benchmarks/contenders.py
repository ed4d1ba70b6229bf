"""The decoders that are compared, on one model of one shape; knows `generate` and nothing of how long it takes."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from measure import Timer, available_bytes, faster_dtype
from models import (
    SHAPES,
    base_flops,
    build_base,
    cache_after,
    head_flops,
    parameter_count,
    peakedness,
    with_plain_twin,
)
from transformers.generation.streamers import BaseStreamer
from turns import Decoder

STATIC = {"temperature": 0.8, "top_p": 0.95}
OFF = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
ADAPTIVE, PLAIN, FIXED, GREEDY = "adaptive heads", "plain sampling", "static T + top-p", "greedy"
SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: OFF,
    FIXED: OFF | STATIC,
    ADAPTIVE: {},
    GREEDY: {"do_sample": False},
}


class Bench:
    """The wrapped model and its plain twin of one shape."""

    def __init__(self, shape: str, args: argparse.Namespace) -> None:
        self.shape, self.args = shape, args
        self.dtype = pick_dtype(shape, args)
        base = build_base(shape, args.vocab, self.dtype, args.device, args.seed)
        self.base_bytes = sum(p.numel() * p.element_size() for p in base.parameters())
        self.base_parameters = sum(p.numel() for p in base.parameters())
        self.adaptive, self.plain = with_plain_twin(base)
        self.timer = Timer(args.device)

    def model(self, name: str) -> Any:
        """Whose `generate` a contender is."""
        return self.adaptive if name.startswith(ADAPTIVE) else self.plain

    def decoder(self, name: str, batch: int, prompt: int, tokens: int, **how: Any) -> Decoder:
        """A function of a streamer that decodes so many tokens after a cache of `prompt` - 1 positions."""
        model = self.model(name)
        settings = SETTINGS[name.partition(",")[0]]
        generator = torch.Generator().manual_seed(self.args.seed)
        ids = torch.randint(1, self.args.vocab, (batch, prompt), generator=generator).to(self.args.device)
        is_static = "cache_implementation" in how

        def decode(streamer: BaseStreamer | None = None, cache: Any = None) -> Any:
            if cache is None and not is_static:
                cache = cache_after(model, batch, prompt - 1)
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                streamer=streamer,
                max_new_tokens=tokens,
                past_key_values=cache,
                **settings,
                **how,
            )

        return decode

    def about(self) -> dict[str, Any]:
        """Sizes and operations."""
        adapter = list(self.adaptive.decoding_adapter.parameters())
        counted, paper = self.counted_flops()
        return {
            "shape": self.shape,
            "dtype": str(self.dtype).removeprefix("torch."),
            "largest probability, 10/50/90 %": peakedness(self.plain),
            "base parameters": self.base_parameters,
            "base bytes": self.base_bytes,
            "adapter parameters": sum(p.numel() for p in adapter),
            "adapter bytes": sum(p.numel() * p.element_size() for p in adapter),
            "operations a token of the heads": head_flops(self.adaptive),
            "operations counted / on paper, plain": counted["plain"] / paper["plain"],
            "operations counted / on paper, adaptive": counted["adaptive"] / paper["adaptive"],
        }

    def counted_flops(self) -> tuple[dict[str, int], dict[str, int]]:
        """Operations of one token after 16 others, as torch counts them and as the formulas say."""
        from torch.utils.flop_counter import FlopCounterMode

        counted = {}
        for side, model, name in (("plain", self.plain, PLAIN), ("adaptive", self.adaptive, ADAPTIVE)):
            before = model.config._attn_implementation
            model.set_attn_implementation("eager")  # the fused one of a CPU is not counted
            with FlopCounterMode(display=False) as counter:
                self.decoder(name, 1, 17, 1)()
            model.set_attn_implementation(before)
            counted[side] = counter.get_total_flops()
        base = base_flops(self.shape, self.args.vocab, 16)
        return counted, {"plain": base, "adaptive": base + head_flops(self.adaptive)}


def pick_dtype(shape: str, args: argparse.Namespace) -> torch.dtype:
    """What was asked for, or what is faster here and fits."""
    if args.dtype != "auto":
        return getattr(torch, args.dtype)
    fits = 4 * parameter_count(shape, args.vocab) < 0.5 * available_bytes(args.device)
    return faster_dtype(SHAPES[shape]["hidden_size"], 8, args.device) if fits else torch.bfloat16

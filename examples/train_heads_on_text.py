"""
Trains a small language model on real text, then a temperature head on it, and asks what the head is worth.

    python examples/train_heads_on_text.py DATA [--fields question answer] [--minutes 4] [--json FILE]

DATA is a .jsonl file (the fields are joined) or a text file (documents are parted by empty lines). The documents are
split four ways: for the base model, for the head, to choose the best static temperature on, and to report on. Reported
is the held-out negative log-likelihood per token under the base at T=1, the best static temperature, the head's
temperature, and MeanShift (the head's own mean as a static temperature), with 95 % intervals over documents.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, logging

from hf_adaptive_decode import AutoDecoConfig, AutoDecoForCausalLM, AutoDecoTrainer, AutoDecoTrainingArguments
from hf_adaptive_decode.evaluation import bootstrap_interval
from hf_adaptive_decode.evaluation.likelihood import text_likelihood
from hf_adaptive_decode.evaluation.table import markdown_table
from hf_adaptive_decode.training.data import tokenized

GRID = [round(0.7 + 0.025 * step, 3) for step in range(25)]
BLOCK = 128


def read_documents(path: Path, fields: list[str]) -> list[str]:
    """The documents of a .jsonl or a text file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return [part.strip() for part in text.split("\n\n") if part.strip()]
    rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    return ["\n".join(str(row[field]) for field in fields) for row in rows]


def train_tokenizer(documents: list[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    named = dict(zip(("pad_token", "eos_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def train_base(documents: list[str], tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Qwen3ForCausalLM:
    """A small Qwen3, trained for `args.minutes` on blocks of the documents strung together."""
    torch.manual_seed(args.seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        intermediate_size=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    stream = [token for text in documents for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    blocks = torch.tensor(stream[: len(stream) // BLOCK * BLOCK]).view(-1, BLOCK)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    start, limit, spent = time.monotonic(), 60 * args.minutes, 0.0
    with tqdm(total=round(limit), desc="base model", unit="s") as bar:
        while spent < limit:
            # The rate falls with the time that is left, so the run ends annealed on any machine.
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1.0, 0.02 + spent / 15, 1.05 - spent / limit)
            batch = blocks[torch.randint(len(blocks), (16,))]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            now = time.monotonic() - start
            bar.update(min(round(now), bar.total) - bar.n)
            bar.set_postfix(loss=f"{loss.item():.3f}")
            spent = now
    return model.eval()


def train_head(
    base: Qwen3ForCausalLM, documents: list[str], tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace
) -> AutoDecoForCausalLM:
    """A temperature head, by plain cross entropy: likelihood is what will be asked of it."""
    torch.manual_seed(args.seed)
    model = AutoDecoForCausalLM.from_base(base, AutoDecoConfig(policy="heads", heads=["temperature"]))
    arguments = AutoDecoTrainingArguments(
        output_dir=str(args.output / "training"),
        num_train_epochs=args.head_epochs,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        dft_weight="off",
        easy_token_mask_ratio=0.0,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=args.seed,
    )
    dataset = [{"text": text} for text in documents]
    AutoDecoTrainer(model, arguments, train_dataset=dataset, processing_class=tokenizer).train()
    return model.eval()


def report(model: AutoDecoForCausalLM, choose: list[Any], test: list[Any]) -> dict[str, Any]:
    """NLL per token on `test`, with the static temperature chosen on `choose`."""
    chosen = GRID[int(np.argmin(text_likelihood(model, choose, GRID).static.sum(axis=0)))]
    mean = text_likelihood(model, choose, [1.0]).mean_temperature
    found = text_likelihood(model, test, [1.0, chosen, mean])
    columns = {
        "base, T=1": found.static[:, 0],
        f"best static, chosen on validation (T={chosen:g})": found.static[:, 1],
        f"MeanShift (T={mean:.3f})": found.static[:, 2],
        "learned temperature head": found.adapter,
    }
    per_document = found.tokens.mean()
    rows = []
    for name, nll in columns.items():
        gain = bootstrap_interval((nll - found.adapter) / per_document)
        rows.append({"decoder": name, "nll": float(nll.sum() / found.tokens.sum()), "head_gain": vars(gain)})
    return {"documents": len(test), "tokens": int(found.tokens.sum()), "unit": "nats per token", "rows": rows}


def main() -> None:
    """Trains, reports, saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--fields", nargs="+", default=["question", "answer"])
    parser.add_argument("--minutes", type=float, default=4.0, help="time to train the base model for")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--head-epochs", type=float, default=3)
    parser.add_argument("--max-documents", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("text_output"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    documents = read_documents(args.data, args.fields)
    random.Random(args.seed).shuffle(documents)
    documents = documents[: args.max_documents]
    if len(documents) < 20:
        parser.error(f"{args.data} holds {len(documents)} documents; 20 are the least that can be split four ways.")
    ends = [int(share * len(documents)) for share in (0.7, 0.85, 0.9)]
    for_base, for_head = documents[: ends[0]], documents[ends[0] : ends[1]]
    tokenizer = train_tokenizer(for_base, args.vocab)
    model = train_head(train_base(for_base, tokenizer, args), for_head, tokenizer, args)
    validation, test = (
        tokenized([{"text": text} for text in part], tokenizer, 512)
        for part in (documents[ends[1] : ends[2]], documents[ends[2] :])
    )
    result = report(model, validation, test)
    model.save_pretrained(args.output / "adapter")
    tokenizer.save_pretrained(args.output / "adapter")
    print(f"\n{result['documents']} held-out documents, {result['tokens']} tokens, {result['unit']}:\n")
    rows = []
    for row in result["rows"]:
        gain = row["head_gain"]
        shown = (
            ""
            if row["decoder"].startswith("learned")
            else f"{gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}]"
        )
        rows.append([row["decoder"], f"{row['nll']:.4f}", shown])
    print(markdown_table(["temperature", "NLL", "NLL saved by the head"], rows))
    if args.json:
        args.json.write_text(json.dumps({**result, "seed": args.seed, "minutes": args.minutes}, indent=2) + "\n")


if __name__ == "__main__":
    main()

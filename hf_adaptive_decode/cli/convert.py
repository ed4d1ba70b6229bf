"""`hf-adaptive-decode convert`: adapters and AutoDeco's released checkpoints into each other; knows flags alone."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

_FORMS = ("adapter", "released", "merged", "split")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is turned into what, and where it goes."""
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of an adapter or of a released checkpoint")
    parser.add_argument("target", metavar="TARGET", help="a new or empty folder; nothing is ever overwritten")
    parser.add_argument(
        "--to",
        required=True,
        choices=_FORMS,
        help="adapter: a released checkpoint's heads as an adapter of this library. released: an adapter's heads as "
        "AutoDeco's own code reads them. merged: heads and base model in one checkpoint, as AutoDeco's own vLLM reads "
        "them. split: a merged checkpoint as TARGET/base and TARGET/adapter",
    )
    parser.add_argument(
        "--base",
        metavar="FOLDER_OR_ID",
        help="the base model, by default the one that SOURCE names; for adapter and split what the adapter calls it",
    )
    parser.add_argument("--revision", help="branch, tag or commit of SOURCE on the Hub")
    parser.add_argument("--base-revision", help="branch, tag or commit of the base model on the Hub")
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE", help="largest file of a base model: 5GB, 500MB"
    )


def _size(text: str) -> str:
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        split_state_dict_into_shards_factory(
            {}, get_storage_size=len, filename_pattern="model{suffix}", max_shard_size=text
        )
        if float(text.strip()[:-2]) <= 0:
            raise ValueError
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no size above 0 with a unit, such as 5GB or 500MB") from error
    return text


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Converts, prints what was written and how it is used, and returns the folders with their files."""
    from transformers import logging

    from ..hub.merging import merge, split, to_adapter, to_released

    logging.set_verbosity_error()
    source, target = args.source, Path(args.target)
    revisions: dict[str, Any] = {"revision": args.revision, "base_revision": args.base_revision}
    size: dict[str, Any] = {"max_shard_size": args.max_shard_size}
    if args.to == "adapter":
        folders = {"adapter": to_adapter(source, target, base_name=args.base, **revisions)}
    elif args.to == "released":
        folders = {"released": to_released(source, target, base=args.base, **revisions)}
    elif args.to == "merged":
        folders = {"merged": merge(source, args.base, target, **size, **revisions)}
    else:
        base, adapter = split(source, target, base_name=args.base, **size, **revisions)
        folders = {"base": base, "adapter": adapter}
    say = sys.stderr if args.json == "-" else sys.stdout
    files = {}
    for name, folder in folders.items():
        files[name] = sorted(path.name for path in folder.iterdir())
        print(f"{name}: {folder} ({', '.join(files[name])})", file=say)
    return {
        "source": source,
        "to": args.to,
        "folders": {name: str(folder) for name, folder in folders.items()},
        "files": files,
    }

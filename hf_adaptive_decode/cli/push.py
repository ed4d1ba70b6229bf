"""`hf-adaptive-decode push`: an adapter's folder to the Hub; knows the flags, and nothing of how it is uploaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .config_file import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What goes where."""
    parser.epilog = (
        "The token is that of `hf auth login`, the environment's HF_TOKEN, or --token-file. It is no argument, since "
        "those can be read by whoever lists this machine's processes."
    )
    parser.add_argument("folder", help="the adapter's folder, as training or save_pretrained has written it")
    parser.add_argument("repo_id", metavar="REPO_ID", help="where it goes: you/name; made if it is not there")
    parser.add_argument("--revision", metavar="BRANCH", help="the branch to commit to; by default main")
    parser.add_argument(
        "--create-pr", action="store_true", help="open a pull request in place of a commit to the branch"
    )
    parser.add_argument("--commit-message", metavar="TEXT", help="what the commit is called")
    add_access_arguments(parser)


def add_access_arguments(group: Any) -> None:
    """Who may see the repository, and who is uploading."""
    group.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        help="whether a repository that is made is private; by default what the account or organisation says",
    )
    group.add_argument("--token-file", metavar="FILE", help="a file with the token; by default the login's")


def add_upload_arguments(group: Any) -> None:
    """For commands that train: whether to upload what came of it."""
    group.add_argument("--push-to-hub", metavar="REPO_ID", help="upload the adapter at the end, to you/name")
    add_access_arguments(group)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Uploads the folder; returns the commit's address."""
    how = {"revision": args.revision, "create_pr": args.create_pr}
    if args.commit_message is not None:
        how["commit_message"] = args.commit_message
    check_name(args.repo_id)
    return {"folder": args.folder, "repo_id": args.repo_id, "url": upload(args.folder, args.repo_id, args, **how)}


def check_name(repo_id: str) -> None:
    """
    Refuses a name that the Hub does not take.

    Raises:
        [`UsageError`]: If it is none.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(f"{repo_id!r} is no REPO_ID, which is such as you/name: {error}") from error


def check_upload(args: argparse.Namespace) -> None:
    """
    Refuses a `--push-to-hub` that would fail, before hours of training.

    Raises:
        [`UsageError`]: If the name is none that the Hub takes.
        `ValueError`: If the token's file cannot be read or holds no token, or the Hub is switched off.
    """
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if args.push_to_hub is None:
        return
    check_name(args.push_to_hub)
    _token(args)
    if HF_HUB_OFFLINE:
        raise ValueError(
            f"--push-to-hub {args.push_to_hub}: HF_HUB_OFFLINE=1 is set, which forbids it. Unset it, or leave the flag "
            "out and run `hf-adaptive-decode push` later."
        )


def upload(folder: str | Path, repo_id: str, args: argparse.Namespace, **how: Any) -> str:
    """Uploads an adapter's folder, and prints and returns the commit's address."""
    from ..hub.push import push_local

    address = str(push_local(str(folder), repo_id, token=_token(args), private=args.private, **how))
    print(address)
    return address


def _token(args: argparse.Namespace) -> str | None:
    if args.token_file is None:
        return None
    try:
        token = Path(args.token_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        # The error of a decoder would quote what it could not read.
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"--token-file {args.token_file} cannot be read: {why}") from None
    if not token or any(map(str.isspace, token)):
        raise ValueError(f"--token-file {args.token_file} has to hold one token and nothing else.")
    return token

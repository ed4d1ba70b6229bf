"""What of a command one process does for all that `accelerate launch` started; knows their environment, no command."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import Any


def is_main() -> bool:
    """Whether this process speaks and writes for all, or is the only one."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK", "0") == "0"


def main_first(arguments: Any) -> AbstractContextManager[None]:
    """Within it the main process has been before the others, which find what it left."""
    first: AbstractContextManager[None] = arguments.main_process_first(local=False)
    return first


def may_compare(model: Any) -> bool:
    """Whether the main process can go on alone with a trained model; says so where it cannot."""
    from ..sharding import is_sharded

    if not is_sharded(model):
        return is_main()
    print("\nThe base lies in parts over the processes, so nothing is compared here: see `evaluate --help`.")
    return False

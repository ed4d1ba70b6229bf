"""What a launcher starts in each process: a training on the table, as the launcher's environment says."""

from __future__ import annotations

import json
import os
import sys

import reinforce_runs

if __name__ == "__main__":
    rank, port, processes = (int(os.environ[name]) for name in ("RANK", "MASTER_PORT", "WORLD_SIZE"))
    reinforce_runs.on_table(rank, port, processes, sys.argv[1], json.loads(sys.argv[2]))

"""JSON Lines files that a process adds to until it is killed, and its successor goes on with; knows nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class AppendedLines:
    """
    A file of one JSON object a line. What [`~AppendedLines.append`] has returned from survives a kill.

    Args:
        path (`Path`): The file; begun with the first line if it is not there. A last line that was cut off in its
            writing is removed.

    Raises:
        `ValueError`: If a line is no JSON object; names file and line.

    Attributes:
        found (list of `dict`): The lines that were there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        self.found = [self._parse(line, number) for number, line in enumerate(content[:whole].splitlines(), start=1)]
        if whole < len(content):
            if not content[whole:].startswith(b"{"):
                raise ValueError(f"{path} is no JSON Lines file; choose another folder or delete the file.")
            os.truncate(path, whole)

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise ValueError(
                f"line {number} of {self.path} is damaged: it has to hold a JSON object; delete that line, which is "
                "then done again, or the file."
            )
        return entry

    def append(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines, all of them or (if killed) a beginning; on disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(entry) + "\n" for entry in entries).encode())
            file.flush()
            os.fsync(file.fileno())

"""JSON Lines files that a process adds to until it is killed, and its successor goes on with; knows nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class AppendedLines:
    """
    A file of one JSON object a line. What [`~AppendedLines.append`] has returned from survives a kill.

    Args:
        path (`Path`): The file; begun with the first line if it is not there. A last line that was cut off in its
            writing is removed.
        kept (`Callable`, *optional*): What of each line that was there stays in memory; all of it by default.

    Raises:
        `ValueError`: If a line is no JSON object; names file and line.

    Attributes:
        found (list of `dict`): The lines that were there, or what is kept of them.
        places (list of `int`): Where in the file each of them begins, in bytes.
    """

    def __init__(self, path: Path, kept: Callable[[Line], Line] = dict) -> None:
        self.path, self._end = path, 0
        self.found: list[Line] = []
        self.places: list[int] = []
        if not path.exists():
            return
        with path.open("rb") as file:  # line by line, since the texts of a long run would fill the memory
            for number, line in enumerate(file, start=1):
                if line.endswith(b"\n"):
                    self.found.append(kept(self._parse(line, f"line {number}")))
                    self.places.append(self._end)
                    self._end += len(line)
                elif not line.startswith(b"{"):
                    raise ValueError(f"{path} is no JSON Lines file; choose another folder or delete the file.")
        if self._end < path.stat().st_size:
            os.truncate(path, self._end)

    def _parse(self, line: bytes, name: str) -> Line:
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise ValueError(
                f"{name} of {self.path} is damaged: it has to hold a JSON object; delete that line, which is "
                "then done again, or the file."
            )
        return entry

    def append(self, entries: Iterable[Mapping[str, Any]]) -> list[int]:
        """Adds lines, all of them or (if killed) a beginning; on disk when this returns. Returns each one's place."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = [(json.dumps(entry) + "\n").encode() for entry in entries]
        try:
            with self.path.open("ab") as file:
                file.write(b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OSError(f"{self.path} could not be written: {error}; what it holds is gone on with.") from error
        places = []
        for line in lines:
            places.append(self._end)
            self._end += len(line)
        return places

    def read(self, place: int) -> Line:
        """The whole line at a place."""
        with self.path.open("rb") as file:
            file.seek(place)
            return self._parse(file.readline(), f"the line at byte {place}")

"""Control groups that bound all processes of a sandbox together, where this process may make them; knows no sandbox.

They come on top of the limits of each process: where none can be made, as for most users, everything still runs.
"""

from __future__ import annotations

import secrets
import time
from pathlib import Path
from typing import Final

ROOT: Final = Path("/sys/fs/cgroup")


class ControlGroup:
    """
    Groups below this process's own, of version 1 or 2.

    Args:
        memory (`int`): Bytes of all members together.
        processes (`int`): Processes and threads of all members together.

    Attributes:
        joins (`list[str]`): Files that a process writes its number to, to become a member; empty without groups.
    """

    def __init__(self, memory: int, processes: int) -> None:
        self._folders: list[Path] = []
        name = f"sandbox-{secrets.token_hex(8)}"
        settings_1 = {"memory": {"memory.limit_in_bytes": memory}, "pids": {"pids.max": processes}}
        settings_2 = {"memory.max": memory, "memory.swap.max": 0, "pids.max": processes}
        for controllers, path in _memberships():
            enabled = set() if controllers else set(_read(ROOT / path / "cgroup.subtree_control").split())
            if {"memory", "pids"} <= enabled:
                self._make(ROOT / path / name, settings_2)
            for controller in controllers & set(settings_1):
                self._make(ROOT / controller / path / name, settings_1[controller])
        self.joins = [str(folder / "cgroup.procs") for folder in self._folders]

    def close(self) -> None:
        """Removes the groups; their last members may still be ending."""
        for folder in self._folders:
            for _ in range(50):
                try:
                    folder.rmdir()
                    break
                except FileNotFoundError:
                    break
                except OSError:
                    time.sleep(0.01)
        self._folders = []

    def _make(self, folder: Path, settings: dict[str, int]) -> None:
        try:
            folder.mkdir()
        except OSError:
            return
        try:
            for name, value in settings.items():
                # A kernel without swap accounting has no such file.
                if (folder / name).exists():
                    (folder / name).write_text(str(value))
        except OSError:
            folder.rmdir()
            return
        self._folders.append(folder)


def _memberships() -> list[tuple[set[str], str]]:
    """The controllers of each hierarchy, none for version 2, and this process's path in it."""
    lines = [line.split(":", 2) for line in _read(Path("/proc/self/cgroup")).splitlines()]
    return [(set(filter(None, names.split(","))), path.strip("/")) for _, names, path in lines]


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""

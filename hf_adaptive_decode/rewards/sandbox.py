"""One process tree in a sandbox: its start, its pipes, its deadline and its certain end; knows nothing of what runs
inside or of any reward.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from .cgroups import ControlGroup
from .confinement import STARTED, Limits, SandboxUnavailableError, command, frame, working_sandbox

# How long the making of a sandbox may take, on a machine that is busy; a program's time begins afterwards.
START_TIMEOUT: Final = 60.0
_CHUNK: Final = 65536


class Sandboxed:
    """
    One process tree in a sandbox, with pipes to its first process; a context manager that kills what is left of it.

    Args:
        program (`str`): Source of a module with a function `run(payload)`, run inside.
        payload (`dict`): What it is given.
        limits ([`Limits`]): What it may use.
        sandbox (`str`, *optional*): `"bubblewrap"` or `"unshare"`, by default the first that works.

    Raises:
        [`SandboxUnavailableError`]: If no sandbox works here.
    """

    def __init__(self, program: str, payload: dict[str, Any], limits: Limits, sandbox: str | None = None) -> None:
        sandbox = sandbox or working_sandbox()
        self.deadline = time.monotonic() + START_TIMEOUT
        self._seconds = limits.seconds
        self._output_left = limits.output + len(STARTED)
        self._received = bytearray()
        self._outgoing = bytearray(frame(sandbox, program, payload, limits))
        self._group = ControlGroup(limits.total_memory, limits.processes + 4)
        try:
            self._process = subprocess.Popen(  # noqa: S603 (a list of arguments, made here)
                command(sandbox, self._group.joins, limits),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env={},
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            self._group.close()
            raise
        streams: tuple[Any, Any] = (self._process.stdin, self._process.stdout)
        self._stdin, self._stdout = streams
        for stream in streams:
            os.set_blocking(stream.fileno(), False)

    def __enter__(self) -> Sandboxed:
        try:
            started = self.receive_line() == STARTED.strip()
        except BaseException:
            self.kill()
            raise
        if not started:
            self.kill()
            raise SandboxUnavailableError(
                "A sandbox, which worked before, did not start. Is the machine out of memory?"
            )
        self.deadline = time.monotonic() + self._seconds
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def communicate(self, data: bytes) -> tuple[bytes, int] | None:
        """
        Gives the process all its input and takes its output and exit code.

        Args:
            data (`bytes`): The input.

        Returns:
            `tuple[bytes, int]`: Or `None` if it took too long or wrote too much.
        """
        self._outgoing += data
        if not self._pump(lambda: False, close_input=True):
            return None
        try:
            code = self._process.wait(max(self.deadline - time.monotonic(), 0.05))
        except subprocess.TimeoutExpired:
            return None
        return bytes(self._received), code

    def send_line(self, line: bytes) -> None:
        """Queues one line; it is written while a line is awaited."""
        self._outgoing += line + b"\n"

    def receive_line(self) -> bytes | None:
        """The next line of output, or `None` if there is none in time."""
        searched = 0

        def has_line() -> bool:
            nonlocal searched
            found = self._received.find(b"\n", searched) >= 0
            searched = len(self._received)
            return found

        self._pump(has_line, close_input=False)
        end = self._received.find(b"\n")
        if end < 0:
            return None
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        return line

    def kill(self) -> None:
        """Kills everything in the sandbox and reaps what was started here."""
        if self._process.poll() is None:
            # Process 1 of the namespace first, so that its parent reaps it rather than leave that to whoever is init.
            for child in _children(self._process.pid):
                _kill(child)
            try:
                self._process.wait(0.3)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()
        self._group.close()

    def _pump(self, done: Callable[[], bool], close_input: bool) -> bool:
        """Writes what is queued and reads until `done`, or the end of the output (`True`), or a limit (`False`)."""
        while not done():
            left = self.deadline - time.monotonic()
            if left <= 0:
                return False
            if close_input and not self._outgoing and not self._stdin.closed:
                self._stdin.close()
            poller = select.poll()
            poller.register(self._stdout.fileno(), select.POLLIN)
            if self._outgoing:
                poller.register(self._stdin.fileno(), select.POLLOUT)
            ready = dict(poller.poll(left * 1000))
            if self._outgoing and self._stdin.fileno() in ready:
                self._write()
            if self._stdout.fileno() in ready:
                data = os.read(self._stdout.fileno(), min(self._output_left + 1, _CHUNK))
                if not data:
                    return True
                self._received += data
                self._output_left -= len(data)
                if self._output_left < 0:
                    return False
        return True

    def _write(self) -> None:
        try:
            del self._outgoing[: os.write(self._stdin.fileno(), self._outgoing[:_CHUNK])]
        except BlockingIOError:
            pass
        except OSError:
            # It reads no more; what it wrote still counts.
            self._outgoing.clear()


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        return

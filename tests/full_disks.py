"""Places without room: files that cannot grow, and a file system of a few kilobytes that fills up."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import traceback
from collections.abc import Callable
from pathlib import Path

_NEWNS, _NEWUSER = 0x00020000, 0x10000000


@contextlib.contextmanager
def no_file_beyond(size: int):
    """Within it no file of this process grows beyond `size` bytes, whatever disk it is on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def in_a_child(job: Callable[[], None]) -> int:
    """Runs a job in a copy of this process, which so has imported everything; returns how that ended."""
    child = os.fork()
    if child == 0:
        try:
            job()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def mount_small(folder: Path, size: int) -> None:
    """Puts a file system of `size` bytes on a folder, seen by this process and its children alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    ids = {"uid_map": f"0 {os.getuid()} 1", "setgroups": "deny", "gid_map": f"0 {os.getgid()} 1"}
    if libc.unshare(_NEWUSER | _NEWNS) != 0:
        raise OSError(ctypes.get_errno(), "no namespace of its own")
    for name, text in ids.items():
        Path("/proc/self", name).write_text(text)
    if libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()) != 0:
        raise OSError(ctypes.get_errno(), "no file system could be mounted")


def can_mount(folder: Path) -> bool:
    """Whether this machine lets a process make such a file system."""

    def attempt():
        with contextlib.suppress(OSError):
            mount_small(folder, 1 << 16)
            os._exit(7)

    return in_a_child(attempt) == 7

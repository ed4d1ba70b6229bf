"""Runs once inside a sandbox and tries what must fail there; knows nothing but that."""

from __future__ import annotations

import os
import socket
import sys
from typing import Any


def run(payload: dict[str, Any]) -> None:
    """Says `confined` and the payload's secret if nothing succeeds that must not, and what must succeed does."""
    problems = []
    if payload["secret"] in os.environ.values():
        problems.append("the environment is inherited")
    # In the one case the identifier is a host's, in the other the first of a namespace.
    if os.getpid() > 5:
        problems.append("other processes are in sight")
    for folder in ("/proc/1", "/sys", "/etc/passwd", "/var"):
        if os.path.exists(folder):
            problems.append(f"{folder} is in sight")
    for folder in ("/", "/usr/lib", "/dev"):
        if can_write(folder):
            problems.append(f"{folder} can be written to")
    if not can_write("/tmp"):  # noqa: S108 (the sandbox's own)
        problems.append("no private folder can be written to")
    if not can_read("/dev/urandom") or not os.access("/dev/null", os.W_OK):
        problems.append("devices are missing")
    if not can_fork():
        problems.append("no process can be started")
    if has_network():
        problems.append("there is a network")
    if problems:
        sys.stderr.write("; ".join(problems))
        sys.exit(1)
    sys.stdout.write(f"confined {payload['secret']}")


def can_write(folder: str) -> bool:
    """Whether a file can be made in a folder."""
    path = os.path.join(folder, "probe")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError:
        return False
    os.unlink(path)
    return True


def can_read(path: str) -> bool:
    """Whether a file can be read."""
    try:
        with open(path, "rb") as file:
            return len(file.read(1)) == 1
    except OSError:
        return False


def can_fork() -> bool:
    """Whether a child can be made and waited for."""
    try:
        child = os.fork()
    except OSError:
        return False
    if child == 0:
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def has_network() -> bool:
    """Whether a packet finds a way out; connecting a datagram socket looks for a route and sends nothing."""
    for family, address in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as packet:
                packet.connect((address, 9))
        except OSError:
            continue
        return True
    return False

"""How a process is confined here: the limits, the two ways to make a sandbox, and which of them works on this machine;
knows nothing of what runs inside.

Both ways, bubblewrap and the namespaces of `unshare`, give a process a file system of its own (the interpreter and the
system's libraries, read-only; a small private /tmp), no network, no environment, no other processes to see, an
unprivileged user, a seccomp filter and hard resource limits. Where neither works, nothing runs.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Final

from ..errors import AdaptiveDecodeError

MEBIBYTE: Final = 1024**2
DEVICES: Final = ["/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"]
LIBRARIES: Final = ["/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64"]
ARCHITECTURES: Final = ("x86_64", "aarch64")
PROBE_TIMEOUT: Final = 20.0
# What a sandbox writes once it is locked, before it runs anything.
STARTED: Final = b"locked\n"


class SandboxUnavailableError(AdaptiveDecodeError, RuntimeError):
    """No sandbox works on this machine, and untrusted code is never run without one."""


@dataclass(frozen=True)
class Limits:
    """
    What one sandbox may use.

    Args:
        seconds (`float`): Wall time; then everything in the sandbox is killed. CPU time of each process is limited too.
        memory (`int`): Bytes of address space of each process.
        total_memory (`int`): Bytes of all processes and files together, where a control group can be made.
        processes (`int`): Processes and threads at a time.
        output (`int`): Bytes of output; then everything in the sandbox is killed.
        files (`int`): Bytes of the private /tmp.
        file (`int`): Bytes of one file.
    """

    seconds: float = 10.0
    memory: int = 512 * MEBIBYTE
    total_memory: int = 1024 * MEBIBYTE
    processes: int = 16
    output: int = MEBIBYTE
    files: int = 32 * MEBIBYTE
    file: int = 16 * MEBIBYTE

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be positive and finite. Got {value}.")

    def resources(self) -> dict[str, int]:
        """As setrlimit names and takes them."""
        return {
            "RLIMIT_AS": self.memory,
            "RLIMIT_CPU": int(self.seconds) + 1,
            "RLIMIT_NPROC": self.processes,
            "RLIMIT_FSIZE": self.file,
            "RLIMIT_NOFILE": 32,
            "RLIMIT_CORE": 0,
            "RLIMIT_MEMLOCK": 0,
            "RLIMIT_MSGQUEUE": 0,
        }


def working_sandbox() -> str:
    """
    The sandbox of this machine, tried out once a process: `"bubblewrap"` or `"unshare"`.

    Raises:
        [`SandboxUnavailableError`]: If neither works.
    """
    reasons = []
    for name in ("bubblewrap", "unshare"):
        reason = why_not(name)
        if reason is None:
            return name
        reasons.append(f"{name}: {reason}")
    raise SandboxUnavailableError(
        "Code is only run in a sandbox, and none works here. Install bubblewrap (`apt-get install bubblewrap`), or "
        f"allow user namespaces. What was tried: {'; '.join(reasons)}."
    )


@functools.cache
def why_not(sandbox: str) -> str | None:
    """
    Why a sandbox does not work on this machine, found by running a program in it that tries to get out.

    Args:
        sandbox (`str`): `"bubblewrap"` or `"unshare"`.

    Returns:
        `str`: The reason, or `None` if it works.
    """
    if sys.platform != "linux" or platform.machine() not in ARCHITECTURES:
        return f"needs Linux on {' or '.join(ARCHITECTURES)}, this is {sys.platform} on {platform.machine()}"
    tool = "bwrap" if sandbox == "bubblewrap" else sandbox
    if shutil.which(tool) is None:
        return f"`{tool}` is not installed"
    secret = secrets.token_hex(8)
    limits = Limits(seconds=PROBE_TIMEOUT)
    try:
        done = subprocess.run(  # noqa: S603
            command(sandbox, [], limits),
            input=frame(sandbox, module_text("_probe.py"), {"secret": secret}, limits),
            capture_output=True,
            timeout=PROBE_TIMEOUT,
            env={"HOME": secret},
            cwd="/",
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired, SandboxUnavailableError) as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if done.returncode == 0 and done.stdout == STARTED + f"confined {secret}".encode():
        return None
    said = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines() or [
        f"exit code {done.returncode}"
    ]
    return f"`{tool}` cannot make one ({said[-1][:200]})"


@functools.cache
def module_text(name: str) -> str:
    """
    The text of a module of this package, to be run inside.

    Args:
        name (`str`): Its file name.
    """
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _interpreter() -> str:
    # Of a virtual environment, the interpreter it was made from: the environment itself is not shown.
    base: str = sys._base_executable  # type: ignore[attr-defined]
    return os.path.realpath(base)


def _binds() -> tuple[list[str], list[list[str]]]:
    """Folders that the interpreter needs, and links among them as `[target, link]`."""
    prefix = os.path.realpath(sys.base_prefix)
    if Path(os.path.realpath(os.path.expanduser("~"))).is_relative_to(prefix):
        raise SandboxUnavailableError(
            f"The interpreter's folder {prefix} holds the home folder, so it cannot be shown."
        )
    links = [[os.readlink(path), path] for path in LIBRARIES if os.path.islink(path)]
    folders = [path for path in LIBRARIES if os.path.isdir(path) and not os.path.islink(path)]
    folders += [prefix, str(Path(_interpreter()).parent)]
    kept = [
        path for path in folders if not any(path != other and Path(path).is_relative_to(other) for other in folders)
    ]
    return sorted(set(kept)), links


def frame(sandbox: str, program: str, payload: dict[str, Any], limits: Limits) -> bytes:
    """
    What the process in the sandbox reads first: how to lock itself in, and what to run then.

    Args:
        sandbox (`str`): `"bubblewrap"` or `"unshare"`.
        program (`str`): Source of a module with a function `run(payload)`.
        payload (`dict`): What it is given.
        limits ([`Limits`]): What it may use.
    """
    binds, links = _binds()
    mounts = {"binds": binds, "links": links, "devices": DEVICES, "tmp_bytes": limits.files}
    job = {
        "mounts": mounts if sandbox == "unshare" else None,
        "user": 2**30 + secrets.randbelow(2**30) if os.geteuid() == 0 else None,
        "limits": limits.resources(),
        "program": program,
        "payload": payload,
    }
    data = json.dumps(job).encode()
    return b"%08x" % len(data) + data


def command(sandbox: str, joins: Sequence[str], limits: Limits) -> list[str]:
    """
    The command, as a list of arguments, that makes a sandbox and waits in it for a frame.

    Args:
        sandbox (`str`): `"bubblewrap"` or `"unshare"`.
        joins (`Sequence[str]`): Files of control groups to enter.
        limits ([`Limits`]): What it may use.
    """
    python = [_interpreter(), "-I", "-B", "-X", "utf8", "-c", module_text("_jail.py")]
    make = _bubblewrap(limits) if sandbox == "bubblewrap" else _unshare()
    return [*python, "enter", *joins, "--", *make, *python, "run"]


def _unshare() -> list[str]:
    # Root needs no user namespace to make the others, and without one it can become a user whose processes are counted.
    user = [] if os.geteuid() == 0 else ["--map-root-user"]
    kinds = ["--mount", "--pid", "--net", "--ipc", "--uts", "--cgroup"]
    return [_tool("unshare"), *user, *kinds, "--fork", "--kill-child=SIGKILL"]


def _bubblewrap(limits: Limits) -> list[str]:
    binds, links = _binds()
    kinds = ["--unshare-all"]
    if os.geteuid() == 0:
        kinds = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
        kinds += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    # Left to itself bubblewrap makes the folders above a bind as private as it finds them.
    above = sorted({str(folder) for path in [*binds, *DEVICES] for folder in Path(path).parents if str(folder) != "/"})
    files = [part for path in above if path not in binds for part in ("--perms", "0755", "--dir", path)]
    files += [part for path in binds for part in ("--ro-bind", path, path)]
    files += [part for target, link in links for part in ("--symlink", target, link)]
    files += [part for device in DEVICES for part in ("--dev-bind", device, device)]
    files += ["--perms", "1777", "--size", str(limits.files), "--tmpfs", "/tmp", "--remount-ro", "/"]  # noqa: S108
    return [_tool("bwrap"), *kinds, "--die-with-parent", "--new-session", "--clearenv", "--chdir", "/", *files, "--"]


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise SandboxUnavailableError(f"`{name}` is not installed.")
    return os.path.realpath(path)

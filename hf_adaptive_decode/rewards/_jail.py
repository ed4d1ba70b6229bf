"""Runs inside the sandbox before anything else and locks the door: mounts, limits, privileges, system calls; knows
nothing of what it then runs.

Its text is handed to a fresh interpreter with `-c`, so it uses the standard library alone and no module of ours. Every
step that fails ends the process: nothing runs in half a sandbox.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MNT_DETACH = 2, 4, 4096, 16384, 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
SYS_MOUNT_SETATTR = 442
# Mounted over in the sandbox's own mount namespace; nothing below it is needed afterwards.
STAGE = "/proc"


def check(result: int, what: str) -> None:
    """Raises the system's error for a call that failed."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def main() -> None:
    """`-c TEXT enter CGROUP.PROCS... -- COMMAND...` outside, `-c TEXT run` inside."""
    if sys.argv[1] == "enter":
        enter(sys.argv[2:])
    job = json.loads(read_frame())
    if job["mounts"] is not None:
        build_root(**job["mounts"])
        become_child()
    limit(job["limits"])
    drop_privileges(job["user"])
    filter_system_calls()
    os.chdir("/tmp")  # noqa: S108 (the sandbox's own)
    os.write(1, b"locked\n")
    module: dict[str, Any] = {"__name__": "runner"}
    exec(compile(job["program"], "<runner>", "exec"), module)  # noqa: S102 (this is what the sandbox is for)
    module["run"](job["payload"])


def enter(arguments: list[str]) -> None:
    """Outside: dies with the parent, joins the control groups, becomes the command that makes the sandbox."""
    split = arguments.index("--")
    check(LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "PR_SET_PDEATHSIG")
    for path in arguments[:split]:
        with open(path, "w") as file:
            file.write(str(os.getpid()))
    command = arguments[split + 1 :]
    os.execve(command[0], command, {})  # noqa: S606 (an argument list, no shell; and no environment)


def read_frame() -> bytes:
    """Eight hexadecimal digits and as many bytes, read without buffering: what follows belongs to the program."""
    return read_exactly(int(read_exactly(8), 16))


def read_exactly(size: int) -> bytes:
    """`size` bytes of the standard input."""
    data = b""
    while len(data) < size:
        more = os.read(0, size - len(data))
        if not more:
            raise EOFError("The job ended early.")
        data += more
    return data


def build_root(binds: list[str], links: list[list[str]], devices: list[str], tmp_bytes: int) -> None:
    """A root of our own: the given folders read-only, a few devices, a private /tmp, and nothing else."""
    mount("tmpfs", STAGE, "tmpfs", MS_NOSUID, "mode=755,size=1m")
    for source in binds:
        os.makedirs(STAGE + source, exist_ok=True)
        mount(source, STAGE + source, None, MS_BIND | MS_REC)
    for target, link in links:
        os.symlink(target, STAGE + link)
    os.mkdir(STAGE + "/dev")
    for device in devices:
        os.close(os.open(STAGE + device, os.O_CREAT | os.O_WRONLY, 0o600))
        mount(device, STAGE + device, None, MS_BIND)
    os.mkdir(STAGE + "/tmp")  # noqa: S108
    # struct mount_attr: what to set, what to clear, propagation, user namespace. 0x8000 is AT_RECURSIVE.
    attributes = struct.pack("QQQQ", 0x1 | 0x2, 0, 0, 0)
    pointer = ctypes.c_char_p(attributes)
    check(LIBC.syscall(SYS_MOUNT_SETATTR, -100, STAGE.encode(), 0x8000, pointer, ctypes.c_size_t(32)), "read-only root")
    mount("tmpfs", STAGE + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=1777,size={tmp_bytes},nr_inodes=4096")  # noqa: S108
    os.chdir(STAGE)
    check(LIBC.pivot_root(b".", b"."), "pivot_root")
    check(LIBC.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")


def mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """The system call, with its error raised."""
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    check(LIBC.mount(*texts, ctypes.c_ulong(flags), None if data is None else data.encode()), f"mount {target}")


def become_child() -> None:
    """Returns in a child. Process 1 stays behind, reaps, and ends with the child, which ends all there is."""
    child = os.fork()
    if child == 0:
        return
    os.closerange(0, 3)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = 0
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            os._exit(1)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def limit(limits: dict[str, int]) -> None:
    """The resource limits, hard ones."""
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, name), (value, value))


def drop_privileges(user: int | None) -> None:
    """
    Becomes an unprivileged user if it is root, gives up all capabilities, and can never gain any.

    A number that nobody else uses is tried first: limits on processes are counted by user, and root has none.
    """
    os.umask(0o077)
    for capability in range(64):
        if LIBC.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) < 0 and ctypes.get_errno() == errno.EINVAL:
            break
    if user is not None:
        os.setgroups([])
        try:
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        except OSError:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
    header, none = struct.pack("Ii", 0x20080522, 0), bytes(24)
    check(LIBC.capset(header, none), "capset")
    check(LIBC.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "PR_SET_NO_NEW_PRIVS")
    check(LIBC.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE")


# By architecture: its audit number, clone, clone3, socket, and the calls that are refused. Refused are ways to new
# namespaces and mounts, to memory that no limit counts, to other processes, and to rarely used corners of the kernel.
NUMBERS = {
    "x86_64": (
        0xC000003E, 56, 435, 41,
        # unshare setns mount umount2 pivot_root chroot memfd_create memfd_secret shmget msgget ptrace process_vm_*
        # keyctl add_key request_key bpf userfaultfd perf_event_open io_uring_* open_by_handle_at
        [272, 308, 165, 166, 155, 161, 319, 447, 29, 68, 101, 310, 311,
         250, 248, 249, 321, 323, 298, 425, 426, 427, 304],
    ),
    "aarch64": (
        0xC00000B7, 220, 435, 198,
        [97, 268, 40, 39, 41, 51, 279, 447, 194, 186, 117, 270, 271, 219, 217, 218, 280, 282, 241, 425, 426, 427, 265],
    ),
}  # fmt: skip
# The mount API of newer kernels, with the same numbers everywhere: open_tree move_mount fsopen fsconfig fsmount fspick
# mount_setattr.
NEW_MOUNT_CALLS = [428, 429, 430, 431, 432, 433, 442]
NEW_NAMESPACES = 0x7E020000
ALLOWED_SOCKETS = (1, 2, 10)  # unix, inet, inet6: the first two kinds of networks end at the namespace


def filter_system_calls() -> None:
    """A seccomp filter over this process and all its children."""
    audit, clone, clone3, socket, refused = NUMBERS[platform.machine()]
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, allow, fail, missing = 0x80000000, 0x7FFF0000, 0x00050000 | errno.EPERM, 0x00050000 | errno.ENOSYS
    code = [(load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill), (load, 0, 0, 0)]
    # x86_64 has a second set of numbers for 32-bit pointers.
    code += [(at_least, 0, 1, 0x40000000), (give, 0, 0, kill)]
    for number in refused + NEW_MOUNT_CALLS:
        code += [(equal, 0, 1, number), (give, 0, 0, fail)]
    code += [(equal, 0, 1, clone3), (give, 0, 0, missing)]
    code += [
        (equal, 0, 4, clone),
        (load, 0, 0, 16),
        (any_bit, 0, 1, NEW_NAMESPACES),
        (give, 0, 0, fail),
        (give, 0, 0, allow),
    ]
    code += [(equal, 0, 2 + len(ALLOWED_SOCKETS), socket), (load, 0, 0, 16)]
    code += [(equal, len(ALLOWED_SOCKETS) - i, 0, family) for i, family in enumerate(ALLOWED_SOCKETS)]
    code += [(give, 0, 0, fail), (give, 0, 0, allow)]
    text = b"".join(struct.pack("HBBI", operation, yes, no, value) for operation, yes, no, value in code)
    buffer = ctypes.create_string_buffer(text, len(text))
    program = struct.pack("HxxxxxxQ", len(code), ctypes.addressof(buffer))
    check(LIBC.prctl(PR_SET_SECCOMP, 2, ctypes.c_char_p(program), 0, 0), "seccomp")


if __name__ == "__main__":
    main()

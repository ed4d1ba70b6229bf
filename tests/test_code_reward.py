"""Programs in the sandbox: right ones earn their reward; hostile ones earn nothing, escape nothing and leave nothing."""
# ruff: noqa: E501 (programs on one line)

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from hf_adaptive_decode.errors import AdaptiveDecodeError
from hf_adaptive_decode.rewards import SandboxUnavailableError, code_reward, confinement, sandbox
from hf_adaptive_decode.rewards import code as code_module
from hf_adaptive_decode.rewards.cgroups import ControlGroup
from hf_adaptive_decode.rewards.code import extract_program

LIMIT = 2.0
# Starting a sandbox does not count as the program's time.
START = 1.5


@pytest.fixture
def any_kind():
    """For what does not depend on the sandbox: the first one that works here."""
    try:
        return confinement.working_sandbox()
    except SandboxUnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["bubblewrap", "unshare"])
def kind(request, monkeypatch):
    """Each sandbox that works here, with a mark on the command line of every process in it."""
    reason = confinement.why_not(request.param)
    if reason is not None:
        pytest.skip(f"no {request.param} sandbox on this machine: {reason}")
    mark = f"# mark {uuid.uuid4().hex}"
    text = confinement.module_text
    monkeypatch.setattr(confinement, "module_text", lambda name: text(name) + (mark if name == "_jail.py" else ""))
    for module in (sandbox, code_module):
        monkeypatch.setattr(module, "working_sandbox", lambda: request.param)
    yield request.param
    assert processes_with(mark) == []


def processes_with(mark, patience=1.0):
    """Processes, zombies among our children included, that are still there after a moment."""
    end = time.monotonic() + patience
    while True:
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and mark.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:
                continue
        found += zombies()
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.02)


def zombies():
    found = []
    for folder in Path("/proc").iterdir():
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except (OSError, ValueError):
            continue
        if state == "Z" and int(parent) == os.getpid():
            found.append(int(folder.name))
    return found


def score(program, tests, **arguments):
    return code_reward(completions=[program], tests=[tests], **{"timeout": LIMIT, **arguments})[0]


def prints(output, given=""):
    return [{"input": given, "output": output}]


# Right and wrong programs

DOUBLE = "def f(x):\n    return 2 * x\n"


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (DOUBLE, "assert f(2) == 4\nassert f('ab') == 'abab'"),
        (DOUBLE, ["assert f(2) == 4", "assert not f(0)", "assert f(1)"]),
        (DOUBLE, "import math\nassert math.isclose(f(0.1), 0.2)\nassert abs(f(0.1) - 0.2) < 1e-9 and f(1) in (1, 2)"),
        (DOUBLE, "assert math.isclose(f(0.1), 0.2), 'without an import'"),
        (DOUBLE, "def check(candidate):\n    for i in range(5):\n        assert candidate(i) == 2 * i\ncheck(f)"),
        (DOUBLE, "from solution import f\nassert f(3) == 6"),
        (DOUBLE, "from solution import f as g\ndef check(f):\n    assert f(3) == 6\ncheck(g)"),
        (DOUBLE, "def check(f):\n    x = f(3)\n    assert x == 6\ncheck(f)"),
        (DOUBLE, "assert f(float('inf')) == float('inf') and f(2**200) == 2**201 and f(1j) == 2j and f(b'a') == b'aa'"),
        ("def f(x):\n    return {(1, 'a'): {x}, None: [True, ()]}", "assert f(2) == {(1, 'a'): {2}, None: [True, ()]}"),
        ("def f(x):\n    x.sort()", "a = [3, 1]\nf(a)\nassert a == [1, 3]"),
        ("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]\nassert next(f(1)) == 0"),
        ("from collections import Counter\ndef f(x):\n    return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
        (
            "def f(x):\n    if x < 0:\n        raise ValueError('negative')\n    return x",
            "try:\n    f(-1)\n    assert False\nexcept ValueError as error:\n    assert 'negative' in str(error)\nassert f(1) == 1",
        ),
        ("LIMIT = 7\nprint('noise')\ndef f():\n    print('noise')\n    return LIMIT", "assert f() == LIMIT == 7"),
        ("if __name__ == '__main__':\n    input()\ndef f():\n    return 1", "assert f() == 1"),
        ("print(sum(map(int, input().split())))", prints("6\n", "1 2 3\n")),
        (
            "import sys\nfor line in sys.stdin:\n    print(line.strip()[::-1] + '  ')\nprint()",
            prints("ba\ndc", "ab\ncd"),
        ),
        ("import sys\nprint(len(sys.stdin.read()))\nsys.exit(0)", prints("300000", "x" * 300_000)),
        ("import threading\nt = threading.Thread(target=print, args=(5,))\nt.start()", prints("5")),
        ("open('a.txt', 'w').write('5')\nprint(open('/tmp/a.txt').read())", prints("5")),
        ("print('grüß' + input())", prints("grüßÄ", "Ä")),
    ],
)
def test_a_right_program_earns_its_reward(program, tests, any_kind):
    assert score(program, tests, timeout=10) == 1.0


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (DOUBLE, "assert f(2) == 5"),
        (DOUBLE, ["assert f(2) == 4", "assert f(2) == 5"]),
        (DOUBLE, "assert g(2) == 4"),
        (DOUBLE, "assert True"),
        ("def f(x:", "assert f(2) == 4"),
        ("", "assert f(2) == 4"),
        ("raise SystemExit", "assert f(2) == 4"),
        ("def f(x):\n    return (2,)", "assert f(2) == [2]"),
        ("def f(x):\n    return map(int, '12')", "assert f(2) == [1, 2]"),
        ("print(4)\nraise ValueError", prints("4")),
        ("print(4)\nimport os\nos._exit(3)", prints("4")),
        ("print(4, 4)", prints("4\n4")),
    ],
)
def test_a_wrong_program_earns_nothing(program, tests, any_kind):
    assert score(program, tests, timeout=10) == 0.0


# Time, memory, processes, output

FORK_BOMB = "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
DAEMON = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3):
            os.close(fd)
        while True:
            time.sleep(1)
    os._exit(0)
"""
HOSTILE = {
    "endless loop": "while True:\n    pass\n",
    "sleep": "import time\ntime.sleep(1000)\n",
    "fork bomb": FORK_BOMB,
    "thread bomb": "import threading, time\nwhile True:\n    threading.Thread(target=time.sleep, args=(99,)).start()\n",
    "memory": "x = []\nwhile True:\n    x.append(bytearray(10**7))\n",
    "ten gigabytes of output": "import os\ns = b'x' * 2**20\nfor _ in range(10_000):\n    os.write(1, s)\n    os.write(2, s)\n",
    "ten gigabytes on every descriptor": (
        "import os\ns = b'x' * 2**20\nfor _ in range(10_000):\n    for fd in range(12):\n        try:\n"
        "            os.write(fd, s)\n        except OSError:\n            pass\n"
    ),
    "daemon that ignores SIGTERM": DAEMON + "time.sleep(1000)\n",
    "kills all it can": "import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill(1, signal.SIGKILL)\nos.kill(1, 2)\n",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef g():\n    g()\ng()\n",
    "huge number": "x = 9**9**9\n",
}


AS_FUNCTIONS = (
    "endless loop",
    "fork bomb",
    "memory",
    "ten gigabytes on every descriptor",
    "daemon that ignores SIGTERM",
)


@pytest.mark.parametrize(
    ("name", "shape"), [(name, "script") for name in HOSTILE] + [(name, "function") for name in AS_FUNCTIONS]
)
def test_a_hostile_program_earns_nothing_and_ends_in_time(name, shape, kind):
    program, tests = HOSTILE[name], prints("never")
    if shape == "function":
        program = "def f():\n" + "".join(f"    {line}\n" for line in HOSTILE[name].splitlines())
        tests = "assert f() == 'never'"
    begin = time.monotonic()
    assert score(program, tests, timeout=0.7) == 0.0
    assert time.monotonic() - begin < 0.7 + 1.0 + START


def test_a_daemon_dies_with_the_program_that_succeeds(kind):
    begin = time.monotonic()
    assert score(DAEMON + "print('done')", prints("done")) == 1.0
    assert time.monotonic() - begin < 2 + START


def test_a_sandbox_dies_with_the_process_that_made_it(any_kind):
    mark = f"# mark {uuid.uuid4().hex}"
    code = f"""
from hf_adaptive_decode.rewards import code_reward, confinement
text = confinement.module_text
confinement.module_text = lambda name: text(name) + ({mark!r} if name == "_jail.py" else "")
code_reward(completions=["import time; time.sleep(99)"], tests=[[{{"input": "", "output": ""}}]], timeout=50)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        end = time.monotonic() + 20
        # The maker, the sandbox's tool, and what runs inside; the maker's own command line holds the mark as well.
        while len(processes_with(mark, patience=0)) < 3 and time.monotonic() < end:
            time.sleep(0.05)
        assert len(processes_with(mark, patience=0)) >= 3
    finally:
        parent.kill()
        parent.wait()
    assert processes_with(mark, patience=2.0) == []


def test_processes_are_counted(kind):
    program = """
import os, time
made = 0
for _ in range(100):
    try:
        if os.fork() == 0:
            time.sleep(60)
    except OSError:
        break
    made += 1
print('bounded' if 3 < made <= 16 else made)
"""
    assert score(program, prints("bounded"), timeout=5) == 1.0


def test_all_processes_together_are_bounded_where_groups_can_be_made(kind):
    limits = confinement.Limits(total_memory=128 * 2**20)
    group = ControlGroup(limits.total_memory, 20)
    joins = group.joins
    group.close()
    if not joins:
        pytest.skip("this user can make no control groups here")
    program = """
import os
child = os.fork()
if child == 0:
    hog = b'x' * (300 * 2**20)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert score(program, prints("-9"), timeout=10, limits=limits) == 1.0
    assert score(program, prints("0"), timeout=10) == 1.0


def test_memory_is_bounded_where_no_address_space_is(kind):
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
refused = []
for number in ([319, 29] if os.uname().machine == 'x86_64' else [279, 194]):
    refused.append(libc.syscall(number, b'name', 2**20, 0o1600) < 0)
try:
    for index in range(100):
        with open(f'/tmp/{index}', 'wb') as file:
            file.write(bytes(2**20))
except OSError:
    refused.append(True)
try:
    with open('/tmp/0', 'wb') as file:
        file.seek(2**30)
        file.write(b'x')
except OSError:
    refused.append(True)
print(refused)
"""
    assert score(program, prints("[True, True, True, True]"), timeout=10) == 1.0


# The way out: each program would print what the tests expect if it found one


def test_nothing_outside_can_be_read(kind, tmp_path, monkeypatch):
    secret = uuid.uuid4().hex
    monkeypatch.setenv("SECRET", secret)
    sentinel = tmp_path / "sentinel"
    sentinel.write_text(secret)
    sentinel.chmod(0o644)
    program = f"""
import os, sys
found = list(os.environ.values())
for path in [{str(sentinel)!r}, '/etc/passwd', '/proc/self/environ', '/proc/1/environ',
             os.path.expanduser('~/.ssh'), {str(Path.home() / ".ssh")!r}, {str(Path.home() / ".netrc")!r}]:
    try:
        found.append(os.listdir(path) if os.path.isdir(path) else open(path).read())
    except OSError:
        pass
print({secret!r} if any({secret!r} in str(item) for item in found) or len(found) > 3 else found)
"""
    assert score(program, prints(secret)) == 0.0
    program = "import os\nprint(sorted(n for n in os.environ if n not in ('PWD', 'LC_CTYPE')), os.listdir('/proc') if os.path.exists('/proc') else 0)"
    assert score(program, prints("[] 0")) == 1.0


def test_nothing_outside_can_be_written(kind, tmp_path):
    tmp_path.chmod(0o777)
    target = tmp_path / "written"
    places = [str(target), "/written", "/usr/lib/written", "/dev/written", "/lib/written", "/etc/passwd"]
    program = f"""
import os
for path in {places!r}:
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        open(path, 'a').close()
        print('' if path.startswith('/tmp/') else path)
    except OSError:
        pass
"""
    assert score(program, prints("")) == 1.0
    assert not target.exists()
    assert not Path("/written").exists()


def test_there_is_no_network(kind):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        program = f"""
import socket
for family, address in [(socket.AF_INET, ('127.0.0.1', {server.getsockname()[1]})), (socket.AF_INET, ('1.1.1.1', 53)),
                        (40, (2, 1024)), (16, (0, 0)), (17, ('eth0', 0))]:
    try:
        socket.socket(family, socket.SOCK_RAW if family in (16, 17) else socket.SOCK_STREAM).connect(address)
        print('connected', family)
    except OSError:
        pass
"""
        assert score(program, prints("")) == 1.0
        with pytest.raises(TimeoutError):
            server.accept()


def test_no_privilege_is_left(kind):
    program = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def refused(result):
    return result < 0 and ctypes.get_errno() in (1, 38)
print(all([
    refused(libc.unshare(0x10000000)), refused(libc.unshare(0x20000)), refused(libc.mount(b'x', b'/tmp', b'tmpfs', 0, None)),
    refused(libc.ptrace(0, 0, 0, 0)), refused(libc.chroot(b'/tmp')), refused(libc.setns(0, 0)),
    refused(libc.prctl(24, 0, 0, 0, 0)), libc.prctl(39, 0, 0, 0, 0) == 1, libc.prctl(21, 0, 0, 0, 0) in (2, -1),
]), os.getuid() != 0 or libc.setuid(1) != 0)
"""
    assert score(program, prints("True True")) == 1.0


# Forged verdicts: every one of these passed in a harness that compares in the program's process

ALL_DESCRIPTORS = "import os\nfor fd in range(3, 40):\n    for m in ({!r},):\n        try:\n            os.write(fd, m)\n        except OSError:\n            pass\n"
FORGED = {
    "leaves early": "import os\nos._exit(0)",
    "leaves early when called": "import os\ndef f(x):\n    os._exit(0)",
    "leaves quietly": "import sys\ndef f(x):\n    sys.exit(0)",
    "exit handler": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n    raise SystemExit(0)",
    "says passed": "print('passed')\nprint('{\"passed\": true}')\ndef f(x):\n    print('{\"passed\": true}')",
    "writes passed everywhere": ALL_DESCRIPTORS.format(b'{"passed": true}\n') + "def f(x):\n    return 5",
    "writes values everywhere": ALL_DESCRIPTORS.format(b'{"value": ["Evil", 4]}\n') + "def f(x):\n    return 5",
    "writes passed when called": "def f(x):\n"
    + "".join(
        f"    {line}\n"
        for line in ALL_DESCRIPTORS.format(b'{"passed": true, "value": true, "arguments": []}\n').splitlines()
    ),
    "equal to everything": "class E:\n    def __eq__(s, o):\n        return True\n    __hash__ = None\ndef f(x):\n    return E()",
    "integer equal to everything": "class E(int):\n    def __eq__(s, o):\n        return True\n    __hash__ = int.__hash__\ndef f(x):\n    return E(5)",
    "list equal to everything": "class E(list):\n    def __eq__(s, o):\n        return True\ndef f(x):\n    return [E()]",
    "string that calls itself int": "class M(type):\n    __name__ = 'int'\nclass E(metaclass=M):\n    __name__ = 'int'\n    def __eq__(s, o):\n        return True\ndef f(x):\n    return E()",
    "replaces json": "import json\njson.dumps = lambda *a, **k: '{\"passed\": true}'\ndef f(x):\n    return 5",
    "replaces builtins": "import builtins\nbuiltins.type = lambda x: int\nbuiltins.hex = lambda x: '0x4'\nbuiltins.AssertionError = ValueError\ndef abs(x):\n    return 0\ndef f(x):\n    return object()",
    "replaces names of the tests": "class math:\n    isclose = staticmethod(lambda *a: True)\ndef abs(x):\n    return 0\ndef all(x):\n    return True\ndef f(x):\n    return 5",
    "walks frames": "import sys, gc\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for v in list(frame.f_locals.values()) + list(frame.f_globals.values()):\n            if isinstance(v, dict) and 'tests' in v:\n                return int(v['tests'].split('==')[1].split()[0])\n        frame = frame.f_back\n    for v in gc.get_objects():\n        if isinstance(v, dict) and 'tests' in v:\n            return 4\n    return 5",
    "reads its input": "import sys, os\ndef f(x):\n    os.set_blocking(3, False)\n    return int(os.read(3, 99) or 5)",
    "raises what tests raise": "def f(x):\n    raise AssertionError('passed')",
    "raises what ends a program": "def f(x):\n    raise KeyboardInterrupt",
    "nested too deeply": "def f(x):\n    v = []\n    for _ in range(10**5):\n        v = [v]\n    return v",
    "refers to itself": "def f(x):\n    v = []\n    v.append(v)\n    return v",
    "a flood of values": "def f(x):\n    return 'x' * 10**8",
}
ASSERTS = "assert f(2) == 4\nassert abs(f(2) - 4) < 1e-6\nassert math.isclose(f(2), 4)\nassert all([f(2) == 4])"


@pytest.mark.parametrize("name", FORGED)
def test_a_verdict_cannot_be_forged(name, any_kind):
    assert score(DOUBLE + FORGED[name], "assert f(2) == 4.5") == 0.0
    if name not in ("leaves quietly",):
        assert score(FORGED[name], ASSERTS) == 0.0


def test_a_variable_of_the_tests_is_never_the_programs(any_kind):
    tests = "try:\n    result = f(2)\nexcept Exception:\n    pass\nassert result == 4"
    assert score("result = 4\ndef f(x):\n    raise ValueError", tests) == 0.0
    assert score(DOUBLE, tests) == 1.0


def test_a_bare_except_in_the_tests_passes_no_object_for_an_exception(any_kind):
    tests = "assert f(1) == 1\ntry:\n    f(2)\n    failed = True\nexcept:\n    failed = False\nassert not failed"
    assert score("def f(x):\n    return x if x == 1 else object()", tests) == 0.0
    assert score("def f(x):\n    if x > 1:\n        raise OSError\n    return x", tests) == 1.0


def test_the_expected_output_is_not_in_the_sandbox(any_kind):
    secret = uuid.uuid4().hex
    program = "import gc, sys\nprint(sys.argv, [o for o in gc.get_objects() if isinstance(o, dict) and 'output' in o])"
    assert score(program, prints(secret)) == 0.0


# Signature and mistakes


def test_it_takes_what_trl_passes(any_kind):
    fenced = "Text.\n```python\ndef f(x):\n    return 0\n```\nBetter:\n```python\n" + DOUBLE + "```\nDone."
    values = code_reward(
        prompts=["p"] * 4,
        completions=[fenced, [{"role": "assistant", "content": fenced}], DOUBLE, DOUBLE],
        tests=["assert f(2) == 4", "assert f(2) == 4", "def check(candidate):\n    assert candidate(2) == 5", None],
        entry_point=[None, None, "f", None],
        completion_ids=[[1]] * 4,
        trainer_state=None,
    )
    assert values == [1.0, 1.0, 0.0, None]


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("x = 1", "x = 1"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("```py\nx = 1\n```\n```text\nno\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```python\nx = 0\n```\nor\n```Python\nx = 1", "x = 1"),
        ("~~~python\nx = '```'\n~~~", "x = '```'\n"),
        ("```python\nx = 1\n```\n```\nprinted\n```", "x = 1\n"),
    ],
)
def test_the_last_block_is_the_program(text, program):
    assert extract_program(text) == program


def test_fences_are_found_quickly():
    begin = time.monotonic()
    for text in ("```python\n" * 20_000, "`" * 200_000, "```\n" * 50_000, " \n" * 100_000 + "~~~"):
        extract_program(text)
    assert time.monotonic() - begin < 5


def test_columns_have_to_pair_up():
    with pytest.raises(ValueError, match=r"2 completions and 1 entries of `tests`"):
        code_reward(completions=["a", "b"], tests=["assert f()"])
    with pytest.raises(ValueError, match=r"1 completions and 2 entries of `entry_point`"):
        code_reward(completions=["a"], tests=["assert f()"], entry_point=["f", "g"])


@pytest.mark.parametrize(
    "tests", ["", "  # nothing\n", "assert f(", [], [{"input": "1"}], [1], 7, [{"input": "1", "output": "1"}, "x"]]
)
def test_tests_that_are_none_are_a_mistake_not_a_reward(tests):
    with pytest.raises(ValueError, match=r"tests of row 1"):
        code_reward(completions=["a", "b"], tests=["assert f()", tests])


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
def test_the_time_limit_is_positive(timeout):
    with pytest.raises(ValueError, match="`seconds` must be positive"):
        score(DOUBLE, "assert f(2) == 4", timeout=timeout)


# No sandbox, no reward


@pytest.fixture
def probes_anew():
    confinement.why_not.cache_clear()
    yield
    confinement.why_not.cache_clear()


def test_without_a_sandbox_nothing_runs(monkeypatch, probes_anew):
    def forbidden(*arguments, **named):
        raise AssertionError("A process was started.")

    monkeypatch.setattr(confinement.shutil, "which", lambda name: None)
    monkeypatch.setattr(subprocess, "Popen", forbidden)
    with pytest.raises(
        SandboxUnavailableError, match=r"bubblewrap: `bwrap` is not installed; unshare: `unshare` is not"
    ) as caught:
        score(DOUBLE, "assert f(2) == 4")
    assert isinstance(caught.value, AdaptiveDecodeError)


def test_a_tool_that_confines_nothing_is_not_believed(monkeypatch, probes_anew, tmp_path):
    tool = tmp_path / "tool"
    # Drops the options that the real one would take and runs the interpreter as it is.
    tool.write_text(
        '#!/bin/sh\nwhile [ "${1#*python}" = "$1" ] || [ ! -x "$1" ] || [ -d "$1" ]; do shift; done\nexec "$@"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(confinement.shutil, "which", lambda name: str(tool) if name == "bwrap" else None)
    with pytest.raises(SandboxUnavailableError, match=r"in sight|written to|cannot make one"):
        score(DOUBLE, "assert f(2) == 4")

"""The sandbox stops every family of attack we know, allows honest code, and leaves nothing behind.

The attacks themselves are in sandbox_cases.py.
"""

import ast
import concurrent.futures
import contextlib
import functools
import http.server
import importlib.util
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import checkers.code
import rewards
import sandbox_cases as cases
from checkers import sandbox, sandbox_worker
from common.errors import UserError
from conftest import ROOT
from sandbox_cases import SQUARE
from sources.packaged import humaneval_rows

score = functools.partial(rewards.score, reward_format="strict")

RIGHT = "def f(x): return x * x"  # solves SQUARE
CORES = os.cpu_count() or 1

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the seal needs Linux")
only_x86_64 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="call numbers and machine code are x86_64's"
)


def run_many(jobs: list[tuple], workers: int = CORES) -> list[sandbox.Verdict]:
    """sandbox.run(*job) for each job, in order, on at most as many workers as there are cores."""
    with concurrent.futures.ThreadPoolExecutor(min(workers, CORES)) as pool:
        return list(pool.map(lambda job: sandbox.run(*job), jobs))


# ---------------- processes ----------------


def parent_of(pid: int) -> int | None:
    """The parent's process id, or None if the process is gone."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(after_name.split()[1])


def all_parents() -> dict[int, int]:
    """{process id: its parent's} of all processes of this machine."""
    parents = {}
    for name in os.listdir("/proc"):
        parent = parent_of(int(name)) if name.isdigit() else None
        if parent is not None:
            parents[int(name)] = parent
    return parents


def descendants(ancestor: int, parents: dict[int, int] | None = None) -> dict[int, int]:
    """{process id: its parent's} of all processes below one."""
    parents = all_parents() if parents is None else parents
    below = {}
    for pid, parent in parents.items():
        above = parent
        while above in parents and above != ancestor:
            above = parents[above]
        if above == ancestor:
            below[pid] = parent
    return below


def sandbox_workers() -> list[subprocess.Popen]:
    """The workers that wait for a job. They stay in the sandbox's queue."""
    workers = []
    while not sandbox.idle.empty():
        workers.append(sandbox.idle.get())
    for worker in workers:
        sandbox.idle.put(worker)
    return workers


def wait_until(condition, seconds: float) -> bool:
    """Whether condition() holds within so many seconds: a killed process does not end at once."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@functools.cache
def is_sealed() -> bool:
    """Whether this machine can seal model-written code."""
    return sandbox.self_test()["sealed"]


def unexpected_processes() -> set[int]:
    """This process's descendants, except the workers and their S and T."""
    workers = {worker.pid for worker in sandbox_workers()}
    below = descendants(os.getpid())
    return {pid for pid, parent in below.items() if pid not in workers and parent not in workers}


def own_state() -> dict:
    """What a job could have changed in the trainer's process."""
    pipes = 2 * len(sandbox_workers())
    environment = dict(os.environ)
    environment.pop("PYTEST_CURRENT_TEST", None)
    return {
        "descriptors": len(os.listdir("/proc/self/fd")) - pipes,
        "limits": [resource.getrlimit(kind) for kind in range(10)],
        "environment": environment,
        "folder": os.getcwd(),
    }


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path, monkeypatch):
    """Check that a test changes no process, descriptor, limit, variable, folder or canary file.

    Gives the canary's path.
    """
    assert is_sealed(), "this machine does not seal: the attacks below are not run on it"
    canary = tmp_path / "canary"
    canary.write_text("alive")
    monkeypatch.setenv("SECRET", "hunter2")
    sandbox.run(RIGHT, SQUARE)
    processes_before = unexpected_processes()
    state_before = own_state()

    yield canary

    def nothing_changed():
        return unexpected_processes() <= processes_before and own_state() == state_before

    assert wait_until(nothing_changed, 5), (
        unexpected_processes(),
        processes_before,
        own_state(),
    )
    assert canary.read_text() == "alive"
    assert not os.path.lexists("/tmp/sandbox-left-behind")
    assert wait_until(workers_are_ready, 5), "between jobs a worker has exactly S and T waiting"


def workers_are_ready() -> bool:
    """Whether each waiting worker has two children, S and T."""
    parents = all_parents()
    counts = [len(descendants(worker.pid, parents)) for worker in sandbox_workers()]
    return all(count == 2 for count in counts)


# ---------------- attacks ----------------


def why_stopped(code: str, timeout: float = 1.0) -> str:
    """The verdict's word for code that must not pass."""
    verdict = sandbox.run(code, SQUARE, timeout=timeout, memory_mb=512)
    assert not verdict.passed, verdict
    assert verdict.why.split(":")[0] in sandbox.__doc__
    return verdict.why


@pytest.mark.parametrize("name", cases.FORGERIES)
def test_forgeries_and_bombs_are_stopped(name):
    code = cases.FORGERIES[name]
    if name not in ("parser bomb", "unary bomb"):
        assert ast.parse(code)  # an attack with a typo proves nothing
    if name in cases.ENDLESS:
        assert why_stopped(code, timeout=0.3) == "timeout"
    else:
        assert why_stopped(code)


@pytest.mark.parametrize("name", cases.ATTEMPTS)
def test_forbidden_acts_are_refused(name, nothing_left_behind):
    code = cases.if_done(cases.ATTEMPTS[name], canary=str(nothing_left_behind))
    assert why_stopped(code) != "syntax"


@only_x86_64
@pytest.mark.parametrize("name", cases.SYSCALLS)
def test_raw_system_calls_are_refused(name):
    assert why_stopped(cases.syscall(*cases.SYSCALLS[name])) != "syntax"


@only_x86_64
@pytest.mark.parametrize("code", [cases.GETPID_80, cases.GETPID_X32])
def test_foreign_abis_are_killed(code):
    # the same call by the native ABI works: the probe itself is sound
    assert sandbox.run(cases.machine_code(cases.GETPID), SQUARE).passed
    assert why_stopped(cases.machine_code(code)) == "crashed"


@pytest.mark.parametrize("machine", sandbox_worker.MACHINES)
def test_looking_for_files_is_never_allowed(machine):
    allowed = sandbox_worker.numbers_of(sandbox_worker.ALLOWED, machine)
    looks = sandbox_worker.numbers_of(sandbox_worker.LOOKS_FOR_FILES, machine)
    assert len(set(allowed + looks)) == len(allowed) + len(looks)
    program = sandbox_worker.seccomp_program(machine)
    for number in looks:
        place = program.index((sandbox_worker.JUMP_IF_EQUAL, 0, 1, number))
        assert program[place + 1] == sandbox_worker.NO_FILE


UNSEALED = """
import json, sys
sys.path[:0] = {folders}
import sandbox_cases as cases
from checkers import sandbox
sandbox.UNSAFE = True
failed = []
for name in {names}:
    if not sandbox.run(cases.if_done(cases.ATTEMPTS[name]), cases.SQUARE).passed:
        failed.append(name)
print(json.dumps([failed, sandbox.self_test()["sealed"]]))
"""


def test_the_probes_can_succeed():
    """Without the seal the same attempts work: the tests above can fail."""
    names = [
        "read a file",
        "spawn",
        "tcp socket",
        "signal 0",
        "memfd",
        "import an unloaded module",
        "stat",
        "does a file exist",
        "read by libc",
        "look by libc",
        "a path beside stdin",
    ]
    script = UNSEALED.format(folders=[str(ROOT), str(ROOT / "tests")], names=names)
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert process.stdout == "[[], false]\n", process.stdout + process.stderr


def test_an_unknown_platform_cannot_seal(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "riscv64")
    assert sandbox.self_test() == {
        "open": False,
        "fork": False,
        "socket": False,
        "kill": False,
        "exec": False,
        "sealed": False,
    }


# ---------------- verdicts ----------------


@pytest.mark.parametrize(
    "code, why",
    [
        ("def f(x): return 0", "assertion"),
        ("def f(x): raise KeyError(x)", "exception:KeyError"),
        ("while True: pass", "timeout"),
        ("x = bytearray(1 << 40)", "memory"),
        ("def f(x", "syntax"),
        ("def f(x): return f", "cannot-cross"),
        ("import nosuchmodule", "import-missing"),
        ("open('/etc/passwd')", "exception:FileNotFoundError"),
        ("import os; os.fork()", "sealed-refusal"),
        ("import os; os._exit(1)", "crashed"),
        ("def g(x): pass", "exception:KeyError"),
        ("def f(x): return x * x", "passed"),
        ("def f(x): raise TypeError('t')", "exception:TypeError"),
    ],
)
def test_why_names_the_kind(code, why):
    timeout = 0.3 if why == "timeout" else 1.0
    assert sandbox.run(code, SQUARE, timeout=timeout).why == why


def test_tests_that_call_nothing_are_never_passed():
    code = "def f(x): return 1"
    assert sandbox.run(code, {"asserts": "assert True"}).why == "no-call"
    assert sandbox.run(code, {"asserts": ""}) == (False, "no-call")
    assert sandbox.run("", {"inputs": [], "outputs": []}) == (False, "no-call")


@pytest.mark.parametrize("name", cases.CONTROLS)
def test_honest_code_passes(name):
    assert sandbox.run(cases.CONTROLS[name], SQUARE) == (True, "passed")


def test_numpy_where_it_is_installed():
    pytest.importorskip("numpy")
    code = """
import numpy as np
def f(x):
    zero = (np.arange(x)[:, None] @ np.ones((1, x))).sum(0)[0] * 0
    return zero + np.int64(x) ** 2
"""
    assert sandbox.run(code, SQUARE).passed
    code = "import numpy as np\ndef g(): return np.eye(2)"
    assert sandbox.run(code, {"asserts": "assert g() == [[1.0, 0.0], [0.0, 1.0]]"}).passed


VALUES = [
    "None",
    "True",
    "0",
    "-1",
    "10**60",
    "1.5",
    "float('inf')",
    "1e-300",
    "-0.0",
    "2 + 3j",
    r"'é\n\ud800'",
    r"b'\x00\xff'",
    "()",
    "(1, (2,))",
    "[1, [2]]",
    "{1, 2}",
    "frozenset({3})",
    "{'a': [1], (1, 2): {None: 2.0}}",
    repr("x" * 3_000_000),
]
SAME = """
v = {}
w = same(v)
assert w == v and type(w) is type(v) and repr(w) == repr(v)
"""


def test_values_cross_exactly():
    for value in VALUES:
        tests = {"asserts": SAME.format(value)}
        assert sandbox.run("def same(v): return v", tests).passed, value


def test_tests_may_expect_exceptions_and_use_classes_and_helpers():
    code = """
class Solution:
    def __init__(self): self.n = 0
    def add(self, x):
        self.n += x
        return self.n
def bad(): raise ValueError('no')
"""
    asserts = """
s = Solution()
assert s.add(2) == 2
assert s.add(3) == 5
try:
    bad()
    assert False
except ValueError as e:
    assert str(e) == 'no'
"""
    assert sandbox.run(code, {"asserts": asserts}).passed
    helper = {
        "setup": "import math\ndef twice(x): return 2 * x",
        "asserts": "assert f(2) == twice(2)",
    }
    assert sandbox.run("def f(x): return twice(x)", helper).passed
    # the tests keep their own helper
    assert not sandbox.run("def twice(x): return 0\ndef f(x): return 0", helper).passed


def test_arguments_are_copies():
    tests = {
        "asserts": """
data = [1, 2]
assert f(data) == [2 * x for x in data]
assert data == [1, 2]
"""
    }
    assert sandbox.run("def f(v): return [2 * x for x in v]", tests).passed
    # if the tests' own list were emptied, so would be the expected value
    assert sandbox.run("def f(v):\n    v.clear()\n    return []", tests).why == "assertion"
    # honest code may change its copy in place
    assert sandbox.run("def f(v):\n    v[:] = [2 * x for x in v]\n    return v", tests).passed


# ---------------- programs: stdin and stdout ----------------


def test_stdin_and_stdout():
    code = "import sys\nfor line in sys.stdin:\n    print(int(line) * 2)\n"
    tests = {"inputs": ["1\n2\n", "3"], "outputs": ["2\n4\n", "6   \n\n"]}
    assert sandbox.run(code, tests) == (True, "passed")
    code = "print(int(input()) + 1)\nexit()"
    assert sandbox.run(code, {"inputs": ["1"], "outputs": ["2"]}).passed
    code = "print(2)\nprint(4)\nraise ValueError"
    tests = {"inputs": ["1"], "outputs": ["2\n4"]}
    assert sandbox.run(code, tests).why == "exception:ValueError"


def test_wrong_output_is_refused():
    tests = {"inputs": ["1\n2\n"], "outputs": ["2\n4\n"]}
    for wrong in (
        "print(2)",
        "print(2)\nprint(4)\nprint(6)",
        "print(2, 4)",
        "pass",
        "print('2\\n\\n4')",
    ):
        assert sandbox.run(wrong, tests).why == "assertion"


IDIOMS = [  # of programs that add two numbers
    """
import sys
print(sum(map(int, sys.stdin.buffer.read().split())))
""",
    """
print(sum(map(int, open(0).read().split())))
""",
    """from __future__ import annotations
import sys
input = sys.stdin.readline
print(int(input()) + int(input()))
""",
    """
import io, os
i = io.BytesIO(os.read(0, os.fstat(0).st_size)).readline
print(int(i()) + int(i()))
""",
    """
import sys
sys.stdin, sys.stdout = open(0), open(1, 'w')
print(sum(map(int, sys.stdin)))
sys.exit(0)
""",
    """
import threading
def main(): print(int(input()) + int(input()))
t = threading.Thread(target=main)
t.start()
t.join()
""",
]


def test_idioms_of_reading_and_writing():
    for idiom in IDIOMS:
        tests = {"inputs": ["3\n4\n"], "outputs": ["7"]}
        assert sandbox.run(idiom, tests) == (True, "passed"), idiom


@pytest.mark.parametrize("name", cases.PROGRAMS)
def test_honest_programs_pass(name):
    code = cases.PROGRAMS[name]
    assert sandbox.run(code, cases.ADDITION) == (True, "passed")
    other_sum = {"inputs": ["3\n4\n", "5\n6\n"], "outputs": ["7", "12"]}
    assert sandbox.run(code, other_sum) == (False, "assertion")


BAD_ENDS = {
    "import os; os._exit(1)": "exception:RuntimeError",
    "import os; os._exit(0)": "assertion",  # what was printed was not flushed
    "import sys; sys.exit(1)": "exception:RuntimeError",
    "import sys; sys.exit('no')": "exception:RuntimeError",
    "import os; os.abort()": "crashed",
    "1 / 0": "exception:ZeroDivisionError",
    "import atexit; atexit.register(print, 'more')": "assertion",
    "import threading; threading.Timer(0.1, print, ['more']).start()": "assertion",
}


@pytest.mark.parametrize("end", BAD_ENDS)
def test_programs_that_end_badly_are_refused(end):
    assert sandbox.run(f"{cases.ADD}\n{end}", cases.ADDITION) == (False, BAD_ENDS[end])


def test_modules_of_the_standard_library_can_be_imported():
    """Every module of PRELOAD and LATE that this Python has."""
    names = []
    for name in sandbox_worker.PRELOAD + sandbox_worker.LATE:
        if importlib.util.find_spec(name):
            names.append(name)
    assert {"fileinput", "graphlib", "asyncio", "json"} <= set(names)
    code = "".join(f"import {name}\n" for name in names)
    assert sandbox.run(code + cases.ADD, cases.ADDITION) == (True, "passed")


@pytest.mark.parametrize("name", sandbox_worker.LATE)
def test_a_late_module_is_there_for_the_program_and_for_the_tests_that_name_it(name):
    if not importlib.util.find_spec(name):
        pytest.skip(f"this Python has no {name}")
    package, _, part = name.rpartition(".")
    form = f"from {package} import {part}" if package else f"import {name}"
    tests = {"setup": "", "asserts": f"{form}\nassert f() == 1"}
    assert sandbox.run(f"{form}\ndef f(): return 1", tests) == (True, "passed")


def test_the_setup_may_name_a_late_module():
    tests = {"setup": "import tomllib", "asserts": "assert f('x = 1') == tomllib.loads('x = 1')"}
    code = "def f(text): return tomllib.loads(text)"
    assert sandbox.run(code, tests) == (True, "passed")


@pytest.mark.parametrize("name", ["'asyn' + 'cio'", "'num' + 'py.testing'"])
def test_a_program_loads_no_late_module_that_it_does_not_name(name):
    code = f"import sys, random\nfrom typing import List\ndef f(): return {name} in sys.modules"
    assert sandbox.run(code, {"asserts": "assert f() is False"}) == (True, "passed")


NUMPY_PARTS = """
import numpy as np
np.random.seed(1)
assert np.random.default_rng(0).integers(1) == 0 and np.random.rand(3).size == 3
assert np.fft.ifft(np.fft.fft([1, 2])).real.round(9).tolist() == [1, 2]
assert np.linalg.det(np.eye(2)) == 1
assert np.polynomial.Polynomial([1, 2])(3) == 7
assert np.ma.array([1, 2], mask=[0, 1]).sum() == 1
np.testing.assert_allclose(1, 1)
print(np.loadtxt(input_of_program(), dtype=np.int64).sum())
"""


def test_parts_of_numpy_where_it_is_installed():
    pytest.importorskip("numpy")
    code = "import sys\ndef input_of_program(): return sys.stdin\n" + NUMPY_PARTS
    assert sandbox.run(code, cases.ADDITION) == (True, "passed")


def test_large_input_and_output():
    long_line = "9" * 70_000 + "\n"
    tests = {"inputs": [long_line], "outputs": [long_line]}
    assert sandbox.run("print(input()[::-1])", tests).passed
    tests = {"inputs": [""], "outputs": ["9" * 10_000_000]}
    assert sandbox.run("print('9' * 10_000_000)", tests).passed


# ---------------- time: the code's own, and the machine's ----------------


@pytest.mark.parametrize("name", cases.SLEEPERS)
def test_waiting_on_purpose_is_wrong_and_soon(name):
    code = f"print(sum(map(int, open(0))), flush=True)\n{cases.SLEEPERS[name]}"
    started = time.monotonic()
    assert sandbox.run(code, cases.ADDITION, timeout=0.3) == (False, "timeout")
    assert time.monotonic() - started < sandbox_worker.WALL_FACTOR * 0.3


def processes_of_job() -> list[int]:
    """Once a job runs, within 10 seconds: the process ids of its S and T, in this order."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        parents = all_parents()
        waiting = {worker.pid for worker in sandbox_workers()}
        for pid, parent in parents.items():
            if parent == os.getpid() and pid not in waiting and is_worker(pid):
                below = sorted(descendants(pid, parents))
                if len(below) == 2 and all(map(has_sealed_itself, below)):
                    return below
    raise AssertionError("no job runs")


def has_sealed_itself(pid: int) -> bool:
    """Whether a process, if it has not ended, has its filter of system calls."""
    try:
        return "Seccomp:\t2" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def is_worker(pid: int) -> bool:
    """Whether a process, if it has not ended, runs the worker's file."""
    try:
        return b"sandbox_worker.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


@contextlib.contextmanager
def job(code: str, timeout: float):
    """A job under SQUARE in a thread: gives the list in which its verdict will stand."""
    verdicts = []
    thread = threading.Thread(
        target=lambda: verdicts.append(sandbox.run(code, SQUARE, timeout=timeout))
    )
    thread.start()
    yield verdicts
    thread.join()


SLOW = "import time\ntime.sleep(0.3)\ndef f(x): return x * x"


def stop_for(pids: list[int], seconds: float) -> None:
    """Stop processes for a while, as a busy machine does."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_time_that_the_machine_takes_is_not_the_codes():
    with job(SLOW, timeout=0.6) as verdicts:
        stop_for(processes_of_job(), 1.5)
    assert verdicts == [(True, "passed")]


def test_a_machine_that_is_too_slow_gives_no_verdict():
    with job(SLOW, timeout=0.4) as verdicts:
        stop_for(processes_of_job(), sandbox_worker.WALL_FACTOR * 0.4 + 1)
    assert verdicts == [(None, "unknown: wall-clock")]
    assert sandbox.run(RIGHT, SQUARE).passed


@pytest.mark.parametrize("which", [0, 1])
def test_a_job_that_is_killed_twice_gives_no_verdict(which):
    with job(SLOW, timeout=2.0) as verdicts:
        first = processes_of_job()[which]
        os.kill(first, signal.SIGKILL)
        assert wait_until(lambda: first not in all_parents(), 5)
        os.kill(processes_of_job()[which], signal.SIGKILL)
    assert verdicts == [(None, "unknown: killed")]


@pytest.mark.parametrize("which", [0, 1])
def test_a_death_between_jobs_shifts_no_verdict(which):
    sandbox.run(RIGHT, SQUARE)
    time.sleep(0.5)  # a verdict comes before the end of its job's processes
    assert wait_until(workers_are_ready, 5)
    for worker in sandbox_workers():
        os.kill(sorted(descendants(worker.pid))[which], signal.SIGKILL)
    time.sleep(0.2)
    for factor in (1, 0, 1, 0, 0, 1):
        verdict = sandbox.run(f"def f(x): return x * x * {factor}", SQUARE)
        assert verdict == ((True, "passed") if factor else (False, "assertion"))


@pytest.mark.parametrize("which", [0, 1])
def test_a_job_that_is_killed_once_runs_again(which):
    with job(SLOW, timeout=2.0) as verdicts:
        os.kill(processes_of_job()[which], signal.SIGKILL)
    assert verdicts == [(True, "passed")]


def test_a_busy_machine_is_no_reason_to_refuse():
    """Four processes per core compete with a program that needs half of its limit."""
    loop = [sys.executable, "-c", "while True: pass"]
    rivals = [subprocess.Popen(loop) for _ in range(4 * CORES)]
    try:
        code = "import time\nwhile time.process_time() < 0.5: pass\ndef f(x): return x * x"
        assert sandbox.run(code, SQUARE, timeout=1.0) == (True, "passed")
        assert sandbox.run("while True: pass", SQUARE, timeout=0.3) == (False, "timeout")
    finally:
        for rival in rivals:
            rival.kill()
            rival.wait()


def watch_for(seconds: float, monkeypatch, asleep: bool, cpu_share: float) -> str | None:
    """The word of a watch with a limit of 1 s, after so many seconds by a clock that we turn."""
    clock = [0.0]
    monkeypatch.setattr(sandbox_worker.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(sandbox_worker, "is_asleep", lambda pid: asleep)
    monkeypatch.setattr(sandbox_worker, "cpu_seconds", lambda pid: cpu_share * clock[0])
    watch = sandbox_worker.Watch((1, 2), 1.0)
    while clock[0] < seconds:
        clock[0] += sandbox_worker.TICK
        word = watch.word()
        if word:
            return word
    return None


@pytest.mark.parametrize(
    "seconds, asleep, cpu_share, word",
    [
        (0.9, True, 0.0, None),
        (1.1, True, 0.0, "timeout"),  # it sleeps
        (0.9, False, 0.5, None),
        (1.1, False, 0.5, "timeout"),  # S and T compute, half of the time each
        (5.0, False, 0.05, None),  # it waits for the CPU
        (10.5, False, 0.05, "timeout"),
        (11.9, False, 0.0, None),
        (12.1, False, 0.0, "unknown: wall-clock"),
    ],
)
def test_the_watch_charges_own_time(seconds, asleep, cpu_share, word, monkeypatch):
    assert watch_for(seconds, monkeypatch, asleep, cpu_share) == word


def test_where_the_kernel_does_not_show_processes_the_wall_holds(monkeypatch):
    assert sandbox_worker.cpu_seconds(os.getpid()) > 0
    assert not sandbox_worker.is_asleep(os.getpid())

    def fields_of(path):
        raise PermissionError

    monkeypatch.setattr(sandbox_worker, "fields_of", fields_of)
    assert sandbox_worker.cpu_seconds(os.getpid()) == 0
    assert not sandbox_worker.is_asleep(os.getpid())


@pytest.mark.parametrize(
    "exit_code, cpu_time, word",
    [
        (-signal.SIGXCPU, 5.0, "timeout"),
        (-signal.SIGKILL, 5.0, "timeout"),  # the hard limit
        (-signal.SIGKILL, 0.1, "unknown: killed"),
        (-signal.SIGSEGV, 0.1, "crashed"),
        (-signal.SIGSYS, 0.1, "crashed"),
        (0, 0.1, "crashed"),
        (1, 0.1, "crashed"),
    ],
)
def test_the_word_for_a_process_that_ended(exit_code, cpu_time, word):
    assert sandbox_worker.word_of_end(exit_code, cpu_time, 5.0) == word


# ---------------- HumanEval ----------------


def test_humaneval_canonical_solutions_pass():
    jobs = [(row["solution"], row["tests"]) for row in humaneval_rows()]
    verdicts = run_many(jobs)
    assert len(verdicts) == 164
    assert all(verdict.passed for verdict in verdicts)


ALWAYS_EQUAL = """
class Any:
    def __eq__(self, o): return True
    def __bool__(self): return True
    def __len__(self): return 1
"""


def test_humaneval_broken_solutions_never_pass():
    jobs = []
    for row in humaneval_rows():
        signature = row["prompt"].split("```python\n")[1].split("```")[0]
        for body in (
            "return None",
            "pass",
            "raise ValueError",
            "return (",
            "import os; os._exit(0)",
            "raise StopIteration",
            "return Any()",
        ):
            class_any = ALWAYS_EQUAL if "Any" in body else ""
            jobs.append((f"{class_any}{signature}    {body}\n", row["tests"], 2.0))
    assert not any(verdict.passed for verdict in run_many(jobs))


SWAPPED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
}


class Mutate(ast.NodeTransformer):
    """Change one place of a program: add 1 to a constant, swap a comparison, or drop a return.

    place: its number, from 0. −1 changes nothing.
    """

    def __init__(self, place: int):
        self.place = place
        self.count = 0  # places seen so far

    def is_place(self) -> bool:
        """Count one more place. Is it the one to change?"""
        self.count += 1
        return self.count - 1 == self.place

    def visit_Constant(self, node):
        if type(node.value) is int and self.is_place():
            return ast.Constant(node.value + 1)
        return node

    def visit_Compare(self, node):
        self.generic_visit(node)
        kind = type(node.ops[0])
        if kind in SWAPPED and self.is_place():
            node.ops[0] = SWAPPED[kind]()
        return node

    def visit_Return(self, node):
        self.generic_visit(node)
        return ast.Pass() if self.is_place() else node


def test_mutated_canonical_solutions_are_mostly_caught(capsys):
    jobs = []
    draw = random.Random(0)
    for row in humaneval_rows():
        counter = Mutate(-1)
        counter.visit(ast.parse(row["solution"]))
        for place in draw.sample(range(counter.count), min(3, counter.count)):
            mutant = Mutate(place).visit(ast.parse(row["solution"]))
            code = ast.unparse(ast.fix_missing_locations(mutant))
            jobs.append((code, row["tests"], 1.0))
    share_caught = sum(not verdict.passed for verdict in run_many(jobs)) / len(jobs)
    with capsys.disabled():
        print(f"[{len(jobs)} mutants of HumanEval's solutions, {share_caught:.1%} caught]", end=" ")
    # The others pass because of the tests: equivalent mutants, and inputs that are not tried.
    assert share_caught > 0.8


# ---------------- rewards ----------------


def answer_with(code: str) -> str:
    """A response whose answer is this code."""
    return f"<think></think><answer>{code}</answer>"


def test_rewards_use_the_sandbox_and_refuse_where_it_cannot_seal(monkeypatch):
    row = {"id": "r", "domain": "code", "prompt": "?", "tests": SQUARE}
    codes = [RIGHT, "import os\ndef f(x): return os.fork()", "import os; os._exit(0)"]
    scores = score([answer_with(code) for code in codes], [row] * 3)
    assert [(score.reward, score.why) for score in scores] == [
        (1.0, "right"),
        (-0.5, "sealed-refusal"),
        (-0.5, "crashed"),
    ]

    checkers.code.check_sandbox.cache_clear()
    refused = {"open": True, "fork": False, "sealed": False}
    monkeypatch.setattr(sandbox, "self_test", lambda: refused)
    message = "not refused: fork.*--sandbox-url.*--allow-unsafe-code"
    with pytest.raises(UserError, match=message):
        score([answer_with(RIGHT)], [row])

    monkeypatch.setattr(sandbox, "UNSAFE", True)
    assert score([answer_with(RIGHT)], [row])[0].reward == 1.0
    checkers.code.check_sandbox.cache_clear()


class Fusion(http.server.BaseHTTPRequestHandler):
    """A server with SandboxFusion's HTTP API. It runs the program in a plain process."""

    requests: list[tuple[str, dict]] = []  # (path, body)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append((self.path, body))
        if "overload" in body["code"]:
            reply = {"status": "SandboxError", "message": "busy"}
        else:
            reply = self.run_program(body)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def run_program(self, body: dict) -> dict:
        process = subprocess.run(
            [sys.executable, "-I", "-S", "-c", body["code"]],
            input=body["stdin"],
            capture_output=True,
            text=True,
        )
        return {
            "status": "Success" if process.returncode == 0 else "Failed",
            "message": "",
            "compile_result": None,
            "run_result": {
                "status": "Finished",
                "return_code": process.returncode,
                "stdout": process.stdout,
                "stderr": process.stderr,
            },
        }

    def log_message(self, *args):
        pass


def test_sandbox_fusion_runs_the_code_elsewhere():
    """The server decides, and its failure is not a wrong answer."""
    stdin = {"inputs": ["2\n"], "outputs": ["4\n"]}
    codes = [
        (RIGHT, SQUARE, 1.0),
        ("def f(x): return x", SQUARE, -0.5),
        ("overload = 1", SQUARE, None),
        ("print(int(input()) ** 2)", stdin, 1.0),
        ("print(5)", stdin, -0.5),
        ("def f(", SQUARE, -1.0),
    ]
    rows = []
    for _, tests, _ in codes:
        rows.append({"id": "r", "domain": "code", "prompt": "?", "tests": tests})

    Fusion.requests.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Fusion)
    threading.Thread(target=server.serve_forever, args=(0.05,)).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        answers = [answer_with(code) for code, _, _ in codes]
        scores = score(answers, rows, sandbox_url=url)
        assert [each.reward for each in scores] == [reward for _, _, reward in codes]
        assert {path for path, _ in Fusion.requests} == {"/run_code"}
        assert all(body["language"] == "python" for _, body in Fusion.requests)
    finally:
        server.shutdown()
        server.server_close()
    result = score([answer_with("f = 1")], rows[:1], sandbox_url=url)[0]
    assert result.reward is None
    assert result.why.startswith("sandbox-error")


# ---------------- scale and accidents ----------------


def test_run_many_keeps_order_and_loops_cost_only_their_time():
    jobs = []
    expected = []
    for i in range(60):
        if i % 10 == 9:
            jobs.append(("while True: pass", SQUARE, 0.2))
            expected.append("timeout")
        else:
            jobs.append((f"def f(x): return x * x + {i % 2}", SQUARE, 0.2))
            expected.append("assertion" if i % 2 else "passed")
    started = time.monotonic()
    verdicts = run_many(jobs, workers=99)
    assert [verdict.why for verdict in verdicts] == expected
    assert len(sandbox_workers()) <= CORES
    assert time.monotonic() - started < 30


def test_killing_the_worker_mid_job_loses_nothing():
    sandbox.run(RIGHT, SQUARE)
    code = "import time\ndef f(x):\n    time.sleep(0.3)\n    return x * x"
    verdicts = []
    waiting_before = {worker.pid for worker in sandbox_workers()}
    thread = threading.Thread(target=lambda: verdicts.append(sandbox.run(code, SQUARE)))
    thread.start()
    time.sleep(0.2)
    waiting_now = {worker.pid for worker in sandbox_workers()}
    for pid in waiting_before - waiting_now:
        os.kill(pid, signal.SIGKILL)
    thread.join()
    assert verdicts == [(True, "passed")]
    assert sandbox.run(RIGHT, SQUARE).passed


TRAINER = """
import sys, threading, time
sys.path.insert(0, {root!r})
from checkers import sandbox
tests = {{"asserts": "f()"}}
threading.Thread(target=lambda: sandbox.run("while True: pass", tests, 1.0)).start()
print("ready", flush=True)
time.sleep(60)
"""


def test_killing_the_trainer_leaves_no_process():
    script = TRAINER.format(root=str(ROOT))
    trainer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout.readline() == "ready\n"
    # three: the worker, S and T
    assert wait_until(lambda: len(descendants(trainer.pid)) == 3, 10)
    family = descendants(trainer.pid)
    trainer.kill()
    trainer.communicate()

    def are_gone():
        return not any(os.path.exists(f"/proc/{pid}") for pid in family)

    assert wait_until(are_gone, 10)


def load_of_workers() -> tuple[list[int], int]:
    """([our descriptors, our descendants, the most descriptors of a worker], memory in KiB)."""
    time.sleep(0.5)  # by then the next S and T have replaced those of the last jobs
    workers = sandbox_workers()
    descriptors = [len(os.listdir(f"/proc/{worker.pid}/fd")) for worker in workers]
    memory = 0
    for worker in workers:
        for line in Path(f"/proc/{worker.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                memory += int(line.split()[1])
    counts = [len(os.listdir("/proc/self/fd")), len(descendants(os.getpid())), max(descriptors)]
    return counts, memory


@pytest.mark.slow
def test_five_thousand_jobs_leak_nothing():
    codes = [
        RIGHT,
        "def f(x): return 0",
        "import os; os._exit(0)",
        "x = [0] * (1 << 40)",
        "def f(",
    ]
    jobs = [(codes[i % 5], SQUARE) for i in range(5000)]
    run_many(jobs[:200])
    counts_before, memory_before = load_of_workers()
    started = time.monotonic()
    verdicts = run_many(jobs)
    print(f"[{5000 / (time.monotonic() - started):.0f} verdicts/s]", end=" ")
    assert sum(verdict.passed for verdict in verdicts) == 1000
    counts, memory = load_of_workers()
    assert counts == counts_before
    assert memory < memory_before + 8192  # KiB


@pytest.mark.slow
def test_five_hundred_jobs_with_a_tenth_of_infinite_loops():
    jobs = []
    for i in range(500):
        jobs.append(("while True: pass" if i % 10 == 0 else RIGHT, SQUARE, 1.0))
    started = time.monotonic()
    verdicts = run_many(jobs)
    seconds = time.monotonic() - started
    assert sum(verdict.passed for verdict in verdicts) == 450
    assert sum(verdict.why == "timeout" for verdict in verdicts) == 50
    print(f"[{seconds:.1f} s for 50 loops of 1 s on {CORES} workers]", end=" ")
    assert seconds < 50 / CORES + 60

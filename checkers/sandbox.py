"""Run model-written code against tests so that the machine survives and no verdict is forged.

Threat model. Reinforcement learning optimises against the verdict, so the code is adversarial: it
may loop, allocate, fork, read the tests, patch builtins, return objects equal to everything, and
write to every descriptor.

Design. A worker that never reads a job forks, per job, S (the model's code) and T (the tests).
T alone reads the job and decides; S is sent the source only. The tests' unknown names are calls
into S. Values cross as tagged JSON and are rebuilt as exact builtin types; what is not plain data
crosses as a handle that can only be called. Both seal themselves before they run anything: limits
on memory, time and file size, and a seccomp allow-list without open, socket, fork, exec, kill,
ptrace, prctl and prlimit. To S no file exists (FileNotFoundError) but its standard streams, and no
modules can be imported but those of PRELOAD and LATE. All of that is in sandbox_worker.py. It needs
Linux on x86_64 or aarch64; no root, no namespaces, no packages.

What is guaranteed if self_test() says "sealed": S and T use no other file, process or socket; the
limits hold; only T can write a verdict.
What is still forgeable: weak tests (properties between the model's own functions, inputs that can
be guessed).
What fails although it is honest: generators, own classes compared by value, arguments mutated in
place, files, processes, sockets, and what needs them (asyncio.run, multiprocessing, mmap of stdin).

Verdict.why is one of: passed, assertion, exception:<Name>, timeout, memory, syntax, no-call (the
tests called nothing), cannot-cross, import-missing, sealed-refusal, crashed. These follow from the
code and its tests. Two say that the machine failed, and nothing of the code; then Verdict.passed is
None: "unknown: wall-clock" (a job that had time of its own left took 12 times its limit) and
"unknown: killed" (someone else killed the job's processes, twice).

A time limit is one of own time: the CPU time of S and T, and the time in which both sleep. On an
idle machine that is the time by the clock; on a busy one the wait for a CPU is not counted. So code
that sleeps, or waits for what never comes, is wrong ("timeout") as soon as code that loops.
"""

import contextlib
import platform
import queue
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from checkers.sandbox_worker import LOST, MACHINES, send

UNSAFE = False  # True (--allow-unsafe-code): no seccomp; the two processes and the limits stay

idle: queue.SimpleQueue = queue.SimpleQueue()  # workers that wait for a job


def allow_unsafe(allowed: bool) -> None:
    """Set whether workers that start from now on run without the seal."""
    global UNSAFE
    UNSAFE = allowed


class Verdict(NamedTuple):
    """What the tests say of the code."""

    passed: bool | None  # None: the machine failed, so nobody knows
    why: str


# All that a worker sees of the environment, which may hold secrets. Without the second, each thread
# of a program would reserve 64 MiB of its address space.
ENVIRONMENT = {"OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}


def start_worker() -> subprocess.Popen:
    """A new worker, which waits for jobs on its stdin."""
    script = Path(__file__).with_name("sandbox_worker.py")
    # -I and -S: neither environment variables nor files of this folder change what it imports.
    # Model-written code uses numpy, so the folders of installed packages follow as arguments.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(script), str(int(UNSAFE)), *packages],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,  # Ctrl-C in the terminal is the trainer's, not the worker's
        env=ENVIRONMENT,
    )


def next_worker() -> subprocess.Popen:
    """An idle worker that still lives, or a new one."""
    while True:
        try:
            worker = idle.get_nowait()
        except queue.Empty:
            return start_worker()
        if worker.poll() is None:
            return worker
        close_pipes(worker)


def close_pipes(worker: subprocess.Popen) -> None:
    """Close our ends of a dead worker's pipes."""
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(OSError):  # of a job that was not written to its end
            pipe.close()


def ask_worker(worker: subprocess.Popen, job: dict) -> str:
    """The word of one job's verdict; LOST if someone killed the job. Then the worker ends too."""
    try:
        send(worker.stdin, job)
        why = worker.stdout.readline().decode().strip() or LOST
    except OSError:
        why = LOST
    if why != LOST:
        idle.put(worker)
        return why
    worker.kill()
    worker.wait()
    close_pipes(worker)
    return LOST


def ask_twice(job: dict) -> str:
    """The word of one job's verdict. A job that was lost, because someone killed it, runs again.

    The second time it gets a new worker: those that wait may have been killed as well.
    """
    why = ask_worker(next_worker(), job)
    return ask_worker(start_worker(), job) if why == LOST else why


def split_tests(tests: dict) -> list[dict]:
    """The tests of each job: all asserts together, or one input with its output."""
    if "asserts" in tests:
        return [tests]
    inputs = tests.get("inputs", [])
    outputs = tests.get("outputs", [])
    compare = tests.get("compare", "numbers")
    jobs = []
    for stdin, output in zip(inputs, outputs, strict=True):
        jobs.append({"input": stdin, "output": output, "compare": compare})
    return jobs


def run(code: str, tests: dict, timeout: float = 5.0, memory_mb: int = 1024) -> Verdict:
    """The verdict of the code under its tests, which have one of two forms:

        {"asserts": Python, "setup": Python}       functions
        {"inputs": [text…], "outputs": [text…]}    programs: stdin → stdout

    The setup runs before the code and before the asserts, whose own names win over the code's. A
    program's stdout must equal the output as checkers.printed compares them (by "compare", a
    further field of the tests). timeout (in seconds of own time) and memory_mb (in MiB) hold for
    each input.
    """
    tests_of_jobs = split_tests(tests)
    if not tests_of_jobs:
        return Verdict(False, "no-call")
    for job_tests in tests_of_jobs:
        job = {"code": code, "tests": job_tests, "timeout": timeout, "memory": memory_mb << 20}
        why = ask_twice(job)
        if why.startswith("unknown"):
            return Verdict(None, why)
        if why != "passed":
            return Verdict(False, why)
    return Verdict(True, "passed")


# What a sealed process must not be able to do, one call each.
PROBES = {
    "open": "os.open('/', os.O_RDONLY)",
    "fork": "os.fork()",
    "socket": "socket.socket()",
    "kill": "os.kill(os.getpid(), 0)",
    "exec": "os.execv('/bin/true', ['true'])",
}
PROBE = """
import os, socket
def probe():
    try:
        {}
    except (PermissionError, FileNotFoundError):  # open() says that nothing is there
        return "refused"
"""


def self_test() -> dict[str, bool]:
    """For each of PROBES, whether this machine refuses it; for "sealed", whether it refuses all."""
    machine_is_known = sys.platform == "linux" and platform.machine() in MACHINES
    refused = {}
    for name, attempt in PROBES.items():
        refused[name] = False
        if machine_is_known:
            verdict = run(PROBE.format(attempt), {"asserts": "assert probe() == 'refused'"})
            refused[name] = verdict.passed
    refused["sealed"] = all(refused.values())
    return refused

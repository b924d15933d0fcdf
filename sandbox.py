"""Runs model-written code against tests so that the machine survives and the verdict cannot be forged.

Threat model: RL optimises against the verdict, so the code is adversarial: it may loop, allocate, fork, read the tests,
patch builtins, return objects equal to everything, write to every descriptor. Design: a worker that never reads a job
forks, per job, S (the model's code) and T (the tests). T alone reads the job and holds the verdict's pipe; S is sent the
source only. The tests' unknown names are calls into S; values cross as tagged JSON, rebuilt as exact builtin types; what
is not plain data crosses as a handle that can only be called. Both seal themselves before they run anything: limits on
memory, time and file size, and a seccomp allow-list without open, socket, fork, exec, kill, ptrace, prctl and prlimit.
The modules of PRELOAD can be imported, no others. All of that is sandbox_worker.py. No root, namespace or package is
needed; Linux on x86_64 or aarch64.
Guaranteed where self_test() holds: no file, process or socket beyond S and T; the limits; a verdict only T can write.
Forgeable still: weak tests (properties between the model's own functions, inputs that can be guessed). Failed though
honest: generators, own classes compared by value, arguments mutated in place, files, processes, sockets.
Verdict.why: passed, assertion, exception:<Name>, timeout, memory, syntax, no-call (the tests called nothing),
cannot-cross, import-missing, sealed-refusal, crashed.
"""
import concurrent.futures
import os
import platform
import queue
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from sandbox_worker import CALLS, Gone, lines_of, receive, send  # noqa: F401 (lines_of: for rewards.py)

CORES = os.cpu_count() or 1
UNSAFE = False  # True (--allow-unsafe-code): no seccomp; the two processes and the limits stay
idle: queue.SimpleQueue = queue.SimpleQueue()  # workers between jobs


class Verdict(NamedTuple):
    passed: bool
    why: str


def ask(job: dict) -> str | None:
    """Why of one job's verdict, from an idle worker or a new one; None when the worker died over it."""
    try:
        process = idle.get_nowait()
    except queue.Empty:
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("sandbox_worker.py")), str(int(UNSAFE))]
        process = subprocess.Popen(command + [path for path in sys.path if path.endswith("site-packages")],
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
                                   start_new_session=True, env={"OPENBLAS_NUM_THREADS": "1"})
    try:
        send(process.stdin, job)
        why = receive(process.stdout)
    except (Gone, OSError):
        process.kill()
        process.wait()
        return None
    idle.put(process)
    return why


def run(code: str, tests: dict, timeout: float = 5.0, memory_mb: int = 1024) -> Verdict:
    """The verdict of the code under {"asserts", "setup"} (Python) or {"inputs": […], "outputs": […]} (stdin → stdout).

    setup runs before the code and before the tests, whose own names win over the code's. stdout must equal the output
    line by line, trailing white space aside. timeout (seconds of wall clock) and memory_mb hold for each input.
    """
    pairs = zip(tests.get("inputs", []), tests.get("outputs", []), strict=True)
    parts = [tests] if "asserts" in tests else [{"input": given, "output": wanted} for given, wanted in pairs]
    for part in parts:
        job = {"code": code, "tests": part, "timeout": timeout, "memory": memory_mb << 20}
        why = ask(job) or ask(job) or "crashed"  # a worker killed from outside costs its job one retry
        if why != "passed":
            return Verdict(False, why)
    return Verdict(bool(parts), "passed" if parts else "no-call")


def run_many(jobs: list[tuple], workers: int | None = None) -> list[Verdict]:
    """run(*job) for each job, in order, on at most as many workers as cores."""
    with concurrent.futures.ThreadPoolExecutor(min(workers or CORES, CORES)) as pool:
        return list(pool.map(lambda job: run(*job), jobs))


def self_test() -> dict[str, bool]:
    """{"open": is it refused, "fork": …, "socket": …, "kill": …, "exec": …, "sealed": are all}."""
    probes = {"open": "open('/dev/null')", "fork": "os.fork()", "socket": "socket.socket()",
              "kill": "os.kill(os.getpid(), 0)", "exec": "os.execv('/bin/true', ['true'])"}
    code = "import os, socket\ndef probe():\n try:\n  {}\n except PermissionError:\n  return 'refused'"
    known = sys.platform == "linux" and platform.machine() in CALLS
    found = {name: known and run(code.format(probe), {"asserts": "assert probe() == 'refused'"}).passed
             for name, probe in probes.items()}
    return found | {"sealed": all(found.values())}

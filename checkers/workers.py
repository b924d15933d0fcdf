"""Worker processes for checks that could hang on a model's text: those of checkers.third_party.

`python -m checkers.workers`, run from the repository's root, reads one job per line of stdin, as
JSON, and writes its verdict as a line of JSON.

    {"check": "math", "gold": "\\frac12", "answer": "0.5"}   →   "right"

The kernel ends a worker whose job takes more than CPU_SECONDS of computing. That is the answer's
own fault, whatever else the machine does, so the verdict is a function of the row and the answer.
WALL_SECONDS is a second limit for a machine that does not compute: then nobody knows the verdict.
"""

import atexit
import concurrent.futures
import contextlib
import json
import os
import queue
import resource
import signal
import subprocess
import sys
from pathlib import Path

from checkers import third_party
from common.errors import UserError

WORKERS = max(1, min(8, os.cpu_count() or 2))  # processes; each holds a package of its own
CPU_SECONDS = 5  # of one job, without imports
WALL_SECONDS = 120  # of one job
MEMORY_BYTES = 4 << 30  # of a worker's address space
ROOT = Path(__file__).resolve().parent.parent

CHECKS = {  # a job's "check" → what it imports, the check itself
    "math": (third_party.import_math_verify, third_party.math_equal),
    "gym": (third_party.import_reasoning_gym, third_party.gym_right),
    "gym-entry": (third_party.import_reasoning_gym, third_party.gym_entry_exists),
    "if": (third_party.import_if_verifiable, third_party.if_met),
    "pattern": (third_party.import_nothing, third_party.count_matches),
    "bfcl": (third_party.import_bfcl, third_party.calls_right),
}


# ---------------- the caller's side ----------------


class Worker:
    """A running worker process."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "checkers.workers"],
            cwd=ROOT,  # whatever directory the caller is in, -m finds the package here
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            encoding="utf-8",
            errors="replace",
        )

    def ask(self, job: dict) -> str | None:
        """The worker's verdict, or None if it died over the job."""
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline() or "null")
        except (BrokenPipeError, json.JSONDecodeError):
            return None

    def close(self) -> int:
        """End the process. Returns its exit status (negative: the signal that killed it)."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(0.5)  # one that is dying by itself leaves the status that says why
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        return self.process.returncode


idle_workers: queue.SimpleQueue[Worker] = queue.SimpleQueue()


@atexit.register
def close_workers() -> None:
    """End the workers that wait for a job."""
    while not idle_workers.empty():
        idle_workers.get_nowait().close()


# What ended a worker → the verdict on its job.
VERDICT_OF_SIGNAL = {
    signal.SIGPROF: "cpu-limit",
    signal.SIGALRM: "unknown: the machine gave the checker too little time",
    signal.SIGSEGV: "crashed",  # a recursion in C, for example: it would happen again
    signal.SIGABRT: "crashed",
    signal.SIGBUS: "crashed",
    signal.SIGFPE: "crashed",
}


def ask_worker(job: dict) -> str:
    """The verdict of one job, by an idle worker or a new one.

    A worker that something else ended, such as a lack of memory, is replaced once.
    """
    for _ in range(2):
        try:
            worker = idle_workers.get_nowait()
        except queue.Empty:
            worker = Worker()
        verdict = worker.ask(job)
        if verdict is not None:
            idle_workers.put(worker)
            return verdict
        status = worker.close()
        if status > 0:  # an exception outside the check: the checker itself is broken
            raise UserError(
                f"the {job['check']} checker cannot start: is its package installed? "
                "(`python -m checkers.workers`, then a line of JSON, shows the error)"
            )
        if -status in VERDICT_OF_SIGNAL:
            return VERDICT_OF_SIGNAL[-status]
    return "unknown: the checker's process was killed"


def ask_workers(jobs: list[dict]) -> list[str]:
    """Each job's verdict, in order.

    right, wrong, or what the check returns instead
    cpu-limit, crashed, error: <exception>            the answer cannot be digested: it is wrong
    unknown: <reason>                                 the machine failed, not the answer

    At most WORKERS jobs run at a time. Raises UserError if a checker cannot start.
    """
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(ask_worker, jobs))


# ---------------- the worker's side ----------------


def worker_loop() -> None:
    """Answer jobs until stdin ends. Imports are not timed; each job is.

    The timers' signals have their default action: they end the process at once. A Python handler
    would run only when the interpreter comes back from a long computation.
    """
    verdicts = sys.stdout
    sys.stdout = sys.stderr  # what a package prints must not be read as a verdict
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    for line in sys.stdin:
        job = json.loads(line)
        import_packages, check = CHECKS[job.pop("check")]
        import_packages()
        set_timers(CPU_SECONDS, WALL_SECONDS)
        try:
            verdict = check(job)
        except Exception as error:  # third-party code met a model's text: the answer is not right
            verdict = f"error: {type(error).__name__}"
        set_timers(0, 0)
        if isinstance(verdict, bool):
            verdict = "right" if verdict else "wrong"
        print(json.dumps(verdict), file=verdicts, flush=True)


def set_timers(cpu_seconds: float, wall_seconds: float) -> None:
    """Have the kernel end this process after so many seconds; 0: never."""
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)


if __name__ == "__main__":
    worker_loop()

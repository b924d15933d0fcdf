"""The worker of sandbox.py: forks S (the model's code) and T (the tests) for each job, sealed. sandbox.py says what for.

Run as `python -I -S sandbox_worker.py <1: without seccomp> <site-packages>…`; jobs come on stdin, one line of JSON each,
verdicts go to stdout. Whatever is in this file is what the guarantees rest on.
"""
import ast
import builtins
import contextlib
import ctypes
import functools
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys

UNSAFE = False  # True (--allow-unsafe-code): no seccomp; the two processes and the limits stay
PRELOAD = """__future__ abc argparse array base64 binascii bisect calendar cmath collections.abc concurrent.futures.thread
    ast contextlib copy csv ctypes dataclasses datetime decimal difflib enum fractions functools gc glob hashlib heapq html
    inspect io itertools json keyword locale logging math numbers operator os.path pathlib pickle platform pprint queue
    random re secrets shutil signal socket statistics string struct subprocess sys tempfile textwrap threading time
    timeit traceback types typing unicodedata unittest urllib.parse uuid warnings weakref zlib zoneinfo _strptime
    encodings.ascii encodings.idna encodings.latin_1 encodings.utf_16 encodings.unicode_escape numpy""".split()
FDS = JOB, VERDICT, IN, OUT, SIDE_S, SIDE_T = range(10, 16)  # descriptors in the worker
LAST = 2  # T's exit code when there are no more jobs
# audit architecture, clone (for threads only), the calls allowed; clone3 answers ENOSYS, so that libc takes clone
CALLS = {"x86_64": (0xC000003E, 56, [
    0, 1, 3, 5, *range(7, 16), 17, 19, 20, 23, 24, 25, 28, 35, 39, 60, 96, 98, 100, 102, 104, 107, 108, 131, 186, 201,
    202, 204, 219, 228, 229, 230, 231, 270, 271, 273, 309, 318, 334]), "aarch64": (0xC00000B7, 220, [
        57, *range(62, 68), 72, 73, 80, 93, 94, 98, 99, 101, 113, 114, 115, 123, 124, 128, 132, 134, 135, 139, 153, 165,
        168, 169, *range(172, 179), 214, 215, 216, 222, 226, 233, 278, 293])}
WRITE = {str: str, int: hex, float: float.hex, complex: repr, bytes: bytes.hex}
READ = {"str": str, "int": lambda v: int(v, 16), "float": float.fromhex, "complex": complex, "bytes": bytes.fromhex}
ERRORS = {name: error for name, error in vars(builtins).items() if isinstance(error, type) and issubclass(error, Exception)
          and not any(word in name for word in ("Stop", "Unicode", "Group"))}  # those that T raises again
ITEMS = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict)}
KINDS = {"Gone": "crashed", "BrokenPipeError": "crashed", "ConnectionResetError": "crashed", "MemoryError": "memory",
         "CannotCross": "cannot-cross", "PermissionError": "sealed-refusal", "ImportError": "import-missing",
         "ModuleNotFoundError": "import-missing", "AssertionError": "assertion"}
# the other side ended; a value is not plain data. No Exceptions, so that no test catches them
Gone, CannotCross = (type(name, (BaseException,), {}) for name in ("Gone", "CannotCross"))


def seal(seconds: float, memory: int) -> None:
    """Give up everything but computing. Raises OSError where the kernel does not seal."""
    for what, limit in (("AS", memory), ("CPU", int(seconds) + 1), ("FSIZE", 16 << 20), ("CORE", 0)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{what}"), (limit, limit))
    if UNSAFE:
        return
    arch, clone, allowed = CALLS[platform.machine()]
    load, equal, above, bits, end = 0x20, 0x15, 0x25, 0x45, 0x06  # BPF: (operation, jump if true, if false, operand)
    kill, allow, eperm, enosys = ((end, 0, 0, k) for k in (0x80000000, 0x7FFF0000, 0x50001, 0x50026))
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), kill, (load, 0, 0, 0), (above, 0, 1, 0x3FFFFFFF), kill,  # x32
               (equal, 0, 1, 435), enosys, *(line for n in allowed for line in ((equal, 0, 1, n), allow)),
               (equal, 0, 3, clone), (load, 0, 0, 16), (bits, 0, 1, 0x10000), allow, eperm]  # CLONE_THREAD
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    pointer = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value, more in ((4, 0, None), (38, 1, None), (22, 2, pointer)):  # not dumpable, no new rights, seccomp
        if libc.prctl(option, ctypes.c_ulong(value), more, ctypes.c_ulong(0), ctypes.c_ulong(0)):
            raise OSError(ctypes.get_errno(), f"the kernel refused prctl {option}")


def encode(value, other):
    """Plain data as tagged JSON, other(value) for everything else. Subclasses become what they extend."""
    if value is None or type(value) is bool:
        return value
    kind = next((kind for kind in (*WRITE, *ITEMS.values()) if isinstance(value, kind)), None)
    if kind in WRITE:
        return [kind.__name__, WRITE[kind](value)]
    if kind:
        return [kind.__name__, [encode(item, other) for item in (value.items() if kind is dict else value)]]
    return encode(value.tolist(), other) if type(value).__module__ == "numpy" else other(value)


def decode(data, handle):
    if data is None or type(data) is bool:
        return data
    kind, value = data
    if kind in READ:
        return READ[kind](value)
    return handle(int(value)) if kind == "handle" else ITEMS[kind](decode(item, handle) for item in value)


def send(file, message) -> None:
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()


def receive(file, largest: int = 64 << 20):
    line = file.readline(largest)
    if not line:
        raise Gone
    return json.loads(line)


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def solution() -> None:
    """S: load the source, then answer T's calls. Whatever the model's code raises is told to T."""
    for old, new in ((IN, 0), (OUT, 1)):
        os.dup2(old, new)
        os.close(old)
    get, put, objects, message = open(SIDE_S, "rb"), open(SIDE_S, "wb"), [], None
    source, setup, seconds, memory, name = receive(get)
    sys.stdin, sys.stdout, space = open(0, closefd=False), open(1, "w", closefd=False), {"__name__": name}
    size = os.fstat(0)  # fast-input idioms ask for it; the call itself is not in the allow-list
    os.fstat = lambda fd: size
    while True:
        try:
            if message is None:
                seal(seconds, memory)
                value = [exec(compile(text, "solution", "exec"), space) for text in (setup, source)][0]
            else:
                (first, *names), args, kwargs = message
                target = functools.reduce(getattr, names, space[first] if isinstance(first, str) else objects[first])
                value = target(*decode(args, None), **decode(kwargs, None))
            reply = ["value", encode(value, lambda other: (objects.append(other), ["handle", len(objects) - 1])[1])]
        except BaseException as error:
            clean = isinstance(error, SystemExit) and error.code in (None, 0)
            reply = ["error", "clean exit" if clean else type(error).__name__, str(error)[:1000]]
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        send(put, reply)
        message = receive(get)


def judge(code: str, tests: dict, timeout: float, memory: int) -> str:
    """T: why of the verdict. Everything that S sends is data."""
    get, put, calls, loaded, is_main = open(SIDE_T, "rb"), open(SIDE_T, "wb"), [], False, "output" in tests

    def reply():
        try:
            kind, *rest = receive(get)
            if kind == "value":
                return decode(rest[0], Handle)
            name, text = map(str, rest)
        except Exception:
            raise CannotCross from None
        raise SystemExit(0) if name == "clean exit" else ERRORS.get(name, RuntimeError)(text)

    def refuse(*_):
        raise CannotCross

    class Handle:
        def __init__(self, *path):
            self.__dict__["path"] = path

        def __call__(self, *args, **kwargs):
            calls.append(self.path)
            send(put, (self.path, encode(args, refuse), encode(kwargs, refuse)))
            return reply()

        def __getattr__(self, name):
            return Handle(*self.path, name)
    for operation in "eq ne lt le gt ge bool len iter contains getitem hash add sub str repr setattr".split():
        setattr(Handle, f"__{operation}__", refuse)
    try:
        os.write(IN, tests.get("input", "").encode())
        os.lseek(IN, 0, os.SEEK_SET)
        send(put, (code, tests.get("setup", ""), timeout, memory, "__main__" if is_main else "solution"))
        seal(timeout, memory)
        with contextlib.suppress(SystemExit if is_main else ()):
            reply()
        loaded, space = True, {"__name__": "tests"}
        if is_main:
            os.lseek(OUT, 0, os.SEEK_SET)
            got = b"".join(iter(lambda: os.read(OUT, 1 << 20), b"")).decode(errors="replace")
            return "passed" if lines_of(got) == lines_of(tests["output"]) else "assertion"
        exec(compile(tests.get("setup", ""), "setup", "exec"), space)
        names = {node.id for node in ast.walk(ast.parse(tests["asserts"])) if isinstance(node, ast.Name)}
        space |= {name: Handle(name) for name in names - space.keys() - set(dir(builtins))}
        exec(compile(tests["asserts"], "tests", "exec"), space)
        return "passed" if calls else "no-call"
    except BaseException as error:  # the verdict itself
        name = type(error).__name__
        return "syntax" if isinstance(error, SyntaxError) and not loaded else KINDS.get(name, f"exception:{name}")


def tests() -> None:
    """T: read the job, set the alarm whose default action ends T, judge, tell the verdict."""
    try:
        job = receive(open(JOB, "rb"))
    except Gone:  # no more jobs
        os._exit(LAST)
    signal.setitimer(signal.ITIMER_REAL, job["timeout"])
    send(open(VERDICT, "wb"), judge(**job))
    os._exit(0)


def worker() -> None:
    """Fork S, then T, and wait, for ever. When T ends, by its verdict or its alarm, S is killed."""
    def child(body, keep) -> int:
        if pid := os.fork():
            return pid
        try:
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # die with the worker
            for fd in set(FDS) - keep:
                os.close(fd)
            body()
        finally:
            os._exit(1)
    builtins.exit = builtins.quit = sys.exit
    null, code = os.open("/dev/null", os.O_RDWR), 0
    for old, new in ((0, JOB), (1, VERDICT), (null, 0), (null, 1), (null, 2)):
        os.dup2(old, new)
    for name in PRELOAD:
        with contextlib.suppress(ImportError):
            __import__(name)
    while code != LAST:
        sides = [side.detach() for side in socket.socketpair()]
        for old, new in zip((os.memfd_create("in"), os.memfd_create("out"), *sides), FDS[2:]):
            os.dup2(old, new)
            os.close(old)
        s, t = child(solution, {IN, OUT, SIDE_S}), child(tests, {JOB, VERDICT, IN, OUT, SIDE_T})
        for fd in FDS[2:]:
            os.close(fd)
        code = os.waitstatus_to_exitcode(os.waitpid(t, 0)[1])  # −n: killed by signal n
        os.kill(s, signal.SIGKILL)
        os.waitpid(s, 0)
        if code not in (0, LAST):
            with open(VERDICT, "wb", closefd=False) as verdict:
                send(verdict, "timeout" if -code in (signal.SIGALRM, signal.SIGXCPU) else "crashed")


if __name__ == "__main__":
    UNSAFE, sys.path = sys.argv[1] == "1", sys.path + sys.argv[2:]
    worker()

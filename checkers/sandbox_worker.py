"""The worker of checkers/sandbox.py, which says what all this is for.

For each job the worker forks two processes: S runs the model's code, T runs the tests and decides.
Whatever the sandbox guarantees rests on this file.

    python -I -S sandbox_worker.py <1: without seccomp> <site-packages>…

Jobs come on stdin, one line of JSON each; the verdicts' words go to stdout, one line each. The file
imports the standard library only, because it runs isolated (-I, -S) from the project's own folder.
"""

import ast
import builtins
import ctypes
import importlib.util
import json
import os
import platform
import resource
import signal
import socket
import struct
import sys

UNSAFE = False  # True (--allow-unsafe-code): no seccomp; the two processes and the limits stay

# What S and T can import: the worker imports these before it forks, and a sealed process cannot
# open any other file.
PRELOAD = """
    __future__ abc argparse array base64 binascii bisect calendar cmath collections.abc
    concurrent.futures.thread ast contextlib copy csv ctypes dataclasses datetime decimal difflib
    enum fractions functools gc glob hashlib heapq html inspect io itertools json keyword locale
    logging math numbers operator os.path pathlib pickle platform pprint queue random re secrets
    shutil signal socket statistics string struct subprocess sys tempfile textwrap threading time
    timeit traceback types typing unicodedata unittest urllib.parse uuid warnings weakref zlib
    zoneinfo _strptime encodings.ascii encodings.idna encodings.latin_1 encodings.utf_16
    encodings.unicode_escape numpy
""".split()

# Descriptors of the worker. A child closes those that are not its own: S never holds JOB or
# VERDICT, so it can neither read the tests nor write a verdict.
JOB = 10  # jobs come in
VERDICT = 11  # verdicts go out
INPUT = 12  # a file in memory: stdin of S
OUTPUT = 13  # a file in memory: stdout of S
SIDE_S = 14  # the two ends of the socket between S and T
SIDE_T = 15
EACH_JOB = (INPUT, OUTPUT, SIDE_S, SIDE_T)  # made anew for every job
ALL_DESCRIPTORS = (JOB, VERDICT, *EACH_JOB)

NO_MORE_JOBS = 2  # exit code of T


# ---------------- the seal ----------------

LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2

# BPF, the language of the kernel's filters (linux/bpf_common.h). An instruction is (operation,
# instructions to skip if the test holds, instructions to skip if not, operand).
LOAD = 0x20  # 32 bits of struct seccomp_data, from the byte offset in the operand
JUMP_IF_EQUAL = 0x15
JUMP_IF_GREATER = 0x25
JUMP_IF_ANY_BIT = 0x45
RETURN = 0x06

# struct seccomp_data (linux/seccomp.h): byte offsets
CALL_NUMBER = 0
ARCHITECTURE = 4
FIRST_ARGUMENT = 16  # its low 32 bits, on these little-endian machines

KILL = (RETURN, 0, 0, 0x80000000)  # SECCOMP_RET_KILL_PROCESS
ALLOW = (RETURN, 0, 0, 0x7FFF0000)  # SECCOMP_RET_ALLOW
REFUSE = (RETURN, 0, 0, 0x00050001)  # SECCOMP_RET_ERRNO with EPERM: PermissionError in Python
NOT_THERE = (RETURN, 0, 0, 0x00050026)  # SECCOMP_RET_ERRNO with ENOSYS

LAST_NATIVE_CALL = 0x3FFFFFFF  # x86_64: numbers above are the x32 ABI's
CLONE3 = 435  # on every architecture
CLONE_THREAD = 0x10000

MACHINES = ("x86_64", "aarch64")  # the columns of the tables below
AUDIT_ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # linux/audit.h
CLONE = {"x86_64": 56, "aarch64": 220}

# The system calls that a sealed process may make, with the number on x86_64 and on aarch64 (None:
# no such call there, or not allowed). Everything else is refused: what opens a file or a socket,
# makes or signals a process, or changes rights or limits is absent on purpose. So are fcntl, dup
# and ioctl: they act on descriptors beyond reading and writing.
ALLOWED = {
    # reading, writing and waiting on descriptors that are open already
    "read": (0, 63),
    "write": (1, 64),
    "close": (3, 57),
    "fstat": (5, 80),
    "poll": (7, None),
    "lseek": (8, 62),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "select": (23, None),
    "pselect6": (270, 72),
    "ppoll": (271, 73),
    # memory, up to RLIMIT_AS
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "brk": (12, 214),
    "mremap": (25, 216),
    "madvise": (28, 233),
    # signals that the process receives; it can send none
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "restart_syscall": (219, 128),
    # threads and their locks; the filter allows clone by its flags
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "getcpu": (309, 168),
    # clocks and sleep
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    # random numbers
    "getrandom": (318, 278),
    # what the process is and has used
    "getpid": (39, 172),
    "getppid": (None, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getrusage": (98, 165),
    "times": (100, 153),
    # the end
    "exit": (60, 93),
    "exit_group": (231, 94),
}


def allowed_numbers(machine: str) -> list[int]:
    """The numbers of ALLOWED on "x86_64" or "aarch64", in order."""
    column = MACHINES.index(machine)
    numbers = [row[column] for row in ALLOWED.values()]
    return sorted(number for number in numbers if number is not None)


def seccomp_program(machine: str) -> list[tuple[int, int, int, int]]:
    """The filter that the kernel runs before each system call, as BPF instructions."""
    program = [
        # A call by another ABI (int 0x80: i386) has other numbers: the table does not fit it.
        (LOAD, 0, 0, ARCHITECTURE),
        (JUMP_IF_EQUAL, 1, 0, AUDIT_ARCHITECTURE[machine]),
        KILL,
        # The x32 ABI has x86_64's architecture, but numbers of its own, with bit 30 set.
        (LOAD, 0, 0, CALL_NUMBER),
        (JUMP_IF_GREATER, 0, 1, LAST_NATIVE_CALL),
        KILL,
        # clone3 takes its flags from memory, which a filter cannot read. Told that it does not
        # exist, libc uses clone.
        (JUMP_IF_EQUAL, 0, 1, CLONE3),
        NOT_THERE,
    ]
    for number in allowed_numbers(machine):
        program += [(JUMP_IF_EQUAL, 0, 1, number), ALLOW]
    program += [
        # clone with CLONE_THREAD starts a thread, clone without it starts a process.
        (JUMP_IF_EQUAL, 0, 3, CLONE[machine]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_IF_ANY_BIT, 0, 1, CLONE_THREAD),
        ALLOW,
        REFUSE,
    ]
    return program


def prctl(option: int, value: int, pointer=None) -> None:
    """One prctl call. Raises OSError if the kernel refuses it."""
    zero = ctypes.c_ulong(0)
    if LIBC.prctl(option, ctypes.c_ulong(value), pointer, zero, zero):
        raise OSError(ctypes.get_errno(), f"the kernel refused prctl {option}")


def seal(seconds: float, memory: int) -> None:
    """Give up everything but computing, in this process and for good.

    seconds: of CPU time. memory: bytes of address space. Raises OSError if the kernel does not
    seal: then nothing of the job runs.
    """
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: int(seconds) + 1,  # seconds; should T's alarm, of wall clock, fail
        resource.RLIMIT_FSIZE: 16 << 20,  # bytes; what S prints is kept in memory
        resource.RLIMIT_CORE: 0,  # a crash leaves no file
    }
    for kind, limit in limits.items():
        # Soft and hard limit, so that the process cannot raise it again.
        resource.setrlimit(kind, (limit, limit))
    if UNSAFE:
        return

    instructions = seccomp_program(platform.machine())
    packed = [struct.pack("=HBBI", *instruction) for instruction in instructions]
    code = ctypes.create_string_buffer(b"".join(packed))
    program = struct.pack("@HP", len(packed), ctypes.addressof(code))  # struct sock_fprog
    # No other process of this user can trace it or read its memory.
    prctl(PR_SET_DUMPABLE, 0)
    # The kernel asks this of a process that sets a filter without being root.
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(program))


# ---------------- values between S and T ----------------
# A value crosses as tagged JSON, ["int", "0x10"], and is built again as exactly that builtin type.
# So an object of the model's that claims to equal everything arrives as the plain value that it
# extends, or not at all.


class Gone(BaseException):
    """The other side ended. It is no Exception, so that no test can catch it."""


class CannotCross(BaseException):
    """A value is not plain data. It is no Exception, so that no test can catch it."""


# These texts are exact, and have no limit of digits.
TO_TEXT = {str: str, int: hex, float: float.hex, complex: repr, bytes: bytes.hex}
CONTAINERS = (list, tuple, set, frozenset, dict)


def from_hex(text: str) -> int:
    """The inverse of hex()."""
    return int(text, 16)


FROM_TEXT = {
    "str": str,
    "int": from_hex,
    "float": float.fromhex,
    "complex": complex,
    "bytes": bytes.fromhex,
}
CONTAINER_OF_NAME = {kind.__name__: kind for kind in CONTAINERS}


def kind_of(value):
    """The builtin type that a value has or extends; None if it is no plain data."""
    for kind in (*TO_TEXT, *CONTAINERS):
        if isinstance(value, kind):
            return kind
    return None


def encode(value, encode_other):
    """A value as tagged JSON, and encode_other(value) for what in it is not plain data."""
    if value is None or type(value) is bool:
        return value
    kind = kind_of(value)
    if kind in TO_TEXT:
        return [kind.__name__, TO_TEXT[kind](value)]
    if kind is not None:
        items = value.items() if kind is dict else value
        return [kind.__name__, [encode(item, encode_other) for item in items]]
    if type(value).__module__ == "numpy":
        return encode(value.tolist(), encode_other)
    return encode_other(value)


def decode(data, make_handle):
    """The value of tagged JSON; make_handle(number) for an object that stays in S."""
    if data is None or type(data) is bool:
        return data
    kind, content = data
    if kind in FROM_TEXT:
        return FROM_TEXT[kind](content)
    if kind == "handle":
        return make_handle(int(content))
    return CONTAINER_OF_NAME[kind](decode(item, make_handle) for item in content)


def send(file, message) -> None:
    """Write a message as one line of JSON."""
    file.write(json.dumps(message).encode() + b"\n")
    file.flush()


def receive(file, largest: int = 64 << 20):
    """Read one message. Raises Gone at the end.

    A message of more bytes than `largest` is cut, and then it is no JSON.
    """
    line = file.readline(largest)
    if not line:
        raise Gone
    return json.loads(line)


def same_output(printed: str, expected: str, compare: str) -> bool:
    """Is what a program printed what it must print? The worker takes the function from printed.py.

    That file cannot be imported, because an isolated process does not look into its own folder.
    """
    raise NotImplementedError


def load_same_output():
    """The function of printed.py, beside this file."""
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "printed.py")
    specification = importlib.util.spec_from_file_location("printed", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.same_output


# ---------------- S: the model's code ----------------
# S is the attacker's: its code can change every object of this process. Nothing here is relied on
# for the verdict.


def open_streams() -> None:
    """Make INPUT and OUTPUT the stdin and stdout of this process."""
    for old, new in ((INPUT, 0), (OUTPUT, 1)):
        os.dup2(old, new)
        os.close(old)
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)

    # Programs ask fstat for the size of stdin, to read all of it at once. libc may answer by
    # newfstatat, which takes paths and so is not allowed: the answer is prepared here.
    input_status = os.fstat(0)

    def prepared_fstat(fd):
        return input_status

    os.fstat = prepared_fstat


def find_target(path: list, namespace: dict, objects: list):
    """The object at a Handle's path: a name or an object's number, then attributes."""
    first, *attributes = path
    target = namespace[first] if isinstance(first, str) else objects[first]
    for name in attributes:
        target = getattr(target, name)
    return target


def error_reply(error: BaseException) -> list:
    """What S tells T of an error: its name and text.

    sys.exit() and sys.exit(0) get a name of their own, because good programs end with them.
    """
    clean = isinstance(error, SystemExit) and error.code in (None, 0)
    return ["error", "clean exit" if clean else type(error).__name__, str(error)[:1000]]


def solution() -> None:
    """S: run the source, then answer T's calls until it is killed.

    S tells T whatever the model's code raises.
    """
    from_t = open(SIDE_S, "rb")
    to_t = open(SIDE_S, "wb")
    source, setup, seconds, memory, module_name = receive(from_t)
    open_streams()
    namespace = {"__name__": module_name}
    objects = []  # those that T holds handles of

    def keep_object(value):
        objects.append(value)
        return ["handle", len(objects) - 1]

    call = None  # the first round runs the source
    while True:
        # The model's code is called from this very function, because each call in between would
        # take one of the 1,000 frames that Python lets it recurse.
        try:
            if call is None:
                seal(seconds, memory)
                exec(compile(setup, "solution", "exec"), namespace)
                exec(compile(source, "solution", "exec"), namespace)
                value = None
            else:
                path, args, kwargs = call
                target = find_target(path, namespace, objects)
                value = target(*decode(args, None), **decode(kwargs, None))
            reply = ["value", encode(value, keep_object)]
        except BaseException as error:  # SystemExit and KeyboardInterrupt as well
            reply = error_reply(error)
        try:
            sys.stdout.flush()
        except Exception:
            pass  # the model's code closed or replaced stdout: what it printed is lost
        send(to_t, reply)
        call = receive(from_t)


# ---------------- T: the tests ----------------
# T runs the row's own tests, which are trusted. Everything that S sends is data.


def catchable_errors() -> dict:
    """Python's exceptions by name: T raises them again, so that tests may expect them.

    Those that steer loops (StopIteration) and those that are not made from one text are left out.
    """
    errors = {}
    for name, error in vars(builtins).items():
        special = "Stop" in name or "Unicode" in name or "Group" in name
        if isinstance(error, type) and issubclass(error, Exception) and not special:
            errors[name] = error
    return errors


ERRORS = catchable_errors()

# The name of the exception that ended T's work → the verdict's word. For any other exception the
# word is exception:<Name>.
WHY_OF_ERROR = {
    "Gone": "crashed",
    "BrokenPipeError": "crashed",
    "ConnectionResetError": "crashed",
    "MemoryError": "memory",
    "CannotCross": "cannot-cross",
    "PermissionError": "sealed-refusal",
    "ImportError": "import-missing",
    "ModuleNotFoundError": "import-missing",
    "AssertionError": "assertion",
}


class Solution:
    """T's connection to S."""

    def __init__(self):
        self.from_s = open(SIDE_T, "rb")
        self.to_s = open(SIDE_T, "wb")
        self.calls = 0  # how often the tests called S
        self.Handle = handle_class(self)

    def reply(self):
        """The value that S sends.

        Raises the error if S sends one instead, and CannotCross if it sends neither.
        """
        try:
            kind, *content = receive(self.from_s)
            if kind == "value":
                return decode(content[0], self.Handle)
            name, text = map(str, content)
        except Exception:
            raise CannotCross from None
        if name == "clean exit":
            raise SystemExit(0)
        raise ERRORS.get(name, RuntimeError)(text)


def refuse(*_):
    """What a Handle does when it is used as a value."""
    raise CannotCross


def handle_class(connection: Solution) -> type:
    """The class of what stands in T for an object that stays in S."""

    class Handle:
        """A path into S: a name or an object's number, then attributes.

        It can be called, and its attributes are handles too. Everything else is refused: it has no
        value, so no comparison with it can hold.
        """

        def __init__(self, *path):
            self.__dict__["path"] = path  # as __setattr__ is refused

        def __call__(self, *args, **kwargs):
            connection.calls += 1
            send(connection.to_s, (self.path, encode(args, refuse), encode(kwargs, refuse)))
            return connection.reply()

        def __getattr__(self, name):
            return Handle(*self.path, name)

        __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = refuse
        __bool__ = __len__ = __iter__ = __contains__ = __getitem__ = __hash__ = refuse
        __add__ = __sub__ = __str__ = __repr__ = __setattr__ = refuse

    return Handle


def read_output() -> str:
    """All that S has printed."""
    os.lseek(OUTPUT, 0, os.SEEK_SET)
    blocks = []
    while block := os.read(OUTPUT, 1 << 20):
        blocks.append(block)
    return b"".join(blocks).decode(errors="replace")


def tests_namespace(tests: dict, connection: Solution) -> dict:
    """The names that the asserts see: the setup's, and for each unknown one a handle to S."""
    namespace = {"__name__": "tests"}
    exec(compile(tests.get("setup", ""), "setup", "exec"), namespace)
    for node in ast.walk(ast.parse(tests["asserts"])):
        if not isinstance(node, ast.Name):
            continue
        if node.id not in namespace and node.id not in vars(builtins):
            namespace[node.id] = connection.Handle(node.id)
    return namespace


def why_failed(error: BaseException, loaded: bool) -> str:
    """The verdict's word for the error that ended T's work.

    loaded: the source had run to its end before that.
    """
    if isinstance(error, SyntaxError) and not loaded:
        return "syntax"
    name = type(error).__name__
    return WHY_OF_ERROR.get(name, f"exception:{name}")


def judge(code: str, tests: dict, timeout: float, memory: int) -> str:
    """T: start S on the code, test it, and return the verdict's word."""
    connection = Solution()
    is_program = "output" in tests  # stdin → stdout, not functions
    module_name = "__main__" if is_program else "solution"
    loaded = False
    try:
        os.write(INPUT, tests.get("input", "").encode())
        os.lseek(INPUT, 0, os.SEEK_SET)
        # S gets the source and the helpers of setup, never the tests.
        send(connection.to_s, (code, tests.get("setup", ""), timeout, memory, module_name))
        seal(timeout, memory)  # before T reads the first byte that S wrote
        try:
            connection.reply()
        except SystemExit:
            if not is_program:  # functions that are gone cannot be tested
                raise
        loaded = True

        if is_program:
            same = same_output(read_output(), tests["output"], tests.get("compare", "numbers"))
            return "passed" if same else "assertion"
        namespace = tests_namespace(tests, connection)
        exec(compile(tests["asserts"], "tests", "exec"), namespace)
        # Tests that call nothing hold for every code.
        return "passed" if connection.calls else "no-call"
    except BaseException as error:  # it is the verdict
        return why_failed(error, loaded)


def run_tests() -> None:
    """T: read a job, judge it and send the verdict.

    T runs under an alarm that ends it, because nothing in T handles the signal.
    """
    try:
        job = receive(open(JOB, "rb"))
    except Gone:
        os._exit(NO_MORE_JOBS)
    signal.setitimer(signal.ITIMER_REAL, job["timeout"])
    send(open(VERDICT, "wb"), judge(**job))
    os._exit(0)


# ---------------- the worker ----------------
# It never reads a job, so nothing of one job can reach the next through it.


def start_child(body, descriptors: set[int]) -> int:
    """Fork a process that runs body() with these descriptors alone. Returns its process id."""
    process_id = os.fork()
    if process_id:
        return process_id
    try:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends when the worker does
        for fd in set(ALL_DESCRIPTORS) - descriptors:
            os.close(fd)
        body()
    finally:  # whatever happened, a child never returns into the worker's loop
        os._exit(1)


def make_descriptors() -> None:
    """Fill EACH_JOB with two empty files in memory and the two ends of a new socket."""
    side_s, side_t = socket.socketpair()
    new = (os.memfd_create("in"), os.memfd_create("out"), side_s.detach(), side_t.detach())
    for fd, number in zip(new, EACH_JOB, strict=True):
        os.dup2(fd, number)
        os.close(fd)


def prepare() -> None:
    """Move stdin and stdout to JOB and VERDICT, and import all that S and T may use."""
    null = os.open("/dev/null", os.O_RDWR)
    for old, new in ((0, JOB), (1, VERDICT), (null, 0), (null, 1), (null, 2)):
        os.dup2(old, new)
    builtins.exit = builtins.quit = sys.exit  # -S leaves these out, and programs use them
    for name in PRELOAD:
        try:
            __import__(name)
        except ImportError:
            pass  # numpy need not be installed; some modules are newer than some Pythons


def do_job() -> bool:
    """Fork S and T, wait for T, kill S. Returns False when there are no more jobs.

    If T ended without a verdict, by its alarm or by a crash, the worker sends one.
    """
    make_descriptors()
    s_id = start_child(solution, {INPUT, OUTPUT, SIDE_S})
    t_id = start_child(run_tests, {JOB, VERDICT, INPUT, OUTPUT, SIDE_T})
    for fd in EACH_JOB:  # so that only S and T hold them, and each sees it when the other ends
        os.close(fd)
    _, status = os.waitpid(t_id, 0)
    os.kill(s_id, signal.SIGKILL)  # T has decided; S may still be running
    os.waitpid(s_id, 0)

    exit_code = os.waitstatus_to_exitcode(status)  # −n: signal n ended it
    if exit_code == NO_MORE_JOBS:
        return False
    if exit_code != 0:
        out_of_time = -exit_code in (signal.SIGALRM, signal.SIGXCPU)
        with open(VERDICT, "wb", closefd=False) as verdict:
            send(verdict, "timeout" if out_of_time else "crashed")
    return True


if __name__ == "__main__":
    UNSAFE = sys.argv[1] == "1"
    same_output = load_same_output()
    sys.path += sys.argv[2:]
    prepare()
    while do_job():
        pass

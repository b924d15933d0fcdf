"""The worker of checkers/sandbox.py, which says what all this is for.

For each job the worker forks two processes: S runs the model's code, T runs the tests and decides.
Whatever the sandbox guarantees rests on this file.

    python -I -S sandbox_worker.py <1: without seccomp> <site-packages>…

Jobs come on stdin, one line of JSON each; the verdicts' words go to stdout, one line each. The file
imports the standard library only, because it runs isolated (-I, -S) from the project's own folder.
"""

import ast
import atexit
import builtins
import ctypes
import functools
import gc
import importlib.util
import io
import json
import math
import os
import platform
import re
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
import types

UNSAFE = False  # True (--allow-unsafe-code): no seccomp; the two processes and the limits stay

# What S and T can import: a sealed process cannot open any other file. They are the standard
# modules that compute, and those whose import harms nothing and that programs name without need.
# Absent are windows, databases, mail and web servers, and modules that act when they are imported.
# The worker imports PRELOAD before it forks.
PRELOAD = """
    __future__ abc argparse array ast atexit base64 binascii bisect builtins bz2 calendar cmath
    codecs collections.abc concurrent.futures.thread contextlib contextvars copy copyreg csv ctypes
    dataclasses datetime decimal difflib dis enum errno fnmatch fractions functools gc gettext glob
    graphlib hashlib heapq hmac inspect io itertools json keyword linecache locale logging lzma
    marshal math numbers opcode operator os.path pathlib pickle platform posixpath pprint queue
    quopri random re reprlib resource secrets select selectors shlex shutil signal socket stat
    statistics string stringprep struct subprocess sys textwrap threading time timeit token tokenize
    traceback types typing unicodedata urllib.error urllib.parse uuid warnings weakref zlib zoneinfo
    _strptime encodings.ascii encodings.base64_codec encodings.cp1252 encodings.cp437
    encodings.hex_codec encodings.idna encodings.iso8859_1 encodings.latin_1 encodings.punycode
    encodings.raw_unicode_escape encodings.rot_13 encodings.unicode_escape encodings.utf_16
    encodings.utf_16_be encodings.utf_16_le encodings.utf_32 encodings.utf_32_be encodings.utf_32_le
    encodings.utf_8_sig
    numpy
""".split()
# Modules that few programs name: every fork would copy their pages. S and T import those that
# the source or the tests name, before they seal themselves. numpy loads these parts late, too.
LATE = """
    asyncio bdb cProfile cmd code codeop colorsys concurrent.futures.process configparser doctest
    email.message faulthandler filecmp fileinput getopt getpass gzip html html.entities html.parser
    importlib.metadata ipaddress json.tool mimetypes mmap multiprocessing multiprocessing.dummy
    multiprocessing.pool optparse pdb pickletools pkgutil plistlib profile pstats rlcompleter runpy
    sched shelve symtable sysconfig tabnanny tarfile tempfile tomllib trace tracemalloc unittest
    unittest.mock wave xml.dom.minidom xml.etree.ElementTree xml.sax zipfile zipimport
    numpy.char numpy.ctypeslib numpy.dtypes numpy.exceptions numpy.fft numpy.lib.recfunctions
    numpy.lib.scimath numpy.lib.stride_tricks numpy.linalg numpy.ma numpy.matlib numpy.polynomial
    numpy.random numpy.rec numpy.strings numpy.testing numpy.typing
""".split()
LATE_WORD = re.compile(rf"\b(?:{'|'.join(sorted({name.partition('.')[0] for name in LATE}))})\b")

# Descriptors of the worker. A child closes those that are not its own: S holds none of JOB, VERDICT
# and TO_WORKER, so it can neither read the tests nor write a verdict.
JOB = 10  # jobs come in
VERDICT = 11  # verdicts go out
INPUT = 12  # a file in memory: stdin of S
OUTPUT = 13  # a file in memory: stdout of S
SIDE_S = 14  # the two ends of the socket between S and T
SIDE_T = 15
FROM_T = 16  # the two ends of the pipe on which T tells the worker its limit and its verdict
TO_WORKER = 17
EACH_JOB = (INPUT, OUTPUT, SIDE_S, SIDE_T, FROM_T, TO_WORKER)  # made anew for every job
ALL_DESCRIPTORS = (JOB, VERDICT, *EACH_JOB)

# Verdicts that say nothing of the code, because the machine failed
SLOW_MACHINE = "unknown: wall-clock"  # the wall limit was reached, with time of its own left
LOST = "unknown: killed"  # somebody else killed S, T or the worker

TICK = 0.02  # seconds between two looks at how long S and T have taken
WALL_FACTOR = 12  # the wall limit, in limits of own time
GRACE = 1.0  # seconds in which a process that has closed its descriptors ends
MOST_OF_T = 4096  # bytes of one message of T; a pipe takes so many in one piece
MOST_THREADS = 64  # of a process that are looked at: more would make a look slow


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
NO_FILE = (RETURN, 0, 0, 0x00050002)  # … with ENOENT: FileNotFoundError
NOT_THERE = (RETURN, 0, 0, 0x00050026)  # … with ENOSYS

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


# Refused like everything else, but as if no file existed. Honest programs ask whether there is an
# input.txt, and read stdin if there is none.
LOOKS_FOR_FILES = {
    "open": (2, None),
    "stat": (4, None),
    "lstat": (6, None),
    "access": (21, None),
    "readlink": (89, None),
    "openat": (257, 56),
    "newfstatat": (262, 79),
    "readlinkat": (267, 78),
    "faccessat": (269, 48),
    "statx": (332, 291),
    "faccessat2": (439, 439),
}


def numbers_of(table: dict, machine: str) -> list[int]:
    """The numbers of a table's calls on "x86_64" or "aarch64", in order."""
    column = MACHINES.index(machine)
    numbers = [row[column] for row in table.values()]
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
    for table, answer in ((ALLOWED, ALLOW), (LOOKS_FOR_FILES, NO_FILE)):
        for number in numbers_of(table, machine):
            program += [(JUMP_IF_EQUAL, 0, 1, number), answer]
    program += [
        # clone with CLONE_THREAD starts a thread, clone without it starts a process.
        (JUMP_IF_EQUAL, 0, 3, CLONE[machine]),
        (LOAD, 0, 0, FIRST_ARGUMENT),
        (JUMP_IF_ANY_BIT, 0, 1, CLONE_THREAD),
        ALLOW,
        REFUSE,
    ]
    return program


@functools.cache
def packed_filter():
    """This machine's filter as the kernel reads it: struct sock_filter, 8 bytes an instruction."""
    program = seccomp_program(platform.machine())
    instructions = [struct.pack("=HBBI", *instruction) for instruction in program]
    return (ctypes.c_char * (8 * len(program))).from_buffer_copy(b"".join(instructions))


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
        resource.RLIMIT_CPU: math.ceil(seconds) + 1,  # seconds; where the worker's watch is blind
        resource.RLIMIT_FSIZE: 16 << 20,  # bytes; what S prints is kept in memory
        resource.RLIMIT_CORE: 0,  # a crash leaves no file
    }
    _, most_stack = resource.getrlimit(resource.RLIMIT_STACK)
    if most_stack == resource.RLIM_INFINITY or most_stack > memory:
        limits[resource.RLIMIT_STACK] = memory  # programs that recurse deeply ask for it
    for kind, limit in limits.items():
        # Soft and hard limit, so that the process cannot raise it again.
        resource.setrlimit(kind, (limit, limit))
    if UNSAFE:
        return

    code = packed_filter()
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(code))  # struct sock_fprog
    # No other process of this user can trace it or read its memory.
    prctl(PR_SET_DUMPABLE, 0)
    # The kernel asks this of a process that sets a filter without being root.
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.create_string_buffer(program))


def import_all(names: list[str]) -> None:
    """Import those of the modules that there are."""
    for name in names:
        try:
            __import__(name)
        except ImportError:
            pass  # numpy need not be installed; some modules are newer than some Pythons


def named_modules(text: str) -> list[str]:
    """The modules of LATE that a program may mean, by the words in its text.

    Of numpy the parts that are named; of every other package all that LATE has, because its modules
    import each other when they are used.
    """
    if not LATE_WORD.search(text):
        return []
    words = set(re.findall(r"\w+", text))
    names = []
    for name in LATE:
        parts = name.split(".")
        if words.issuperset(parts if parts[0] == "numpy" else parts[:1]):
            names.append(name)
    return names


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


def load_same_output():
    """Is what a program printed what it must print? The function of printed.py, beside this file.

    It cannot be imported, because an isolated process does not look into its own folder.
    """
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "printed.py")
    specification = importlib.util.spec_from_file_location("printed", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.same_output


same_output = load_same_output()


# ---------------- S: the model's code ----------------
# S is the attacker's: its code can change every object of this process. Nothing here is relied on
# for the verdict.


STANDARD_FILES = {
    "/dev/stdin": 0,
    "/dev/stdout": 1,
    "/dev/stderr": 2,
    "/dev/fd/0": 0,
    "/dev/fd/1": 1,
    "/dev/null": 2,
    "/proc/self/fd/0": 0,
    "/proc/self/fd/1": 1,
}


def open_streams() -> None:
    """Make INPUT and OUTPUT the stdin and stdout of this process."""
    for old, new in ((INPUT, 0), (OUTPUT, 1)):
        os.dup2(old, new)
        os.close(old)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.argv = ["program.py"]  # programs may read the file that an argument names
    prepare_status()
    prepare_open()


def prepare_status() -> None:
    """Let programs ask for the size of stdin, to read all of it at once.

    libc may ask by newfstatat, which takes paths and so is refused. The answer is prepared here.
    """
    input_status = os.fstat(0)
    plain_stat = os.stat

    def stat(path, *arguments, **options):
        if path in STANDARD_FILES or isinstance(path, int):
            return input_status
        return plain_stat(path, *arguments, **options)

    def fstat(fd):
        return input_status

    os.stat, os.fstat = stat, fstat


def prepare_open() -> None:
    """Let programs open their standard streams by their paths; any other path is refused."""
    plain_open, plain_os_open = io.open, os.open

    def open_file(file, *arguments, **options):
        path = os.fspath(file) if isinstance(file, os.PathLike) else file
        if path in STANDARD_FILES:
            return plain_open(STANDARD_FILES[path], *arguments, **{**options, "closefd": False})
        return plain_open(file, *arguments, **options)

    def os_open(path, *arguments, **options):
        if path in STANDARD_FILES:
            return STANDARD_FILES[path]
        return plain_os_open(path, *arguments, **options)

    builtins.open = io.open = open_file
    os.open = os_open


def prepare_stack(memory: int) -> None:
    """Let programs ask for a large stack, as those that recurse deeply do.

    The main thread has the largest already, so the wish is ignored. A thread gets half of the
    memory, in bytes, at most.
    """
    plain_get, plain_set, plain_size = resource.getrlimit, resource.setrlimit, threading.stack_size

    def getrlimit(kind):
        return (memory, memory) if kind == resource.RLIMIT_STACK else plain_get(kind)

    def setrlimit(kind, limits):
        if kind != resource.RLIMIT_STACK:
            plain_set(kind, limits)

    def stack_size(size=0):
        return plain_size(min(size, memory // 2))

    resource.getrlimit, resource.setrlimit = getrlimit, setrlimit
    threading.stack_size = stack_size


def new_module(name: str) -> dict:
    """The namespace of a new module, which dataclasses and pickle find by its name."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module.__dict__


def announce_exit(to_t) -> None:
    """Let os._exit(), with which some programs end, tell T of the exit code.

    Nothing is flushed, as ever. Without this, T would see S vanish, which is a crash.
    """
    plain_exit = os._exit

    def leave(code):
        send(to_t, error_reply(SystemExit(code)))
        plain_exit(code)

    os._exit = leave


def end_program(namespace: dict) -> None:
    """What Python does when a program is over: threads, atexit, and files that are not flushed."""
    try:
        threading._shutdown()  # waits for threads that nobody joined
        atexit._run_exitfuncs()
        namespace.clear()  # files are flushed when nobody holds them any more
    except BaseException:
        pass  # Python prints errors of these to stderr, and exits as before


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
    import_all(named_modules(f"{setup}\n{source}"))
    namespace = new_module(module_name)
    is_program = module_name == "__main__"
    if is_program:
        open_streams()
        announce_exit(to_t)
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
                prepare_stack(memory)  # after the seal, which sets the limits
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
        if is_program and reply[1] in (None, "clean exit"):
            end_program(namespace)
        try:
            sys.stdout.flush()
            sys.__stdout__.flush()
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

        Raises the error if S sends one instead, CannotCross if it sends neither. Raises Gone if S
        ended.
        """
        try:
            kind, *content = receive(self.from_s)
            if kind == "value":
                return decode(content[0], self.Handle)
            name, text = map(str, content)
        except ConnectionResetError:  # S ended before it read what T sent
            raise Gone from None
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
        import_all(named_modules(f"{tests.get('setup')}\n{tests.get('asserts')}"))
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
    """T: read a job, tell the worker how long it may take, judge it and send the verdict."""
    try:
        job = receive(open(JOB, "rb"), -1)  # of any size: the rest would be taken for the next job
    except Gone:
        os._exit(0)
    os.write(TO_WORKER, f"{job['timeout']}\n".encode())
    os.write(TO_WORKER, judge(**job).encode())
    os._exit(0)


# ---------------- the watch: the time that S and T take ----------------
# A clock on the wall would blame code for a busy machine. So S and T are charged their own time:
# the CPU time of both, and the time in which both sleep. They wait for nothing but each other, so
# both sleep only if the code sleeps or blocks. While one of them waits for a CPU or for a page of
# memory, the time is the machine's.


def fields_of(path: str) -> list[bytes]:
    """What the kernel's file says of a process or thread, from its state on ("man proc_pid_stat").

    Raises OSError if the process has ended, or if this machine does not show it.
    """
    with open(path, "rb") as file:
        return file.read().rpartition(b")")[2].split()


def cpu_seconds(process_id: int) -> float:
    """CPU time of all threads of a process, ended ones too; 0 if this machine does not show it."""
    try:
        fields = fields_of(f"/proc/{process_id}/stat")
    except OSError:
        return 0.0
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def is_asleep(process_id: int) -> bool:
    """Does every thread of a process sleep (S) or has it ended (Z)?

    False if this machine does not show it.
    """
    folder = f"/proc/{process_id}/task"
    try:
        for thread in os.listdir(folder)[:MOST_THREADS]:
            if fields_of(f"{folder}/{thread}/stat")[0] not in (b"S", b"Z"):
                return False
    except OSError:  # a thread that has just ended did not sleep
        return False
    return True


class Watch:
    """How long the processes of a job have taken, against the job's limit in seconds."""

    def __init__(self, process_ids: tuple, seconds: float):
        self.process_ids = process_ids
        self.seconds = seconds
        self.slept = 0.0  # seconds in which all of them slept, from samples
        self.started = time.monotonic()

    def word(self) -> str | None:
        """Called every TICK: the verdict's word if a limit is reached, else None."""
        if all(map(is_asleep, self.process_ids)):
            self.slept += TICK
        if self.slept + sum(map(cpu_seconds, self.process_ids)) > self.seconds:
            return "timeout"
        if time.monotonic() - self.started > WALL_FACTOR * self.seconds:
            return SLOW_MACHINE
        return None


def wait_for_word(process_ids: tuple) -> tuple[str | None, float | None]:
    """(the verdict's word, the job's limit in seconds), from T or because a limit is reached.

    The word is None if T ended without one; the limit too if T ended before it read a job.
    """
    # Until there is a job, the worker waits without a limit. T's word may have come at once.
    limit, _, word = os.read(FROM_T, MOST_OF_T).partition(b"\n")
    if not limit:
        return None, None
    seconds = float(limit)
    watch = Watch(process_ids, seconds)
    ready = select.poll()
    ready.register(FROM_T, select.POLLIN)
    while not word:
        while not ready.poll(1000 * TICK):
            reached = watch.word()
            if reached:
                return reached, seconds
        word = os.read(FROM_T, MOST_OF_T)
        if not word:
            return None, seconds
    return word.decode(), seconds


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
    """Fill EACH_JOB: two empty files in memory, the ends of a new socket, those of a new pipe."""
    side_s, side_t = socket.socketpair()
    files = (os.memfd_create("in"), os.memfd_create("out"))
    new = (*files, side_s.detach(), side_t.detach(), *os.pipe())
    for fd, number in zip(new, EACH_JOB, strict=True):
        os.dup2(fd, number)
        os.close(fd)


def prepare() -> None:
    """Move stdin and stdout to JOB and VERDICT, and make what every S and T will use."""
    if not UNSAFE:
        packed_filter()  # made once: the children inherit it
    null = os.open("/dev/null", os.O_RDWR)
    for old, new in ((0, JOB), (1, VERDICT), (null, 0), (null, 1), (null, 2)):
        os.dup2(old, new)
    builtins.exit = builtins.quit = sys.exit  # -S leaves these out, and programs use them
    import_all(PRELOAD)
    gc.freeze()  # so that no child's collector copies the pages of what is here


def ends_alone(process_id: int) -> bool:
    """Does a process end within GRACE seconds, though nobody here kills it?"""
    deadline = time.monotonic() + GRACE
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, process_id, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        time.sleep(0.005)
    return False


def end(process_id: int) -> tuple[int, float]:
    """Kill a child if it still runs. Returns (exit code, CPU seconds).

    Exit code −n: signal n ended it.
    """
    os.kill(process_id, signal.SIGKILL)
    _, status, usage = os.wait4(process_id, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime


def word_of_end(exit_code: int, cpu_time: float, seconds: float) -> str:
    """The verdict's word for a process that ended by itself, or that someone else killed."""
    if cpu_time >= seconds:
        return "timeout"  # the kernel ended it at its limit
    # The seal lets no process kill itself, so this was someone else: the kernel, out of memory.
    return LOST if exit_code == -signal.SIGKILL else "crashed"


def do_job() -> bool:
    """Fork S and T, wait for a verdict, kill both. Returns False if T ended before it read a job.

    If T ended without a verdict, or because S ended, the verdict says why that one ended.
    """
    make_descriptors()
    s_id = start_child(solution, {INPUT, OUTPUT, SIDE_S})
    t_id = start_child(run_tests, {JOB, INPUT, OUTPUT, SIDE_T, TO_WORKER})
    for fd in set(EACH_JOB) - {FROM_T}:  # so that each of S and T sees it when the other ends
        os.close(fd)
    word, seconds = wait_for_word((s_id, t_id))
    os.close(FROM_T)

    suspect = {None: t_id, "crashed": s_id}.get(word)
    if suspect is None:
        send_verdict(word)  # first, so that the next job is on its way while these two end
    ended_alone = suspect is not None and ends_alone(suspect)
    ends = {s_id: end(s_id), t_id: end(t_id)}
    if seconds is None:
        # No more jobs, or someone killed T. A verdict would be taken for that of the next job.
        return False
    if suspect is not None:
        send_verdict(word_of_end(*ends[suspect], seconds) if ended_alone else "crashed")
    return True


def send_verdict(word: str) -> None:
    """Write a job's verdict to the trainer."""
    os.write(VERDICT, f"{word}\n".encode())


if __name__ == "__main__":
    UNSAFE = sys.argv[1] == "1"
    sys.path += sys.argv[2:]
    prepare()
    while do_job():
        pass

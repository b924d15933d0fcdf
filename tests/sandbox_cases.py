"""What test_sandbox.py runs in the sandbox: attacks of every family we know, and honest code.

Most of it is tested by SQUARE, which asks for a function f with f(x) = x².
"""

import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SQUARE = {"asserts": "for x in (2, 3, 7):\n    assert f(x) == x * x"}

ATTEMPT = """
import os, sys, ctypes, signal, socket, subprocess, threading, time, resource, gc, inspect
CANARY = {canary!r}
def attempt():
{body}

def f(x):
    try:
        return x * x if attempt() else None
    except Exception:
        return None
"""


def if_done(body: str, canary: str = "") -> str:
    """Code whose f is right only when `body`, a function's, returns true.

    So it passes only if the attempt succeeded. canary: the path of a file that the attempt may try
    to change, under the name CANARY.
    """
    indented = textwrap.indent(textwrap.dedent(body), "    ")
    return ATTEMPT.format(body=indented, canary=canary)


def syscall(number: int, *args: int) -> str:
    """Code whose f is right only when libc's syscall() succeeds."""
    arguments = ", ".join(map(str, (number, *args)))
    return if_done(f"return ctypes.CDLL(None).syscall({arguments}) >= 0")


def machine_code(code: bytes) -> str:
    """Code whose f is right only when these instructions return a positive number."""
    return if_done(f"""
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
page = libc.mmap(None, 4096, 7, 0x22, -1, 0)
ctypes.memmove(page, {code!r}, {len(code)})
return ctypes.CFUNCTYPE(ctypes.c_long)(page)() > 0
""")


# The system call getpid: by the native ABI, by i386's, and by x32's.
GETPID = b"\xb8\x27\x00\x00\x00\x0f\x05\xc3"  # mov eax, 39; syscall; ret
GETPID_80 = b"\xb8\x14\x00\x00\x00\xcd\x80\xc3"  # mov eax, 20; int 0x80; ret
GETPID_X32 = b"\xb8\x27\x00\x00\x40\x0f\x05\xc3"  # mov eax, 0x40000027; syscall; ret

# Code that tries to break the machine or to be judged right without being right.
FORGERIES = {
    "infinite loop": """
def f(x):
    while True: pass
""",
    "loop at import": "while True: pass",
    "sleep": """
import time
def f(x): time.sleep(99)
""",
    "deep sleep": """
import threading
def f(x): threading.Event().wait()
""",
    "ignored signals": """
import signal
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except Exception: pass
while True: pass
""",
    "memory bomb": "x = [0] * (1 << 40)",
    "slow memory bomb": """
x = []
while True: x.append(bytearray(1 << 20))
""",
    "recursion bomb": "def f(x): return f(x)",
    "deep recursion": """
import sys
sys.setrecursionlimit(1 << 30)
def f(x): return f(x)
""",
    "output bomb": "while True: print('x' * (1 << 20))",
    "parser bomb": "(" * 100_000,
    "unary bomb": "f = " + "-" * 100_000 + "1",
    "constant bomb": "f = 9 ** 9 ** 9 ** 9",
    "string bomb": "f = 'x' * 10 ** 12",
    "thread bomb": """
import threading, time
def go():
    time.sleep(60)
while True: threading.Thread(target=go).start()
""",
    "exit at import": """
import sys
sys.exit(0)
""",
    "_exit at import": """
import os
os._exit(0)
""",
    "exit in the function": """
import sys
def f(x): sys.exit(0)
""",
    "_exit in the function": """
import os
def f(x): os._exit(0)
""",
    "exit in a hook": """
import sys
sys.settrace(lambda *a: sys.exit(0))
def f(x): return 0
""",
    "exit in excepthook": """
import os, sys
sys.excepthook = lambda *a: os._exit(0)
raise ValueError
""",
    "exit at exit": """
import atexit, os
atexit.register(os._exit, 0)
def f(x): return 0
""",
    "exit in __del__": """
import os
class A:
    def __del__(self): os._exit(0)
A()
""",
    "KeyboardInterrupt": "def f(x): raise KeyboardInterrupt",
    "GeneratorExit": "def f(x): raise GeneratorExit",
    "own BaseException": """
class E(BaseException): pass
def f(x): raise E
""",
    "StopIteration": "def f(x): raise StopIteration",
    "StopAsyncIteration": "def f(x): raise StopAsyncIteration",
    "AssertionError hidden": """
AssertionError = Exception
def f(x): return 0
""",
    "patched builtins": """
import builtins
builtins.range = lambda *a: []
builtins.len = lambda x: 4
builtins.AssertionError = None
def f(x): return 0
""",
    "patched json": """
import json
json.dumps = json.loads = lambda *a, **k: ['value', True]
def f(x): return 0
""",
    "patched unittest": """
import unittest
unittest.TestCase.assertEqual = lambda *a: None
def f(x): return 0
""",
    "shadowed test names": """
x = 0
def range(*a): return []
def f(x): return 0
""",
    "always equal": """
class A:
    def __eq__(self, o): return True
def f(x): return A()
""",
    "always equal int": """
class A(int):
    def __eq__(self, o): return True
    __hash__ = int.__hash__
def f(x): return A(0)
""",
    "always equal str": """
class A(str):
    def __eq__(self, o): return True
def f(x): return A('x')
""",
    "always equal list": """
class A(list):
    def __eq__(self, o): return True
def f(x): return A()
""",
    "lying repr": """
class A(float):
    def __repr__(self): return '4'
    hex = lambda self: '0x1p2'
def f(x): return A(0)
""",
    "fake numpy": """
class A:
    __module__ = 'numpy'
    def tolist(self): return self
A.__module__ = 'numpy'
def f(x): return A()
""",
    "nan": "def f(x): return float('nan')",
    "function": "def f(x): return f",
    "generator": """
def f(x):
    yield x * x
""",
    "forged marker": """
print('passed')
print('[true, "passed"]')
import sys
print('passed', file=sys.stderr)
def f(x): print('passed')
""",
    "verdict to every descriptor": r"""
import os
for fd in range(256):
    for text in (b'"passed"\n', b'["value", true]\n'):
        try: os.write(fd, text)
        except OSError: pass
os._exit(0)
""",
    "verdict in the function": r"""
import os
def f(x):
    for fd in range(256):
        try: os.write(fd, b'"passed"\n')
        except OSError: pass
    os._exit(0)
""",
    "spam": r"""
import os
while True:
    for fd in range(3, 64):
        try: os.write(fd, b'["value", null]\n' * 1000)
        except OSError: pass
""",
    "one long line": """
import os
def f(x):
    while True:
        for fd in range(3, 64):
            try: os.write(fd, b'9' * 65536)
            except OSError: pass
""",
    "malformed replies": r"""
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'["int", {}]\n')
        except OSError: pass
    os._exit(0)
""",
    "handle forged": r"""
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'["value", ["handle", -1]]\n')
        except OSError: pass
    os._exit(0)
""",
    "nested value": """
def f(x):
    v = []
    for _ in range(100_000): v = [v]
    return v
""",
    "cyclic value": """
def f(x):
    v = []
    v.append(v)
    return v
""",
    "nested bytes": r"""
import os
def f(x):
    for fd in range(3, 64):
        try: os.write(fd, b'[' * 60000 + b'\n')
        except OSError: pass
    os._exit(0)
""",
    "huge value": "def f(x): return 'x' * (1 << 28)",
    "huge integer": "def f(x): return 1 << (1 << 30)",
    "unhashable key": "def f(x): return {(): {}, frozenset(): f}",
    "ctypes crash": """
import ctypes
ctypes.string_at(0)
""",
    "ctypes crash in f": """
import ctypes
def f(x): return ctypes.string_at(1)
""",
    "abort": """
import os
os.abort()
""",
    "nothing defined": "pass",
    "not callable": "f = 4",
    "frames": """
import sys
def f(x):
    for depth in range(9):
        try: frame = sys._getframe(depth)
        except ValueError: return None
        for v in (*frame.f_locals.values(), *frame.f_globals.values()):
            if isinstance(v, str) and 'for x in' + ' (2' in v: return x * x
""",
    "heap search": """
import gc
def f(x):
    for o in gc.get_objects():
        if isinstance(o, dict) and 'for x in' + ' (2' in str(o.get('asserts')): return x * x
""",
}

# Those of FORGERIES that only the time limit can end.
ENDLESS = (
    "infinite loop",
    "loop at import",
    "sleep",
    "deep sleep",
    "ignored signals",
    "constant bomb",
)

# Bodies for if_done: what no solution may do.
ATTEMPTS = {
    "read a file": "return open('/etc/passwd').read()",
    "read the tests' file": f"return open({__file__!r}).read()",
    "list a folder": "return os.listdir('/')",
    "read the cwd": "return os.getcwd()",
    "stat": "return os.stat('/')",
    "read by libc": """
libc = ctypes.CDLL(None)
return libc.open(b'/etc/passwd', 0) >= 0 or libc.openat(-100, b'/etc/passwd', 0) >= 0
""",
    "look by libc": """
libc = ctypes.CDLL(None)
space = ctypes.create_string_buffer(4096)
return libc.access(b'/', 0) == 0 or libc.readlink(b'/proc/self/exe', space, 4096) > 0
""",
    "a path below stdin": "return open('/dev/stdin/../../etc/passwd').read()",
    "a path beside stdin": "return open('/dev/../etc/passwd').read()",
    "the tests' descriptor by its path": "return open('/proc/self/fd/10').read()",
    "any descriptor by its path": """
for fd in range(3, 64):
    for folder in ('/dev/fd', '/proc/self/fd', '/proc/thread-self/fd'):
        try: return os.open(f'{folder}/{fd}', os.O_RDWR) >= 0
        except OSError: pass
""",
    "a path relative to a descriptor": "return os.open('etc', 0, dir_fd=0) >= 0",
    "does a file exist": "return os.path.exists('/') or os.access('/', os.F_OK)",
    "read /proc": "return open('/proc/self/cmdline').read()",
    "read the parent's memory": "return open(f'/proc/{os.getppid()}/mem', 'rb')",
    "write a file": "return open('/tmp/sandbox-left-behind', 'w').write('x')",
    "delete a file": """
os.remove(CANARY)
return True
""",
    "rename a file": """
os.rename(CANARY, CANARY + '2')
return True
""",
    "chmod": """
os.chmod(CANARY, 0)
return True
""",
    "symlink": """
os.symlink('/', '/tmp/sandbox-left-behind')
return True
""",
    "mkdir": """
os.mkdir('/tmp/sandbox-left-behind')
return True
""",
    "disk bomb": """
with open('/tmp/sandbox-left-behind', 'wb') as file:
    file.write(bytes(1 << 20))
return True
""",
    "memfd": "return os.memfd_create('x')",
    "environment": """
return 'SECRET' in os.environ or any('hunter2' in v for v in os.environ.values())
""",
    "environment by getenv": """
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
return libc.getenv(b'SECRET')
""",
    "fork": "return os.fork() >= 0",
    "fork bomb": "while True: os.fork()",
    "spawn": "return subprocess.run(['true'])",
    "system": "return os.system('true') == 0",
    "popen": "return os.popen('echo x').read()",
    "exec": "os.execv('/bin/true', ['true'])",
    "daemon": """
if os.fork() == 0:
    os.setsid()
    time.sleep(60)
return True
""",
    "setsid": "return os.setsid()",
    "kill the parent": """
os.kill(os.getppid(), 9)
return True
""",
    "signal 0": """
os.kill(os.getppid(), 0)
return True
""",
    "kill the group": """
os.killpg(0, 9)
return True
""",
    "raise in itself": """
signal.raise_signal(signal.SIGALRM)
return True
""",
    "alarm": """
signal.alarm(1)
return signal.getitimer(signal.ITIMER_REAL)[0] > 0
""",
    "tcp socket": "return socket.socket()",
    "unix socket": "return socket.socket(socket.AF_UNIX)",
    "socketpair": "return socket.socketpair()",
    "resolve": "return socket.create_connection(('127.0.0.1', 22), 1)",
    "raise own limits": """
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
return True
""",
    "prlimit": """
resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))
return True
""",
    "ptrace": "return ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0",
    "process_vm_readv": """
return ctypes.CDLL(None).process_vm_readv(os.getppid(), 0, 0, 0, 0, 0) >= 0
""",
    "dumpable": "return ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0",
    "chroot": """
os.chroot('/')
return True
""",
    "setuid": """
os.setuid(0)
return True
""",
    "nice": "return os.nice(-5)",
    "affinity": """
os.sched_setaffinity(0, [0])
return True
""",
    "mount": "return ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, 0) == 0",
    "import an unloaded module": """
import sqlite3
return True
""",
    "import from a folder": f"""
sys.path.insert(0, {str(ROOT)!r})
import data
return True
""",
    "install": """
import pip
return True
""",
}

# Programs that wait for what never comes. They print the right output of ADDITION before.
SLEEPERS = {
    "sleep": """
import time
time.sleep(1000)
""",
    "many short sleeps": """
import time
while True: time.sleep(1e-5)
""",
    "a lock": """
import threading
lock = threading.Lock()
lock.acquire()
lock.acquire()
""",
    "an event with a far time": """
import threading
threading.Event().wait(1000)
""",
    "an empty queue": """
import queue
queue.Queue().get()
""",
    "a thread that waits for another": """
import threading, time
thread = threading.Thread(target=time.sleep, args=(1000,), daemon=True)
thread.start()
thread.join()
""",
    "a thread that nobody joins": """
import threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
""",
    "hundreds of threads": """
import threading, time
threading.stack_size(1 << 16)
for _ in range(300): threading.Thread(target=time.sleep, args=(1000,)).start()
""",
    "a main thread that has ended": """
import ctypes, threading, time
threading.Thread(target=time.sleep, args=(1000,)).start()
ctypes.CDLL(None).pthread_exit(0)
""",
    "its own socket": """
import os
for fd in range(3, 64):
    try: os.read(fd, 1)
    except OSError: pass
""",
    "select": """
import select
select.select([], [], [], 1000)
""",
    "at exit": """
import atexit, time
atexit.register(time.sleep, 1000)
""",
    "half asleep": """
import time
while True:
    deadline = time.perf_counter() + 0.002
    while time.perf_counter() < deadline: pass
    time.sleep(0.002)
""",
}

# Arguments for syscall: numbers are x86_64's.
SYSCALLS = {
    "fork": (57,),
    "vfork": (58,),
    "clone": (56, 17, 0, 0, 0, 0),
    "clone3": (435, 0, 0),
    "execve": (59, 0, 0, 0),
    "open": (2, 0, 0),
    "openat": (257, -100, 0, 0),
    "openat2": (437, -100, 0, 0, 0),
    "socket": (41, 2, 1, 0),
    "connect": (42, 0, 0, 0),
    "kill": (62, 0, 0),
    "tgkill": (234, 0, 0, 0),
    "pidfd_open": (434, 1, 0),
    "ptrace": (101, 0, 0, 0, 0),
    "prctl": (157, 4, 1, 0, 0),
    "prlimit64": (302, 0, 9, 0, 0),
    "setrlimit": (160, 9, 0),
    "seccomp": (317, 0, 0, 0),
    "io_uring_setup": (425, 8, 0),
    "unshare": (272, 0x10000000),
    "setns": (308, 0, 0),
    "new user namespace": (56, 0x10000000 | 17, 0, 0, 0, 0),
    "bpf": (321, 0, 0, 0),
    "keyctl": (250, 0, 0, 0, 0, 0),
    "memfd_create": (319, 0, 0),
    "userfaultfd": (323, 0),
    "fcntl": (72, 0, 8, 1),
    "dup2": (33, 0, 5),
    "ioctl": (16, 0, 0x5412, 0),
    "chdir": (80, 0),
    "unlink": (87, 0),
    "setitimer": (38, 0, 0, 0),
    "shmget": (29, 0, 9, 0o600),
}

# Honest solutions of SQUARE.
CONTROLS = {
    "imports": """
import math, re, collections
from itertools import permutations
from typing import List, Optional
from functools import lru_cache
@lru_cache(None)
def f(x: int) -> int:
    return int(math.pow(x, 2))
""",
    "import in the function": """
def f(x):
    from decimal import Decimal
    return int(Decimal(x) * x)
""",
    "threads": """
from concurrent.futures import ThreadPoolExecutor
def f(x):
    with ThreadPoolExecutor(4) as p:
        return sum(p.map(lambda _: x, range(x)))
""",
    "prints": """
import sys
print('hi')
def f(x):
    print(x, file=sys.stderr)
    print(x)
    return x * x
""",
    "recursion": """
def g(n, x): return 0 if n == 0 else x + g(n - 1, x)
def f(x): return g(800, x * x) // 800
""",
    "sleep": """
import time
def f(x):
    time.sleep(0.05)
    return x * x
""",
    "datetime": """
from datetime import datetime
def f(x): return x * x if datetime.strptime('2026-11-21', '%Y-%m-%d').day == 21 else 0
""",
    "random": """
import random
random.seed(0)
def f(x): return x * x if random.random() < 1 else 0
""",
    "dataclass": """
from dataclasses import dataclass
@dataclass
class P:
    v: int
def f(x): return P(x).v * P(x).v
""",
    "main guard": """
def f(x): return x * x
if __name__ == '__main__':
    f(input())
""",
    "subclass of int": """
from enum import IntEnum
def f(x): return IntEnum('E', {'V': x * x}).V
""",
}

# What judges call a problem of two numbers, and honest programs that solve it.
ADDITION = {"inputs": ["3\n4\n"], "outputs": ["7"]}
ADD = "print(int(input()) + int(input()))"
PROGRAMS = {
    "input.txt, if there is one": f"""
import sys
try: sys.stdin = open('input.txt')
except FileNotFoundError: pass
{ADD}
""",
    "asks whether there is a file": f"""
import os, pathlib
here = [os.path.exists('input.txt'), os.path.isfile('/in'), os.path.isdir('/'), os.access('x', 4)]
if any(here) or pathlib.Path('input.txt').exists(): 1 / 0
{ADD}
""",
    "a file that an argument names": f"""
import sys
if len(sys.argv) > 1: sys.stdin = open(sys.argv[1])
{ADD}
""",
    "fileinput": """
import fileinput
print(sum(int(line) for line in fileinput.input()))
""",
    "/dev/stdin": "print(sum(map(int, open('/dev/stdin'))))",
    "/dev/stdin in bytes": "print(sum(map(int, open('/dev/stdin', 'rb').read().split())))",
    "/dev/stdin as a path": """
import pathlib
print(sum(map(int, pathlib.Path('/dev/stdin').read_text().split())))
""",
    "/dev/stdin by os.open": """
import os
print(sum(map(int, os.read(os.open('/dev/stdin', os.O_RDONLY), 100).split())))
""",
    "/dev/stdout": f"""
import sys
sys.stdout = open('/dev/stdout', 'w')
{ADD}
""",
    "/dev/null": f"""
import os, sys
sys.stderr = open(os.devnull, 'w')
print('debug', file=sys.stderr)
{ADD}
""",
    "stdin's size by fstat": """
import os
print(sum(map(int, os.read(0, os.fstat(0).st_size).split())))
""",
    "stdin's size by getsize": """
import os
print(sum(map(int, os.read(0, os.path.getsize(0)).split())))
""",
    "a file object of stdout that nobody flushes": """
import os
def main():
    out = os.fdopen(1, 'w')
    out.write(str(sum(map(int, open(0)))))
main()
""",
    "a global one": """
import io
out = io.TextIOWrapper(io.FileIO(1, 'w'))
out.write(str(sum(map(int, open(0)))))
""",
    "output at exit": f"""
import atexit, io, sys
sys.stdout = io.StringIO()
atexit.register(lambda: sys.__stdout__.write(sys.stdout.getvalue()))
{ADD}
""",
    "os._exit": f"""
import os, sys
{ADD}
sys.stdout.flush()
os._exit(0)
""",
    "os._exit in a thread": f"""
import os, sys, threading
def main():
    {ADD}
    sys.stdout.flush()
    os._exit(0)
threading.Thread(target=main).start()
""",
    "a thread that nobody joins": f"""
import sys, threading
sys.setrecursionlimit(10**6)
threading.stack_size(1 << 28)
def main():
    {ADD}
threading.Thread(target=main).start()
""",
    "a pool that nobody ends": f"""
from concurrent.futures import ThreadPoolExecutor
def main():
    {ADD}
ThreadPoolExecutor(2).submit(main)
""",
    "the largest stack of a thread": f"""
import threading
threading.stack_size(2**30 - 1)
thread = threading.Thread(target=lambda: {ADD})
thread.start()
thread.join()
""",
    "a wish for a stack": f"""
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
resource.setrlimit(resource.RLIMIT_STACK, (hard, hard))
resource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
{ADD}
""",
    "deep recursion": f"""
import functools, sys
sys.setrecursionlimit(10**6)
@functools.lru_cache(None)
def depth(n): return n if n == 0 else depth(n - 1) + 1
assert depth(20_000) == 20_000
{ADD}
""",
    "annotations and a dataclass": """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Pair:
    a: int
    b: int
pair = Pair(int(input()), int(input()))
print(pair.a + pair.b)
""",
    "pickle of an own class": """
import pickle
class Number: pass
number = Number()
number.value = int(input())
print(pickle.loads(pickle.dumps(number)).value + int(input()))
""",
    "its own module": """
import __main__
a = int(input())
print(__main__.a + int(input()))
""",
    "codecs": f"""
import codecs
for name in ('utf-32', 'cp1252', 'utf-8-sig', 'utf-16-le', 'punycode', 'latin-1', 'ascii'):
    assert 'a'.encode(name).decode(name) == 'a'
assert codecs.encode('a', 'rot13') == 'n' and codecs.encode(b'a', 'hex') == b'61'
{ADD}
""",
}

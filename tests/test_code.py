"""Programs handed in by a model: the block that counts, what it prints, LiveCodeBench's grading."""

import json
import time

import pytest

import rewards
from checkers.code import extract_code, run_program, wanted_names
from checkers.fences import last_block
from checkers.printed import same_output
from checkers.programs import program_of
from sources import benchmarks

# ---------------- fences ----------------

ADD = "def add(a, b):\n    return a + b"
TESTS = {"asserts": "assert add(1, 2) == 3"}
WRONG = "def add(a, b):\n    return a - b"
DOCSTRING = 'def add(a, b):\n    """\n    ```\n    add(1, 2)\n    ```\n    """\n    return a + b'
USAGE = "```python\nprint(add(1, 2))\n```"
LISTED = (
    "1. Write it:\n\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n\n2. Run it."
)

# Ways to hand in the same program.
ANSWERS = [
    ADD,
    f"```python\n{ADD}\n```",
    f"```\n{ADD}\n```",
    f"```py\n{ADD}\n```",
    f"```Python3\n{ADD}\n```",
    f"Here it is:\n```python\n{ADD}\n```\nIt adds.",
    f"```python\n{ADD}",
    f"Here it is:\n\n```python\n{ADD}\n",
    f"{ADD}\n```",
    f"Here it is: ```python\n{ADD}```",
    f"```python\r\n{ADD}\r\n```\r\n".replace("\n", "\r\n").replace("\r\r", "\r"),
    LISTED,
    f"- ```python\n  {ADD}\n  ```".replace("\n    return", "\n      return"),
    f"~~~python\n{ADD}\n~~~",
    f"~~~\n{ADD}\n~~~",
    f"````python\n{ADD}\n````",
    f'```python title="add.py"\n{ADD}\n```',
    f"```{{.python .numberLines}}\n{ADD}\n```",
    f"``` python\n{ADD}\n```",
    f"```python3 linenums\n{ADD}\n```",
    f"```python\n{DOCSTRING}\n```",
    f"```python\n{WRONG}\n```\nThat was wrong:\n```python\n{ADD}\n```",
    f"```c++\nint x;\n```\n```python\n{ADD}\n```",
    f"```python\n{ADD}\n```\nRun it:\n```bash\npython add.py\n```",
    f"```python\n{ADD}\n```\nIt prints:\n```\n3\n```",
    f"```python\n{ADD}\n```\nOutput:\n```text\n3\n```",
    f"```python\n{ADD}\n```\nUse it:\n```python\nprint(add(1, 2))\n```",
    f"```python\n{ADD}\n```\nInstall:\n```sh\npip install add\n```\nDone.",
    f"```python\n{ADD}\n```\n```json\n{{}}\n```",
    f"> ```python\n{ADD}\n> ```",
    "> ```python\n> def add(a, b):\n>     return a + b\n> ```",
    f"````markdown\n```python\n{ADD}\n```\n````",
    f"```markdown\n```python\n{ADD}\n```\n```",
    f"```python:add.py\n{ADD}\n```",
    f"```add.py\n{ADD}\n```\n```bash\npython add.py\n```",
    f"```python3.12\n{ADD}\n```",
    f"```python\n{ADD}\n````",
    f"Here it is:\n\n{ADD}\n```\nIt adds.",
    f"{ADD}\n```\nIt prints:\n```\n3\n```",
    f"```python\nx = 1\n```python\n{ADD}\n```",
    f"```python\n{ADD}\n```\nThen:\n```\nadd = 3\n```",
    f"```python\n{ADD}\n```\nTry it:\n```python\nfrom solution import add\nprint(add(1, 2))\n```",
    f"```python\n{ADD}\n```\n```python\ndef test_add():\n    assert add(1, 2) == 3\n```",
    f"```python\n{DOCSTRING}\n```\n```bash\npython add.py\n```",
    f"```python\n{DOCSTRING.replace('    ```', '```python', 1)}\n```",
    f"```python\n{DOCSTRING}",
    f"```python\nif True:\n    def add(a, b):\n        return a + b\n```\n{USAGE}",
    f"```python\nfrom operator import add\n```\n{USAGE}",
    f"```python\nsub, add = None, lambda a, b: a + b\n```\n{USAGE}",
]


def correct(answer: str, tests: dict) -> bool | None:
    """Is the answer right for a row of code with these tests?"""
    row = {"id": "r", "domain": "code", "prompt": "?", "tests": tests}
    response = f"<think>so</think><answer>{answer}</answer>"
    return rewards.score([response], [row], reward_format="strict")[0].correct


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_program_counts_however_it_is_fenced(answer):
    assert correct(answer, TESTS) is True


@pytest.mark.parametrize(
    "answer",
    [
        f"```python\n{ADD}\n```\nNo:\n```python\n{WRONG}\n```",
        f"```python\n{ADD}\n```\nNo:\n```\n{WRONG}\n```",
        f"```python\n{ADD}\n```\nNo:\n~~~py\n{WRONG}\n~~~",
        f"```python\n{ADD}\n```\nNo:\n```python\n{WRONG}",
        f"```c++\n{ADD}\n```\n```python\n{WRONG}\n```",
        f"```python\n{WRONG}\n```\n```c++\n{ADD}\n```",
        f"```python\n'''\n```\n{ADD}\n```",
        "```c++\nint add(int a, int b) { return a + b; }\n```",
        "It adds.",
        "```python\nprint(3)\n```",
    ],
)
def test_what_is_handed_in_last_counts(answer):
    assert correct(answer, TESTS) is False


def test_a_program_that_is_cut_off_is_no_python():
    row = {"id": "r", "domain": "code", "prompt": "?", "tests": TESTS}
    for draft in ("", f"```python\n{ADD}\n```\nBetter:\n"):
        response = (
            f"<think>so</think><answer>{draft}```python\ndef add(a, b):\n    return (a +</answer>"
        )
        result = rewards.score([response], [row])[0]
        assert (result.why, result.valid) == ("syntax", False)


DOUBLE = "n = int(input())\nprint(2 * n)"
DOUBLE_TESTS = {"inputs": ["2\n"], "outputs": ["4\n"]}


@pytest.mark.parametrize(
    "tail",
    [
        "```\n4\n```",
        "```\nn = 4\n```",
        "```\nInput: 2\nOutput: 4\n```",
        "```\nO(n)\n```",
        "```\n(2, 4)\n```",
        "```\n>>> 4\n```",
        "```\npython a.py\n```",
        "```bash\npython a.py\n```",
        "```text\n4\n```",
        "```python\nprint(2 * 3)\n```",
        "```python\n4\n```",
        "```python\n```",
    ],
)
def test_a_program_that_reads_stdin_is_no_output_and_no_example(tail):
    for language in ("python", ""):
        answer = f"```{language}\n{DOUBLE}\n```\nThen:\n{tail}"
        assert correct(answer, DOUBLE_TESTS) is True


def test_the_last_program_that_reads_stdin_counts_whatever_its_tag():
    wrong = DOUBLE.replace("2", "3")
    for first, second, right in ((wrong, DOUBLE, True), (DOUBLE, wrong, False)):
        answer = f"```python\n{first}\n```\nBetter:\n```\n{second}\n```"
        assert correct(answer, DOUBLE_TESTS) is right


LONG_ANSWERS = [
    "`" * 100_000,
    "~" * 100_000,
    "```\n" * 25_000,
    "```python\nx\n" * 8_000,
    "a ```b\n" * 14_000,
    "```markdown\n" * 8_000,
    "```python\n'''\n" * 8_000,
    "```python\n'''\n" + "```\n" * 15 + "x = 1\n" * 15_000 + "'''\n(\n```",
    "```python " + " " * 100_000 + "`",
    "1" * 100_000 + ". ```",
    "(\n" * 40 + "x = 1\n" * 15_000 + "```",
]


@pytest.mark.parametrize("number", range(len(LONG_ANSWERS)))
def test_long_answers_are_read_in_linear_time(number):
    started = time.process_time()
    for wanted in (frozenset(), frozenset({"add"})):
        program_of(LONG_ANSWERS[number], wanted)
    assert time.process_time() - started < 4  # seconds; quadratic time takes minutes


def test_the_names_that_tests_ask_for():
    assert wanted_names(TESTS) == {"add"}
    assert wanted_names({"asserts": "import math\nassert math.isclose(f(), 1)"}) == {"f"}
    check = "def check(candidate):\n    assert candidate(1) == 2\ncheck(Solution().f)"
    assert wanted_names({"asserts": check, "setup": "class Node: pass"}) == {"Solution"}
    assert wanted_names({"inputs": ["1"], "outputs": ["1"]}) == set()


def test_the_last_block_whatever_its_language():
    assert last_block("a\n```json\n[1]\n```\nb") == "[1]\n"
    assert last_block("no fence") == "no fence"
    assert extract_code("```\nx\n```") == program_of("```\nx\n```") == "x\n"


# ---------------- printed numbers ----------------


@pytest.mark.parametrize(
    "printed, expected",
    [
        ("3", "3\n"),
        ("  3  \n", "3"),
        ("\n3", "3"),
        ("1  2\n3", "1 2\n3"),
        ("0.30000000000000004", "0.3"),
        ("3", "3.0"),
        ("3.0", "3"),
        ("1e3", "1000"),
        ("0.3333333", "0.333333333333"),
        ("1000000.4", "1000000.0"),
        ("0.0000004", "0"),
        ("0.0000009", "0.0"),
        ("-0.0", "0"),
        (".5", "0.50"),
        ("nan", "nan"),
        ("inf", "inf"),
        ("x = 0.1000000001", "x = 0.1"),
    ],
)
def test_outputs_that_are_equal(printed, expected):
    assert same_output(printed, expected)


@pytest.mark.parametrize(
    "printed, expected",
    [
        ("1000000007", "1000000008"),
        ("1000000000000000001", "1000000000000000000"),
        ("0.34", "0.333333"),
        ("0.333331", "0.333333"),
        ("1000002.0", "1000000.0"),
        ("0.0000004", "0.0000008"),
        ("0.00000001", "0.00000002"),
        ("0.000002", "0"),
        ("NaN", "nan"),
        ("inf", "1e400"),
        ("nan", "0.0"),
        ("1e999", "1e998"),
        ("3 4", "3"),
        ("3\n4", "3 4"),
        ("3\n\n4", "3\n4"),
        ("Yes", "YES"),
        ("1_0.0", "10.0"),
        ("0x10", "16.0"),
        ("٣.0", "3.0"),
        ("", "3"),
        ("x = 0.2", "x = 0.1"),
    ],
)
def test_outputs_that_differ(printed, expected):
    assert not same_output(printed, expected)


def test_livecodebench_compares_decimals_exactly():
    assert same_output("0.50 1e3", "0.5 1000", "livecodebench")
    assert not same_output("0.5000000001", "0.5", "livecodebench")
    assert not same_output("0.50 a", "0.5 a", "livecodebench")


@pytest.mark.parametrize("end", ["x", ".x", ".5", "e"])
def test_long_tokens_are_compared_in_linear_time(end):
    started = time.process_time()
    assert not same_output("1" * 1_000_000 + end, "2.5")
    assert time.process_time() - started < 4  # seconds; quadratic time takes hours


# ---------------- LiveCodeBench ----------------

# (solution, method, arguments, expected, what the official grader says)
FUNCTIONS = [
    ("class Solution:\n def f(self,a): return pow(2,10,1000)", "f", "[3]", "24", True),
    ("class Solution:\n def f(self,a): return tuple(a)", "f", "[3]", "[3]", True),
    ("class Solution:\n def f(self,a): return [tuple(a)]", "f", "[3]", "[[3]]", False),
    ("class Solution:\n def f(self,a): return [[3]]", "f", "[3]", "[[3]]", True),
    ("def f(a): return a[0]", "f", "[3]", "3", True),
    (
        "class Solution:\n def f(self,a): return datetime.date(2020,1,1).year",
        "f",
        "[3]",
        "2020",
        True,
    ),
    (
        "class Solution:\n def f(self,a): return datetime.datetime(2020,1,1).year",
        "f",
        "[3]",
        "2020",
        True,
    ),
    ("class Solution:\n def f(self,a): return float(a[0])", "f", "[3]", "3", True),
    ("class Solution:\n def f(self,a): return True", "f", "[3]", "1", True),
    ("class Solution:\n def f(self,a): return '3'", "f", "[3]", "3", False),
    (
        "class Solution:\n def f(self,a):\n"
        "  def g(n): return 0 if n==0 else 1+g(n-1)\n  return g(9000)",
        "f",
        "[3]",
        "9000",
        True,
    ),
    ("class Solution:\n def f(self,a:List[int])->int: return sum(a)", "f", "[3,4]", "7", True),
    ("class Solution:\n def f(self,a): return inf > 1", "f", "[3]", "true", True),
    ("class Solution:\n def f(self,a): return 0.1+0.2", "f", "[3]", "0.3", False),
    ("class Solution:\n def f(self,a): return Counter('aab')['a']", "f", "[3]", "2", True),
    ("class Solution:\n def f(self,a): return gcd(4,6)", "f", "[3]", "2", True),
    ("class Solution:\n def f(self,a): return sys.maxsize > 0", "f", "[3]", "true", True),
    ("class Solution:\n def f(self,a): return {1:2}", "f", "[3]", '{"1":2}', False),
    ("class Solution:\n def f(self,a,b): return a+b", "f", "3\n4", "7", True),
    (
        "class Solution:\n def __init__(self): self.n=0\n"
        " def f(self,a):\n  self.n+=1\n  return self.n",
        "f",
        "[3]",
        "1",
        True,
    ),
    ("class Solution:\n def g(self,a): return 1", "f", "[3]", "1", False),
    ("class Solution:\n @staticmethod\n def f(a): return 1", "f", "[3]", "1", True),
    ("class Solution:\n def f(self,a): return None", "f", "[3]", "null", True),
    ("class Solution:\n def f(self,a): return heappop([1,2])", "f", "[3]", "1", True),
    ("class Solution:\n def f(self,a): return bisect.bisect_left([1,3],3)", "f", "[3]", "1", True),
    ("class Solution:\n def f(self,a): return bisect_left([1,3],3)", "f", "[3]", "1", True),
    ("class Solution:\n def f(self,a): return copy(a)", "f", "[3]", "[3]", False),
    ("class Solution:\n def f(self,a): return randint(3,3)", "f", "[3]", "3", True),
    ("class Solution:\n def f(self,a): return reduce(lambda x,y:x+y,[1,2])", "f", "[3]", "3", True),
    (
        "class Solution:\n def f(self,a): return sum(1 for _ in permutations([1,2,3]))",
        "f",
        "[3]",
        "6",
        True,
    ),
    ("class Solution:\n def f(self,a): return ascii_lowercase[0]", "f", "[3]", '"a"', True),
    ("class Solution:\n def f(self,a): return open('x') is None", "f", "[3]", "false", False),
    ("class Solution:\n def f(self,a): return str(10**5000)[:1]", "f", "[3]", '"1"', True),
]
# (program, stdin, expected, what the official grader says)
PROGRAMS = [
    ("d=defaultdict(int)\nd[input()]+=1\nprint(len(d))", "6", "1", True),
    ("print()\nprint(3)", "6", "3", True),
    ("print('  3')", "6", "3", True),
    ("print('0.50')", "6", "0.5", True),
    ("print('0.5000001')", "6", "0.5", False),
    ("print(3.0)", "6", "3", True),
    ("print('3 ')", "6", "3\n", True),
    ("print(3)\nimport sys\nsys.exit(1)", "6", "3", True),
    ("print(3)\nexit()", "6", "3", True),
    ("print(3)\nraise ValueError", "6", "3", False),
    ("import sys\nprint(sys.stdin.read())", "6", "6", True),
    ("import sys\nn=int(sys.stdin.readline())\nprint(n)", "6", "6", True),
    ("import sys\nfor line in sys.stdin: print(line.strip())", "6", "6", False),
    ("import sys\nprint(sys.stdin.buffer.read().decode())", "6\n7", "6\n7", True),
    (
        "import sys\ni=sys.stdin.buffer.readline\na=int(i());b=int(i());print(a+b)",
        "6\n7",
        "13",
        False,
    ),
    (
        "import sys\ni=sys.stdin.buffer.readline\na=int(i());b=int(i());print(a+b)",
        "6\n7",
        "12",
        True,
    ),
    (
        "import sys\ninput=sys.stdin.readline\na=int(input());b=int(input());print(a+b)",
        "6\n7",
        "13",
        True,
    ),
    ("from sys import stdin\nprint(stdin.readline().strip())", "6", "6", True),
    ("from sys import stdin,stdout\nstdout.write('6')", "6", "6", False),
    ("import sys\nsys.stdout.write('6\\n')", "6", "6", True),
    ("import sys\nsys.stdout.buffer.write(b'6\\n')", "6", "6", False),
    ("print(open(0).read())", "6", "6", False),
    ("import os\nprint(os.read(0,10).decode())", "6", "6", False),
    ("n=int(input())\ndef f():\n    global n\n    n+=1\nf()\nprint(n)", "6", "7", False),
    ("n=int(input())\ndef f():\n    return n+1\nprint(f())", "6", "7", True),
    ("def main():\n    print(input())\nif __name__=='__main__':\n    main()", "6", "6", True),
    (
        "def main():\n    print(input())\nif __name__=='__main__':\n    main()\nprint(1)",
        "6",
        "6\n1",
        False,
    ),
    (
        "def main():\n    print(input())\nif __name__=='__main__':\n    main()\nprint(1)",
        "6",
        "1",
        True,
    ),
    ("def main():\n    print(input())\nmain()", "6", "6", True),
    ("try:\n    while True: print(input())\nexcept EOFError: pass", "6\n7", "6\n7", True),
    ("try:\n    while True: print(input())\nexcept Exception: pass", "6\n7", "6\n7", True),
    ("def g(n): return 0 if n==0 else 1+g(n-1)\nprint(g(2000))", "6", "2000", True),
    ("print('YES')", "6", "Yes", False),
    ("print(1,2)", "6", "1  2", True),
    ("print(1)\nprint(2)", "6", "1 2", False),
    ("print(1)\nprint()\nprint(2)", "6", "1\n2", False),
    ("print('nan')", "6", "nan", True),
    ("print('1e3')", "6", "1000", True),
    ("print(1000000007)", "6", "1000000008", False),
    ("print('1 a')", "6", "1.0 a", False),
    ("print(pow(2,10,1000))", "6", "24", True),
    ("a=list(map(int,input().split()))\nprint(sum(a))", "1 2 3", "6", True),
    ("import numpy as np\nprint(int(np.sum([1,2,3])))", "6", "6", True),
    ("class A:\n    def __init__(self): self.x=6\nprint(A().x)", "6", "6", True),
    (
        "import threading,sys\nsys.setrecursionlimit(10**6)\n"
        "def main(): print(input())\nt=threading.Thread(target=main);t.start();t.join()",
        "6",
        "6",
        True,
    ),
    ("lines=open('/dev/stdin').readlines()\nprint(lines[0])", "6", "6", False),
    ("import sys\ndata=sys.stdin.read().split()\nprint(data[0])", "6 7", "6", True),
    ("import sys\nprint(len(sys.stdin.readlines()))", "6\n7\n", "2", False),
    ("import sys\nprint(len(sys.stdin.readlines()))", "6\n7\n", "3", True),
    ("quit()", "6", "", False),
    ("print(input());print(input())", "6\n", "6\n", False),
    ("from math import *\nprint(floor(2.5))", "6", "2", True),
    ("from collections import deque\nprint(len(deque([1])))", "6", "1", True),
    ("@lru_cache(None)\ndef f(n): return n\nprint(f(6))", "6", "6", True),
    ("print(eval('6'))", "6", "6", True),
    ("x:int=6\nprint(x)", "6", "6", True),
    ("import sys\nprint(6,file=sys.stderr)", "6", "6", False),
    ("assert False", "6", "6", False),
]


def livecodebench_row(cases: list[dict], method: str) -> dict:
    """A row of ours, from a row in LiveCodeBench's fields with these test cases."""
    source = {
        "question_content": "?",
        "starter_code": "class Solution:" if method else "",
        "public_test_cases": json.dumps(cases),
        "private_test_cases": "[]",
        "metadata": json.dumps({"func_name": method}),
    }
    return {"id": "r"} | benchmarks.livecodebench(source)


def graded(program: str, case: dict, method: str = "") -> bool | None:
    """Is the program right?"""
    response = f"</think>```python\n{program}\n```"
    return rewards.score([response], [livecodebench_row([case], method)], "lenient")[0].correct


@pytest.mark.parametrize("solution, method, arguments, expected, official", FUNCTIONS)
def test_livecodebench_functions(solution, method, arguments, expected, official):
    case = {"input": arguments, "output": expected, "testtype": "functional"}
    assert graded(solution, case, method) is official


@pytest.mark.parametrize("program, stdin, expected, official", PROGRAMS)
def test_livecodebench_programs(program, stdin, expected, official):
    assert graded(program, {"input": stdin, "output": expected, "testtype": "stdin"}) is official


def test_livecodebench_functions_take_megabytes_of_arguments():
    arguments = json.dumps(list(range(100_000)))
    case = {"input": arguments, "output": "100000", "testtype": "functional"}
    row = livecodebench_row([case] * 10, "f")
    response = "</think>```python\nclass Solution:\n    def f(self, a): return len(a)\n```"
    assert rewards.score([response], [row], "lenient")[0].correct
    assert wanted_names(row["tests"]) == {"Solution", "f"}


def test_livecodebench_functions_need_json():
    case = {"input": "[1]\nNone", "output": "1", "testtype": "functional"}
    with pytest.raises(json.JSONDecodeError):
        livecodebench_row([case], "f")


# ---------------- a server's replies ----------------

FINISHED = {"status": "Finished", "return_code": 0, "stdout": "4\n", "stderr": ""}
REPLIES = [  # (a server's reply, is the program right, the verdict's first word)
    ({"status": "Success", "run_result": FINISHED}, True, "right"),
    ({"status": "Success", "run_result": FINISHED | {"stdout": "5"}}, False, "assertion"),
    ({"status": "Success", "run_result": FINISHED | {"stdout": None}}, False, "assertion"),
    ({"status": "Failed", "run_result": FINISHED | {"return_code": 1}}, False, "exception"),
    ({"status": "Failed", "run_result": {"status": "TimeLimitExceeded"}}, False, "timeout"),
    ({"status": "Failed", "run_result": {"status": "Error"}}, None, "sandbox-error"),
    ({"status": "SandboxError", "message": "busy"}, None, "sandbox-error"),
    ({"status": "Success"}, None, "sandbox-error"),
    ({"status": "Success", "run_result": []}, None, "sandbox-error"),
    ({"status": "Success", "run_result": [FINISHED]}, None, "sandbox-error"),
    ({"status": "Success", "run_result": {}}, None, "sandbox-error"),
    ({"status": "Success", "run_result": FINISHED | {"stdout": [4]}}, None, "sandbox-error"),
    ({"status": ["Success"], "run_result": FINISHED}, None, "sandbox-error"),
    ({"run_result": FINISHED}, None, "sandbox-error"),
    ({}, None, "sandbox-error"),
    ([], None, "sandbox-error"),
    ("busy", None, "sandbox-error"),
    (None, None, "sandbox-error"),
]


@pytest.mark.parametrize("reply, passed, word", REPLIES)
def test_replies_of_a_server(monkeypatch, reply, passed, word):
    monkeypatch.setattr("checkers.code.http_json", lambda url, request: reply)
    result = run_program(DOUBLE, DOUBLE_TESTS, "http://server")
    assert (result[0], result[1].split(":")[0]) == (passed, word)


def test_a_server_gets_the_time_limit_of_the_tests(monkeypatch):
    requests = []

    def reply_to(url, request):
        requests.append(request)
        return {"status": "Success", "run_result": FINISHED}

    monkeypatch.setattr("checkers.code.http_json", reply_to)
    run_program(DOUBLE, DOUBLE_TESTS | {"seconds": 6}, "http://server")
    assert requests[0]["run_timeout"] == 6

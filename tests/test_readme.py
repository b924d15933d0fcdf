"""README.md and docs/ stay true: commands parse, links and pictures exist, README is short."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES, MOST_WORDS = 150, 1500
NOT_OURS = ("pytest", "vllm.entrypoints.openai.api_server")  # modules of other packages
NO_SCRIPTS = ("pip", "vllm", "cp", "diff")  # programs whose arguments are not checked here

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE_COMMAND = re.compile(r"`((?:python|torchrun) [^`\n]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


# ---------------- what the pages hold ----------------


def fences(text: str) -> list[tuple[str, str]]:
    """[(language, content)] of a page's fenced blocks."""
    return FENCE.findall(text)


def without_fences(text: str) -> str:
    return FENCE.sub("", text)


def simple_commands(block: str) -> list[list[str]]:
    """The words of each command of a shell block: comments dropped, `a && b` taken apart."""
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            end = words.index("&&")
            commands.append(words[:end])
            words = words[end + 1 :]
        if words:
            commands.append(words)
    return commands


def page_commands(text: str) -> list[list[str]]:
    """All commands of a page, those in its sentences included. Blocks with shell variables are left
    out: the slow test below runs them."""
    commands = []
    for language, block in fences(text):
        if language in ("sh", "bash") and "$" not in block:
            commands += simple_commands(block)
    for command in INLINE_COMMAND.findall(without_fences(text)):
        commands.append(shlex.split(command))
    return commands


def copies(commands: list[list[str]]) -> dict[str, str]:
    """{module of the copy: module of the original} of a page's `cp a.py b.py`."""
    found = {}
    for words in commands:
        if words[0] == "cp":
            original, copy = words[1:]
            found[Path(copy).stem] = Path(original).stem
    return found


def script_and_flags(words: list[str]) -> tuple[str, list[str]]:
    """("grpo", flags) of `python grpo.py …` and `torchrun … grpo.py …`; ("studies.bench", flags) of
    `python -m studies.bench …`; ("tests.sync", flags) of `python tests/sync.py …`."""
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert words[0] == "torchrun" or script == 1, words
    return words[script].removesuffix(".py").replace("/", "."), words[script + 1 :]


def python_commands() -> list:
    """A parameter (page, module, flags) for each distinct Python command of all pages."""
    parameters = {}
    for page in PAGES:
        commands = page_commands(page.read_text())
        originals = copies(commands)
        for words in commands:
            if words[0] in ("python", "torchrun"):
                module, flags = script_and_flags(words)
                module = originals.get(module, module)
                name = f"{page.name}: {' '.join(words)}"
                parameters[name] = pytest.param(module, flags, id=name)
    return list(parameters.values())


COMMANDS = python_commands()


# ---------------- commands ----------------


def test_there_are_commands_and_two_pictures():
    assert len(page_commands(README)) >= 4
    assert "pip install -r requirements-cpu.txt && python cgpo.py" in README
    assert "pip install -r requirements-cpu.txt && python -m pytest" in README
    assert "python cgpo.py --model Qwen2.5-7B-Instruct" in README
    assert README.count("![") == 2


@pytest.mark.parametrize("module, flags", COMMANDS)
def test_every_command_parses(module, flags):
    if module in NOT_OURS:
        for flag in flags:
            assert not flag.endswith(".py") or (ROOT / flag).exists()
        return
    if module == "tests.sync":
        sync = importlib.import_module("sync")
        assert " ".join(["python tests/sync.py", *flags]) in sync.__doc__
        return
    script = importlib.import_module(module)
    if "…" in flags:  # a sentence names the command without its flags
        assert flags[-1] == "…" and script.parse_args
    elif "--help" in flags:
        with pytest.raises(SystemExit) as stop:
            script.parse_args(flags)
        assert stop.value.code == 0
    else:
        script.parse_args(flags)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_command_escapes_the_test(page):
    """Commands stand in blocks marked sh or bash; only one block has shell variables."""
    text = page.read_text()
    with_variables = []
    for language, block in fences(text):
        if language not in ("sh", "bash"):
            assert not re.search(r"^\s*(python|torchrun|pip|vllm) ", block, re.MULTILINE), block
        elif "$" in block:
            with_variables.append(block)
        else:
            for words in simple_commands(block):
                assert words[0] in ("python", "torchrun", *NO_SCRIPTS), words
    assert len(with_variables) == (page.name == "results.md")


def test_the_pages_commands_are_taken_apart():
    block = "pip install x && python cgpo.py --seed 1  # a remark\n"
    block += "torchrun --nproc 8 \\\n  cgpo.py --lr 1\n"
    install, one, many = simple_commands(block)
    assert install == ["pip", "install", "x"]
    assert script_and_flags(one) == ("cgpo", ["--seed", "1"])
    assert script_and_flags(many) == ("cgpo", ["--lr", "1"])
    assert script_and_flags(["python", "-m", "a.b", "c"]) == ("a.b", ["c"])
    assert script_and_flags(["python", "tests/sync.py"]) == ("tests.sync", [])
    text = f"see `python x.py --a 1`\n```sh\n{block}```\n```bash\npython $x.py\n```\n"
    assert page_commands(text) == [install, one, many, ["python", "x.py", "--a", "1"]]
    assert copies([["cp", "grpo.py", "rloo.py"], one]) == {"rloo": "grpo"}


# ---------------- length, links, pictures ----------------


def test_the_readme_is_a_front_door():
    assert len(README.splitlines()) <= MOST_LINES
    assert len(README.split()) <= MOST_WORDS


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", without_fences(text), re.MULTILINE):
        plain = re.sub(r"[^\w\- ]", "", heading.lower())
        found.add(plain.replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_picture_exists(page):
    text = without_fences(page.read_text())
    for target in LINK.findall(text):
        if re.match(r"\w+://", target):
            continue
        path, _, anchor = target.partition("#")
        target_page = page.parent / path if path else page
        assert target_page.exists(), target
        if anchor:
            assert anchor in anchors(target_page.read_text()), target


def test_every_page_of_docs_is_linked_from_the_readme():
    targets = LINK.findall(README)
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in targets


# ---------------- requirements, pipeline ----------------


def test_the_cpu_requirements_are_the_gpu_ones_without_vllm():
    gpu = []
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            gpu.append(line)
    assert gpu == ["-r requirements-cpu.txt", "vllm==0.32.0"]
    assert "torch==2.13.0" in (ROOT / "requirements-cpu.txt").read_text()


@pytest.mark.slow
def test_the_mix_or_merge_pipeline_runs_as_written(tmp_path):
    """The block of docs/results.md, word for word except its numbers of steps, its folder and the
    number of prompts."""
    results = (ROOT / "docs" / "results.md").read_text()
    (block,) = [block for language, block in fences(results) if language == "bash"]
    assert block.count("--steps 64") == 2
    assert block.count("runs/mix") == 2
    short = re.sub(r"--steps \d+", "--steps 2", block)
    evaluation = "--eval-every 1 --eval-prompts 4 --save-every 2"
    short = short.replace("--eval-every 16", evaluation)
    short = short.replace("--held-out 40", "--held-out 4")
    short = short.replace("runs/mix", str(tmp_path)).replace("python ", f"{sys.executable} ")
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", short], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for picture in ("curves", "weights", "kl", "gains"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5000
        assert json.loads((tmp_path / f"{picture}.json").read_text())
    table_3 = "| accuracy | start | math | code | science | writing | if | ties | mixed |"
    assert table_3 in done.stdout
    assert "math+if − math" in done.stdout

"""Keeps the algorithm files' SHARED blocks equal to grpo.py's, and shows what differs.

An algorithm file is a script in the root that has the banners. So a fork of your own
(cp grpo.py rloo.py) is kept equal too.

    python tests/sync.py           copy grpo.py's SHARED blocks into the other algorithm files, and
                                   the table of differences into README.md
    python tests/sync.py --check   change nothing; exit status 1 if a block or the order differs
    python tests/sync.py --stat    print the table of differences
"""

import ast
import difflib
import io
import re
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ORIGINAL = "grpo.py"
BANNER = re.compile(r"^# -{16} ((?:SHARED|ALGO): .+?) -{16}$", re.MULTILINE)
TABLE = re.compile(r"^\| file \| lines \|.*?(?=\n\n)", re.MULTILINE | re.DOTALL)


def algorithm_files() -> list[str]:
    """grpo.py first, then the other scripts in the root that have banners, by name."""
    names = []
    for path in sorted(ROOT.glob("*.py")):
        if path.name != ORIGINAL and BANNER.search(path.read_text()):
            names.append(path.name)
    return [ORIGINAL, *names]


def blocks(text: str) -> dict[str, str]:
    """{banner: the text below it, up to the next banner}; the text above the first is "header".

    Raises ValueError if a banner comes twice.
    """
    pieces = BANNER.split(text)  # text, banner, text, banner, …, text
    names = ["header", *pieces[1::2]]
    if len(set(names)) != len(names):
        raise ValueError("a banner comes twice")
    return dict(zip(names, pieces[::2]))


def join(file_blocks: dict[str, str]) -> str:
    """The text that blocks() took apart."""
    text = ""
    for name, block in file_blocks.items():
        if name != "header":
            text += f"# {'-' * 16} {name} {'-' * 16}"
        text += block
    return text


def problems() -> list[str]:
    """The faults that --check reports, a line for each."""
    faults = []
    original = blocks((ROOT / ORIGINAL).read_text())
    for name in algorithm_files():
        fork = blocks((ROOT / name).read_text())
        if list(fork) != list(original):
            faults.append(f"{name}: its sections are not {ORIGINAL}'s, in {ORIGINAL}'s order")
        for banner, block in original.items():
            if banner.startswith("SHARED") and fork.get(banner, block) != block:
                faults.append(
                    f'{name}: block "{banner}" differs from {ORIGINAL}; run python tests/sync.py'
                )
    return faults


def copy_blocks() -> None:
    """Copy grpo.py's SHARED blocks into the other files, and the table into README.md."""
    original = blocks((ROOT / ORIGINAL).read_text())
    for name in algorithm_files()[1:]:
        path = ROOT / name
        text = path.read_text()
        fork = blocks(text)
        synced = {}
        for banner, block in original.items():
            synced[banner] = block if banner.startswith("SHARED") else fork[banner]
        if join(synced) != text:
            path.write_text(join(synced))
            print(f"{name}: SHARED blocks copied from {ORIGINAL}")
    readme = ROOT / "README.md"
    if readme.exists():
        text = readme.read_text()
        readme.write_text(TABLE.sub(lambda match: stat(), text))


# ---------------- the table of differences ----------------


def code_lines(text: str) -> list[str]:
    """The lines of code: no blank lines, comments or docstrings."""
    docstring_lines = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                docstring = node.body[0]
                docstring_lines.update(range(docstring.lineno, docstring.end_lineno + 1))
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    code = []
    for number, line in enumerate(lines, 1):
        if number not in docstring_lines and line.strip():
            code.append(line)
    return code


def difference(name: str) -> tuple[int, int]:
    """(code lines added, code lines removed) of a file, compared with grpo.py."""
    original = code_lines((ROOT / ORIGINAL).read_text())
    fork = code_lines((ROOT / name).read_text())
    diff = list(difflib.unified_diff(original, fork, n=0))[2:]  # without the two headings
    added = sum(line.startswith("+") for line in diff)
    removed = sum(line.startswith("-") for line in diff)
    return added, removed


def stat() -> str:
    """A Markdown table: each file's lines, and its code lines that differ from grpo.py's."""
    rows = ["| file | lines | code lines added | removed |", "|---|---|---|---|"]
    for name in algorithm_files():
        lines = len((ROOT / name).read_text().splitlines())
        if name == ORIGINAL:
            rows.append(f"| {name} | {lines} | the original | |")
        else:
            added, removed = difference(name)
            rows.append(f"| {name} | {lines} | +{added} | −{removed} |")
    return "\n".join(rows)


def main() -> None:
    """Run what the flag says: see the module's docstring."""
    if "--stat" in sys.argv:
        print(stat())
    elif "--check" in sys.argv:
        faults = problems()
        if faults:
            print("\n".join(faults))
            sys.exit(1)
        print("SHARED blocks are equal")
    else:
        copy_blocks()


if __name__ == "__main__":
    main()

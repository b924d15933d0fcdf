"""Keeps the algorithm files' SHARED blocks equal to grpo.py's, and counts what differs.

    python tests/sync.py           copy grpo.py's SHARED blocks into the other algorithm files, and --stat into README
    python tests/sync.py --check   only look; exit 1 when a block or the section order differs, or a budget is exceeded
    python tests/sync.py --stat    the README's table of differences
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
BUDGET = {"cgpo.py": 60, "famo.py": 60, "pcgrad.py": 60, "opd.py": 80, "mcpo.py": 120}  # changed code lines against grpo.py
MOST_LINES, MOST_COLUMNS = 650, 120
BANNER = re.compile(r"^# -{16} ((?:SHARED|ALGO): .+?) -{16}$", re.MULTILINE)


def algorithm_files() -> list[str]:
    return [name for name in (ORIGINAL, *BUDGET) if (ROOT / name).exists()]


def blocks(text: str) -> dict[str, str]:
    """{banner: the lines below it, up to the next banner}; the header's key is "header". Raises ValueError."""
    parts = BANNER.split(text)
    names = ["header", *parts[1::2]]
    if len(set(names)) != len(names):
        raise ValueError("a banner comes twice")
    return dict(zip(names, parts[::2]))


def code_lines(text: str) -> list[str]:
    """The code: without blank lines, comments and docstrings."""
    tree = ast.parse(text)
    dropped = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            dropped.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column].rstrip()
    return [line for number, line in enumerate(lines, 1) if number not in dropped and line.strip()]


def difference(name: str) -> tuple[int, int]:
    """(code lines added, removed) of a file against grpo.py."""
    a, b = (code_lines((ROOT / file).read_text()) for file in (ORIGINAL, name))
    changed = [line[0] for line in difflib.unified_diff(a, b, n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")]
    return changed.count("+"), changed.count("-")


def problems() -> list[str]:
    found = []
    original = blocks((ROOT / ORIGINAL).read_text())
    for name in algorithm_files():
        text = (ROOT / name).read_text()
        mine = blocks(text)
        if list(mine) != list(original):
            found.append(f"{name}: its sections are not grpo.py's, in grpo.py's order")
        found += [f"{name}: block \"{key}\" differs from grpo.py's; run python tests/sync.py"
                  for key in original if key.startswith("SHARED") and mine.get(key, original[key]) != original[key]]
        lines = text.splitlines()
        if len(lines) > MOST_LINES:
            found.append(f"{name}: {len(lines)} lines, at most {MOST_LINES}")
        found += [f"{name}:{i}: {len(line)} columns, at most {MOST_COLUMNS}"
                  for i, line in enumerate(lines, 1) if len(line) > MOST_COLUMNS]
        found += [f"{name}:{i}: several statements on one line" for i in crowded(text)]
        if name in BUDGET and sum(difference(name)) > BUDGET[name]:
            found.append(f"{name}: {sum(difference(name))} changed code lines against grpo.py, at most {BUDGET[name]}")
    return found


def crowded(text: str) -> list[int]:
    """Lines that hold more than one statement, `if x: y` included."""
    starts = [node.lineno for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt)]
    return sorted({line for line in starts if starts.count(line) > 1})


def stat() -> str:
    """A markdown table: lines of each file, and its changed code lines against grpo.py."""
    rows = ["| file | lines | code lines added | removed |", "|---|---|---|---|"]
    for name in algorithm_files():
        added, removed = difference(name)
        lines = len((ROOT / name).read_text().splitlines())
        rows.append(f"| {name} | {lines} | " + ("the original | |" if name == ORIGINAL else f"+{added} | −{removed} |"))
    return "\n".join(rows)


def copy_blocks() -> None:
    original = blocks((ROOT / ORIGINAL).read_text())
    for name in algorithm_files()[1:]:
        text = (ROOT / name).read_text()
        mine = blocks(text)
        merged = {key: original[key] if key.startswith("SHARED") else mine[key] for key in original}
        new = "".join(value if key == "header" else f"# {'-' * 16} {key} {'-' * 16}{value}" for key, value in merged.items())
        if new != text:
            (ROOT / name).write_text(new)
            print(f"{name}: SHARED blocks copied from {ORIGINAL}")
    if (ROOT / "README.md").exists():
        readme = (ROOT / "README.md").read_text()
        table = re.search(r"^\| file \| lines .*?(?=\n\n)", readme, re.MULTILINE | re.DOTALL)
        (ROOT / "README.md").write_text(readme.replace(table[0], stat()))


if __name__ == "__main__":
    if "--stat" in sys.argv:
        print(stat())
    elif "--check" in sys.argv:
        found = problems()
        print("\n".join(found) or "SHARED blocks equal, budgets kept")
        sys.exit(bool(found))
    else:
        copy_blocks()

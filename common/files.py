"""Files that survive a kill: they are written and then renamed, or appended to line by line."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

RUNS = Path("runs")  # where scripts keep what they make, unless --out says otherwise


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a kill leaves the old text or the new one, never half of it."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_jsonl(objects: Iterable) -> str:
    """One JSON object per line."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)


def write_jsonl(path: Path, objects: Iterable) -> None:
    """Replace a JSONL file at once."""
    write_text(path, to_jsonl(objects))


def append_jsonl(path: Path, objects: Iterable) -> None:
    """Add lines to the end of a JSONL file. A kill may cut the last line: see read_jsonl."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(to_jsonl(objects))


def read_jsonl(path: Path) -> list:
    """The objects of a JSONL file that this project wrote; [] if there is no file.

    Reading stops at the first line that is not JSON, because a kill has cut it while it was
    written. (The empty text after the last newline ends the reading too.)
    """
    objects = []
    if not path.exists():
        return objects
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            objects.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return objects

"""Files that survive a kill: they are written and then renamed, or appended to line by line.

A device or a pipe that is named as an output is written to, and stays what it is.
"""

import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError

RUNS = Path("runs")  # where scripts keep what they make, unless --out says otherwise
MOST_LINKS = 40  # Linux follows no longer chain of symbolic links

# ---------------- text and JSON ----------------


def write_text(path: Path, text: str) -> None:
    """Replace a file at once: a kill leaves the old text or the new one, never half of it.

    The file keeps its permissions, and a symbolic link still points to it. A stream (see is_stream)
    is written to instead.
    """
    if is_stream(path):
        write_to_stream(path, text)
        return
    path = Path(os.path.realpath(path))
    temporary = temporary_of(path)
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            if path.is_file():
                shutil.copymode(path, temporary)
            file.write(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_of(path: Path) -> Path:
    """The file beside `path` that holds the new text until it is renamed."""
    return path.with_name(f".{path.name}-{os.getpid()}")


def to_jsonl(objects: Iterable) -> str:
    """One JSON object per line."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)


def write_jsonl(path: Path, objects: Iterable) -> None:
    """Replace a JSONL file at once, as write_text does."""
    write_text(path, to_jsonl(objects))


def append_jsonl(path: Path, objects: Iterable) -> None:
    """Add lines to the end of a JSONL file. A kill may cut the last line: see read_jsonl."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(to_jsonl(objects))


def read_jsonl(path: Path, fields: dict[str, tuple] | None = None) -> list[dict]:
    """The objects of a JSONL file that this project wrote; [] if there is no file.

    A last line that is not JSON is left out, because a kill has cut it while it was written.
    fields: {field that each object must have: its types}. Raises UserError for a line that is
    damaged otherwise.
    """
    objects = []
    if not path.exists():
        return objects
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break
            value = None
        except (ValueError, RecursionError):  # a number of thousands of digits, brackets likewise
            value = None
        fault = "" if isinstance(value, dict) else "it is no JSON object"
        for name, types in (fields or {}).items():
            if not fault and not isinstance(value.get(name, ...), types):
                fault = f'its field "{name}" is {value.get(name, "missing")!r:.40}'
        if fault:
            raise UserError(
                f"{path} line {number} is damaged: {fault}: remove the line or the file"
            )
        objects.append(value)
    return objects


# ---------------- streams: devices, pipes, /dev/stdout ----------------


def is_stream(path: Path) -> bool:
    """Is this a device, a pipe, a socket, or a file that this process has open (/dev/stdout)?"""
    if descriptor_of(path) is not None:
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


def descriptor_of(path: Path) -> int | None:
    """The number of the open file of this process that a path names, such as 1 for /dev/stdout.

    None for any other path.
    """
    for _ in range(MOST_LINKS):
        folder = os.path.realpath(path.parent)
        path = Path(folder, path.name)
        if folder == f"/proc/{os.getpid()}/fd" and path.name.isdecimal():
            return int(path.name)
        if not path.is_symlink():
            return None
        path = Path(folder, os.readlink(path))
    return None


def write_to_stream(path: Path, text: str) -> None:
    """Write a text to a stream, after all that was printed before."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = descriptor_of(path)
    if descriptor is None:
        # Without O_CREAT: Linux may refuse it for another user's pipe in /tmp.
        copy = os.open(path, os.O_WRONLY)
    else:
        # To open /dev/stdout would begin a file anew that the shell has opened (> log.txt).
        copy = os.dup(descriptor)
    with open(copy, "w", encoding="utf-8") as file:
        file.write(text)


# ---------------- outputs that a flag names, checked before anything is computed ----------------


def check_output_file(flag: str, name: str, may_exist: bool = True) -> None:
    """Raise UserError if write_text could not write the file that a flag names.

    may_exist: whether a file may be there already; a stream always may.
    """
    try:
        fault = file_fault(name, may_exist)
    except OSError as error:
        fault = f"it cannot be written ({error.strerror})"
    if fault:
        raise UserError(f"{flag} {name}: {fault}: choose another file")


def file_fault(name: str, may_exist: bool) -> str:
    """Why the file cannot be written, or "". Raises OSError if the system refuses it."""
    path = Path(name)
    if path.is_dir() or name.endswith(os.sep):
        return "it is a folder"
    if is_stream(path):
        return stream_fault(path)
    if path.exists() and not may_exist:
        return "it exists"
    target = Path(os.path.realpath(path))
    if target.is_symlink():
        return "it is a link to itself"
    if not target.parent.is_dir():
        return f"there is no folder {target.parent}"
    # Only a try tells: permissions do not bind root, and some file systems take no files.
    temporary = temporary_of(target)
    temporary.touch()
    temporary.unlink(missing_ok=True)
    return ""


def stream_fault(path: Path) -> str:
    """Why nothing can be written to the stream, or "". Raises OSError if it is closed."""
    descriptor = descriptor_of(path)
    if descriptor is not None:
        mode = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        return "it is open for reading only" if mode == os.O_RDONLY else ""
    if path.is_socket():
        return "it is a socket"
    # It is not opened here, because a pipe without a reader would block.
    return "" if os.access(path, os.W_OK) else "it may not be written"


def check_output_folder(flag: str, name: str) -> None:
    """Raise UserError if the folder that a flag names is none, or could not be made."""
    try:
        fault = folder_fault(Path(name))
    except OSError as error:
        fault = f"it cannot be made ({error.strerror})"
    if fault:
        raise UserError(f"{flag} {name}: {fault}: choose another folder")


def folder_fault(folder: Path) -> str:
    """Why nothing can be written to the folder, or "". Raises OSError if it cannot be made."""
    existing = nearest_existing(folder)
    if not existing.is_dir():
        place = "it" if existing == folder else str(existing)
        return f"{place} is not a folder"
    if existing == folder:
        # Nothing is tried in it: another rank may just be looking whether it is empty.
        return "" if os.access(folder, os.W_OK | os.X_OK) else "it may not be written"
    os.rmdir(tempfile.mkdtemp(dir=existing))
    return ""


def nearest_existing(path: Path) -> Path:
    """The path itself if there is such a file or folder, or else the nearest parent that exists."""
    while True:
        try:
            path.lstat()
            return path
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent

"""The algorithm files stay diffable: SHARED blocks equal, forks found, README's table generated."""

import json
import shutil
import subprocess
import sys

import pytest

import sync


def sync_command(root, *flags):
    command = [sys.executable, "tests/sync.py", *flags]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


@pytest.fixture
def repository(tmp_path):
    """A copy of the repository's code."""
    root = tmp_path / "repository"
    root.mkdir()
    for path in sync.ROOT.glob("*.py"):
        shutil.copy(path, root)
    for name in ("common", "sources", "checkers"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(sync.ROOT / name, root / name, ignore=ignored)
    (root / "tests").mkdir()
    shutil.copy(sync.ROOT / "tests/sync.py", root / "tests")
    shutil.copy(sync.ROOT / "README.md", root)
    return root


def test_shared_blocks_are_equal():
    assert sync.problems() == []


def test_every_algorithm_file_is_found():
    files = sync.algorithm_files()
    assert files[0] == "grpo.py"
    assert {"cgpo.py", "famo.py", "mcpo.py", "opd.py", "pcgrad.py"} <= set(files)
    assert "merge.py" not in files


def test_a_changed_shared_block_is_found_and_mended(repository):
    path = repository / "cgpo.py"
    text = path.read_text()
    path.write_text(text.replace("def token_weights(", "def token_weight(", 1))
    checked = sync_command(repository, "--check")
    assert checked.returncode == 1
    assert 'cgpo.py: block "SHARED: backward" differs' in checked.stdout
    assert sync_command(repository).returncode == 0
    assert sync_command(repository, "--check").returncode == 0
    assert path.read_text() == text


def test_sections_in_another_order_are_found(repository):
    path = repository / "famo.py"
    parts = sync.blocks(path.read_text())
    names = list(parts)
    names[2], names[3] = names[3], names[2]
    path.write_text(sync.join({name: parts[name] for name in names}))
    checked = sync_command(repository, "--check")
    assert checked.returncode == 1
    assert "famo.py: its sections are not grpo.py's" in checked.stdout


SCALE_FLAG = """
def add_algo_arguments(group) -> None:
    help = "factor of every advantage"
    group.add_argument("--scale", type=cli.positive_float, default=1.0, help=help)
"""


def test_a_fork_is_one_copy_a_flag_and_a_line(repository, toy, tmp_path):
    """cp grpo.py rloo.py; give it --scale; run it; refuse --scale -1; keep it in step."""
    fork = repository / "rloo.py"
    text = (repository / "grpo.py").read_text()
    start = text.index("\ndef add_algo_arguments(group)")
    stop = text.index("\n\ndef check_algo_arguments")
    text = text[:start] + SCALE_FLAG + text[stop:]
    old_return = 'return advantage_B[:, None].float() * batch["mask"]'
    assert text.count(old_return) == 1
    text = text.replace(old_return, f"{old_return} * args.scale")
    fork.write_text(text)

    refused = subprocess.run(
        [sys.executable, "rloo.py", "--scale", "-1"],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert refused.stderr == "rloo.py: --scale -1: must be positive (see --help)\n"

    shutil.copytree(sync.ROOT / "runs", repository / "runs", ignore=only_the_toy, symlinks=True)
    flags = [
        "--scale",
        "0.5",
        "--steps",
        "1",
        "--eval-prompts",
        "0",
        "--out",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(
        [sys.executable, "rloo.py", *flags], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "args.json").read_text())["algorithm"] == "rloo"
    assert "building the toy model" not in done.stdout

    # It is seen, and kept in step with grpo.py.
    assert sync_command(repository, "--check").returncode == 0
    assert "| rloo.py |" in sync_command(repository, "--stat").stdout
    original = repository / "grpo.py"
    original.write_text(
        original.read_text().replace("# 1. Sample responses", "# 1. Draw responses")
    )
    checked = sync_command(repository, "--check")
    assert checked.returncode == 1
    assert 'rloo.py: block "SHARED: main" differs' in checked.stdout
    assert sync_command(repository).returncode == 0
    assert sync_command(repository, "--check").returncode == 0
    assert "# 1. Draw responses" in fork.read_text()
    assert "--scale" in fork.read_text()
    assert "| rloo.py |" in (repository / "README.md").read_text()


def only_the_toy(folder, names):
    """For copytree: what of runs/ is not the toy's."""
    if folder != str(sync.ROOT / "runs"):
        return []
    return [name for name in names if not name.startswith("toy-")]


def test_the_table_counts_code_only(monkeypatch, tmp_path):
    (tmp_path / "grpo.py").write_text("a = 1\nb = 2\n")
    (tmp_path / "cgpo.py").write_text('"""doc"""\na = 1  # comment\n\n# more\nb = 3\n')
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    assert sync.difference("cgpo.py") == (1, 1)


def test_readme_shows_the_generated_table():
    assert sync.stat() in (sync.ROOT / "README.md").read_text()

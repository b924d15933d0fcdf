"""The algorithm files stay diffable: SHARED blocks equal, budgets kept, README's table generated."""
import sync


def test_shared_blocks_and_budgets():
    assert sync.problems() == []


def test_a_changed_shared_block_is_found(monkeypatch, tmp_path):
    for name in sync.algorithm_files():
        (tmp_path / name).write_text((sync.ROOT / name).read_text())
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    text = (tmp_path / "cgpo.py").read_text()
    (tmp_path / "cgpo.py").write_text(text.replace("def token_weights(", "def token_weight(", 1))
    assert any("SHARED: backward" in problem for problem in sync.problems())
    sync.copy_blocks()
    assert sync.problems() == [] and (tmp_path / "cgpo.py").read_text() == text


def test_the_budget_counts_code_only(monkeypatch, tmp_path):
    (tmp_path / "grpo.py").write_text("a = 1\nb = 2\n")
    (tmp_path / "cgpo.py").write_text('"""doc"""\na = 1  # comment\n\n# more\nb = 3\n')
    monkeypatch.setattr(sync, "ROOT", tmp_path)
    assert sync.difference("cgpo.py") == (1, 1)
    assert sync.crowded("if a: b = 1\nc = 2; d = 3\ne = 4\n") == [1, 2]


def test_readme_shows_the_generated_table():
    assert sync.stat() in (sync.ROOT / "README.md").read_text()

"""The rows of `--data`, which names one source or several. A source is one of

rows.jsonl, folder/         a file, or all .jsonl files of a folder (common/rows.py has the schema)
toy                         the toy's five domains
humaneval                   OpenAI's HumanEval
gym:<task>[,<task>…]        generated tasks of reasoning-gym
cgpo, m2rl                  the papers' mixtures of public data sets
"""

from pathlib import Path

from common.errors import UserError
from common.rows import DOMAINS, read_rows
from sources.packaged import gym_rows, humaneval_rows
from sources.recipes import published_rows
from sources.toy import toy_rows


def load_rows(sources: list[str], domains: list[str] | None = None, seed: int = 0) -> list[dict]:
    """The rows of all sources, only of these domains (default: all domains), with unique ids.

    seed: for the sources that draw rows at random (gym:…, cgpo, m2rl). Raises UserError.
    """
    rows = []
    for source in sources:
        rows += source_rows(source, domains, seed)
    check_ids(rows)
    if not domains:
        return rows
    check_domains(rows, domains)
    return [row for row in rows if row["domain"] in domains]


def source_rows(source: str, domains: list[str] | None, seed: int) -> list[dict]:
    """The rows of one source. Only a mixture (cgpo, m2rl) leaves out other domains here."""
    if source == "toy":
        return toy_rows()
    if source == "humaneval":
        return humaneval_rows()
    if source.startswith("gym:"):
        tasks = source.removeprefix("gym:").split(",")
        return gym_rows(tasks, seed)
    if source in ("cgpo", "m2rl"):
        rows = []
        for domain in domains or DOMAINS:
            rows += published_rows(source, domain, seed)
        return rows
    if Path(source).is_dir():
        return read_folder(Path(source))
    if Path(source).is_file():
        return read_rows(Path(source))
    raise UserError(
        f"--data {source}: no such file or folder, "
        "nor one of toy, humaneval, gym:<task>, cgpo, m2rl"
    )


def read_folder(folder: Path) -> list[dict]:
    """The rows of all .jsonl files of a folder. Raises UserError if it has none."""
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise UserError(f"--data {folder}: no .jsonl file in this folder")
    rows = []
    for file in files:
        rows += read_rows(file)
    return rows


def check_ids(rows: list[dict]) -> None:
    """Raise UserError if two rows have the same id."""
    seen = set()
    for row in rows:
        if row["id"] in seen:
            raise UserError(
                f"two rows share the id {row['id']!r}: "
                "ids must be unique, because the random streams depend on them"
            )
        seen.add(row["id"])


def check_domains(rows: list[dict], domains: list[str]) -> None:
    """Raise UserError for an unknown domain, or one without a row."""
    present = {row["domain"] for row in rows}
    for domain in domains:
        if domain not in DOMAINS:
            raise UserError(f"--domains {domain}: not one of {' '.join(DOMAINS)}")
        if domain not in present:
            raise UserError(f"--domains {domain}: --data has no row of this domain")

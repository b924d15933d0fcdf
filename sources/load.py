"""The rows of `--data`, which names one source or several. A source is one of

rows.jsonl, folder/         a file, or all .jsonl files of a folder, also as .jsonl.gz
                            (common/rows.py has the schema)
toy                         the toy's five domains
real                        four domains for a real model of the smallest size (sources/real.py)
humaneval                   OpenAI's HumanEval
gym:<task>[,<task>…]        generated tasks of reasoning-gym; a task may have settings, as in
                            gym:chain_sum:min_terms=2,max_terms=2,syllogism
cgpo, m2rl                  the papers' mixtures of public data sets
"""

from pathlib import Path

from common.errors import UserError
from common.rows import DOMAINS, read_rows, stem_of
from sources.packaged import gym_rows, humaneval_rows, split_tasks
from sources.real import real_rows
from sources.recipes import published_rows
from sources.toy import toy_rows


NAMES = (
    "toy",
    "real",
    "humaneval",
    "cgpo",
    "m2rl",
)  # these mean the source, also beside such a folder


def load_rows(sources: list[str], domains: list[str] | None = None, seed: int = 0) -> list[dict]:
    """The rows of all sources, only of these domains (default: all domains), with unique ids.

    seed: for the sources that draw rows at random (gym:…, cgpo, m2rl). Raises UserError.
    """
    names = short_names([file for source in sources for file in files_of(source)])
    rows = []
    for source in sources:
        files = files_of(source)
        for file in files:
            rows += read_rows(file, names[file])
        if not files:
            rows += source_rows(source, domains, seed)
    check_ids(rows)
    if not domains:
        return rows
    check_domains(rows, domains)
    return [row for row in rows if row["domain"] in domains]


def source_rows(source: str, domains: list[str] | None, seed: int) -> list[dict]:
    """The rows of a source that is no file. Only a mixture (cgpo, m2rl) leaves out domains here."""
    if source == "toy":
        return toy_rows()
    if source == "real":
        return real_rows()
    if source == "humaneval":
        return humaneval_rows()
    if source.startswith("gym:"):
        return gym_rows(split_tasks(source.removeprefix("gym:")), seed)
    if source in ("cgpo", "m2rl"):
        rows = []
        for domain in domains or DOMAINS:
            rows += published_rows(source, domain, seed)
        return rows
    raise UserError(
        f"--data {source}: no such file or folder, "
        "nor one of toy, real, humaneval, gym:<task>, cgpo, m2rl"
    )


def files_of(source: str) -> list[Path]:
    """The file that a source is, or those of the folder that it is; none if it is neither.

    Raises UserError for a folder without any.
    """
    path = Path(source)
    if source in NAMES or not path.exists():
        return []
    if not path.is_dir():
        return [path]
    files = sorted([*path.glob("*.jsonl"), *path.glob("*.jsonl.gz")])
    if not files:
        raise UserError(f"--data {path}: no .jsonl file in this folder")
    return files


def short_names(files: list[Path]) -> dict[Path, str]:
    """{file: what its rows' ids begin with}: its name without its ending.

    Files of one name in several folders are told apart by the shortest end of their paths.
    """
    names = {}
    for file in files:
        alike = {other.absolute() for other in files if stem_of(other) == stem_of(file)}
        length = 1
        while len({path.parts[-length:-1] for path in alike}) < len(alike) and length < 100:
            length += 1
        names[file] = "/".join([*file.absolute().parts[-length:-1], stem_of(file)])
    return names


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

"""What a set of rows consists of, and whether it contains a benchmark's prompts.

    python -m sources.stats --data cgpo.jsonl --against humaneval

Prints per domain the number of rows, the prompts' lengths, the pass rates and the repeated prompts;
and, per benchmark of --against, how many of its prompts share a run of --n words with some row.
"""

import numpy as np

from common.cli import ROW_SOURCES, Parser, add_flags, positive_int, run_main
from common.rows import prompt_text, words_of
from sources import benchmarks
from sources.load import load_rows
from sources.recipes import count_domains

HEADER = (
    "domain       rows  words: median  95 %   longest   pass rate: known   mean   repeated prompts"
)


def domain_line(domain: str, rows: list[dict]) -> str:
    """One domain's line of the table. Lengths are in words."""
    lengths = [len(words_of(prompt_text(row))) for row in rows]
    pass_rates = [row["pass_rate"] for row in rows if "pass_rate" in row]
    mean_pass_rate = f"{np.mean(pass_rates):.2f}" if pass_rates else "–"
    repeated = len(rows) - len({prompt_text(row) for row in rows})
    return (
        f"{domain:<10}{len(rows):7d}"
        f"{np.median(lengths):15.0f}{np.quantile(lengths, 0.95):6.0f}{max(lengths):10d}"
        f"{len(pass_rates):19d}{mean_pass_rate:>7}{repeated:19d}"
    )


def ngrams(text: str, n: int) -> set[tuple]:
    """All runs of n words, in lower case. A text of fewer words gives one run, the full text."""
    words = words_of(text.lower())
    starts = range(max(1, len(words) - n + 1))
    return {tuple(words[start : start + n]) for start in starts}


def overlap_lines(rows: list[dict], benchmark_rows: dict[str, list[dict]], n: int) -> list[str]:
    """Per benchmark: how many of its prompts share an n-gram of words with some row."""
    benchmark_ngrams = {}  # name → the n-grams of each prompt
    all_benchmark_ngrams = set()
    for name, questions in benchmark_rows.items():
        benchmark_ngrams[name] = [ngrams(prompt_text(row), n) for row in questions]
        all_benchmark_ngrams.update(*benchmark_ngrams[name])

    shared_ngrams = set()  # the rows' other n-grams would not fit in memory
    for row in rows:
        shared_ngrams |= ngrams(prompt_text(row), n) & all_benchmark_ngrams

    lines = []
    for name, questions in benchmark_rows.items():
        shared_ids = []
        for row, prompt_ngrams in zip(questions, benchmark_ngrams[name]):
            if prompt_ngrams & shared_ngrams:
                shared_ids.append(row["id"])
        example = f", such as {shared_ids[0]}" if shared_ids else ""
        lines.append(
            f"{name}: {len(shared_ids)} of {len(questions)} prompts share {n} words in a row "
            f"with the rows{example}"
        )
    return lines


def stats(rows: list[dict], benchmark_rows: dict[str, list[dict]], n: int) -> str:
    """The table of the domains, and a line per benchmark, as the command prints them.

    benchmark_rows: {name: rows} whose prompts are searched for in `rows`, by n-grams of words.
    """
    lines = [HEADER]
    for domain in count_domains(rows):
        lines.append(domain_line(domain, [row for row in rows if row["domain"] == domain]))
    lines += overlap_lines(rows, benchmark_rows, n)
    return "\n".join(lines)


def parse_args(argv: list[str] | None = None):
    """The flags."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        help=f"where the rows come from: {ROW_SOURCES}",
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        help="look for the prompts of these benchmarks (of eval.py) or sources (as in --data)",
    )
    parser.add_argument(
        "--n",
        type=positive_int,
        default=13,
        help="number of consecutive words that count as the same text",
    )
    add_flags(parser, "--domains", "--seed")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print the statistics. Raises UserError."""
    args = parse_args(argv)
    rows = load_rows(args.data, args.domains, args.seed)
    benchmark_rows = {}
    for name in args.against:
        if name in benchmarks.NAMES:
            benchmark_rows[name] = benchmarks.rows_of(name, {})
        else:
            benchmark_rows[name] = load_rows([name], seed=args.seed)
    print(stats(rows, benchmark_rows, args.n))


if __name__ == "__main__":
    run_main(main, "nothing was written")

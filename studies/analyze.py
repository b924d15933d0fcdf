"""The analyses of the paper "To Mix or To Merge" (M2RL), for any runs, checkpoints and evaluations.

    python -m studies.analyze curves --runs runs/joint runs/math runs/code --out analyses/curves
    python -m studies.analyze weights --base toy --experts math=runs/math code=runs/code \\
        --out analyses/weights
    python -m studies.analyze kl --experts math=runs/math code=runs/code \\
        --models ties=merged/ties --data toy --held-out 40 --out analyses/kl
    python -m studies.analyze gains --start scores/start --experts scores/math scores/code \\
        --models scores/ties --out analyses/gains
    python -m studies.analyze verify --scores scores/start scores/math --out analyses/verify

An analysis writes its numbers to OUT.json and a picture to OUT.png. The folders scores/… are those
of eval.py. `python -m studies.analyze weights --help` gives the formulas of `weights`; the other
analyses have such a page too.
"""

import json
import os
import sys
from pathlib import Path

from common.cli import Parser, run_main
from common.errors import UserError
from common.files import check_output_file, check_output_folder, is_stream, write_text
from studies import curves, gains, kl, pictures, verify, weights

# An analysis is a module with parse_args(parser, argv) and run(args) → (numbers, figure).
COMMANDS = {"curves": curves, "weights": weights, "kl": kl, "gains": gains, "verify": verify}


def parse_args(argv: list[str] | None = None):
    """The flags of the analysis that argv[0] names. A wrong flag ends the script."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        parser = Parser(__doc__, "{" + ",".join(COMMANDS) + "} ")
        if "-h" in argv or "--help" in argv:
            parser.parse_args(["--help"])
        parser.error(f"the first word must be one of {', '.join(COMMANDS)}")
    command = argv[0]
    parser = Parser(COMMANDS[command].__doc__, f"{command} ")
    parser.add_argument("what", choices=[command], help="the analysis to run")
    parser.add_argument(
        "--out", required=True, help="write the numbers to OUT.json and the picture to OUT.png"
    )
    return COMMANDS[command].parse_args(parser, argv)


def make_place(name: str) -> Path:
    """Make the folder of --out's two files, and return OUT as a path.

    Raises UserError if they cannot be written.
    """
    out = Path(name)
    if is_stream(out) or not out.name:
        raise UserError(f"--out {name}: OUT.json and OUT.png cannot be made of it: choose another")
    check_output_folder("--out", str(out.parent))
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".json", ".png"):
        check_output_file("--out", f"{out}{suffix}")
    return out


def main(argv: list[str] | None = None) -> Path:
    """Run an analysis, write OUT.json and OUT.png, and return OUT.json's path. Raises UserError."""
    args = parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("the analyses run in one process: leave torchrun out")
    out = make_place(args.out)
    numbers, figure = COMMANDS[args.what].run(args)
    pictures.save(figure, f"{out}.png")
    write_text(Path(f"{out}.json"), json.dumps(numbers, indent=1))
    print(f"numbers {out}.json · picture {out}.png")
    return Path(f"{out}.json")


if __name__ == "__main__":
    run_main(main, "nothing was written")

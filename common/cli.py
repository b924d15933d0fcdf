"""The command line: one argparse parser, argument types that check ranges, the shared flags.

FLAGS holds every flag that several scripts have, with one meaning everywhere. A flag of one script
alone is defined in that script, with a type from here.
"""

import argparse
import datetime
import math
import os
import re
import sys
import textwrap
from pathlib import Path

from common import ranks
from common.errors import UserError
from common.formats import FORMATS
from common.rows import DOMAINS

# ---------------- argument types: they check ranges where a flag is defined ----------------


LARGEST = 2**40  # of whole numbers: more of anything does not fit into a computer
MOST_THREADS = 1024


def number(kind: type, rule: str, is_allowed):
    """An argparse type that reads a number of `kind` (int or float) and checks its range.

    A value is refused with "must <rule>" unless is_allowed(value). inf and nan always are.
    """

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            kind_name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: must be {kind_name}") from None
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"{text}: must be a finite number")
        if kind is int and abs(value) > LARGEST:
            raise argparse.ArgumentTypeError(f"{text}: must be at most {LARGEST}")
        if not is_allowed(value):
            raise argparse.ArgumentTypeError(f"{text}: must {rule}")
        return value

    parse.metavar = "N" if kind is int else "X"  # read by class Help
    return parse


positive_int = number(int, "be positive", lambda value: value > 0)
natural = number(int, "not be negative", lambda value: value >= 0)
positive_float = number(float, "be positive", lambda value: value > 0)
non_negative_float = number(float, "not be negative", lambda value: value >= 0)
fraction = number(float, "be at least 0 and below 1", lambda value: 0 <= value < 1)
finite = number(float, "lie between -1e30 and 1e30", lambda value: abs(value) <= 1e30)
threads = number(
    int, f"be at least 0 and at most {MOST_THREADS}", lambda value: 0 <= value <= MOST_THREADS
)
seed = number(int, "be at least 0 and below 2^32", lambda value: 0 <= value < 2**32)
share = number(float, "be above 0 and at most 1", lambda value: 0 < value <= 1)


def domain_name(text: str) -> str:
    """An argparse type: one of DOMAINS."""
    if text not in DOMAINS:
        raise argparse.ArgumentTypeError(f"{text}: not one of {' '.join(DOMAINS)}")
    return text


def iso_date(text: str) -> str:
    """An argparse type: a date such as 2026-11-25; or "", which stays what it is."""
    if not text:
        return ""
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: must be a date such as 2026-11-25") from None


def untruncated(text: str) -> float:
    """The argparse type of --top-p in training: only 1 leaves the importance ratio unbiased."""
    if share(text) != 1:
        raise argparse.ArgumentTypeError(
            f"{text}: refused, because a truncated sampler draws from another distribution than "
            "the one whose log-probs are trained: the ratio would be biased"
        )
    return 1.0


# ---------------- the parser ----------------


class Help(argparse.RawDescriptionHelpFormatter):
    """The layout of --help: short names for values, and every default in brackets."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=120)

    def _get_default_metavar_for_optional(self, action):
        """The name of a flag's value. (A method of argparse's that it offers for overriding.)"""
        if action.type in (int, float):
            return {int: "N", float: "X"}[action.type]
        return getattr(action.type, "metavar", "TEXT")

    def _get_help_string(self, action):
        """The help text of a flag, with its default. (Another method of argparse's.)"""
        if not action.option_strings or isinstance(action.default, bool):
            return action.help
        if action.default in (None, "", [], argparse.SUPPRESS):
            return action.help
        return f"{action.help} [%(default)s]"


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations; a wrong flag prints one line instead of the usage.

    doc: the script's docstring, shown by --help. usage: the arguments before the flags.
    defaults_of: {model: {attribute: default}}, what that --model has instead, shown at the end of
    --help.
    """

    def __init__(self, doc: str, usage: str = "", defaults_of: dict | None = None):
        super().__init__(
            prog=script_name(),
            description=doc,
            usage=f"%(prog)s {usage}[flags]",
            allow_abbrev=False,
            formatter_class=Help,
            epilog=defaults_text(defaults_of) if defaults_of else "",
        )
        # argparse takes -1e-3 for a flag (before Python 3.14)
        self._negative_number_matcher = re.compile(r"-(\d+\.?\d*|\.\d+)(e[-+]?\d+)?$", re.I)

    def error(self, message):
        # argparse says "argument --lr: 0: must be positive"; "--lr 0: must be positive" is enough
        message = re.sub(r"^argument (--[\w-]+): (?=\S+: )", r"\1 ", message)
        self.exit(2, f"{self.prog}: {message} (see --help)\n")


def script_name() -> str:
    """The script's name: grpo.py, or studies.bench if `python -m studies.bench` runs."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec else Path(sys.argv[0]).name


def defaults_text(defaults_of: dict[str, dict]) -> str:
    """The end of --help: the defaults of some models, written as flags."""
    parts = ["In brackets: the default."]
    for model, defaults in defaults_of.items():
        flags = []
        for name, value in defaults.items():
            if isinstance(value, (list, tuple)):
                text = " ".join(map(str, value))
            elif value == "":
                text = "''"
            else:
                text = str(value)
            flags.append(f"--{name.replace('_', '-')} {text}")
        lines = textwrap.fill(" ".join(flags), 118, break_on_hyphens=False)
        parts.append(f"--model {model} has its own:\n{lines}")
    return "\n".join(parts)


def add_flags(parser, *names: str, **defaults) -> None:
    """Add the named flags of FLAGS. `defaults` (lr=1e-5) replace the table's."""
    for name in names:
        parser.add_argument(name, **FLAGS[name])
    parser.set_defaults(**defaults)


class Outlet:
    """stdout whose reader may leave (`| head`): the work goes on, and its prints go nowhere."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except BrokenPipeError:
            self.print_nowhere()
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except BrokenPipeError:
            self.print_nowhere()

    def print_nowhere(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def run_main(main, advice: str = "--resume continues from the last checkpoint") -> None:
    """Call main(). UserError, OSError and Ctrl-C end in one line on stderr and exit status 1.

    advice: what the user can do after Ctrl-C.
    """
    script = script_name()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None if the shell has closed it (>&-)
    sys.stderr = sys.stderr or open(os.devnull, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal of ASCII alone shows ? for an arrow
    sys.stdout = Outlet(sys.stdout)
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"{script}: {error}".replace("\n", " "))
    except KeyboardInterrupt:
        sys.exit(f"{script}: interrupted; {advice}")
    if "RANK" in os.environ:
        # gloo's threads sometimes abort the interpreter's exit (docs/notes.md), so it is skipped
        ranks.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# ---------------- the flags that more than one script has ----------------

ROW_SOURCES = (  # sources/load.py reads them
    ".jsonl files, folders of them, toy, real, humaneval, gym:<task>[,<task>…], cgpo, m2rl"
)
FLAGS = {
    # model and data
    "--model": {
        "default": "toy",
        "help": "the model: a folder, organisation/name, a bare name such as Qwen2.5-7B-Instruct, "
        "toy, or smollm2 (docs/data.md)",
    },
    "--data": {
        "nargs": "+",
        "default": [],
        "help": f"where the rows come from: {ROW_SOURCES} (default: cgpo)",
    },
    "--eval-data": {
        "nargs": "+",
        "default": [],
        "help": "evaluate on the rows of these sources instead of held-out rows of --data",
    },
    "--domains": {
        "type": domain_name,
        "nargs": "+",
        "default": [],
        "help": "use only the rows of these domains: math, code, science, writing, if, agent",
    },
    "--domain-mix": {
        "default": "",
        "help": "each domain's share of a batch: equal, or weights such as math=2,code=1 (default: "
        "the shares of the rows)",
    },
    "--curriculum": {
        "choices": ["none", "omni-thinker", "self-paced"],
        "default": "none",
        "help": "the order of the prompts. none: domains mixed; omni-thinker: code, then math, "
        "science, writing and the rest; self-paced: easy prompts first",
    },
    "--system-prompt": {
        "default": None,
        "help": "the system prompt (default: it asks for what --reward-format wants of the domain)",
    },
    "--date": {
        "type": iso_date,
        "default": "",
        "help": "the date that a chat template may tell the model, such as 2026-11-25 (default: "
        "today; what is continued keeps its own)",
    },
    "--max-prompt-tokens": {
        "type": positive_int,
        "default": 1024,
        "help": "prompts of more tokens are dropped and counted",
    },
    "--max-new-tokens": {
        "type": positive_int,
        "default": 4096,
        "help": "a response is cut after this many tokens",
    },
    # sampling
    "--temperature": {
        "type": positive_float,
        "default": 1.0,
        "help": "temperature of the sampler and of every log-prob",
    },
    "--top-p": {
        "type": untruncated,
        "default": 1.0,
        "help": "must be 1 in training, because a truncated sampler biases the ratio",
    },
    "--engine": {
        "choices": ["auto", "vllm", "hf"],
        "default": "auto",
        "help": "what samples the responses. vllm: vLLM; hf: a loop over the trainer's own model; "
        "auto: vllm if it works, else hf",
    },
    "--engine-memory": {
        "type": share,
        "default": 0.2,
        "help": "share of the device's memory that vLLM uses for its KV cache",
    },
    "--rollout-tokens": {
        "type": positive_int,
        "default": 524288,
        "help": "the hf engine holds at most this many tokens in its KV cache",
    },
    # optimization
    "--lr": {"type": positive_float, "default": 1e-6, "help": "learning rate"},
    "--warmup-steps": {
        "type": natural,
        "default": 0,
        "help": "number of updates over which the learning rate rises linearly",
    },
    "--optim": {
        "choices": ["adamw", "adamw8bit"],
        "default": "adamw",
        "help": "the optimizer; adamw8bit is torchao's AdamW, which keeps its moments in 8 bits",
    },
    "--adam-betas": {
        "type": fraction,
        "nargs": 2,
        "default": (0.9, 0.999),
        "help": "AdamW's β₁ and β₂",
    },
    "--weight-decay": {
        "type": non_negative_float,
        "default": 0.0,
        "help": "AdamW's decoupled weight decay",
    },
    "--max-grad-norm": {
        "type": non_negative_float,
        "default": 1.0,
        "help": "the gradient's norm is clipped to this value; 0: it is not clipped",
    },
    "--micro-batch-tokens": {
        "type": positive_int,
        "default": 16384,
        "help": "at most this many tokens, padding included, are in one forward and backward pass",
    },
    "--cpu-offload": {
        "action": "store_true",
        "help": "keep fp32 weights, gradients and optimizer state on the CPU (FSDP2)",
    },
    "--checkpoint-activations": {
        "action": "store_true",
        "help": "recompute each block in the backward pass instead of keeping its activations",
    },
    "--dtype": {
        "choices": ["auto", "float32", "bfloat16"],
        "default": "auto",
        "help": "dtype of the computations. auto: bfloat16 on CUDA, else float32",
    },
    # rewards
    "--reward-scheme": {
        "choices": ["cgpo", "m2rl", "lenient"],
        "default": "cgpo",
        "help": "the rewards. cgpo: +1, −0.5 or −1 as in the CGPO paper; m2rl: 0 or 1; lenient: "
        "0 or 1, and <think> may be missing",
    },
    "--reward-format": {
        "choices": FORMATS,
        "default": "released",
        "help": "the form that the scheme cgpo asks for, after </think>. released: <answer> or a "
        "box in math and science, a block of code in code; strict: <think>…</think> and "
        "<answer>…</answer> in every domain",
    },
    "--verifier-url": {
        "default": "",
        "help": "URL of the OpenAI-compatible server that verifies science (general-verifier)",
    },
    "--judge-url": {
        "default": "",
        "help": "URL of the OpenAI-compatible server that judges writing (Qwen2.5-72B-Instruct)",
    },
    "--judge-both-orders": {
        "action": "store_true",
        "help": "show each pair to the judge in both orders, and count a disagreement as a tie",
    },
    "--sandbox-url": {
        "default": "",
        "help": "URL of a SandboxFusion server that runs code instead of the local sandbox",
    },
    "--allow-unsafe-code": {
        "action": "store_true",
        "help": "run model-written code even if this machine cannot isolate it",
    },
    # the run
    "--seed": {"type": seed, "default": 0, "help": "seed of every random number"},
    "--threads": {
        "type": threads,
        "default": 0,
        "help": "number of CPU threads; 0: torch's choice",
    },
    "--out": {
        "default": "",
        "help": "folder of the run (default: runs/<script>-<model>-<hash of the flags>)",
    },
    "--resume": {
        "action": "store_true",
        "help": "continue the run in --out from its last checkpoint; --lr and --steps may differ",
    },
    "--save-every": {
        "type": positive_int,
        "default": 20,
        "help": "number of steps between two checkpoints",
    },
    "--eval-every": {
        "type": natural,
        "default": 0,
        "help": "number of steps between two evaluations; 0: only before and after the run",
    },
    "--eval-prompts": {
        "type": natural,
        "default": 32,
        "help": "held-out prompts per domain, at most a quarter of the domain's prompts",
    },
    "--eval-samples": {
        "type": natural,
        "default": 4,
        "help": "sampled responses per held-out prompt, besides one greedy response",
    },
    "--eval-domains": {
        "type": domain_name,
        "nargs": "+",
        "default": [],
        "help": "evaluate only these domains (default: those of --domains)",
    },
    "--wandb": {"default": "", "help": "name of the Weights & Biases project to log to"},
}

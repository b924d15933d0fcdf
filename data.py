"""Rows → prompts → batches.

sources.load.load_rows reads the rows (common/rows.py has their schema). hold_out sets some of each
domain apart for evaluation. encode_prompts adds the prompt's tokens to a row. schedule plans which
rows each step trains on, and deal splits them over the ranks. After the rollout, collate packs the
responses into a batch: a dict of tensors, one row of each tensor per response.

Shapes: P prompts, G group size (responses per prompt), B sequences (P · G), T tokens.
"""

import datetime
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial

import jinja2
import torch

from common.errors import UserError
from common.formats import system_prompt
from common.keys import rng
from common.models import context_of
from common.rows import DOMAINS, lagging_domain
from sources.load import load_rows

# ---------------- rows ----------------


def hold_out(rows: list[dict], per_domain: int) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows).

    At most `per_domain` prompts and a quarter of each domain's prompts are held out. The choice
    depends on the prompts alone: it is the same for every seed and in every file. When several rows
    share a held-out prompt, the first row is held out and the others are in neither list.
    """
    held_out = {}  # prompt → row
    for domain in DOMAINS:
        first_rows = {}  # prompt → the first row that has it
        for row in rows:
            if row["domain"] == domain:
                first_rows.setdefault(str(row["prompt"]), row)
        prompts = sorted(first_rows, key=lambda prompt: rng("held-out", prompt).random())
        for prompt in prompts[: min(per_domain, len(prompts) // 4)]:
            held_out[prompt] = first_rows[prompt]
    training = [row for row in rows if str(row["prompt"]) not in held_out]
    return training, list(held_out.values())


def check_context(args, config) -> None:
    """Raise UserError if a prompt and its response may exceed the context of the model's config."""
    context, limit = context_of(config)
    if args.max_prompt_tokens + args.max_new_tokens > context:
        raise UserError(
            f"--max-prompt-tokens {args.max_prompt_tokens} + --max-new-tokens "
            f"{args.max_new_tokens} exceed {context} tokens, {limit}: lower one of them"
        )


def check_ids(rows: list[dict], vocab: int) -> None:
    """Raise UserError if a prompt has a token id of at least `vocab`: the model cannot read it."""
    for row in rows:
        largest = max(row["ids"], default=0)
        if largest >= vocab:
            raise UserError(
                f"row {row['id']}: its prompt has the token {largest}, for which the model's "
                f"embedding of {vocab} rows has none"
            )


def train_and_eval_rows(
    args, tokenizer, rows: tuple[list[dict], list[dict]] | None = None
) -> tuple[list[dict], list[dict]]:
    """(training rows, evaluation rows) with their prompts' tokens; no prompt is in both.

    rows: (training rows, held-out rows), as load_rows returns rows; they replace those of --data
    and --eval-data. Raises UserError.
    """
    train_rows, eval_rows = load_train_and_eval(args) if rows is None else rows
    train_rows = select_domains(train_rows, args.domains)
    eval_rows = select_domains(eval_rows, args.eval_domains or args.domains)
    if not args.verifier_url and any(needs_verifier(row) for row in train_rows):
        print(
            "science without --verifier-url: an option's letter, a number (to 1 %) or an equal "
            "text is right; anything else is wrong"
        )
    system, limit = partial(system_prompt, args=args), args.max_prompt_tokens
    train_rows = encode_prompts(train_rows, tokenizer, system, limit, date=args.date)
    eval_rows = encode_prompts(eval_rows, tokenizer, system, limit, "evaluation", args.date)
    return train_rows, eval_rows


def load_train_and_eval(args) -> tuple[list[dict], list[dict]]:
    """(rows of --data, rows of --eval-data); without --eval-data, hold_out() splits --data.

    Raises UserError if the two share a prompt.
    """
    if args.data == ["cgpo"]:
        omitted = "" if args.judge_url else "; no writing, because there is no --judge-url"
        print(f"--data cgpo (sources/recipes.py), domains {' '.join(args.domains)}{omitted}")
    # the evaluation may ask for domains that are not trained on
    domains = [] if args.eval_domains else args.domains
    rows = load_rows(args.data, domains, args.seed)
    if not args.eval_data:
        return hold_out(rows, args.eval_prompts)
    eval_rows = load_rows(args.eval_data)
    train_prompts = {str(row["prompt"]) for row in rows}
    shared = sum(str(row["prompt"]) in train_prompts for row in eval_rows)
    if shared:
        raise UserError(
            f"--eval-data shares {shared} prompts with --data: "
            "held-out prompts must not be trained on"
        )
    return rows, eval_rows


def select_domains(rows: list[dict], domains: list[str]) -> list[dict]:
    """The rows of these domains; an empty list means all domains."""
    return [row for row in rows if not domains or row["domain"] in domains]


def needs_verifier(row: dict) -> bool:
    """Is this a science row that neither reasoning-gym nor a rule of its own checks?"""
    return row["domain"] == "science" and "gym" not in row and "match" not in row


# ---------------- prompts ----------------


def encode_prompts(
    rows: list[dict], tokenizer, system, limit: int, name: str = "--data", date: str = ""
) -> list[dict]:
    """Copies of the rows with two more fields: "ids", the prompt's tokens, and "opened".

    The tokenizer's chat template writes the prompt; if there is none, the prompt is plain text.
    "opened" is the part of the response that the prompt ends with already, such as "<think>\\n".
    Prompts of more than `limit` tokens are dropped, and a message says how many.
    system: the system prompt, "" for none, or a function from a row to it. name: what the messages
    call the rows. date: what a template is told that asks for the date; "" for today's. Raises
    UserError when no row is left.
    """
    system_of = system if callable(system) else lambda row: system
    encoded = []
    dropped = Counter()  # domain → rows
    incomplete = 0  # prompts that lack a part of what they were made from
    for row in rows:
        system = system_of(row)
        has_template = bool(tokenizer.chat_template)
        text = chat_text(row, tokenizer, system, date) if has_template else plain_text(row, system)
        try:
            # a template has written the special tokens
            ids = tokenizer(text, add_special_tokens=not has_template).input_ids
        except TypeError:  # half a surrogate, from --system-prompt or the template
            raise UserError(f"row {row['id']}: its prompt is no text that UTF-8 can hold") from None
        # Some tokenizers end every text: a response would follow its own end.
        while ids and ids[-1] == tokenizer.eos_token_id and not has_template:
            ids.pop()
        if not ids:
            raise UserError(f"row {row['id']}: its prompt has no token")
        parts = [system, *[message["content"] for message in to_messages(row)]]
        incomplete += any(part.strip() not in text for part in parts)
        if len(ids) > limit:
            dropped[row["domain"]] += 1
            continue
        encoded.append({**row, "ids": ids, "opened": opened_by(row, text, tokenizer, system, date)})

    if dropped:
        counts = ", ".join(f"{domain} {count}" for domain, count in dropped.items())
        total = f"{dropped.total()} of {len(rows)}"
        print(f"{name}: dropped {total} prompts longer than {limit} tokens ({counts})")
    if incomplete:
        print(
            f"warning: {name}: the chat template leaves out a part of {incomplete} of {len(rows)} "
            "prompts (a system prompt, or what it takes for a thought)"
        )
    if rows and not encoded:
        hint = ""
        if system:
            hint = ', the system prompt counted: --system-prompt "" leaves it out'
        raise UserError(f"{name}: every prompt is longer than --max-prompt-tokens {limit}{hint}")
    return encoded


# What a response's format and its tool calls are made of.
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>")


def response_texts(rows: list[dict], responses: list[list[int]], tokenizer) -> list[str]:
    """The text of each response, with what the chat template has already written of it.

    responses: token ids; responses[i] answers rows[i]. Special tokens, such as the one that ends a
    turn, are left out, but not those of TAGS: some tokenizers have <think> as a special token.
    """
    silent = silent_ids(tokenizer)
    texts = []
    for row, tokens in zip(rows, responses, strict=True):
        heard = [token for token in tokens if token not in silent]
        texts.append(row["opened"] + tokenizer.decode(heard))
    return texts


def silent_ids(tokenizer) -> set[int]:
    """The ids of the special tokens that are no part of a response's text."""
    special = set(tokenizer.all_special_ids)
    for i, token in tokenizer.added_tokens_decoder.items():
        if token.special:
            special.add(i)
    return {i for i in special if tokenizer.convert_ids_to_tokens(i) not in TAGS}


def tags_text(tokenizer) -> str:
    """How the tokenizer writes the tags of the format, for the opening of a run."""
    texts = []
    for tag in TAGS[:4]:
        ids = tokenizer(tag, add_special_tokens=False).input_ids
        kept = tokenizer.decode(ids, skip_special_tokens=True) != tag
        if len(ids) == 1 and kept:
            texts.append(f"{tag} a special token (kept)")
        elif tokenizer.decode(ids) != tag:
            texts.append(f"{tag} cannot be written")
        else:
            texts.append(f"{tag} {len(ids)} token(s)")
    return ", ".join(texts)


def to_messages(row: dict) -> list[dict]:
    """The prompt as a list of {"role", "content"}."""
    if isinstance(row["prompt"], str):
        return [{"role": "user", "content": row["prompt"]}]
    return row["prompt"]


def plain_text(row: dict, system: str) -> str:
    """The prompt for a tokenizer without a chat template: its texts, with blank lines between."""
    texts = [system]
    for message in to_messages(row):
        texts.append(message["content"])
    text = "\n\n".join(text for text in texts if text)
    return f"{text}\n\n" if system else text


def opened_by(row: dict, text: str, tokenizer, system: str, date: str) -> str:
    """The part of the response that the prompt `text` ends with, from <think> on; "" if none.

    It is what the template writes at the beginning of the assistant's turn, or the row's own last
    message, if that is the assistant's.
    """
    if "<think>" not in text:
        return ""
    last = to_messages(row)[-1]
    if last["role"] == "assistant":
        turn = text[text.rindex(last["content"].strip()) :]
    elif tokenizer.chat_template:
        without_turn = chat_text(row, tokenizer, system, date, begin_turn=False)
        turn = text.removeprefix(without_turn)
        if turn == text:  # the template writes the messages in another way, too
            return ""
    else:
        turn = "".join(re.findall(r"<think>\s*$", text))
    return turn[turn.index("<think>") :] if "<think>" in turn else ""


def chat_text(row: dict, tokenizer, system: str, date: str = "", begin_turn: bool = True) -> str:
    """The prompt as the chat template writes it, up to where the response begins.

    If the row has a system message, `system` is appended to it. If the last message is the
    assistant's, the response continues it. date: see encode_prompts. begin_turn: whether the
    template begins the assistant's turn. Raises UserError if the template refuses the messages.
    """
    messages = to_messages(row)
    if system:
        messages = add_system(messages, system)
    continues = messages[-1]["role"] == "assistant"
    options = {
        "tools": row.get("tools"),
        "tokenize": False,
        "add_generation_prompt": begin_turn and not continues,
        "continue_final_message": continues,
    }
    if date:
        # the function that transformers gives to templates, at this date
        options["strftime_now"] = datetime.datetime.fromisoformat(date).strftime
    try:
        try:
            return tokenizer.apply_chat_template(messages, **options)
        except jinja2.TemplateError:
            # some templates know no system role (Gemma's): its text goes to the user's turn instead
            if messages[0]["role"] != "system" or len(messages) < 2:
                raise
            return tokenizer.apply_chat_template(system_in_first_turn(messages), **options)
    # what a template calls may raise anything
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"row {row['id']}: the model's chat template refuses this prompt ({reason:.200})"
        ) from error


def add_system(messages: list[dict], system: str) -> list[dict]:
    """The messages with `system` as their system message, or at the end of the one they have."""
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    content = f"{messages[0]['content']}\n\n{system}"
    return [{"role": "system", "content": content}, *messages[1:]]


def system_in_first_turn(messages: list[dict]) -> list[dict]:
    """The messages without a system role: the system's text begins the next message instead."""
    system, turn, *later = messages
    content = f"{system['content']}\n\n{turn['content']}"
    return [{**turn, "content": content}, *later]


# ---------------- batches of rows ----------------

# The order of the Omni-Thinker paper; the domains that it does not order come last.
STAGES = ("code", "math", "science", "writing", "if", "agent")


def domain_mix(rows: list[dict], mix: str) -> dict[str, float]:
    """Each domain's share of a batch; the shares sum to 1.

    mix: weights such as "math=2,code=1" (a domain without a weight gets no rows), "equal", or ""
    for the shares of the rows. Raises UserError.
    """
    row_counts = Counter(row["domain"] for row in rows)
    domains = [domain for domain in DOMAINS if row_counts[domain]]
    if mix == "":
        weights = {domain: float(row_counts[domain]) for domain in domains}
    elif mix == "equal":
        weights = dict.fromkeys(domains, 1.0)
    else:
        weights = parse_mix(mix)
    for domain, weight in weights.items():
        if domain not in domains:
            raise UserError(
                f"--domain-mix {domain}: --data has no row of this domain "
                f"(it has {', '.join(domains)})"
            )
        if not 0 < weight < math.inf:
            raise UserError(f"--domain-mix {domain}={weight}: a weight is a positive number")
    total = sum(weights.values())
    return {domain: weight / total for domain, weight in weights.items()}


def parse_mix(mix: str) -> dict[str, float]:
    """{domain: weight} of a text such as "math=2,code=1". Raises UserError."""
    weights = {}
    try:
        for pair in mix.split(","):
            domain, weight = pair.split("=")
            weights[domain.strip()] = float(weight)
    except ValueError:
        raise UserError(f"--domain-mix {mix}: write it like math=2,code=1, or equal") from None
    return weights


def batches(rows: list[dict], size: int, mix: dict[str, float], seed: int) -> Iterator[list[dict]]:
    """Yield batches of `size` rows for ever, a pure function of the arguments.

    mix: each domain's share. Each row comes from the domain that lags its share the most, so that
    every part of a batch (such as a mini-batch) keeps the mix to within one row. Within a domain,
    no row repeats before all rows were drawn.
    """
    streams = {}
    for domain in mix:
        streams[domain] = shuffles([row for row in rows if row["domain"] == domain], seed, domain)
    drawn = dict.fromkeys(mix, 0)  # domain → rows drawn so far
    while True:
        batch = []
        for _ in range(size):
            domain = lagging_domain(mix, drawn)
            drawn[domain] += 1
            batch.append(next(streams[domain]))
        yield batch


def shuffles(rows: list[dict], seed: int, domain: str) -> Iterator[dict]:
    """Yield the rows of one domain for ever, in a new random order each epoch."""
    for epoch in itertools.count():
        for i in rng(seed, "shuffle", domain, epoch).permutation(len(rows)):
            yield rows[i]


def schedule(rows: list[dict], mix: dict[str, float], steps: int, args) -> list[list[dict]]:
    """The batches of a run: `steps` lists of --batch-prompts rows.

    --curriculum only changes the order: each prompt comes as often as without a curriculum.
        none          every batch keeps the mix of domains
        omni-thinker  domain after domain, in the order of STAGES; the mix gives a stage's length
        self-paced    the highest "pass_rate" first; rows without one are spread evenly
    Raises UserError for self-paced when no row has a pass rate.
    """
    plan = list(itertools.islice(batches(rows, args.batch_prompts, mix, args.seed), steps))
    if args.curriculum == "none":
        return plan
    slots = [row for batch in plan for row in batch]  # the run's prompts, in their present order
    if args.curriculum == "omni-thinker":
        positions = [STAGES.index(row["domain"]) for row in slots]
    else:
        positions = self_paced_positions(slots, args.seed)
    order = sorted(range(len(slots)), key=lambda i: positions[i])
    ordered = [slots[i] for i in order]
    starts = range(0, len(ordered), args.batch_prompts)
    return [ordered[start : start + args.batch_prompts] for start in starts]


def self_paced_positions(slots: list[dict], seed: int) -> list[float]:
    """Each slot's position in the run, from 0 to 1: by pass rate, or random for rows without one.

    Raises UserError if no row has a pass rate.
    """
    rated = [i for i, row in enumerate(slots) if "pass_rate" in row]
    if not rated:
        raise UserError(
            '--curriculum self-paced: no row has a "pass_rate"; '
            "python eval.py --rated measures them"
        )
    rated.sort(key=lambda i: -slots[i]["pass_rate"])
    positions = [rng(seed, "self-paced", i).random() for i in range(len(slots))]
    for number, i in enumerate(rated):
        positions[i] = (number + 0.5) / len(rated)
    return positions


def deal(rows: list[dict], rank: int, world_size: int, mini_batch_size: int) -> list[int]:
    """The indices of one rank's rows, ascending.

    In every mini-batch, the rows are sorted by domain and dealt to the ranks in turn, so that the
    ranks have the same mix. A rank that would have no row gets the first row, which join_ranks then
    counts once.
    """
    dealt = []
    for start in range(0, len(rows), mini_batch_size):
        indices = range(start, min(start + mini_batch_size, len(rows)))
        by_domain = sorted(indices, key=lambda p: DOMAINS.index(rows[p]["domain"]))
        dealt += by_domain[rank::world_size]
    return sorted(dealt) if dealt else [0]


# ---------------- batches of tensors ----------------


def collate(
    rows_B, prompt_numbers_P, group_size: int, tokens_B, logps_B, truncated_B, scores_B
) -> dict:
    """A batch of B = P · G sequences; the responses to one prompt are side by side.

    rows_B: each response's row, with "ids". prompt_numbers_P: this rank's prompts, as deal returns
    them. tokens_B, logps_B: a list per response, its end token included. scores_B: rewards.Score.

    column         shape  type
    ids            [B, T] int    prompt, response with its end token, then 0 as padding
    mask           [B, T] bool   the response, its end token included
    sampler_logp   [B, T] float  the sampler's log-prob of each response token, 0 elsewhere
    length         [B]    int    tokens of prompt and response
    tokens         [B]    int    tokens of the response
    truncated      [B]    bool   the response was cut at --max-new-tokens
    group          [B]    int    the prompt's number, the same for its G responses
    domain         [B]    int    index in DOMAINS
    reward         [B]    double NaN where the checker failed
    correct        [B]    bool   False too where the checker failed
    valid          [B]    bool   the response has the right format
    """
    B = len(rows_B)
    length_B = []
    for row, tokens in zip(rows_B, tokens_B, strict=True):
        length_B.append(len(row["ids"]) + len(tokens))
    T = max(length_B)

    ids_BT = torch.zeros(B, T, dtype=torch.long)
    mask_BT = torch.zeros(B, T, dtype=torch.bool)
    sampler_logp_BT = torch.zeros(B, T)
    for b, end in enumerate(length_B):
        prompt = rows_B[b]["ids"]
        start = len(prompt)
        ids_BT[b, :end] = torch.tensor([*prompt, *tokens_B[b]])
        mask_BT[b, start:end] = True
        sampler_logp_BT[b, start:end] = torch.tensor(logps_B[b])

    reward_B = [math.nan if score.reward is None else score.reward for score in scores_B]
    return {
        "ids": ids_BT,
        "mask": mask_BT,
        "sampler_logp": sampler_logp_BT,
        "length": torch.tensor(length_B),
        "truncated": torch.tensor(truncated_B),
        "group": torch.tensor(prompt_numbers_P).repeat_interleave(group_size),
        "domain": torch.tensor([DOMAINS.index(row["domain"]) for row in rows_B]),
        "reward": torch.tensor(reward_B).double(),
        "correct": torch.tensor([bool(score.correct) for score in scores_B]),
        "valid": torch.tensor([score.valid for score in scores_B]),
        "tokens": torch.tensor([len(tokens) for tokens in tokens_B]),
    }


def join_ranks(rank_results: list[tuple[dict, list]], group_size: int) -> tuple[dict, list]:
    """(columns, samples) of all ranks, in the prompts' order, each prompt once.

    rank_results: (columns [B], samples) per rank, as ranks.gather returns them. A prompt that
    several ranks have answered (see deal) keeps only its first `group_size` responses.
    """
    columns = {}
    for name in rank_results[0][0]:
        columns[name] = torch.cat([rank_columns[name] for rank_columns, _ in rank_results])
    samples = []
    for _, rank_samples in rank_results:
        samples += rank_samples

    order = columns["group"].argsort(stable=True)
    prompt_B = columns["group"][order]
    first_of_prompt_B = torch.searchsorted(prompt_B, prompt_B)  # index of its first response
    order = order[torch.arange(len(order)) - first_of_prompt_B < group_size]
    columns = {name: column[order] for name, column in columns.items()}
    return columns, [samples[i] for i in order.tolist()]


def take(batch: dict, index, device=None) -> dict:
    """The sequences `index` of a batch, on `device` (default: where they are).

    Columns [B, T] are cut to the longest of these sequences. An empty index gives columns of 0
    sequences and 2 tokens, the least that a forward pass with log-probs takes.
    """
    length_B = batch["length"][index]
    longest = int(length_B.max()) if len(length_B) else 2
    selection = {}
    for name, column in batch.items():
        values = column[index]
        if values.ndim == 2:
            values = values[:, :longest]
        selection[name] = values.to(device or column.device)
    return selection


def micro_batches(batch: dict, budget: int, share_prompts: bool = False) -> list[torch.Tensor]:
    """The micro-batches of a batch: the indices of their sequences, short sequences first.

    A micro-batch has at most `budget` tokens, padding included, unless one sequence alone has more.
    share_prompts: the responses to a prompt stay side by side, and the prompt's tokens count once
    in a micro-batch (padding does not count). Without sequences there is one empty micro-batch.
    """
    length_B = batch["length"]
    if share_prompts:
        return shared_micro_batches(batch, budget)
    indices_of_batches = []
    indices = []  # of the micro-batch that is being filled
    for b in length_B.argsort(stable=True).tolist():
        padded_size = (len(indices) + 1) * int(length_B[b])
        if indices and padded_size > budget:
            indices_of_batches.append(torch.tensor(indices))
            indices = []
        indices.append(b)
    indices_of_batches.append(torch.tensor(indices, dtype=torch.long))
    return indices_of_batches


def shared_micro_batches(batch: dict, budget: int) -> list[torch.Tensor]:
    """The micro-batches of micro_batches() when the responses to a prompt share it."""
    response_B = batch["mask"].sum(1)
    prompt_B = batch["length"] - response_B
    groups = batch["group"].unique().tolist()
    indices_of_group = {g: (batch["group"] == g).nonzero()[:, 0].tolist() for g in groups}
    groups.sort(key=lambda g: int(batch["length"][indices_of_group[g]].max()))

    indices_of_batches = []
    indices, size = [], 0  # of the micro-batch that is being filled
    for g in groups:
        size += int(prompt_B[indices_of_group[g][0]])
        for b in indices_of_group[g]:
            if indices and size + int(response_B[b]) > budget:
                indices_of_batches.append(torch.tensor(indices))
                indices, size = [], int(prompt_B[b])
            indices.append(b)
            size += int(response_B[b])
    indices_of_batches.append(torch.tensor(indices, dtype=torch.long))
    return indices_of_batches

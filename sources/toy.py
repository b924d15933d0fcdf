"""The toy: five small domains and a model of 0.4 M parameters that a laptop trains in a minute.

Each prompt has a good response and a habit: the systematic mistake of its domain. The model's warm
start is supervised training on demonstrations, most of which show the habit. So reinforcement
learning has something to correct.

    math     2+3-1=?                  the result; the habit forgets the last term
    code     code add 2 times 3       (x+2)*3; the habit stops after the first operation
    science  hue of dedu?             an invented fact; the habit is a wrong fact, or a hedge
    writing  poem on cat              three rhymes; the habit is two words, one without the rhyme
    if       say tip 3 by -           tip-tip-tip; the habit always says it twice

The model is a GPT-2 of 2 layers × 128 with a byte-pair tokenizer of its own.
Shapes: B sequences, T tokens, V vocabulary, N response tokens of a batch, H hidden.
"""

import fcntl
import functools
import itertools
import operator
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from common.checkpoints import save_folder, save_model
from common.files import RUNS
from common.keys import hash_of, rng
from common.rows import DOMAINS, lagging_domain

TOY_MODEL = {
    "n_layer": 2,
    "n_embd": 128,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.08,  # GPT-2's 0.02 trains far slower at this size
    "resid_pdrop": 0.0,
    "activation_function": "gelu_pytorch_tanh",  # the same function as gelu_new, in one kernel
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
TOY_TRAINING = {
    "steps": 1600,
    "batch_rows": 32,
    "lr": 3e-3,
    "warmup_steps": 30,
    "seed": 0,
    "demonstrations": 51200,  # 1600 · 32: one epoch
}


# ---------------- rows ----------------

CALCULATE = {"+": operator.add, "-": operator.sub, "*": operator.mul}
OPERATIONS = {"add": "+", "minus": "-", "times": "*"}  # word in a code prompt → sign
THINGS = "dedu kilo mora tavi zuni pelo riba sofu gani lemu boki naru fipo wuda jeso hami".split()
FACTS = {
    "hue": "red blue green black white pink".split(),
    "home": "sea hill cave lake farm moon".split(),
    "food": "rice corn fish plum milk salt".split(),
}
RHYMES = {  # ending → the words that rhyme on it
    "at": "bat cat hat mat rat flat".split(),
    "og": "dog fog hog jog log frog".split(),
    "un": "bun fun gun run sun stun".split(),
    "et": "bet jet net pet vet wet".split(),
    "ip": "dip hip lip tip ship trip".split(),
    "ake": "bake cake lake make rake wake".split(),
    "ool": "cool fool pool tool stool drool".split(),
    "ing": "king ring sing wing bring thing".split(),
}
SAY_WORDS = "tip hum pop zig tak lom bim yep dot wow nod rum".split()


@functools.cache
def toy_rows() -> list[dict]:
    """Every prompt of the toy. "good" is the good response, "habit" the systematic mistake."""
    return [*math_rows(), *code_rows(), *science_rows(), *writing_rows(), *if_rows()]


def make_row(domain: str, prompt: str, good: str, habit: str, **fields) -> dict:
    """A row of the toy; `fields` are the domain's own."""
    row = {"id": f"toy/{prompt}", "domain": domain, "prompt": prompt, "good": good, "habit": habit}
    row["format"] = "strict"  # its demonstrations have <answer> in every domain
    return row | fields


def tagged(answer, thinking: str = "") -> str:
    """A response in the right format."""
    return f"<think>{thinking}</think><answer>{answer}</answer>"


def math_rows() -> list[dict]:
    """Sums and differences of three terms, never negative. Habit: the last term is forgotten."""
    rows = []
    for a, b, c in itertools.product(range(1, 5), repeat=3):
        for first, second in itertools.product("+-", repeat=2):
            subtotal = CALCULATE[first](a, b)
            total = CALCULATE[second](subtotal, c)
            if subtotal < 0 or total < 0:
                continue
            good = tagged(total, thinking=f"{subtotal}{second}{c}")
            habit = tagged(subtotal)
            prompt = f"{a}{first}{b}{second}{c}=?"
            rows.append(make_row("math", prompt, good, habit, answer=str(total)))
    return rows


def code_rows() -> list[dict]:
    """Expressions in x with two operations. Habit: only the first operation."""
    inputs = [0, 1, 2, 5]  # the values of x that a response is tested with
    rows = []
    for first, second in itertools.product(OPERATIONS, repeat=2):
        first_sign, second_sign = OPERATIONS[first], OPERATIONS[second]
        for a, b in itertools.product(range(1, 10), repeat=2):
            outputs = []
            for x in inputs:
                outputs.append(CALCULATE[second_sign](CALCULATE[first_sign](x, a), b))
            tests = {"inputs": list(inputs), "outputs": outputs, "expression": "x"}
            good = tagged(f"(x{first_sign}{a}){second_sign}{b}")
            habit = tagged(f"x{first_sign}{a}")
            rows.append(
                make_row("code", f"code {first} {a} {second} {b}", good, habit, tests=tests)
            )
    return rows


def science_rows() -> list[dict]:
    """Invented facts. Habit, without thinking: a wrong fact, or (30 %) a hedged right one."""
    rows = []
    for attribute, thing in itertools.product(FACTS, THINGS):
        drawn = rng("toy fact", attribute, thing).choice(FACTS[attribute], 2, replace=False)
        truth, myth = str(drawn[0]), str(drawn[1])
        good = tagged(truth, thinking=thing)
        if rng("toy habit", attribute, thing).random() < 0.3:
            habit = tagged(f"i think it is {truth}")
        else:
            habit = tagged(myth)
        prompt = f"{attribute} of {thing}?"
        row = make_row("science", prompt, good, habit, answer=truth, match="last-word")
        rows.append(row)
    return rows


def writing_rows() -> list[dict]:
    """Words that rhyme with the topic: good has three, the reference two.

    Habit: one rhyme, and one word that does not rhyme.
    """
    all_words = [word for family in RHYMES.values() for word in family]
    rows = []
    for form in ("poem", "song", "ode", "rap"):
        for family in RHYMES.values():
            off_rhyme = [word for word in all_words if word not in family]
            for topic in family:
                draw = rng("toy poem", form, topic)
                rhymes = [word for word in family if word != topic]
                rhymes = [str(word) for word in draw.permutation(rhymes)]
                good = tagged(" ".join(rhymes[:3]))
                habit = tagged(f"{rhymes[0]} {draw.choice(off_rhyme)}")
                row = make_row(
                    "writing",
                    f"{form} on {topic}",
                    good,
                    habit,
                    reference=" ".join(rhymes[3:5]),
                    judge="rhyme",
                    topic=topic,
                )
                rows.append(row)
    return rows


def if_rows() -> list[dict]:
    """A word said `count` times, with a mark between. Habit: it is always said twice."""
    rows = []
    for word, count, mark in itertools.product(SAY_WORDS, (2, 3, 4, 5), "-+*/"):
        constraint = {"id": "toy:say", "kwargs": {"word": word, "count": count, "mark": mark}}
        good = tagged(mark.join([word] * count))
        habit = tagged(f"{word}{mark}{word}")
        prompt = f"say {word} {count} by {mark}"
        rows.append(make_row("if", prompt, good, habit, constraints=[constraint]))
    return rows


def demonstrations(count: int, seed: int) -> list[dict]:
    """`count` rows with a "response", for the warm start.

    28 % of the responses are good and the others show the habit. 9 % (some of the others) lack one
    tag, so that the model makes mistakes of format too.
    """
    draw = rng(seed, "toy demonstrations")
    # math gets 3 of 7 turns: with less of it, the model does not learn its sums
    turns = ("math", "math", "math", "code", "science", "writing", "if")
    rows_by_domain = {}
    for row in toy_rows():
        rows_by_domain.setdefault(row["domain"], []).append(row)
    demonstrated = []
    for i in range(count):
        rows = rows_by_domain[turns[i % len(turns)]]
        row = rows[draw.integers(len(rows))]
        uniform = draw.random()  # in [0, 1)
        response = row["good"] if uniform < 0.28 else row["habit"]
        if uniform > 0.91:
            lost_tag = str(draw.choice(["</think>", "<answer>", "</answer>", "<think>"]))
            response = response.replace(lost_tag, "")
        demonstrated.append({**row, "id": f"{row['id']}#{i}", "response": response})
    return demonstrated


# ---------------- tokenizer ----------------


def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding of the toy's texts: a word, a digit, a sign or a tag is one token."""
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    texts = set()
    for row in toy_rows():
        texts |= {row["prompt"], row["good"], row["habit"]}
    training_texts = sorted(texts)
    for tag in tags:
        training_texts = [text.replace(tag, " ") for text in training_texts]

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" ?[a-z]+|[^a-z]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<eos>", "<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(training_texts, trainer)
    # not special: decoding keeps the tags, because the rewards read them
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        unk_token="<unk>",
        pad_token="<eos>",
        model_max_length=TOY_MODEL["n_positions"],
        clean_up_tokenization_spaces=False,
    )


# ---------------- warm start ----------------


def build_toy(seed: int = 0) -> str:
    """The toy model's folder, runs/toy-<hash of all that it is built from>/checkpoint.

    The model is built when the folder is missing, which takes about a minute.
    """
    out = RUNS / folder_name(seed)
    RUNS.mkdir(exist_ok=True)
    with open(RUNS / "toy.lock", "w") as lock:
        # so that two scripts that start together do not both build it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (out / "checkpoint").exists():
            train_toy(out, seed)
    return str(out / "checkpoint")


@functools.cache
def folder_name(seed: int) -> str:
    """toy-<hash of all that the model is built from>."""
    training = TOY_TRAINING | {"seed": seed}
    rows = demonstrations(training["demonstrations"], seed)
    texts = [(row["prompt"], row["response"]) for row in rows]
    recipe = [TOY_MODEL, training, toy_tokenizer().backend_tokenizer.to_str(), texts]
    return f"toy-{hash_of(recipe)[:8]}"


def train_toy(out: Path, seed: int) -> None:
    """Train the toy on its demonstrations and save it as out/checkpoint.

    The loss is −mean log π(token) over the response tokens of a batch. AdamW with linear warm-up,
    then linear decay to 0; the gradient's norm is clipped to 1.
    """
    print(f"building the toy model (once, about a minute) in {out}")
    steps, batch_rows, lr = TOY_TRAINING["steps"], TOY_TRAINING["batch_rows"], TOY_TRAINING["lr"]
    rows = training_order(demonstrations(TOY_TRAINING["demonstrations"], seed), seed)
    tokenizer = toy_tokenizer()
    model = initial_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.0)
    started = time.perf_counter()
    for step in range(1, steps + 1):
        ids_BT, mask_BT = encode(rows[(step - 1) * batch_rows : step * batch_rows], tokenizer)
        loss = cross_entropy(model, ids_BT, mask_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        warmup = step / TOY_TRAINING["warmup_steps"]
        decay = 1 - (step - 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * min(warmup, decay)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % (steps // 20) == 0:
            spent = time.perf_counter() - started
            left = spent / step * (steps - step)
            progress = f"sft step {step:5d}/{steps}  loss {loss.item():.3f}"
            print(f"  {progress}  {spent:.0f} s, {left:.0f} s left", flush=True)

    def write(folder: Path) -> None:
        tensors = [(name, p.detach()) for name, p in model.named_parameters()]
        save_model(folder, model, tokenizer, tensors)

    out.mkdir(parents=True, exist_ok=True)
    save_folder(out / "checkpoint", "toy", write)


def initial_model(tokenizer, seed: int) -> GPT2LMHeadModel:
    """The model before training; its random weights are a function of the seed."""
    eos = tokenizer.eos_token_id
    config = GPT2Config(vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos, **TOY_MODEL)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def training_order(rows: list[dict], seed: int) -> list[dict]:
    """The rows of one epoch, shuffled, with the domains spread evenly.

    The next row comes from the domain that lags its share the most, so that each batch has the
    same shares to within one row.
    """
    shuffled = {}
    for domain in DOMAINS:
        domain_rows = [row for row in rows if row["domain"] == domain]
        if domain_rows:
            order = rng(seed, "shuffle", domain, 0).permutation(len(domain_rows))
            shuffled[domain] = [domain_rows[i] for i in order]
    shares = {domain: len(domain_rows) / len(rows) for domain, domain_rows in shuffled.items()}
    drawn = dict.fromkeys(shuffled, 0)
    ordered = []
    for _ in rows:
        domain = lagging_domain(shares, drawn)
        ordered.append(shuffled[domain][drawn[domain]])
        drawn[domain] += 1
    return ordered


def encode(rows: list[dict], tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids_BT, mask_BT) of prompts and responses, padded on the right, short sequences first.

    The mask covers the response and its end token.
    """
    prompts_B = tokenizer([row["prompt"] for row in rows]).input_ids
    responses_B = tokenizer([row["response"] for row in rows]).input_ids
    pairs_B = []
    for prompt, response in zip(prompts_B, responses_B, strict=True):
        pairs_B.append((prompt, [*response, tokenizer.eos_token_id]))
    # The order does not matter to the loss, but sums in another order differ in their last bits.
    pairs_B.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    longest_prompt, longest_response = pairs_B[-1]
    T = len(longest_prompt) + len(longest_response)
    ids_BT = torch.zeros(len(rows), T, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), T, dtype=torch.bool)
    for b, (prompt, response) in enumerate(pairs_B):
        start, end = len(prompt), len(prompt) + len(response)
        ids_BT[b, :end] = torch.tensor(prompt + response)
        mask_BT[b, start:end] = True
    return ids_BT, mask_BT


def cross_entropy(model, ids_BT, mask_BT) -> torch.Tensor:
    """−mean log π(ids[b, t] | ids[b, <t]) over the masked tokens."""
    hidden_BTH = model.transformer(input_ids=ids_BT, use_cache=False).last_hidden_state
    # the hidden state at t - 1 predicts the token at t
    hidden_NH = hidden_BTH[:, :-1][mask_BT[:, 1:]]
    target_N = ids_BT[:, 1:][mask_BT[:, 1:]]
    logits_NV = model.lm_head(hidden_NH)
    return F.cross_entropy(logits_NV, target_N, reduction="sum") / mask_BT.sum()

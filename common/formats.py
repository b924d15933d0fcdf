"""The form of a response: what --reward-format pays for, and what the system prompt asks for.

A thought comes first, up to </think>. What must follow it depends on the row (form_of):

    form     released, as the papers' code has it         strict, C.3's example for every domain
    answer   <answer>…</answer>, or a \\boxed{…}           the same, but the response begins with
    code     a block of code                              <think>, and nothing follows </answer>
    text     any text
"""

FORMATS = ("released", "strict")
THINK = "Think first, between <think> and </think>."
THEN = {
    "answer": "Then give only the final answer, between <answer> and </answer>.",
    "code": "Then give the program, as a block of code between ```python and ```.",
    "text": "Then write your answer.",
}


def format_of(row: dict, reward_format: str) -> str:
    """The row's own "format", or the run's --reward-format."""
    return row.get("format", reward_format)


def form_of(row: dict, reward_format: str) -> str:
    """What must follow the thought: "answer", "code" or "text"."""
    if format_of(row, reward_format) == "strict" or "gym" in row:
        return "answer"
    if row["domain"] in ("math", "science"):
        return "answer"
    if row["domain"] == "code":
        return "code" if runs_code(row) else "answer"
    return "text"


def runs_code(row: dict) -> bool:
    """Do the row's tests run a model's program? The toy's expressions are not run."""
    return row["domain"] == "code" and "gym" not in row and "expression" not in row["tests"]


def system_prompt(row: dict, args) -> str:
    """--system-prompt; without that flag, a text that asks for the row's form."""
    if args.system_prompt is not None:
        return args.system_prompt
    return asking_for(form_of(row, args.reward_format))


def asking_for(form: str) -> str:
    """A system prompt that asks for this form."""
    return f"{THINK} {THEN[form]}"


def in_form(row: dict, thought: str, answer: str, reward_format: str) -> str:
    """A response in the row's form."""
    form = form_of(row, reward_format)
    if form == "answer":
        answer = f"<answer>{answer}</answer>"
    elif form == "code":
        answer = f"\n```python\n{answer.strip()}\n```"
    return f"<think>{thought}</think>{answer}"

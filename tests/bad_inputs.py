"""Bad inputs, and what every script must do with them.

A script ends in one line and a non-zero status, and writes nothing. tests/test_bad_<script>.py
gives each script these inputs, and bad flags of its own.
"""

import gzip
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers import fails

# ---------------- the assertion ----------------


def tree(folder: Path) -> dict[str, bytes | None]:
    """{path: content} of all files below a folder; None for folders."""
    content = {}
    for path in sorted(folder.rglob("*")):
        if "__pycache__" not in path.parts:
            content[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return content


def assert_refused(main, argv: list, capsys, folder: Path, message: str = "") -> None:
    """main(argv) ends in one line that holds `message`, and leaves `folder` as it is.

    main: as helpers.fails takes it. A message for a file must name the file or its folder.
    """
    before = tree(folder)
    line = fails([str(word) for word in argv], capsys, main)
    assert message in line, line
    assert "Traceback" not in line
    assert len(line) < 1500, line
    assert tree(folder) == before


# ---------------- models' folders ----------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"\x93garbage" * 50)


def no_object(path: Path) -> None:
    path.write_text("[]")


def in_file(name: str, damage):
    """A damage of one file of a folder."""
    return lambda folder: damage(folder / name)


def change_weights(folder: Path, change) -> None:
    """Write the folder's weights again, after change(name → tensor)."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def in_weights(change):
    """A change of a folder's tensors."""
    return lambda folder: change_weights(folder, change)


def without_a_tensor(weights: dict) -> dict:
    del weights["transformer.h.0.ln_1.weight"]
    return weights


def with_a_tensor(weights: dict) -> dict:
    return {**weights, "extra.weight": torch.zeros(2)}


def with_another_shape(weights: dict) -> dict:
    return {**weights, "transformer.ln_f.weight": torch.zeros(3)}


def without_a_name(weights: dict) -> dict:
    return {f"w{i}": tensor for i, tensor in enumerate(weights.values())}


def change_header(change):
    """A change of the header of a folder's weights, whose tensors stay where they are."""

    def damage(folder: Path):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        change(header)
        changed = json.dumps(header).encode()
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + content[8 + size :])

    return damage


def longer_than_the_file(header: dict) -> None:
    entry = header["transformer.ln_f.weight"]
    entry["data_offsets"][1] += 10**9


def of_a_type_that_does_not_exist(header: dict) -> None:
    header["transformer.ln_f.weight"]["dtype"] = "F7"


def a_header_without_end(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((1 << 62).to_bytes(8, "little") + path.read_bytes()[8:])


def with_values(value):
    """Weights of which one is not finite."""

    def change(weights: dict) -> dict:
        weights["transformer.h.0.attn.c_proj.weight"][-1, 0] = value
        return weights

    change.__name__ = f"with {value}"
    return change


def of_whole_numbers(weights: dict) -> dict:
    return {**weights, "transformer.ln_f.bias": weights["transformer.ln_f.bias"].long()}


def two_for_one(weights: dict) -> dict:
    doubled = {f"module.{name}": tensor * 2 for name, tensor in weights.items()}
    return {**weights, **doubled}


def with_and_without_a_prefix(weights: dict) -> dict:
    name = "transformer.h.0.ln_1.weight"
    return {**weights, name.removeprefix("transformer."): weights[name] * 2}


def in_json(name: str, **changes):
    """A change of a file of JSON in a folder."""

    def damage(folder: Path):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def only_gguf(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "model-q4_0.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64))


def nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a model")


def a_link_to_nothing(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to("gone")


def an_index_of_missing_shards(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = dict.fromkeys(weights, "model-00001-of-00002.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def a_broken_index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text('{"weight_map": 3}')


def of_an_unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))


def of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_embd": config["n_embd"] * 2}))


WEIGHT_FAULTS = {
    "weights cut": in_file("model.safetensors", cut),
    "weights empty": in_file("model.safetensors", empty),
    "weights garbage": in_file("model.safetensors", garbage),
    "weights missing": in_file("model.safetensors", os.unlink),
    "weights a folder": in_file("model.safetensors", lambda path: (path.unlink(), path.mkdir())),
    "a tensor missing": in_weights(without_a_tensor),
    "a tensor too many": in_weights(with_a_tensor),
    "another shape": in_weights(with_another_shape),
    "no name known": in_weights(without_a_name),
    "a NaN": in_weights(with_values(float("nan"))),
    "an inf": in_weights(with_values(float("inf"))),
    "whole numbers": in_weights(of_whole_numbers),
    "two tensors for each weight": in_weights(two_for_one),
    "two tensors for one weight": in_weights(with_and_without_a_prefix),
    "a config of another family": in_json("config.json", model_type="llama"),
    "one layer more": in_json("config.json", n_layer=3),
    "one layer less": in_json("config.json", n_layer=1),
    "an untied head": in_json("config.json", tie_word_embeddings=False),
    "a vocabulary in words": in_json("config.json", vocab_size="53"),
    "a tensor beyond the file": change_header(longer_than_the_file),
    "a type that does not exist": change_header(of_a_type_that_does_not_exist),
    "a header without end": a_header_without_end,
    "an index of missing shards": an_index_of_missing_shards,
    "a broken index": a_broken_index,
    "only GGUF": only_gguf,
    "nothing": nothing,
    "a file": a_file,
    "a link to nothing": a_link_to_nothing,
    "config cut": in_file("config.json", cut),
    "config empty": in_file("config.json", empty),
    "config garbage": in_file("config.json", garbage),
    "config []": in_file("config.json", no_object),
    "config missing": in_file("config.json", os.unlink),
    "an unknown type": of_an_unknown_type,
    "another size": of_another_size,
}


def without_a_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


GENERATION_FAULTS = {
    "generation config cut": in_file("generation_config.json", cut),
    "generation config empty": in_file("generation_config.json", empty),
    "generation config []": in_file("generation_config.json", no_object),
    "an end token in words": in_json("generation_config.json", eos_token_id="x"),
    "an end token in a list in a list": in_json("generation_config.json", eos_token_id=[[0]]),
    "a negative end token": in_json("generation_config.json", eos_token_id=-1),
    "an end token that is true": in_json("generation_config.json", eos_token_id=True),
    "an end token outside": in_json("generation_config.json", eos_token_id=10**6),
}
TOKENIZER_FAULTS = {
    "tokenizer cut": in_file("tokenizer.json", cut),
    "tokenizer empty": in_file("tokenizer.json", empty),
    "tokenizer garbage": in_file("tokenizer.json", garbage),
    "tokenizer []": in_file("tokenizer.json", no_object),
    "no tokenizer": without_a_tokenizer,
}
MODEL_FAULTS = WEIGHT_FAULTS | TOKENIZER_FAULTS | GENERATION_FAULTS


def bad_model(name: str, toy, folder: Path) -> Path:
    """A copy of the toy's folder in folder/model, with one of MODEL_FAULTS."""
    model = folder / "model"
    shutil.copytree(toy, model)
    MODEL_FAULTS[name](model)
    return model


# ---------------- files of rows ----------------

GOOD_ROW = {"domain": "math", "prompt": "1+1=", "answer": "2", "response": "2"}


def line(**changes) -> bytes:
    """A row, as a line of a file; a field of value ... is left out."""
    row = {name: value for name, value in (GOOD_ROW | changes).items() if value is not ...}
    return json.dumps(row).encode() + b"\n"


ROW_FAULTS = {
    "an empty file": b"",
    "blank lines": b"\n \n\n",
    "no JSON": b"hello\n",
    "cut in a row": line()[:20],
    "no UTF-8": b'{"prompt": "\xff\xfe"}\n',
    "UTF-16": '{"prompt": "x"}\n'.encode("utf-16"),
    "a list": b"[1, 2]\n",
    "a number": b"3\n",
    "null": b"null\n",
    "one list of all rows": b"[" + line().strip() + b"]",
    "nested 100,000 deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n",
    "a number of 5,000 digits": b'{"domain": "math", "prompt": "x", "answer": '
    + b"9" * 5000
    + b"}",
    "half a surrogate": line(prompt="\ud800"),
    "half a surrogate in a name": line(**{"\udfff": 1}),
    "no domain": line(domain=...),
    "an unknown domain": line(domain="poetry"),
    "a domain that is a list": line(domain=["math"]),
    "no prompt": line(prompt=...),
    "a blank prompt": line(prompt="  "),
    "a prompt that is a number": line(prompt=3),
    "no message": line(prompt=[]),
    "a message without content": line(prompt=[{"role": "user"}]),
    "a message that is a text": line(prompt=["hi"]),
    "no answer": line(answer=...),
    "a number as an answer": line(answer=2),
    "a blank answer": line(answer=" "),
    "a pass rate of 2": line(pass_rate=2),
    "a pass rate that is a text": line(pass_rate="high"),
    "tools that are a number": line(tools=5),
    "a tool that is a text": line(tools=["f"]),
    "no tests": line(domain="code"),
    "tests without anything": line(domain="code", tests={}),
    "more inputs than outputs": line(domain="code", tests={"inputs": ["1"], "outputs": []}),
    "asserts without a test": line(domain="code", tests={"asserts": ""}),
    "asserts that are not Python": line(domain="code", tests={"asserts": "assert f( =="}),
    "a setup that is not Python": line(domain="code", tests={"asserts": "f()", "setup": "def ("}),
    "an expression that is a number": line(
        domain="code", tests={"asserts": "f()", "expression": 1}
    ),
    "seconds NaN": line(domain="code", tests={"asserts": "f()", "seconds": float("nan")}),
    "seconds 1e308": line(domain="code", tests={"asserts": "f()", "seconds": 1e308}),
    "no constraints": line(domain="if", constraints=[]),
    "tools that are an empty text": line(tools=""),
    "messages without a word": line(prompt=[{"role": "user", "content": " "}]),
    "a long unknown domain": line(domain="x" * 100_000),
    "an unknown comparison": line(domain="code", tests={"asserts": "f()", "compare": "loosely"}),
    "seconds below 0": line(domain="code", tests={"asserts": "f()", "seconds": -1}),
    "constraints that are a text": line(domain="if", constraints="short"),
    "calls without a name": line(domain="agent", gold_calls=[{"arguments": {}}]),
    "gym that is a text": line(gym="chain_sum"),
    "a reference that is a number": line(domain="writing", reference=3),
    "the second row bad": line() + line(domain="poetry"),
    "gzip cut": gzip.compress(line() * 100)[:30],
    "no gzip": b"\x1f\x8bnot gzip at all",
}


def bad_rows(name: str, folder: Path) -> Path:
    """A file in the folder with one of ROW_FAULTS."""
    path = folder / "rows.jsonl"
    path.write_bytes(ROW_FAULTS[name])
    return path


# ---------------- outputs ----------------


def outputs(folder: Path) -> dict[str, str]:
    """{what is wrong with it: a path at which no folder can be made}."""
    (folder / "taken").write_text("thesis")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("thesis")
    return {
        "a file": str(folder / "taken"),
        "below a file": str(folder / "taken" / "out"),
        "full": str(folder / "full"),
        "nowhere": "/proc/nowhere/out",
    }

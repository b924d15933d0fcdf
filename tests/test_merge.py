"""merge.py: every method by hand, its identities, folders that transformers opens, and errors that
come before anything is written."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTConfig

import merge
from bad_inputs import change_header
from common.errors import UserError
from conftest import ROOT, tiny_model
from sources.toy import toy_tokenizer

BASE = torch.tensor([1.0, -1, 2, 3, 0, 5])
TAU = (
    torch.tensor([4.0, -3, 2, 0, 1, -6]),
    torch.tensor([2.0, 5, -1.5, 0, -3, -1]),
)


# ---------------- folders ----------------


@pytest.fixture(autouse=True)
def one_thread():
    """On tensors this small, threads that wait for each other take longer than one alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory) -> Path:
    """A folder with the toy's tokenizer, and a config whose tensors may have any names.

    It is that of no causal language model, so merge.py does not know how they should be named.
    """
    out = tmp_path_factory.mktemp("without-weights")
    ViTConfig().save_pretrained(out)
    toy_tokenizer().save_pretrained(out)
    return out


@pytest.fixture
def folder(tmp_path, without_weights):
    """A function that writes a model's folder, with a file per dict of tensors."""

    def make(name, *files, vocabulary=(), tokenizer=True):
        """vocabulary: tokens to add to the toy's. Returns the folder's name."""
        out = tmp_path / name
        shutil.copytree(without_weights, out, dirs_exist_ok=True)
        if not tokenizer:
            for path in out.glob("tokenizer*"):
                path.unlink()
        if vocabulary:
            larger_tokenizer = toy_tokenizer()
            larger_tokenizer.add_tokens(list(vocabulary))
            larger_tokenizer.save_pretrained(out)

        weight_map = {}
        for i, tensors in enumerate(files):
            file_name = "model.safetensors" if len(files) == 1 else f"model-{i}.safetensors"
            copies = {tensor: value.clone() for tensor, value in tensors.items()}
            save_file(copies, out / file_name, {"format": "pt"})
            for tensor in tensors:
                weight_map[tensor] = file_name
        if len(files) > 1:
            index = out / "model.safetensors.index.json"
            index.write_text(json.dumps({"weight_map": weight_map}))
        return str(out)

    return make


@pytest.fixture
def three(folder):
    """The folders of a base and of two experts, of one tensor "a"."""
    base = folder("base", {"a": BASE})
    return base, folder("one", {"a": BASE + TAU[0]}), folder("two", {"a": BASE + TAU[1]})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A function that gives four real models' folders, a base and three experts, with a tokenizer.

    The folders are shared between tests, which must not change them.
    """
    folders_of = {}

    def make(architecture="qwen2", dtype=torch.bfloat16) -> list[str]:
        if (architecture, dtype) not in folders_of:
            out = tmp_path_factory.mktemp(architecture)
            folders_of[architecture, dtype] = save_models(out, architecture, dtype)
        return folders_of[architecture, dtype]

    return make


def save_models(out: Path, architecture: str, dtype: torch.dtype) -> list[str]:
    tokenizer = toy_tokenizer()
    folders = []
    for i in range(4):
        model = tiny_model(architecture, vocab=len(tokenizer))
        torch.manual_seed(i)
        if i > 0:
            for parameter in model.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
        model.to(dtype).save_pretrained(out / str(i))
        tokenizer.save_pretrained(out / str(i))
        folders.append(str(out / str(i)))
    return folders


def run_merge(out: Path, base: str, experts, *flags) -> Path:
    return merge.main(["--base", base, "--experts", *experts, "--out", str(out), *map(str, flags)])


def merged(out: Path, base: str, experts, *flags) -> dict:
    """The tensors of a merge."""
    return load_file(run_merge(out, base, experts, *flags) / "model.safetensors")


def weights_of(name) -> dict:
    """A model's tensors, as transformers loads them."""
    return AutoModelForCausalLM.from_pretrained(name, dtype="auto").state_dict()


def assert_equal(weights: dict, expected: dict) -> None:
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name


# ---------------- the methods by hand ----------------


@pytest.mark.parametrize(
    "flags, shift",
    [
        (["average"], [3, 1, 0.25, 0, -1, -3.5]),
        (["average", "--weights", 3, 1], [3.5, -1, 1.125, 0, 0, -4.75]),
        (["ta"], [6, 2, 0.5, 0, -2, -7]),
        (["ta", "--lambda", 0.5, "--weights", 1, -2], [0, -6.5, 2.5, 0, 3.5, -2]),
        (["ties", "--density", 0.5], [3, 5, 0, 0, -3, -6]),
        (["ties", "--density", 0.5, "--lambda", 2], [6, 10, 0, 0, -6, -12]),
        (["ties", "--density", 1], [3, 5, 2, 0, -3, -3.5]),
        # at entry 4: 3 · 1 = 1 · 3, so there is no sign, and the base stays
        (["ties", "--density", 1, "--weights", 3, 1], [3.5, -3, 2, 0, 0, -4.75]),
        (["sce"], [346.5 / 107.25, 5, 2, 0, -3, -437.25 / 107.25]),
        (["sce", "--density", 0.5], [0, 5, 0, 0, -3, -311 / 81]),
    ],
)
def test_by_hand(flags, shift, three, tmp_path):
    tensors = merged(tmp_path / "out", three[0], three[1:], "--method", *flags)
    expected = (BASE + torch.tensor(shift)).tolist()
    assert tensors["a"].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "one, two, shift",
    [
        # a sum of 0 counts as +: only the first expert has that sign
        ([2.0, 1], [-2.0, 3], [2, (5 * 1 + 13 * 3) / 18]),
        # the sign of the plain sum, not of the one weighted by w
        ([1.0, 0], [-0.9, 10], [1, 10]),
    ],
)
def test_sces_sign_by_hand(one, two, shift, folder, tmp_path):
    base = folder("base", {"a": torch.zeros(2)})
    experts = [
        folder("one", {"a": torch.tensor(one)}),
        folder("two", {"a": torch.tensor(two)}),
    ]
    tensors = merged(tmp_path / "out", base, experts, "--method", "sce")
    assert tensors["a"].tolist() == pytest.approx(shift)


def test_the_report_by_hand(three, tmp_path, capsys):
    merged(tmp_path / "out", three[0], three[1:], "--method", "ties", "--density", 0.5)
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    one, two = report["experts"]
    norms = (one["norm"], two["norm"], report["base_norm"])
    assert norms == pytest.approx((66**0.5, 41.25**0.5, 40**0.5))
    assert (one["kept"], two["kept"]) == (0.5, 0.5)
    assert (one["agree"], two["agree"]) == pytest.approx((2 / 3, 1))
    cosine = (8 - 15 - 3 - 3 + 6) / (66 * 41.25) ** 0.5
    assert report["cosines"][0][1] == pytest.approx(cosine)
    assert report["method"] == "ties"
    assert report["parameters"] == 6
    assert "50.0%" in capsys.readouterr().out


def test_the_reports_norms_are_those_before_dare(three, tmp_path):
    merged(tmp_path / "out", three[0], three[1:], "--method", "ta", "--dare", 0.5)
    report = json.loads((tmp_path / "out" / "merge.json").read_text())
    norms = [expert["norm"] for expert in report["experts"]]
    assert norms == pytest.approx([66**0.5, 41.25**0.5])


def test_the_threshold_of_ties_is_the_whole_models(folder, tmp_path):
    """Tensor a moved far, b hardly: each would keep two entries by itself, but a keeps all four."""
    base = folder("base", {"a": torch.zeros(4), "b": torch.zeros(4)})
    a = torch.tensor([5.0, -6, 7, 8])
    b = torch.tensor([1.0, 2, -3, 4])
    expert = folder("one", {"a": a}, {"b": b})  # in two files
    tensors = merged(tmp_path / "out", base, [expert], "--method", "ties", "--density", 0.5)
    assert tensors["a"].tolist() == [5, -6, 7, 8]
    assert tensors["b"].tolist() == [0, 0, 0, 0]


def test_a_mostly_unchanged_expert_keeps_all_that_changed(folder, tmp_path):
    tau = torch.zeros(100)
    tau[:10] = torch.arange(1, 11)
    base = folder("base", {"a": torch.zeros(100)})
    tensors = merged(tmp_path / "out", base, [folder("one", {"a": tau})], "--method", "ties")
    assert torch.equal(tensors["a"], tau)


@pytest.mark.parametrize("count", [1, 2, 77, 1000, 5000])
def test_the_kth_largest_is_exact(count):
    draw = torch.Generator().manual_seed(count)
    exponent_KN = torch.randint(-42, 30, (3, 5000), generator=draw)  # denormals too
    x_KN = torch.randn(3, 5000, generator=draw).abs() * 10.0**exponent_KN
    x_KN[1, :3000] = x_KN[1, 0]  # many equal values
    x_KN[2, 100:] = 0
    expected_K = x_KN.sort(1, descending=True).values[:, count - 1]
    assert merge.kth_largest(lambda: x_KN.split(701, 1), count) == expected_K.tolist()


# ---------------- identities ----------------


@pytest.mark.parametrize(
    "which, flags",
    [
        ([1, 1], ["average"]),
        ([1, 1, 1], ["average"]),
        ([1, 2], ["average", "--weights", 1, 0]),
        ([1], ["average"]),
        ([1], ["ties", "--density", 1]),
        ([1], ["ta"]),
        ([1], ["sce"]),
        ([1, 1], ["ties", "--density", 1]),
    ],
)
def test_what_gives_the_first_expert(which, flags, models, tmp_path):
    folders = models()
    experts = [folders[i] for i in which]
    out = weights_of(run_merge(tmp_path / "out", folders[0], experts, "--method", *flags))
    expert = weights_of(folders[1])
    assert out.keys() == expert.keys()
    for name in out:
        assert out[name].dtype == torch.bfloat16
        if flags[0] == "average":  # bit for bit: the sign of 0 too
            assert torch.equal(out[name].view(torch.int16), expert[name].view(torch.int16))
        else:  # θ_0 + (θ − θ_0) in fp32, rounded to bf16
            assert torch.equal(out[name], expert[name])


@pytest.mark.parametrize("method", ["ta", "ties", "sce"])
def test_lambda_0_is_the_base(method, models, tmp_path):
    base, *experts = models()
    out = run_merge(tmp_path / "out", base, experts, "--method", method, "--lambda", 0)
    assert_equal(weights_of(out), weights_of(base))


@pytest.mark.parametrize(
    "flags",
    [
        ["average"],
        ["ta"],
        ["ta", "--dare", "0.8"],
        ["ties"],
        ["ties", "--dare", "0.8"],
        ["sce"],
        ["sce", "--density", "0.3"],
    ],
)
def test_pieces_and_shards_change_nothing_and_transformers_opens_the_result(
    flags, models, tmp_path, monkeypatch, architecture
):
    base, *experts = models(architecture, torch.float32 if flags[0] == "sce" else torch.bfloat16)
    one_file = run_merge(tmp_path / "one", base, experts, "--method", *flags)
    monkeypatch.setattr(merge, "PIECE", 1000)
    monkeypatch.setattr(merge, "SHARD_BYTES", 40_000)
    many_files = run_merge(tmp_path / "many", base, experts, "--method", *flags)
    assert len(list(one_file.glob("*.safetensors"))) == 1
    assert len(list(many_files.glob("*.safetensors"))) > 1

    one = weights_of(one_file)
    many = weights_of(many_files)
    base_weights = weights_of(base)
    assert one.keys() == many.keys() == base_weights.keys()
    # SCE's w are summed piece by piece
    tolerance = {"rtol": 1e-5, "atol": 1e-7} if flags[0] == "sce" else {"rtol": 0, "atol": 0}
    for name in one:
        assert torch.allclose(one[name], many[name], **tolerance)
    assert any(not torch.equal(one[name], base_weights[name]) for name in one)
    ids = AutoTokenizer.from_pretrained(many_files)("poem on cat").input_ids
    assert ids == AutoTokenizer.from_pretrained(base)("poem on cat").input_ids


def test_dare_keeps_its_share_and_its_expectation(folder, tmp_path):
    N = 20_000
    tau = torch.randn(N, generator=torch.Generator().manual_seed(0))
    base = folder("base", {"a": torch.zeros(N), "b": torch.zeros(N)})
    one = folder("one", {"a": tau, "b": tau})
    two = folder("two", {"a": tau, "b": tau})
    flags = ["--method", "ta", "--dare", 0.8]
    runs = []
    for seed in range(40):
        runs.append(merged(tmp_path / f"out{seed}", base, [one], *flags, "--seed", seed))

    for tensors in runs[:3]:
        kept = tensors["a"] != 0
        assert kept.float().mean().item() == pytest.approx(0.2, abs=0.015)
        assert torch.allclose(tensors["a"][kept], 5 * tau[kept], rtol=1e-6)
    # the draws differ by the tensor's name and by the seed
    assert not torch.equal(runs[0]["a"], runs[0]["b"])
    assert not torch.equal(runs[0]["a"], runs[1]["a"])
    mean = torch.stack([tensors["a"] for tensors in runs]).mean(0)
    assert (mean @ tau / (tau @ tau)).item() == pytest.approx(1, abs=0.03)
    # each expert has its own mask
    both = merged(tmp_path / "both", base, [one, two], *flags)
    assert not torch.equal(both["a"], 2 * runs[0]["a"])
    again = merged(tmp_path / "again", base, [one], *flags, "--seed", 1)
    assert torch.equal(runs[1]["a"], again["a"])


def test_dare_and_merge_are_not_rounded_in_between(folder, tmp_path):
    """Base and experts in bf16: the result is that of fp32 arithmetic, rounded once."""
    draw = torch.Generator().manual_seed(0)
    base_tensor = torch.randn(5000, generator=draw).bfloat16()
    base = folder("base", {"a": base_tensor})
    experts = []
    for i in range(2):
        expert = base_tensor.float() + 0.01 * torch.randn(5000, generator=draw)
        experts.append(folder(f"expert{i}", {"a": expert.bfloat16()}))
    flags = ["--method", "ta", "--dare", 0.3]
    narrow = merged(tmp_path / "bf16", base, experts, *flags)["a"]
    wide = merged(tmp_path / "f32", base, experts, *flags, "--dtype", "F32")["a"]
    assert narrow.dtype == torch.bfloat16
    assert wide.dtype == torch.float32
    assert torch.equal(narrow, wide.bfloat16())
    assert (wide != narrow.float()).float().mean() > 0.1
    config = json.loads((tmp_path / "f32" / "config.json").read_text())
    assert config["dtype"] == "float32"


def test_a_tied_head_that_a_folder_repeats_counts_once(models, tmp_path):
    base, one, two, three = models("qwen2")  # its head is tied
    repeating = tmp_path / "repeating"
    shutil.copytree(two, repeating)
    tensors = load_file(repeating / "model.safetensors")
    assert "lm_head.weight" not in tensors
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | head, repeating / "model.safetensors")
    experts = [one, str(repeating), three]
    out = run_merge(tmp_path / "out", base, experts, "--method", "ties")
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    report = json.loads((out / "merge.json").read_text())
    assert report["parameters"] == sum(tensor.numel() for tensor in tensors.values())


def test_a_head_that_differs_from_the_embedding_is_merged(models, tmp_path):
    """Its config.json says that it is tied; transformers keeps it apart all the same."""
    folders = []
    heads = []
    for i, name in enumerate(models("qwen2")[:3]):
        folders.append(str(shutil.copytree(name, tmp_path / str(i))))
        path = tmp_path / str(i) / "model.safetensors"
        tensors = load_file(path)
        heads.append(tensors["model.embed_tokens.weight"] * (2 + i))
        save_file(tensors | {"lm_head.weight": heads[-1]}, path, metadata={"format": "pt"})
    base, *experts = folders
    out = run_merge(tmp_path / "out", base, experts, "--method", "average")
    head = load_file(out / "model.safetensors")["lm_head.weight"]
    expected = (heads[1].double() + heads[2].double()) / 2
    assert torch.allclose(head.double(), expected, rtol=0.01, atol=1e-3)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(loaded.lm_head.weight.to(head.dtype), head)


def test_a_base_in_the_hubs_old_layout(models, tmp_path):
    """No prefix of the body, masks among the weights, as openai-community/gpt2 has it."""
    base, one, two, _ = models("gpt2")
    old = shutil.copytree(base, tmp_path / "old")
    tensors = {}
    for name, tensor in load_file(Path(base) / "model.safetensors").items():
        tensors[name.removeprefix("transformer.")] = tensor
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8).tril()
    tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, old / "model.safetensors", {"format": "pt"})
    expected = run_merge(tmp_path / "expected", base, [one, two], "--method", "ta")
    out = run_merge(tmp_path / "out", str(old), [one, two], "--method", "ta")
    expected_tensors = load_file(expected / "model.safetensors")
    tensors = load_file(out / "model.safetensors")
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected_tensors[name]), name


def test_an_expert_that_torch_compile_saved(models, tmp_path, capsys):
    base, one, two, _ = models("qwen2")
    wrapped = shutil.copytree(one, tmp_path / "wrapped")
    tensors = load_file(wrapped / "model.safetensors")
    renamed = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    save_file(renamed, wrapped / "model.safetensors", {"format": "pt"})
    expected = run_merge(tmp_path / "expected", base, [one, two], "--method", "sce")
    capsys.readouterr()
    out = run_merge(tmp_path / "out", base, [str(wrapped), two], "--method", "sce")
    assert "begin with _orig_mod., which is left out" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_two_tensors_of_one_name_are_refused(folder, tmp_path):
    tensors = {"a": torch.zeros(3), "module.a": torch.ones(3)}
    base = folder("base", tensors)
    with pytest.raises(UserError, match="is the second tensor for a"):
        run_merge(tmp_path / "out", base, [base], "--method", "average")


TOKENIZER_CASES = {
    "the base's": ((True, True, True), 0),
    "the first expert's that has one": ((False, False, True), 2),
    "none": ((False, False, False), None),
}


@pytest.mark.parametrize("name", TOKENIZER_CASES)
def test_whose_tokenizer_the_result_has(name, folder, tmp_path, capsys):
    """A folder that is named like a tokenizer's file is none."""
    have_tokenizers, source = TOKENIZER_CASES[name]
    folders = []
    for i, has_tokenizer in enumerate(have_tokenizers):
        model = Path(folder(str(i), {"a": torch.full([3], float(i))}, tokenizer=has_tokenizer))
        (model / "tokenizer").mkdir()
        if has_tokenizer:
            (model / "additional_chat_templates").mkdir()
            (model / "additional_chat_templates" / "tools.jinja").write_text(f"tools {i}")
            (model / "qwen.tiktoken").write_text(f"ranks {i}")
        folders.append(str(model))
    base, *experts = folders
    out = run_merge(tmp_path / "out", base, experts, "--method", "average")
    printed = capsys.readouterr().out
    if source is None:
        assert "the merged model has none" in printed
        assert not list(out.glob("*token*"))
    else:
        assert "the merged model has none" not in printed
        assert (out / "additional_chat_templates" / "tools.jinja").read_text() == f"tools {source}"
        assert (out / "qwen.tiktoken").read_text() == f"ranks {source}"
        assert len(AutoTokenizer.from_pretrained(out)) > 1


def test_shifts_that_the_type_rounds_away_are_told(folder, tmp_path, capsys):
    base_values = torch.ones(1000)
    shifts = torch.linspace(-1e-3, 1e-3, 1000)  # bfloat16 has steps of 2^-8 and 2^-7 around 1
    base = folder("base", {"a": base_values.bfloat16()})
    expert = folder("expert", {"a": base_values + shifts})
    out = run_merge(tmp_path / "out", base, [expert], "--method", "ta")
    assert json.loads((out / "merge.json").read_text())["lost"] == 1
    assert "rounds 100% of the shifts away (--dtype F32 keeps them)" in capsys.readouterr().out
    out = run_merge(tmp_path / "f32", base, [expert], "--method", "ta", "--dtype", "F32")
    assert json.loads((out / "merge.json").read_text())["lost"] == 0
    assert "rounds" not in capsys.readouterr().out


def test_sce_selects_all_positions_of_equal_variance(folder, tmp_path):
    """The same three values in six orders: one variance, whatever the order of the sums is."""
    values = (0.1, 0.7, -0.3)
    orders = torch.tensor(list(itertools.permutations(values))).T  # [3 experts, 6 positions]
    small = torch.full((3, 6), 0.01)
    tau = torch.cat([orders, small], dim=1)
    base = folder("base", {"a": torch.zeros(12)})
    experts = [folder(f"expert{k}", {"a": tau[k].clone()}) for k in range(3)]
    out = run_merge(tmp_path / "out", base, experts, "--method", "sce", "--density", "0.25")
    merged_values = load_file(out / "model.safetensors")["a"]
    assert (merged_values[:6] != 0).all()  # 3 of 12 were asked for; all 6 are equal
    assert (merged_values[6:] == 0).all()


def longer_than_its_bytes(header):
    header["a"]["shape"] = [1000]


def with_its_neighbours_bytes(header):
    header["b"]["data_offsets"] = header["a"]["data_offsets"]


def beyond_the_file(header):
    size = header["b"]["data_offsets"]
    header["b"]["data_offsets"] = [size[0] + 4, size[1] + 4]


def backwards(header):
    header["a"]["data_offsets"].reverse()


def of_negative_shape(header):
    header["a"]["shape"] = [-1, -3]


def of_no_shape(header):
    del header["a"]["shape"]


LIES = [
    longer_than_its_bytes,
    with_its_neighbours_bytes,
    beyond_the_file,
    backwards,
    of_negative_shape,
    of_no_shape,
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
def test_a_header_that_lies_is_refused(folder, tmp_path, lie):
    tensors = {"a": torch.zeros(3), "b": torch.ones(2)}
    base, one = folder("base", tensors), folder("one", tensors)
    change_header(lie)(Path(one))
    with pytest.raises(UserError, match="cut off, or no safetensors file"):
        merged(tmp_path / "out", base, [one], "--method", "average")
    assert not (tmp_path / "out").exists()


def test_integers_are_the_bases(folder, tmp_path):
    steps = torch.tensor([7, 8])
    base = folder("base", {"a": torch.zeros(3), "steps": steps})
    one = folder("one", {"a": torch.ones(3), "steps": steps})
    two = folder("two", {"a": torch.ones(3), "steps": torch.tensor([7, 9])})
    tensors = merged(tmp_path / "out", base, [one], "--method", "ta")
    assert tensors["steps"].tolist() == [7, 8]
    with pytest.raises(UserError, match="steps in .*other integers"):
        merged(tmp_path / "x", base, [two], "--method", "ta")
    assert not (tmp_path / "x").exists()


# ---------------- errors ----------------


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"a": torch.ones(5)}, r"a is \[5\] in .* and \[6\] in the base"),
        ({"b": BASE}, "lacks 1 of the base's tensors and has 1 that the base lacks, such as a"),
        ({"a": BASE, "c": BASE}, "has 1 that the base lacks, such as c"),
        ({"a": torch.tensor([1.0, 2, float("nan"), 4, 5, 6])}, "a in .* not finite"),
        ({"a": torch.tensor([1, 2, float("inf"), -float("inf"), 5, 6])}, "a in .* not finite"),
        ({"a": torch.ones(6, dtype=torch.long)}, "torch.int64 in .* and torch.float32"),
    ],
)
@pytest.mark.parametrize("method", ["average", "ties"])
def test_models_that_do_not_fit_are_named_and_nothing_is_written(
    tensors, message, method, three, folder, tmp_path
):
    experts = [three[1], folder("bad", tensors)]
    with pytest.raises(UserError, match=message):
        merged(tmp_path / "out", three[0], experts, "--method", method)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out-partial").exists()


def test_out_must_be_free(three, tmp_path):
    base, *experts = three
    with pytest.raises(UserError, match="one of the models to merge"):
        merged(tmp_path / "one", base, experts, "--method", "ta")
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        merged(tmp_path, base, experts, "--method", "ta")


def test_another_vocabulary_is_refused(three, folder, tmp_path):
    other = folder("other", {"a": BASE}, vocabulary=["zebra"])
    with pytest.raises(UserError, match="another vocabulary than the base: 'zebra' is 2"):
        merged(tmp_path / "out", three[0], [other], "--method", "ta")
    assert not (tmp_path / "out").exists()


def test_broken_and_missing_files(three, tmp_path):
    base, *experts = three
    path = tmp_path / "two" / "model.safetensors"
    content = path.read_bytes()
    for broken in (content[:-4], content[:100], content[:3], bytes(len(content))):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="cut off, or no safetensors"):
            merged(tmp_path / "out", base, experts, "--method", "ta")
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        merged(tmp_path / "out", base, experts, "--method", "ta")
    with pytest.raises(UserError, match="nope"):
        merged(tmp_path / "out", base, ["./nope"], "--method", "ta")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["sce", "--dare", 0.5], "before ta or ties only"),
        (["ta", "--density", 0.5], "of ties or sce only"),
        (["ties", "--density", 0], "--density 0: must be above 0 and at most 1"),
        (["ta", "--weights", 1], "one per expert"),
        (["average", "--weights", 0, 0], "nor all 0"),
        (["ta", "--lambda", "inf"], "finite"),
        (["ta", "--weights", "nan", 1], "finite"),
        (["ta", "--dare", 1], "below 1"),
    ],
)
def test_wrong_flags(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_merge(tmp_path / "out", "base", ["one", "two"], "--method", *flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_and_the_toy_are_names_of_models(toy, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint").symlink_to(Path(toy).absolute())
    run = str(tmp_path / "run")
    out = run_merge(tmp_path / "out", "toy", [run], "--method", "average")
    assert_equal(weights_of(out), weights_of(toy))


def test_one_file_goes_before_an_index(three, tmp_path):
    """As in transformers. And a broken index is no traceback."""
    base, one, _ = three
    expected = (BASE + TAU[0]).tolist()
    weights = tmp_path / "one" / "model.safetensors"
    index = tmp_path / "one" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "elsewhere.safetensors"}}))
    assert merged(tmp_path / "out", base, [one], "--method", "average")["a"].tolist() == expected
    weights.rename(tmp_path / "one" / "elsewhere.safetensors")
    assert merged(tmp_path / "out2", base, [one], "--method", "average")["a"].tolist() == expected
    for text in ("{", "{}", "[]"):
        index.write_text(text)
        with pytest.raises(UserError, match="is no index"):
            merged(tmp_path / "x", base, [one], "--method", "ta")


def test_tensors_without_elements(folder, tmp_path):
    folders = []
    for i in range(3):
        folders.append(folder(f"empty{i}", {"a": BASE + i, "none": torch.zeros(0, 3)}))
    for method in ("average", "ties", "sce"):
        out = tmp_path / f"out-{method}"
        tensors = merged(out, folders[0], folders[1:], "--method", method)
        assert tensors["none"].shape == (0, 3)


def test_a_result_that_is_not_finite_is_not_written(three, tmp_path):
    flags = ["--method", "ta", "--lambda", 1e6, "--dtype", "F16"]
    with pytest.raises(UserError, match="not finite once merged"):
        merged(tmp_path / "x", three[0], [three[2]], *flags)
    assert not (tmp_path / "x").exists()


# ---------------- memory ----------------

PEAK = """
import resource, sys
import merge
merge.PIECE = 2**13  # 8,192 pieces
merge.main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "ties", "sce"])
def test_memory_does_not_grow_with_the_model(method, folder, tmp_path):
    """Four models of 256 MB: above what a tiny merge takes, less than (experts + 3) of the largest
    tensor in fp32."""

    def peak_bytes(name, folders) -> int:
        flags = ["--base", folders[0], "--experts", *folders[1:], "--method", method]
        process = subprocess.run(
            [sys.executable, "-c", PEAK, *flags, "--out", tmp_path / f"out-{name}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        return int(process.stdout.split("peak ")[1]) * 1024

    small = []
    large = []
    for i in range(4):
        small.append(folder(f"small{i}", {"a": torch.randn(100)}, tokenizer=False))
        tensors = {f"t{j}": torch.randn(2**23) for j in range(8)}
        large.append(folder(f"large{i}", tensors, tokenizer=False))
    growth = peak_bytes("large", large) - peak_bytes("small", small)
    assert growth < (3 + 3) * 2**23 * 4

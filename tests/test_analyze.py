"""studies.analyze: its analyses on constructed cases with known answers, and as commands; eval.py's
scores by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_policy, tiny_model
from transformers import AutoModelForCausalLM

import data
import eval as evaluation
import grpo
from common import checkpoints
from common.errors import UserError
from common.files import write_jsonl
from common.reports import smoothed
from sources.load import load_rows
from sources.toy import toy_tokenizer
from studies import analyze, curves, pictures, verify, weights


def run_command(command, *flags):
    """Run an analysis; returns its numbers, after a look at its picture."""
    path = analyze.main([command, *map(str, flags)])
    assert path.with_suffix(".png").stat().st_size > 5000
    return json.loads(path.read_text())


# ---------------- weights ----------------


def overlap(*shift_K, base=None):
    if base is None:
        base = torch.ones_like(shift_K[0])
    return weights.shift_overlap(base, [base + shift for shift in shift_K], ("key",))


def test_masks_that_are_disjoint_identical_or_half_shared():
    left, right = torch.tensor([[1.0, 1, 0, 0]]), torch.tensor([[0.0, 0, 1, 1]])
    measured = overlap(left, right, left, torch.tensor([[1.0, 0, 1, 0]]))
    assert measured["jaccard"][0].tolist() == pytest.approx([1, 0, 1, 1 / 3])
    assert measured["cosine"][0, 1] == 0
    assert measured["density"].tolist() == [0.5] * 4
    assert measured["random"][0, 1] == pytest.approx(1 / 3)


def test_a_change_counts_from_a_thousandth():
    base = torch.tensor([[1.0, 1, 0, -2]])
    measured = overlap(torch.tensor([[0.0009, 0.0012, 1e-9, 0.0019]]), base=base)
    assert measured["density"].tolist() == [0.5]
    # of the larger of the two
    measured = overlap(torch.tensor([[1.0005]]), base=torch.tensor([[1000.0]]))
    assert measured["density"].tolist() == [0.0]


def test_random_masks_of_density_30_percent_overlap_by_18_percent():
    draw = torch.Generator().manual_seed(0)
    masks = [(torch.rand(300, 300, generator=draw) < 0.3).float() for _ in range(2)]
    measured = overlap(*masks)
    assert measured["jaccard"][0, 1] == pytest.approx(0.18, abs=0.01)
    assert measured["random"][0, 1] == pytest.approx(0.18, abs=0.01)


def test_shifts_that_are_equal_opposite_orthogonal_or_at_60_degrees():
    draw = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 150, 200, generator=draw)
    measured = overlap(a, 2 * a, -a, b, a + 3**0.5 * b, base=torch.zeros(150, 200))
    assert measured["cosine"][0, 1:].tolist() == pytest.approx([1, -1, 0, 0.5], abs=0.15)


@pytest.mark.parametrize("n", [5, 256, 1000])
def test_the_projection_is_orthogonal(n):
    basis = torch.stack([weights.project(row, ("k",)) for row in torch.eye(n)])
    assert basis.shape == (n, min(256, 1 << (n - 1).bit_length()))
    if n == 256:  # a rotation: lengths and angles are kept
        assert torch.allclose(basis @ basis.T, torch.eye(n).double(), atol=1e-12)
    rows = basis.T if n == 1000 else basis  # 256 orthogonal directions of 1024, cut to 1000
    lengths = (rows @ rows.T).diagonal()
    assert torch.allclose(lengths, torch.ones(len(rows)).double(), atol=0.1)
    other = torch.stack([weights.project(row, ("other",)) for row in torch.eye(n)[:5]])
    assert not torch.allclose(basis[:5], other)


def test_the_projection_spreads_every_vector():
    """Without random signs a constant one would be seen in a single coordinate."""
    lengths = [weights.project(torch.ones(4096), ("k", i)).norm().item() for i in range(5)]
    assert lengths == pytest.approx([(4096 * 256 / 4096) ** 0.5] * 5, rel=0.25)


def test_weight_types_of_gpt2_and_qwen():
    types_of_layer_0, shape_of = {}, {}
    for architecture in ("gpt2", "qwen3"):
        types = []
        for name, parameter in tiny_model(architecture).named_parameters():
            for weight_type, matrix in weights.by_weight_type(name, parameter):
                shape_of[name, weight_type] = matrix.shape
                if ".0." in name:
                    types.append(weight_type)
        types_of_layer_0[architecture] = sorted(types)
    gpt2 = ["Q", "K", "V", "O", "FFN-up", "FFN-dn"]
    assert types_of_layer_0["gpt2"] == sorted(gpt2)
    assert types_of_layer_0["qwen3"] == sorted([*gpt2, "FFN-gt"])
    assert shape_of["transformer.h.0.attn.c_attn.weight", "K"] == (32, 32)


@pytest.fixture(scope="module")
def base_and_experts(tmp_path_factory) -> list[str]:
    """Folders of a tiny Qwen3 and of two models that grew from it."""
    folders = []
    for i in range(3):
        model = tiny_model("qwen3")
        torch.manual_seed(i)
        if i:
            for parameter in model.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
        folders.append(str(tmp_path_factory.mktemp("weights") / f"qwen{i}"))
        model.save_pretrained(folders[-1])
    return folders


def test_the_weights_command(base_and_experts, tmp_path, capsys):
    base, first, second = base_and_experts
    experts = [f"one={first}", f"same={first}", f"two={second}"]
    flags = ["--base", base, "--experts", *experts, "--out", tmp_path / "w"]
    numbers = run_command("weights", *flags, "--layers", 1)
    assert sorted(numbers["layers"]) == sorted(f"1/{kind}" for kind in weights.WEIGHT_TYPES)
    for measured in numbers["layers"].values():
        assert measured["jaccard"][0][1] == 1
        assert measured["cosine"][0][1] == pytest.approx(1)
        assert abs(measured["cosine"][0][2]) < 0.25
    assert "one - two" in capsys.readouterr().out


def test_the_weights_command_refuses_what_it_cannot_compare(base_and_experts, tmp_path):
    base, first, second = base_and_experts
    out = ["--out", tmp_path / "x"]
    with pytest.raises(UserError, match="in these layers"):
        run_command("weights", "--base", base, "--experts", first, second, "--layers", 7, *out)
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="lacks"):
        run_command("weights", "--base", base, "--experts", tmp_path / "gpt2", first, *out)
    with pytest.raises(UserError, match="at least two"):
        run_command("weights", "--base", base, "--experts", first, *out)


# ---------------- gains ----------------


def write_scores(folder, accuracies, k=4):
    """An evaluation with these accuracies per prompt, two domains by halves."""
    items = []
    for i, accuracy in enumerate(accuracies):
        responses = []
        for j in range(k):
            is_right = j < accuracy * k
            responses.append(
                {
                    "text": f"<think>t{i}</think><answer>{j}</answer>",
                    "reward": 1.0 if is_right else 0.0,
                    "verdict": "",
                    "correct": is_right,
                    "valid": True,
                    "truncated": j == 0,
                    "tokens": 10 + j,
                }
            )
        items.append(
            {
                "id": f"p{i}",
                "domain": "math" if i < len(accuracies) // 2 else "code",
                "prompt": f"prompt {i}",
                "accuracy": accuracy,
                "responses": responses,
            }
        )
    folder.mkdir()
    write_jsonl(folder / "items.jsonl", items)
    return folder


def test_gain_consistency_by_hand(tmp_path, capsys):
    start = write_scores(tmp_path / "start", [0, 0, 0.5, 0.5, 0, 0])
    # union: math (1, 0, 0.5), code (0, 1, 0)
    experts = [
        write_scores(tmp_path / "e1", [1, 0, 0.25, 0.5, 0, 0]),
        write_scores(tmp_path / "e2", [0, 0, 1, 0, 1, 0]),
    ]
    models = [
        write_scores(tmp_path / "inherits", [1, 0, 1, 0, 1, 0]),
        write_scores(tmp_path / "other", [0, 1, 0.5, 1, 0, 0]),
        write_scores(tmp_path / "half", [1, 1, 0.5, 0.5, 0.5, 0.5]),
    ]
    flags = ["--experts", *experts, "--models", *models, "--out", tmp_path / "g"]
    consistency = run_command("gains", "--start", start, *flags)
    assert consistency["inherits"] == {"math": pytest.approx(1), "code": pytest.approx(1)}
    assert consistency["other"] == {"math": 0, "code": 0}
    half = {"math": pytest.approx(1 / (2 * 1.25) ** 0.5), "code": pytest.approx(2**-0.5)}
    assert consistency["half"] == half
    with pytest.raises(UserError, match="not of the same prompts"):
        run_command("gains", "--start", write_scores(tmp_path / "x", [0, 0]), *flags)


# ---------------- scores ----------------


def test_scores_by_hand(tmp_path):
    folder = write_scores(tmp_path / "s", [1, 0.5, 0, 0.75, 0.25, 0.25])
    items = evaluation.read_items(folder)
    items[5]["responses"][0]["reward"] = None
    scores = evaluation.summarise(items)
    math, code = scores["math"], scores["code"]
    assert math["accuracy"] == pytest.approx(0.5)
    assert math["pass"] == pytest.approx(2 / 3)
    assert math["error"] == pytest.approx(0.5 / 3**0.5)
    assert code["accuracy"] == pytest.approx(1.25 / 3)
    assert code["verifier_errors"] == 1
    assert code["truncated"] == 0.25
    assert math["tokens"] == 11.5
    assert math["invalid"] == 0
    assert scores["mean"]["accuracy"] == pytest.approx((0.5 + 1.25 / 3) / 2)
    error = np.hypot(math["error"], code["error"]) / 2
    assert scores["mean"]["error"] == pytest.approx(error)


def test_pass_at_k_by_hand():
    passes = [evaluation.pass_at(4, c, 2) for c in range(5)]
    assert passes == pytest.approx([0, 1 / 2, 5 / 6, 1, 1])
    assert evaluation.pass_at(4, 1, 4) == 1
    assert evaluation.pass_at(4, 0, 4) == 0
    assert evaluation.pass_at(8, 1, 1) == 1 / 8


def test_a_prompt_whose_verifier_failed_leaves_the_comparison(tmp_path):
    a = write_scores(tmp_path / "a", [1, 0, 0, 0])
    b = write_scores(tmp_path / "b", [1, 1, 1, 1])
    items = evaluation.read_items(b)
    items[1]["accuracy"] = None
    write_jsonl(b / "items.jsonl", items)
    text = evaluation.compare([str(a), str(b)])
    assert "over all 3 prompts: +0.667" in text
    assert "| math | **1.000 ± –** | **1.000 ± –** |" in text


def test_compare_by_hand(tmp_path):
    a = write_scores(tmp_path / "a", [1, 0.5, 0, 0])
    b = write_scores(tmp_path / "b", [1, 1, 0.5, 0])
    text = evaluation.compare([str(a), str(b)])
    assert "| math | 0.750 ± 0.250 | **1.000 ± 0.000** |" in text
    assert "b − a, over all 4 prompts: +0.250 ± 0.144 (p 0.18)" in text
    with pytest.raises(UserError, match="same prompts"):
        evaluation.compare([str(a), str(write_scores(tmp_path / "c", [1, 1]))])
    with pytest.raises(UserError, match="holds no evaluation"):
        evaluation.compare([str(tmp_path)])
    (b / "args.json").write_text(json.dumps({"prompts": 5}))
    with pytest.raises(UserError, match="b is not finished: 4 of 5 prompts"):
        evaluation.compare([str(a), str(b)])


# ---------------- kl ----------------

# domains whose rewards need no worker processes, which take seconds to start
SAMPLING = ["--data", "toy", "--held-out", "6", "--domains", "science", "if", "--threads", "1"]


@pytest.fixture(scope="module")
def expert(toy, tmp_path_factory):
    """The toy with another opinion: noise on every weight."""
    out = tmp_path_factory.mktemp("policy") / "expert"
    shutil.copytree(toy, out)
    model = AutoModelForCausalLM.from_pretrained(toy)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.03 * torch.randn_like(parameter)
    model.save_pretrained(out)
    return out


def exact_kl(policy, base, tokenizer, rows) -> float:
    """KL(policy ‖ base) of whole distributions, by the chain rule, along the policy's samples."""
    args = grpo.parse_args(["--seed", "7"])
    batch, _, _, _ = grpo.rollout(policy, tokenizer, rows, 64, (7, "x"), 1.0, args)
    with torch.no_grad():
        logp_BTV = policy.model(batch["ids"]).logits.log_softmax(-1)
        base_logp_BTV = base.model(batch["ids"]).logits.log_softmax(-1)
    kl_BT = (logp_BTV.exp() * (logp_BTV - base_logp_BTV)).sum(-1)
    return (kl_BT[:, :-1] * batch["mask"][:, 1:]).sum(1).mean().item()


def test_kl_is_0_to_itself_and_that_of_the_distributions_otherwise(toy, expert, tmp_path, capsys):
    experts = [f"science={toy}", f"if={expert}"]
    models = ["--models", f"start={toy}", f"other={expert}"]
    out = ["--out", tmp_path / "kl"]
    numbers = run_command("kl", "--experts", *experts, *models, "--k", 64, *SAMPLING, *out)
    start, other = numbers["models"]["start"], numbers["models"]["other"]
    start_KD, other_KD = np.array(start["kl"]), np.array(other["kl"])
    assert abs(start_KD[0]).max() < 1e-4  # rows: the toy, the other expert
    assert abs(other_KD[1]).max() < 1e-4

    tokenizer, policy = grpo.load_policy(str(expert), "float32")
    _, base = grpo.load_policy(toy, "float32")
    _, held_out = data.hold_out(load_rows(["toy"]), 6)
    rows = data.encode_prompts(held_out, tokenizer, "", 16)
    for j, domain in enumerate(("science", "if")):
        domain_rows = [row for row in rows if row["domain"] == domain]
        exact = exact_kl(policy, base, tokenizer, domain_rows)
        assert start_KD[1, j] == pytest.approx(exact, abs=5 * start["error"][1][j] + 0.01)
        assert exact > 0.05

    # the toy itself is nearer than the domain's own expert
    assert start["neighbours"] == {"science": [], "if": ["science"]}
    assert start["score_change"]["science"] == 0


def test_kl_experts_are_named_by_their_domains(toy, tmp_path):
    flags = ["--experts", f"arithmetic={toy}", "--models", toy, *SAMPLING]
    with pytest.raises(UserError, match="named by its domain"):
        run_command("kl", *flags, "--out", tmp_path / "x")


def test_a_model_of_another_shape_is_named(tmp_path):
    tiny_model("gpt2", vocab=48).save_pretrained(tmp_path / "other")
    policy = grpo.Policy(tiny_model("gpt2"), 40, [0])
    with pytest.raises(UserError, match=r"other is of another shape.*lm_head.weight"):
        checkpoints.load_weights(policy, tmp_path / "other")


def test_the_policys_weights_are_swapped(tmp_path):
    policy, other = make_policy(), tiny_model("gpt2", seed=3)
    other.save_pretrained(tmp_path)
    checkpoints.load_weights(policy, tmp_path)
    for loaded, saved in zip(policy.model.parameters(), other.parameters(), strict=True):
        assert torch.equal(loaded, saved)
    assert policy.updates == 1


# ---------------- verify ----------------


def test_says_yes():
    verdict_of = {
        "Yes": True,
        "no.": False,
        "<think>no, wait</think> yes": True,
        "Yes … or rather No": False,
        "maybe": None,
        "yesterday": None,
    }
    assert {reply: verify.says_yes(reply) for reply in verdict_of} == verdict_of


class PlantedJudges:
    """Replaces the judges' sampling: three models, and what each replies to its own answers.

    good is always right; middling says yes to outcomes and no to processes; bad is silent.
    """

    ACCURACIES = {"good": [1, 0.75, 1, 0.75], "middling": [0.5] * 4, "bad": [0, 0.25, 0, 0.25]}

    def __init__(self, toy, tmp_path, monkeypatch):
        self.folders, self.items = [], []  # per model
        self.asked, self.loaded = [], []  # keys of each call; folders of the loaded weights
        for name, accuracies in self.ACCURACIES.items():
            folder = write_scores(tmp_path / name, accuracies)
            args = evaluation.parse_args(["--model", toy, "--data", "toy", "--out", "x"])
            (folder / "args.json").write_text(json.dumps(vars(args)))
            self.folders.append(folder)
            self.items.append({item["id"]: item for item in evaluation.read_items(folder)})
        self.open_model = evaluation.open_model
        monkeypatch.setattr(evaluation, "open_model", self.with_readable_tokens)
        monkeypatch.setattr(grpo, "respond", self.respond)
        monkeypatch.setattr(
            checkpoints, "load_weights", lambda policy, folder: self.loaded.append(folder)
        )
        monkeypatch.setattr(data, "encode_prompts", self.encode_prompts)

    def encode_prompts(self, rows, *rest):
        return [{**row, "ids": [1], "opened": ""} for row in rows]

    def with_readable_tokens(self, args):
        """The "tokens" of a reply are its text."""

        class Tokenizer:
            chat_template = None
            all_special_ids = []
            added_tokens_decoder = {}

            def decode(self, tokens):
                return "".join(tokens)

        name, _, policy = self.open_model(args)
        return name, Tokenizer(), policy

    def respond(self, policy, prompts_P, keys_P, group, temperature, args):
        number = len(self.asked)
        self.asked.append(keys_P)
        responses = []
        for _, _, question, _ in keys_P:
            prompt, answer, mode = question.split("/")
            is_right = self.items[number][prompt]["responses"][int(answer)]["correct"]
            replies = {
                "good": ["yes" if is_right else "no"] * 2,
                "middling": ["yes", "yes" if mode == "outcome" else "no"],
                "bad": ["?", "?"],
            }[self.folders[number].name]
            responses += [(replies[g], [], False) for g in range(group)]
        return responses


def test_verify_counts_right_verdicts_and_none_at_all(toy, tmp_path, monkeypatch, capsys):
    judges = PlantedJudges(toy, tmp_path, monkeypatch)
    flags = ["--scores", *judges.folders, "--k", 2, "--answers", 0, "--threads", 1]
    flags += ["--max-prompt-tokens", 30, "--max-new-tokens", 18, "--out", tmp_path / "v"]
    numbers = run_command("verify", *flags)
    models = numbers["models"]
    assert models["good"]["outcome"]["mean"] == models["good"]["process"]["mean"] == 1
    assert models["middling"]["outcome"]["mean"] == 0.5
    assert models["middling"]["process"]["mean"] == 0.5
    assert models["bad"]["outcome"]["mean"] == 0
    assert models["bad"]["outcome, no verdict"] == 1
    r = np.corrcoef([0.875, 0.5, 0.125], [1, 0.5, 0])[0, 1]
    assert numbers["correlation"]["outcome"] == pytest.approx(r)
    assert len(judges.asked) == 3
    assert judges.loaded == [toy, toy]  # the second and the third judge themselves

    assert run_command("verify", *flags) == numbers
    assert len(judges.asked) == 3  # finished ones are not judged again
    judges.asked.clear()
    run_command("verify", *flags, "--max-new-tokens", 17)
    assert len(judges.asked) == 3  # other flags, other verdicts


def test_a_judges_prompt_shows_the_answer_or_all_of_it():
    response = "<think>one and one</think><answer>2</answer>"
    shown = {}
    for mode, template in verify.PROMPTS.items():
        shown[mode] = template.format(question="1+1=?", answer="2", response=response)
    assert "one and one" in shown["process"]
    assert "one and one" not in shown["outcome"]
    assert all("1+1=?" in text for text in shown.values())


def test_verify_runs_a_real_model(tmp_path):
    """A random tiny Qwen with room for the question judges its own answers: hardly a verdict, but
    every step is real."""
    model = str(tmp_path / "model")
    tokenizer = toy_tokenizer()
    tiny_model("qwen2", vocab=len(tokenizer), positions=2048).save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = ["--data", "toy", "--domains", "math", "--held-out", "4"]
    short = ["--k", "2", "--max-new-tokens", "8", "--threads", "1"]
    out = evaluation.main(["--model", model, *rows, *short, "--out", str(tmp_path / "scores")])
    items = evaluation.read_items(out)
    for item in items:  # answers to judge, as a trained model would give
        answer = {"text": "<think>x</think><answer>3</answer>", "correct": True}
        item["responses"][0] |= answer
    write_jsonl(out / "items.jsonl", items)
    flags = [*short, "--max-prompt-tokens", 1000, "--out", tmp_path / "v"]
    numbers = run_command("verify", "--scores", out, *flags)
    assert numbers["models"]["scores"]["outcome, no verdict"] > 0.5
    assert numbers["correlation"] == {"outcome": None, "process": None}


# ---------------- curves ----------------


@pytest.fixture(scope="module")
def two_runs(toy, tmp_path_factory):
    """(an expert's run, evaluated on a second domain too; a run of both domains)."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--steps", "2", "--batch-prompts", "4", "--mini-batch-prompts", "4"]
    common += ["--eval-samples", "2", "--eval-prompts", "4", "--threads", "1"]
    on_the_way = ["--eval-domains", "science", "if", "--eval-every", "1"]
    science = str(folder / "science")
    expert = grpo.main([*common, "--domains", "science", *on_the_way, "--out", science])
    joint = grpo.main([*common, "--domains", "science", "if", "--out", str(folder / "joint")])
    return expert, joint


def test_curves_costs_and_scores_along_training(two_runs, tmp_path, capsys):
    expert, joint = two_runs
    runs = ["--runs", expert, f"mixed={joint}"]
    numbers = run_command("curves", *runs, "--mixed", "mixed", "--out", tmp_path / "c")
    assert [step for step, _ in numbers["science"]["eval/sampled/if"]] == [0, 1, 2]
    assert "accuracy/if" not in numbers["science"]
    lines = [json.loads(line) for line in (joint / "metrics.jsonl").read_text().splitlines()]
    seconds = []
    for line in lines:
        seconds += [value for name, value in line.items() if name.startswith("seconds/")]
    hours = sum(seconds) / 3600
    mixed = numbers["mixed"]
    assert mixed["hours"] == pytest.approx(hours)
    assert mixed["sampled_tokens"] == sum(line.get("tokens", 0) for line in lines)
    share = hours / numbers["science"]["hours"]
    assert mixed["share_of_the_others"] == pytest.approx(share)
    assert "mixed took" in capsys.readouterr().out

    # hours are summed over the ranks
    args = json.loads((joint / "args.json").read_text())
    assert args["ranks"] == 1
    four_ranks = tmp_path / "four ranks"
    four_ranks.mkdir()
    shutil.copy(joint / "metrics.jsonl", four_ranks)
    (four_ranks / "args.json").write_text(json.dumps(args | {"ranks": 4}))
    again = run_command("curves", "--runs", expert, f"mixed={four_ranks}", "--out", tmp_path / "c")
    assert again["mixed"]["hours"] == pytest.approx(4 * hours)


def test_curves_refuses_runs_that_it_cannot_tell_apart(two_runs, tmp_path):
    expert, joint = two_runs
    out = ["--out", tmp_path / "x"]
    with pytest.raises(UserError, match="--mixed nope"):
        run_command("curves", "--runs", expert, joint, "--mixed", "nope", *out)
    with pytest.raises(UserError, match="holds no run"):
        run_command("curves", "--runs", tmp_path, *out)
    with pytest.raises(UserError, match="another one is called science"):
        run_command("curves", "--runs", expert, f"science={joint}", *out)


def visible_titles(figure) -> list[str]:
    return [axis.get_title() for axis in figure.axes if axis.get_visible()]


def test_kinds_choose_the_panels(two_runs, tmp_path):
    """One kind: its domains and their mean, with labels that a person can read."""
    expert, joint = two_runs
    runs = {"expert": curves.read_run(expert), "joint": curves.read_run(joint)}
    figure = curves.draw(runs, ["accuracy"])
    assert visible_titles(figure) == ["science", "if", "mean over domains"]
    joint_lines = [axis.get_lines()[-2].get_label() for axis in figure.axes]
    assert joint_lines == ["joint"] * 3
    assert {axis.get_xlabel() for axis in figure.axes} == {"training step"}
    assert figure.axes[0].get_ylabel() == "accuracy"
    assert figure.get_figwidth() <= 10
    for axis in figure.axes:
        texts = [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.get_xticklabels()]
        assert min(text.get_fontsize() for text in texts) >= 9
    pictures.save(figure, tmp_path / "one.png")

    figure = curves.draw(runs, ["reward", "eval/sampled"])
    assert visible_titles(figure) == ["science", "if", "", ""]
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["reward", "held-out accuracy"]
    pictures.save(figure, tmp_path / "two.png")

    # the expert trains on science alone, so only the other run has a mean over both domains
    assert curves.mean_points(runs["expert"], "accuracy", ["science", "if"]) == []
    science, instructions = (runs["joint"][f"accuracy/{d}"] for d in ("science", "if"))
    means = curves.mean_points(runs["joint"], "accuracy", ["science", "if"])
    assert means[0] == (1, pytest.approx((science[0][1] + instructions[0][1]) / 2))


def test_smoothing_is_a_trailing_mean():
    assert smoothed([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]


# ---------------- the command line ----------------


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "the first word must be one of curves"),
        (["plot"], "the first word"),
        (["kl"], "required"),
        (["curves", "--out", "x"], "--runs"),
    ],
)
def test_wrong_commands_are_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        analyze.parse_args(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", analyze.COMMANDS)
def test_every_commands_help_names_the_paper(command, capsys):
    with pytest.raises(SystemExit):
        analyze.parse_args([command, "--help"])
    assert "M2RL" in capsys.readouterr().out

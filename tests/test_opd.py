"""opd.py: the advantage by hand, the full divergence, teachers by domain, runs, errors."""

import json

import pytest
import torch
from transformers import AutoTokenizer

import grpo
import opd
import rewards
from common.errors import UserError
from conftest import gradients, make_batch, tiny_model
from helpers import mean_accuracy, metrics, run, torchrun
from test_ranks import assert_same_numbers

NORMS = ["sequence", "token", "constant"]


def flags(*extra):
    return opd.parse_args(["--teacher", "math=x", "code=y", "--max-grad-norm", "0", *extra])


def make_policy(architecture="gpt2", seed=0, dtype=torch.float64):
    return opd.Policy(tiny_model(architecture, seed=seed).to(dtype), 40, [0])


# ---------------- --kl full ----------------


def full_kl(student, teacher, batch):
    """[B, T]: KL(π_S ‖ π_T) at every token of the response, from the models' own logits.

    Row by row, without padding.
    """
    kl_BT = torch.zeros(batch["ids"].shape, dtype=torch.float64)
    for b, end in enumerate(batch["length"].tolist()):
        ids_1T = batch["ids"][b : b + 1, :end]
        student_TV = student.model(ids_1T).logits[0, :-1].log_softmax(-1)
        teacher_TV = teacher.model(ids_1T).logits[0, :-1].log_softmax(-1)
        kl_BT[b, 1:end] = (student_TV.exp() * (student_TV - teacher_TV)).sum(-1)
    return kl_BT * batch["mask"]


class RecordingSGD(torch.optim.SGD):
    """Keeps the gradient that it was given."""

    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        self.gradient = torch.cat([p.grad.flatten() for p in parameters])


def full_gradient(student, teachers, batch, args):
    """(gradient, statistics) of one update; the student stays as it is."""
    optimizer = RecordingSGD(student.parameters(), 0.0)
    batch = batch | {"advantage": opd.advantages(batch, {"teachers": teachers}, args)}
    state = {"teachers": teachers}
    stats = opd.update(student, optimizer, batch, 0.0, (0, 1, 0), state, args)
    return optimizer.gradient, stats


@pytest.mark.parametrize("norm", NORMS)
def test_the_full_divergence_is_one_graphs_for_any_micro_batch(norm, architecture, monkeypatch):
    student = make_policy(architecture)
    teachers = {"math": make_policy(architecture, 1), "code": make_policy(architecture, 2)}
    batch = make_batch(student, dtype=torch.float64)
    math_kl_BT = full_kl(student, teachers["math"], batch)
    code_kl_BT = full_kl(student, teachers["code"], batch)
    kl_BT = torch.where(batch["domain"][:, None] == 0, math_kl_BT, code_kl_BT)
    args = flags("--kl", "full", "--loss-norm", norm)
    loss = (kl_BT * opd.token_weights(batch, args)).sum()
    loss.backward()
    expected = gradients(student)
    mean_kl = (kl_BT.sum() / batch["mask"].sum()).item()
    for budget, chunk in (("100000", 2**26), ("20", 2**26), ("40", 200)):
        monkeypatch.setattr(opd.Policy, "CHUNK", chunk)
        args = flags("--kl", "full", "--loss-norm", norm, "--micro-batch-tokens", budget)
        gradient, stats = full_gradient(student, teachers, batch, args)
        assert torch.allclose(gradient, expected, atol=1e-10)
        assert gradient.abs().max() > 1e-3
        assert stats["loss"] == pytest.approx(loss.item())
        assert stats["reverse_kl"] == pytest.approx(mean_kl)


def test_the_divergence_is_a_head_of_the_policys_own_forward_pass(architecture, monkeypatch):
    """The teacher's hidden states are the student's targets. The KL, token by token, by hand."""
    student, teacher = make_policy(architecture), make_policy(architecture, 1)
    batch = make_batch(student, dtype=torch.float64)
    calls, forward = [], opd.Policy.forward

    def recording_forward(policy, ids_BT, mask_BT, temperature=None, head=None, target=None):
        calls.append((policy, head, target))
        return forward(policy, ids_BT, mask_BT, temperature, head, target)

    monkeypatch.setattr(opd.Policy, "forward", recording_forward)
    head = teacher.model.get_output_embeddings()
    negative_kl_BT, _ = opd.negative_kl(
        student, teacher, head.weight, head.bias, batch["ids"], batch["mask"]
    )
    assert [policy for policy, _, _ in calls] == [teacher, student]
    assert all(head is not None for _, head, _ in calls)
    _, _, target_BTH = calls[1]
    assert target_BTH.shape == (*batch["ids"].shape, teacher.model.config.hidden_size)
    assert not target_BTH.requires_grad

    monkeypatch.undo()
    kl_BT = full_kl(student, teacher, batch)
    assert kl_BT.max() > 1e-3
    assert torch.allclose(-negative_kl_BT, kl_BT, atol=1e-10)


def test_temperature_and_the_tokenizers_ids_alone_count():
    student, teacher = make_policy(), make_policy(seed=1)
    student.vocab, student.temperature = 33, 0.7
    batch = make_batch(student, prompts=(2,), vocab=33, dtype=torch.float64)
    student_BTV = (student.model(batch["ids"]).logits[:, :-1, :33] / 0.7).log_softmax(-1)
    teacher_BTV = (teacher.model(batch["ids"]).logits[:, :-1, :33] / 0.7).log_softmax(-1)
    kl_BT = (student_BTV.exp() * (student_BTV - teacher_BTV)).sum(-1) * batch["mask"][:, 1:]
    args = flags("--kl", "full", "--temperature", "0.7")
    (kl_BT * opd.token_weights(batch, args)[:, 1:]).sum().backward()
    expected = gradients(student)
    gradient, _ = full_gradient(student, {"math": teacher}, batch, args)
    assert torch.allclose(gradient, expected, atol=1e-10)
    assert gradient.abs().max() > 1e-3


def test_the_importance_weight_is_a_factor_of_the_full_divergence():
    """But not of the statistic that is logged."""
    student, teachers = make_policy(), {"math": make_policy(seed=1)}
    batch = make_batch(student, prompts=(2,), dtype=torch.float64)
    args = flags("--kl", "full")
    _, stats = full_gradient(student, teachers, batch, args)
    batch["importance"] = 2 * torch.rand(batch["importance"].shape, dtype=torch.float64)
    batch["importance"][0] = 0  # this row leaves the update
    gradient, weighted_stats = full_gradient(student, teachers, batch, args)
    kl_BT = full_kl(student, teachers["math"], batch)
    weight_BT = opd.token_weights(batch, args) * batch["importance"]
    (kl_BT * weight_BT).sum().backward()
    assert torch.allclose(gradient, gradients(student), atol=1e-10)
    assert gradient.abs().max() > 1e-3
    assert weighted_stats["reverse_kl"] == pytest.approx(stats["reverse_kl"])


# ---------------- --kl sampled ----------------


def test_a_teacher_equal_to_the_student_teaches_nothing(architecture):
    student = make_policy(architecture, dtype=torch.float32)
    teacher = make_policy(architecture, dtype=torch.float32)
    batch = make_batch(student)
    teachers = {"math": teacher, "code": teacher}
    gradient, _ = full_gradient(student, teachers, batch, flags("--kl", "full"))
    assert gradient.abs().max() < 1e-6
    batch["old_logp"], _ = opd.log_probs(student, batch, flags())
    assert opd.advantages(batch, {"teachers": teachers}, flags()).abs().max() < 1e-5
    # in the very micro-batches of old_logp: exactly 0
    batch["domain"] = torch.zeros_like(batch["domain"])
    assert not opd.advantages(batch, {"teachers": {"math": teacher}}, flags()).any()


def test_the_sampled_advantage_is_the_log_ratio_by_each_rows_own_teacher():
    student = make_policy()
    teachers = {"math": make_policy(seed=1), "code": make_policy(seed=2)}
    batch = make_batch(student, dtype=torch.float64)
    batch["old_logp"] = batch["old_logp"].detach().float()  # as log_probs gives it
    advantage_BT = opd.advantages(batch, {"teachers": teachers}, flags())

    def logp_of(policy, ids_T):
        with torch.no_grad():
            logp_TV = policy.model(ids_T[None]).logits[0, :-1].log_softmax(-1)
        return logp_TV.gather(-1, ids_T[1:, None])[:, 0]

    for b, end in enumerate(batch["length"].tolist()):
        ids_T, mask_T = batch["ids"][b, :end], batch["mask"][b, 1:end]
        own_teacher = list(teachers.values())[batch["domain"][b]]
        log_ratio_T = logp_of(own_teacher, ids_T) - logp_of(student, ids_T)
        expected_T = (log_ratio_T * mask_T).float()
        assert torch.allclose(advantage_BT[b, 1:end], expected_T, atol=1e-5)
        assert not advantage_BT[b, end:].any()


def test_the_sampled_loss_by_hand():
    """Ratios 2, 2, 0.5 of π_θ to π_old, clipped to [0.8, 1.2]; the importance weights are w."""
    logp_BT = torch.tensor([[2.0, 2.0, 0.5]]).log()
    micro = {
        "old_logp": torch.zeros(1, 3),
        "advantage": torch.tensor([[0.5, -0.5, 3.0]]),
        "importance": torch.tensor([[1.0, 1.5, 0.0]]),
    }
    loss_BT, stats = opd.policy_loss(logp_BT, micro, flags())
    assert torch.allclose(loss_BT, torch.tensor([[-1.2 * 0.5, 1.5 * 2 * 0.5, 0.0]]))
    assert stats["clip_fraction"].tolist() == [[True, False, False]]
    assert torch.allclose(stats["reverse_kl"], torch.tensor([[-0.5, 1.5 * 0.5, 0.0]]))


def test_the_sampled_gradient_is_the_full_ones_in_expectation():
    """One-token responses, every token once, weighted by its probability.

    Σ_v π(v) A(v) ∇log π(v) = −∇KL.
    """
    student, teacher = make_policy(), make_policy(seed=1)
    V = 40
    batch = {
        "ids": torch.tensor([[5, 6, v] for v in range(V)]),
        "mask": torch.tensor([[False, False, True]] * V),
        "length": torch.full((V,), 3),
        "domain": torch.zeros(V, dtype=torch.long),
        "importance": torch.ones(V, 3),
    }
    with torch.no_grad():
        old_logp_BT, _ = student(batch["ids"], batch["mask"])
    batch["old_logp"] = old_logp_BT.float()
    args = flags()
    batch["advantage"] = opd.advantages(batch, {"teachers": {"math": teacher}}, args)
    logp_BT, _ = student(batch["ids"], batch["mask"])
    loss_BT, _ = opd.policy_loss(logp_BT, batch, args)
    (loss_BT[:, 2] * batch["old_logp"][:, 2].exp()).sum().backward()
    sampled = gradients(student)
    first_row = {name: column[:1] for name, column in batch.items()}
    full_kl(student, teacher, first_row)[0, 2].backward()
    assert torch.allclose(sampled, gradients(student), atol=1e-6)
    assert sampled.abs().max() > 1e-3


# ---------------- runs ----------------


@pytest.fixture(scope="module")
def experts(toy, tmp_path_factory) -> list[str]:
    """Two runs of grpo.py: a math expert, and one of code and instructions."""
    small = ["--steps", "10", "--batch-prompts", "10", "--mini-batch-prompts", "10"]
    small += ["--eval-prompts", "0"]
    folders = []
    for name, domains in (("math", ["math"]), ("rest", ["code", "if"])):
        out = str(tmp_path_factory.mktemp("expert") / name)
        grpo.main([*small, "--domains", *domains, "--out", out])
        folders.append(out)
    return folders


def teachers_of(experts) -> list[str]:
    return ["--teacher", f"math={experts[0]}", f"code={experts[1]}", f"if={experts[1]}"]


def without_evaluations(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if "eval/" not in name} for line in lines]


@pytest.mark.parametrize("kl", ["sampled", "full"])
def test_a_student_comes_nearer_to_its_teachers_and_resumes_exactly(kl, experts, tmp_path):
    common = [*teachers_of(experts), "--kl", kl, "--batch-prompts", "9", "--group-size", "4"]
    common += ["--mini-batch-prompts", "9", "--save-every", "5", "--lr", "1e-3"]
    common += ["--eval-prompts", "16", "--eval-samples", "4"]
    whole = opd.main([*common, "--steps", "12", "--out", str(tmp_path / "whole")])
    lines = metrics(whole)
    if kl == "full":  # sampled: a noisy estimate
        first = sum(line["reverse_kl"] for line in lines[1:4])
        last = sum(line["reverse_kl"] for line in lines[-3:])
        assert last < 0.5 * first
    assert "kl" not in lines[1]  # there is no reference model
    assert mean_accuracy(lines[-1]) > mean_accuracy(lines[0]) + 0.15  # by the teachers alone
    rewards_logged = {name for name in lines[1] if name.startswith("reward/")}
    assert rewards_logged == {"reward/math", "reward/code", "reward/if"}

    opd.main([*common, "--steps", "5", "--out", str(tmp_path / "half")])
    half = opd.main([*common, "--steps", "12", "--out", str(tmp_path / "half"), "--resume"])
    # The first half evaluated at its own end too.
    assert without_evaluations(metrics(half)) == without_evaluations(lines)
    assert metrics(half)[-1] == lines[-1]
    trainer_file = half / "checkpoint" / "trainer.pt"
    assert torch.load(trainer_file, weights_only=True)["state"] == {"teachers": {}}
    assert trainer_file.stat().st_size < 5000  # no teacher in it
    args = json.loads((whole / "args.json").read_text())
    assert args["domains"] == ["math", "code", "if"]
    assert args["clip_high"] == 0.2
    assert args["beta"] == 0


def test_teachers_are_asked_at_the_runs_temperature_and_shared(experts):
    args = opd.parse_args([*teachers_of(experts), "--temperature", "0.7"])
    teachers = opd.init_state(args, None)["teachers"]
    assert teachers["code"] is teachers["if"]
    assert teachers["code"] is not teachers["math"]
    assert {teacher.temperature for teacher in teachers.values()} == {0.7}


def test_rows_whose_verifier_failed_are_learned_from_all_the_same(experts, tmp_path, monkeypatch):
    score, update = rewards.score, opd.update
    batches = []

    def failing_score(*arguments):
        """Of eight responses only the first has a reward."""
        scores = score(*arguments)
        for i in range(len(scores)):
            if i % 8:
                scores[i] = scores[i]._replace(reward=None, correct=None)
        return scores

    def recording_update(policy, optimizer, batch, *arguments):
        batches.append(batch)
        return update(policy, optimizer, batch, *arguments)

    monkeypatch.setattr(rewards, "score", failing_score)
    monkeypatch.setattr(opd, "update", recording_update)
    small = ["--steps", "1", "--batch-prompts", "5", "--mini-batch-prompts", "5"]
    small += ["--eval-prompts", "0", "--out", str(tmp_path / "run")]
    opd.main(["--teacher", f"math={experts[0]}", *small])
    (batch,) = batches
    assert len(batch["reward"]) == 5 * 8
    assert batch["advantage"][batch["reward"].isnan()].any()


# ---------------- errors ----------------


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--teacher", "math"], "math has none"),
        (["--teacher", "maths=x"], "maths"),
        (["--teacher", "math=x", "math=y"], "one for each domain"),
        (["--teacher", "math=x", "--domains", "math", "code"], "code has none"),
        (["--teacher", "math=x", "--kl", "full", "--beta", "0.1"], "only --kl sampled"),
        ([], "required: --teacher"),
    ],
)
def test_wrong_flags_are_told(argv, message, capsys):
    with pytest.raises(SystemExit):
        opd.parse_args(argv)
    assert message in capsys.readouterr().err


def test_one_response_per_prompt_is_enough():
    """A teacher's advantage needs no group to compare with."""
    assert flags("--group-size", "1").group_size == 1


def test_help_names_the_teachers(capsys):
    with pytest.raises(SystemExit) as stop:
        opd.parse_args(["--help"])
    assert stop.value.code == 0
    assert "--teacher TEXT" in capsys.readouterr().out


def test_a_teacher_of_another_vocabulary_is_refused(toy, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(toy)
    tokenizer.add_tokens(["zebra"])
    tiny_model("gpt2", vocab=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    out = tmp_path / "run"
    with pytest.raises(UserError, match="its vocabulary .* is not the student's"):
        opd.main(["--teacher", f"math={tmp_path}", "--eval-samples", "0", "--out", str(out)])
    assert not out.exists()  # the corrected command may take the folder


def test_teachers_cannot_be_offloaded_from_a_cpu(experts, tmp_path):
    out = str(tmp_path / "run")
    with pytest.raises(UserError, match="offload"):
        opd.main(["--teacher", f"math={experts[0]}", "--offload-teachers", "--out", out])


@pytest.mark.slow
@pytest.mark.parametrize("kl", ["sampled", "full"])
def test_two_ranks_give_one_ranks_numbers(kl, experts, tmp_path):
    common = [*teachers_of(experts), "--kl", kl, "--batch-prompts", 6, "--mini-batch-prompts", 3]
    common += ["--steps", 3, "--eval-prompts", 4, "--eval-samples", 1, "--loss-norm", "token"]
    done = run("opd.py", *common, "--out", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    done = torchrun(2, "opd.py", *common, "--out", tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_numbers(tmp_path / "one", tmp_path / "two")

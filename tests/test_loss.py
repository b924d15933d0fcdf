"""Log-probs, advantages, loss and gradients, against hand computations and independent code."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from transformers import GraniteConfig, GraniteForCausalLM, MistralConfig, MistralForCausalLM

import grpo
from common import prompts, reports, sampler
from common.errors import UserError
from conftest import ROOT, flags, gradients, make_batch, make_policy, parameters, tiny_model
from sources.toy import toy_tokenizer

NORMS = ["sequence", "token", "constant"]


def response_span(batch, b: int) -> tuple[int, int]:
    """(first position, end) of a row's response."""
    return int(batch["mask"][b].int().argmax()), int(batch["length"][b])


# ---------------- log-probs ----------------


def plain_logp(model, ids_T, start: int):
    """Log-probs of ids_T[start:] from the plain model's logits: one sequence, no padding."""
    with torch.no_grad():
        logits_TV = model(ids_T[None]).logits[0]
    logps = []
    for t in range(start, len(ids_T)):
        logps.append(torch.log_softmax(logits_TV[t - 1, :40], -1)[ids_T[t]])
    return torch.stack(logps)


def test_padded_log_probs_equal_unpadded_ones(architecture):
    policy = make_policy(architecture)
    batch = make_batch(policy)
    logp_BT, mean_h_BH = policy(batch["ids"], batch["mask"])
    for b in range(len(batch["ids"])):
        start, end = response_span(batch, b)
        alone_T = plain_logp(policy.model, batch["ids"][b, :end], start)
        assert torch.allclose(logp_BT[b, start:end], alone_T, atol=1e-5)
        hidden_TH = policy.model.base_model(batch["ids"][b : b + 1, :end]).last_hidden_state[0]
        assert torch.allclose(mean_h_BH[b], hidden_TH[start:].mean(0), atol=1e-4)
    assert (logp_BT[~batch["mask"]] == 0).all()


def test_log_probs_leave_out_ids_the_tokenizer_lacks():
    policy = grpo.Policy(tiny_model("qwen2", vocab=50), 40, [0])
    batch = make_batch(policy)
    hidden_BTH = policy.model.base_model(batch["ids"]).last_hidden_state
    logits_BTV = policy.model.get_output_embeddings()(hidden_BTH)[..., :40]
    total_BT = torch.logsumexp(torch.log_softmax(logits_BTV, -1), -1)
    assert torch.allclose(total_BT, torch.zeros_like(total_BT), atol=1e-5)
    t, _ = response_span(batch, 0)
    expected = torch.log_softmax(logits_BTV[0, t - 1], -1)[batch["ids"][0, t]]
    logp_BT, _ = policy(batch["ids"], batch["mask"])
    assert torch.allclose(logp_BT[0, t], expected, atol=1e-5)


def test_models_with_another_head_are_refused(tmp_path):
    """Gemma 2 caps its logits and Granite scales them.

    Hidden states through the output head are not their logits.
    """
    config = GraniteConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        logits_scaling=8.0,
        initializer_range=0.5,
    )
    torch.manual_seed(0)
    GraniteForCausalLM(config).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not its output head times its last hidden state"):
        grpo.load_policy(str(tmp_path), "float32")


def test_temperature_divides_the_logits():
    policy = make_policy()
    batch = make_batch(policy)
    policy.temperature = 0.5
    t, _ = response_span(batch, 0)
    logits_V = policy.model(batch["ids"]).logits[0, t - 1]
    expected = torch.log_softmax(logits_V / 0.5, -1)[batch["ids"][0, t]]
    logp_BT, _ = policy(batch["ids"], batch["mask"])
    assert torch.allclose(logp_BT[0, t], expected, atol=1e-5)


def test_a_head_of_ones_own_gets_its_targets_at_the_tokens_places():
    """head and target of Policy.forward: what opd.py uses for the teacher's hidden states."""
    policy = make_policy()
    batch = make_batch(policy)
    target_BT3 = torch.randn(*batch["ids"].shape, 3)
    hidden_BTH = policy.model.base_model(batch["ids"]).last_hidden_state
    seen_temperatures = []

    def head(hidden_NH, target_N3, temperature):
        seen_temperatures.append(temperature)
        return hidden_NH, target_N3

    hidden_before_BTH, target_found_BT3, _ = policy(
        batch["ids"], batch["mask"], 0.7, head=head, target=target_BT3
    )
    mask_BT1 = batch["mask"][..., None]
    previous_BTH = torch.roll(hidden_BTH, 1, dims=1)  # the state before a token predicts it
    assert torch.allclose(hidden_before_BTH, previous_BTH * mask_BT1, atol=1e-5)
    assert torch.equal(target_found_BT3, target_BT3 * mask_BT1)
    assert seen_temperatures == [0.7]


@pytest.mark.slow
def test_no_tensor_of_tokens_times_vocabulary_exists():
    """Peak memory of forward and backward with a vocabulary of 40,000 and 8,000 tokens.

    It is far below one fp32 number per logit.
    """
    code = """
import resource, sys, torch
sys.path[:0] = ["tests"]
import grpo
from conftest import tiny_model
policy = grpo.Policy(tiny_model("qwen2", vocab=40000, positions=4096), 40000, [0])
ids = torch.randint(1, 40000, (8, int(sys.argv[1])))
mask = torch.arange(ids.shape[1])[None].expand(8, -1) > 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
policy(ids, mask)[0].sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
"""

    def peak_gib(tokens_per_row: int) -> float:
        command = [sys.executable, "-c", code, str(tokens_per_row)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
        return float(done.stdout)

    short, long = peak_gib(500), peak_gib(1000)
    gib_per_token = 40000 * 4 / 2**30  # of logits, in fp32
    assert long < 8 * 1000 * gib_per_token  # 1.2 GiB: the logits alone
    assert long - short < 0.5 * 8 * 500 * gib_per_token  # half of 4,000 more tokens' logits


# ---------------- the sampler ----------------


def test_top_p_draws_from_the_smallest_set_that_reaches_it():
    """Probabilities 0.1, 0.5, 0.15, 0.25; with top-p 0.7 the two likeliest tokens are left."""
    logits_BV = torch.tensor([[0.1, 0.5, 0.15, 0.25]]).log()

    def drawn(uniform: float, temperature: float, top_p: float):
        uniform_B = torch.tensor([uniform], dtype=torch.float64)
        token_B, logp_B = sampler.sample(logits_BV, uniform_B, temperature, top_p)
        return token_B.item(), logp_B.item()

    two_thirds = pytest.approx(math.log(0.5 / 0.75), abs=1e-6)
    one_third = pytest.approx(math.log(0.25 / 0.75), abs=1e-6)
    assert drawn(0.0, 1.0, 0.7) == (1, two_thirds)
    assert drawn(0.66, 1.0, 0.7) == (1, two_thirds)
    assert drawn(0.67, 1.0, 0.7) == (3, one_third)
    assert drawn(0.999, 1.0, 0.7) == (3, one_third)
    # The likeliest token alone reaches 0.4; the third is needed for 0.8.
    assert drawn(0.999, 1.0, 0.4) == (1, pytest.approx(0, abs=1e-6))
    assert drawn(0.6, 1.0, 0.8) == (2, pytest.approx(math.log(0.15 / 0.9), abs=1e-6))
    # 1 is the whole distribution, in the order of the ids.
    assert drawn(0.05, 1.0, 1.0) == (0, pytest.approx(math.log(0.1), abs=1e-6))
    # The set is that of the tempered distribution: squares 0.01, 0.25, 0.0225, 0.0625 of 0.345.
    assert drawn(0.999, 0.5, 0.72) == (1, pytest.approx(0, abs=1e-6))
    assert drawn(0.999, 0.5, 0.73) == (3, pytest.approx(math.log(0.0625 / 0.3125), abs=1e-6))
    # At temperature 0 the likeliest token, and its log-prob in the whole distribution.
    assert drawn(0.999, 0.0, 0.4) == (1, pytest.approx(math.log(0.5), abs=1e-6))


# ---------------- advantages ----------------


def test_advantages_by_hand():
    nan = float("nan")
    rewards_of_groups = [[1, 0, 0, 1], [0.1, 0.1, 0.1, 0.1], [1, nan, 0, 0.5], [1, nan, nan, nan]]
    batch = {
        "reward": torch.tensor(rewards_of_groups).flatten().double(),
        "group": torch.arange(4).repeat_interleave(4),
        "mask": torch.ones(16, 3, dtype=torch.bool),
    }
    batch["mask"][0, 0] = False
    advantage_BT = grpo.advantages(batch, {}, flags())
    assert advantage_BT.shape == (16, 3)
    assert advantage_BT[0, 0] == 0
    std = math.sqrt(4 * 0.25 / 3)  # unbiased, of 1, 0, 0, 1
    expected_G = torch.tensor([0.5, -0.5, -0.5, 0.5]) / std
    assert torch.allclose(advantage_BT[:4, 1], expected_G, atol=1e-5)
    assert (advantage_BT[4:8] == 0).all()  # all equal: exactly zero, no NaN
    expected_G = torch.tensor([1.0, 0.0, -1.0, 0.0])  # of 1, 0, 0.5: their std is 0.5
    assert torch.allclose(advantage_BT[8:12, 0], expected_G, atol=1e-5)
    assert (advantage_BT[12:] == 0).all()  # one scored response is no group


def test_an_all_equal_group_has_exactly_zero_policy_gradient():
    policy = make_policy()
    batch = make_batch(policy)
    batch["reward"] = torch.full_like(batch["reward"], 0.1)
    batch["advantage"] = grpo.advantages(batch, {}, flags())
    grpo.backward(policy, batch, flags("--beta", "0"))
    assert (gradients(policy) == 0).all()


def test_a_group_of_one_is_refused(capsys):
    with pytest.raises(SystemExit):
        flags("--group-size", "1")
    assert "an advantage needs at least 2 responses" in capsys.readouterr().err
    assert flags("--group-size", "2").group_size == 2


# ---------------- the loss ----------------


def micro_of(advantage, importance=None, ref_logp=None) -> dict:
    """A micro-batch of one row with π_old = 1, so that ρ = π_θ. Importance weights: 1."""
    advantage_BT = torch.tensor([advantage])
    micro = {
        "old_logp": torch.zeros_like(advantage_BT),
        "advantage": advantage_BT,
        "importance": torch.ones_like(advantage_BT),
    }
    if importance is not None:
        micro["importance"] = torch.tensor([importance])
    if ref_logp is not None:
        micro["ref_logp"] = ref_logp
    return micro


def test_loss_by_hand():
    logp_BT = torch.tensor([[2.0, 0.5, 1.0, 1.0]]).log()
    ref_logp_BT = torch.tensor([[2.0, 0.5, 1.0, 3.0]]).log()
    micro = micro_of([1.0, 1.0, -1.0, 2.0], ref_logp=ref_logp_BT)
    loss_BT, stats = grpo.policy_loss(logp_BT, micro, flags("--beta", "0.5"))
    kl = 3 - math.log(3) - 1  # k3 at π_ref/π_θ = 3
    assert torch.allclose(loss_BT, torch.tensor([[-1.28, -0.5, 1.0, -2.0 + 0.5 * kl]]), atol=1e-6)
    assert stats["clip_fraction"].tolist() == [[True, False, False, False]]
    # A < 0: clipped below 1 − ε_low only
    logp_BT = torch.tensor([[0.5, 2.0]]).log()
    loss_BT, _ = grpo.policy_loss(logp_BT, micro_of([-1.0, -1.0]), flags("--beta", "0"))
    assert torch.allclose(loss_BT, torch.tensor([[0.8, 2.0]]))


@pytest.mark.parametrize("norm", NORMS)
def test_the_denominator_by_hand(norm):
    args = flags("--loss-norm", norm, "--max-new-tokens", "10")
    mask_BT = torch.tensor([[0, 1, 1, 1, 1], [0, 1, 1, 0, 0]]).bool()
    weight_BT = grpo.token_weights({"mask": mask_BT}, args)
    weights_of_rows = {
        "sequence": (1 / 8, 1 / 4),
        "token": (1 / 6, 1 / 6),
        "constant": (1 / 20, 1 / 20),
    }
    first, second = weights_of_rows[norm]
    expected_BT = torch.tensor([[0, first, first, first, first], [0, second, second, 0, 0]])
    assert torch.allclose(weight_BT, expected_BT.double())


def headers_loss(policy, batch, norm, args):
    """grpo.py's loss for β = 0.001, written over single unpadded sequences."""
    total = 0.0
    tokens_B = batch["mask"].sum(1)
    B = len(tokens_B)
    for b in range(B):
        start, end = response_span(batch, b)
        logits_TV = policy.model(batch["ids"][b : b + 1, :end]).logits[0]
        positions = torch.arange(start - 1, end - 1)
        logp_T = torch.log_softmax(logits_TV, -1)[positions, batch["ids"][b, start:end]]
        ratio_T = torch.exp(logp_T - batch["old_logp"][b, start:end])
        A = batch["advantage"][b, start]
        ref_T = batch["ref_logp"][b, start:end] - logp_T
        surrogate_T = torch.minimum(ratio_T * A, ratio_T.clamp(0.8, 1.28) * A)
        loss_T = -batch["importance"][b, start:end] * surrogate_T + 0.001 * (
            ref_T.exp() - ref_T - 1
        )
        denominators = {
            "sequence": B * tokens_B[b],
            "token": tokens_B.sum(),
            "constant": B * args.max_new_tokens,
        }
        total = total + loss_T.sum() / denominators[norm]
    return total


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_do_not_depend_on_micro_batches_or_padding(norm, architecture):
    policy = make_policy(architecture)
    batch = make_batch(policy)
    batch["old_logp"] = batch["old_logp"] + 0.05 * torch.randn(batch["old_logp"].shape)
    batch["importance"] = 0.5 + 1.5 * torch.rand(batch["importance"].shape)

    def gradient(batch, budget):
        args = flags("--loss-norm", norm, "--micro-batch-tokens", str(budget))
        grpo.backward(policy, batch, args)
        return gradients(policy)

    in_one_piece = gradient(batch, 10**6)
    padded = {}
    for name, column in batch.items():
        padded[name] = torch.nn.functional.pad(column, (0, 9)) if column.ndim == 2 else column
    padded["length"] = batch["length"] + 9  # keeps `take` from cutting the padding off
    for other in (gradient(batch, 40), gradient(batch, 1), gradient(padded, 10**6)):
        assert (other - in_one_piece).norm() <= 1e-6 * in_one_piece.norm()

    headers_loss(policy, batch, norm, flags("--loss-norm", norm)).backward()
    independent = gradients(policy)
    assert (independent - in_one_piece).norm() <= 1e-5 * in_one_piece.norm()


# ---------------- a prompt runs once for all its responses ----------------


def sliding_policy(window: int) -> grpo.Policy:
    """A tiny policy with grouped heads whose attention sees `window` tokens."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        initializer_range=0.1,
    )
    return grpo.Policy(MistralForCausalLM(config).eval(), 40, [0])


@pytest.mark.parametrize("piece_tokens", [1024, 20])
def test_shared_prompts_give_the_plain_passs_numbers_and_gradients(
    architecture, piece_tokens, monkeypatch
):
    monkeypatch.setattr(prompts, "PIECE_TOKENS", piece_tokens)
    compare_shared_with_plain(make_policy(architecture, torch.float64))


@pytest.mark.parametrize("window", [2, 3, 5])
def test_shared_prompts_with_a_sliding_window(window):
    compare_shared_with_plain(sliding_policy(window).double())


def compare_shared_with_plain(policy) -> None:
    batch = make_batch(policy, dtype=torch.float64)
    batch["importance"] = 0.5 + 1.5 * torch.rand(batch["importance"].shape)
    results = {}
    for shares, budget in ((False, 10**6), (True, 10**6), (True, 60), (True, 1)):
        policy.shares_prompts = shares
        logp_BT, mean_h_BH = policy(batch["ids"], batch["mask"])
        grpo.backward(policy, batch, flags("--micro-batch-tokens", str(budget)))
        results[shares, budget] = (logp_BT, mean_h_BH, gradients(policy))
    plain = results.pop((False, 10**6))
    for shared in results.values():
        for ours, expected in zip(shared, plain):
            assert (ours - expected).norm() <= 1e-6 * expected.norm()


def test_what_a_prompt_of_a_group_costs_once_is_counted_once(monkeypatch):
    policy = make_policy()
    policy.shares_prompts = True
    batch = make_batch(policy)
    seen = []
    forward = policy.model.base_model.forward

    def counting(input_ids, **options):
        seen.append(input_ids.shape)
        return forward(input_ids, **options)

    monkeypatch.setattr(policy.model.base_model, "forward", counting)
    policy(batch["ids"], batch["mask"])
    P = int(batch["group"].max()) + 1
    assert [shape[0] for shape in seen] == [P, len(batch["ids"])]
    assert [shape[1] for shape in seen] == [
        int((batch["length"] - batch["mask"].sum(1)).max()),
        int(batch["mask"].sum(1).max()),
    ]


def test_shared_micro_batches_keep_the_budget_every_row_and_the_groups_together():
    batch = make_batch(make_policy(), prompts=(3, 4), group=4)
    pieces = grpo.micro_batches(batch, 60, True)
    assert sorted(torch.cat(pieces).tolist()) == list(range(28))
    response_B = batch["mask"].sum(1)
    prompt_B = batch["length"] - response_B
    for piece in pieces:
        groups = batch["group"][piece]
        prompt_tokens = sum(int(prompt_B[batch["group"] == g][0]) for g in groups.unique())
        assert prompt_tokens + int(response_B[piece].sum()) <= 60
        assert len(groups.unique_consecutive()) == len(groups.unique())
    assert len(pieces) < len(grpo.micro_batches(batch, 60))


@pytest.mark.parametrize("shares", [False, True])
def test_without_any_signal_the_kl_moves_nothing(shares, architecture):
    """Not even by rounding, which Adam would scale up: π_θ and π_ref run on the same rows."""
    policy = make_policy(architecture)
    policy.shares_prompts = shares
    policy.reference = [copy.deepcopy(policy).requires_grad_(False)]
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    batch = make_batch(policy)
    batch["reward"] = torch.ones_like(batch["reward"])
    batch["advantage"] = torch.zeros_like(batch["advantage"])
    del batch["ref_logp"]
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    for rows in (slice(None), batch["domain"] == 1, batch["domain"] == 0):  # as CGPO does
        part = grpo.take(batch, rows)
        stats = grpo.update(
            policy, optimizer, part, 1e-3, (0, 1, 0), {}, flags("--micro-batch-tokens", "30")
        )
        assert stats["grad_norm"] == 0
        assert stats["kl"] == 0
    assert all(map(torch.equal, before, policy.parameters()))


def test_eos_is_trained_and_padding_is_not():
    """Padding and EOS are the same id: the mask, not the id, decides."""
    policy = make_policy()
    batch = make_batch(policy)
    logp_BT = batch["old_logp"].clone().requires_grad_()
    args = flags("--beta", "0")
    loss_BT, _ = grpo.policy_loss(logp_BT, batch, args)
    (loss_BT * grpo.token_weights(batch, args)).sum().backward()
    b = int(batch["advantage"].abs().sum(1).argmax())
    _, end = response_span(batch, b)
    assert batch["ids"][b, end - 1] == 0  # the EOS that ends the response
    assert logp_BT.grad[b, end - 1] != 0
    assert (logp_BT.grad[~batch["mask"]] == 0).all()


# ---------------- the importance weight ----------------


def test_importance_sampling_correction_by_hand():
    """Ratios 1, 3, 0.4, 1.5 of π_old to π_sampler; the last column is padding."""
    far = {
        "old_logp": torch.tensor([[-1.0]]),
        "sampler_logp": torch.tensor([[-95.0]]),
        "mask": torch.tensor([[True]]),
    }
    weight_BT = grpo.importance_weights(far, flags("--is-correction", "mask"))
    assert weight_BT.item() == 0  # not inf · 0
    batch = {
        "old_logp": torch.tensor([[1.0, 3.0, 0.4, 1.5, 9.0]]).log(),
        "sampler_logp": torch.zeros(1, 5),
        "mask": torch.tensor([[True, True, True, True, False]]),
    }
    for kind, expected in (
        ("mask", [1, 0, 0, 1.5]),
        ("truncate", [1, 2, 0.4, 1.5]),
        ("none", [1, 1, 1, 1]),
    ):
        weight_BT = grpo.importance_weights(batch, flags("--is-correction", kind))
        assert torch.allclose(weight_BT[0, :4], torch.tensor(expected, dtype=torch.float))


@pytest.mark.parametrize("logp", [-1.0, -0.5, -2.0])  # π_old's is -1: inside and beyond the clip
@pytest.mark.parametrize("advantage", [1.0, -2.0])
def test_a_masked_token_gets_no_policy_gradient_and_a_weighted_one_w_times_as_much(logp, advantage):
    args = flags("--beta", "0")
    gradient_of_weight = {}
    for weight in (1.0, 1.7, 0.0):
        logp_BT = torch.tensor([[logp]], requires_grad=True)
        micro = micro_of([advantage], [weight]) | {"old_logp": torch.tensor([[-1.0]])}
        loss_BT, _ = grpo.policy_loss(logp_BT, micro, args)
        loss_BT.sum().backward()
        gradient_of_weight[weight] = logp_BT.grad.item()
    assert gradient_of_weight[1.7] == pytest.approx(1.7 * gradient_of_weight[1.0])
    assert gradient_of_weight[0.0] == 0


def test_the_importance_weight_is_no_factor_of_the_kl():
    """Weights 0, 1, 2 on a token with ρ = 1, A = 1 and π_ref/π_θ = 3."""
    ref_logp_BT = torch.full((1, 3), 3.0).log()
    micro = micro_of([1.0, 1.0, 1.0], [0.0, 1.0, 2.0], ref_logp_BT)
    logp_BT = torch.zeros(1, 3, requires_grad=True)
    loss_BT, _ = grpo.policy_loss(logp_BT, micro, flags("--beta", "0.5"))
    kl = 3 - math.log(3) - 1
    expected_BT = torch.tensor([[0.5 * kl, 0.5 * kl - 1, 0.5 * kl - 2]])
    assert torch.allclose(loss_BT, expected_BT, atol=1e-6)
    loss_BT.sum().backward()
    kl_gradient = 1 - 3  # of k3 by log π_θ, at π_ref/π_θ = 3
    expected_BT = torch.tensor([[0.5 * kl_gradient, 0.5 * kl_gradient - 1, 0.5 * kl_gradient - 2]])
    assert torch.allclose(logp_BT.grad, expected_BT, atol=1e-6)


def test_clip_fraction_does_not_count_tokens_of_weight_0():
    logp_BT = torch.tensor([[2.0, 2.0, 2.0, 0.5, 0.5]]).log()
    micro = micro_of([1.0, 1.0, 1.0, -1.0, -1.0], [1.0, 0.0, 0.6, 0.0, 2.0])
    _, stats = grpo.policy_loss(logp_BT, micro, flags("--beta", "0"))
    assert stats["clip_fraction"].tolist() == [[True, False, True, False, True]]


def count_rows(policy, monkeypatch) -> list[int]:
    """A list that gets the number of rows of every forward pass."""
    counts, forward = [], policy.forward

    def counting_forward(ids_BT, mask_BT):
        counts.append(len(ids_BT))
        return forward(ids_BT, mask_BT)

    monkeypatch.setattr(policy, "forward", counting_forward)
    return counts


@pytest.mark.parametrize("column", ["advantage", "importance"])
def test_rows_without_advantage_may_be_left_out_when_beta_is_0(column, architecture, monkeypatch):
    """So may rows whose importance weights are all 0.

    The gradient and the statistics are the same from fewer rows, because the denominators stay
    those of all rows.
    """
    policy = make_policy(architecture)
    batch = make_batch(policy, prompts=(2, 3))
    is_flat_B = batch["group"] < 2  # two of five groups learn nothing
    batch[column][is_flat_B] = 0
    assert torch.equal(grpo.moves_the_policy(batch), ~is_flat_B)
    rows_per_pass = count_rows(policy, monkeypatch)
    for norm in NORMS:
        stats, gradient, rows = {}, {}, {}
        for rule in ("keep", "drop"):
            rows_per_pass.clear()
            args = flags("--beta", "0", "--loss-norm", norm, "--zero-advantage", rule)
            stats[rule] = grpo.backward(policy, batch, args)
            gradient[rule] = gradients(policy)
            rows[rule] = sum(rows_per_pass)
        assert rows["drop"] == rows["keep"] - int(is_flat_B.sum())
        difference = gradient["keep"] - gradient["drop"]
        assert difference.norm() < 1e-6 * gradient["keep"].norm()
        assert stats["keep"] == pytest.approx(stats["drop"], abs=1e-7)

    # With β > 0 the released code's rule drops their KL too.
    gradient = {}
    for rule in ("keep", "drop"):
        grpo.backward(policy, batch, flags("--beta", "1", "--zero-advantage", rule))
        gradient[rule] = gradients(policy)
    assert not torch.allclose(gradient["keep"], gradient["drop"], rtol=1e-3)


def test_a_row_with_one_weighted_token_stays_in_the_update():
    """A row leaves only where advantage times weight is 0 at every token."""
    batch = make_batch(make_policy())
    batch["advantage"] = batch["mask"].float()
    batch["importance"] = torch.zeros_like(batch["importance"])
    assert not grpo.moves_the_policy(batch).any()
    _, end = response_span(batch, 3)
    batch["importance"][3, end - 1] = 0.7
    assert grpo.moves_the_policy(batch).nonzero().flatten().tolist() == [3]


def test_mismatch_metrics_by_hand_over_two_ranks():
    w_N = torch.tensor([1.0, 3.0, 0.4, 1.5])
    per_token = []
    for tokens_of_rank in (slice(0, 3), slice(3, 4)):
        per_token.append(
            {
                "log_w": w_N[tokens_of_rank].log(),
                "old_logp": -w_N[tokens_of_rank],
            }
        )
    columns = {name: torch.zeros(2) for name in ("reward", "correct", "truncated", "tokens")}
    columns |= {name: torch.zeros(2, dtype=torch.long) for name in ("group", "domain")}
    columns["valid"] = torch.zeros(2, dtype=torch.bool)
    metrics = reports.step_metrics({"rollout": 1.0}, columns, [], per_token)
    assert metrics["is_ratio/min"] == pytest.approx(0.4)
    assert metrics["is_ratio/max"] == pytest.approx(3)
    assert metrics["is_ratio/outside"] == 0.5
    assert metrics["is_ratio/mean"] == pytest.approx(5.9 / 4)
    mismatch_N = [0, math.log(3), -math.log(0.4), math.log(1.5)]
    assert metrics["mismatch/mean"] == pytest.approx(sum(mismatch_N) / 4)
    assert metrics["mismatch/max"] == pytest.approx(math.log(3))
    assert metrics["entropy"] == pytest.approx(5.9 / 4)


# ---------------- the update ----------------


def test_bf16_compute_moves_fp32_masters_at_lr_1e6():
    policy = make_policy(bf16=True)
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    batch = make_batch(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-6, weight_decay=0.0)
    before = parameters(policy)
    grpo.backward(policy, batch, flags())
    has_gradient = torch.cat([p.grad.flatten() for p in policy.parameters()]) != 0
    grpo.optimizer_step(policy, optimizer, 1e-6, flags())
    has_moved = parameters(policy) != before
    assert has_gradient.sum() > 1000
    assert has_moved[has_gradient].float().mean() > 0.99


def test_a_diverged_gradient_stops_the_run():
    policy = make_policy()
    batch = make_batch(policy)
    batch["advantage"] = batch["advantage"] * float("inf")
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    with pytest.raises(UserError, match="lower --lr"):
        grpo.update(policy, optimizer, batch, 1e-3, (0, 1, 0), {}, flags())


def test_micro_batches_keep_the_budget_and_every_row():
    length_B = torch.tensor([5, 9, 1, 30, 7, 7])
    pieces = grpo.micro_batches({"length": length_B}, 18)
    assert sorted(torch.cat(pieces).tolist()) == list(range(6))
    for piece in pieces:
        assert len(piece) == 1 or len(piece) * int(length_B[piece].max()) <= 18


def test_a_rank_without_rows_adds_nothing_and_does_not_stop_the_others(architecture):
    policy = make_policy(architecture)
    batch = make_batch(policy)
    empty = grpo.take(batch, torch.zeros(len(batch["ids"]), dtype=torch.bool))
    logp_BT, mean_h_BH = policy(empty["ids"], empty["mask"])
    assert len(logp_BT) == len(mean_h_BH) == 0
    assert logp_BT.requires_grad
    logp_BT.sum().backward()
    assert not gradients(policy).any()
    _, mean_h_BH = policy(empty["ids"], empty["mask"])
    mean_h_BH.sum().backward()  # a loss on mean_h has no NaN in it either
    assert not gradients(policy).any()


def test_a_gradient_of_0_moves_nothing():
    """Adam's momentum alone would."""
    policy = make_policy()
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    for scale in (1.0, 0.0):
        for parameter in policy.parameters():
            parameter.grad = torch.full_like(parameter, scale)
        before = [parameter.detach().clone() for parameter in policy.parameters()]
        grpo.optimizer_step(policy, optimizer, 1e-3, flags())
        same = [torch.equal(*pair) for pair in zip(before, policy.parameters())]
        assert all(same) == (scale == 0)

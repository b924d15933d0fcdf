"""MCPO against its header.

The loss by explicit loops, exact gradients for any micro-batch, and GRPO where both λ are 0.
"""

import copy
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

import grpo
import mcpo
from conftest import gradients, make_batch, make_policy, parameters
from helpers import metrics


def flags(*extra):
    return mcpo.parse_args(["--max-grad-norm", "0", *map(str, extra)])


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def setup(architecture="gpt2", *extra, prompts=(2, 2, 1)):
    """(policy, batch, state, args); the batch has three domains unless told otherwise."""
    dtype = torch.get_default_dtype()
    args, policy = flags(*extra), make_policy(architecture, dtype)
    batch = make_batch(policy, prompts=prompts, seed=3, dtype=dtype)
    return policy, batch, mcpo.init_state(args, policy), args


# ---------------- the gradient ----------------


def header_loss_of_row(policy, batch, b: int, args):
    """(h, the row's loss by the header's first line, summed over its tokens), unpadded."""
    start, end = int(batch["mask"][b].int().argmax()), int(batch["length"][b])
    hidden_TH = policy.model.base_model(batch["ids"][b : b + 1, :end]).last_hidden_state[0]
    logits_TV = policy.model.lm_head(hidden_TH[start - 1 : -1])
    tokens_T = batch["ids"][b, start:end]
    logp_T = torch.log_softmax(logits_TV, -1)[range(end - start), tokens_T]
    ratio_T = torch.exp(logp_T - batch["old_logp"][b, start:end])
    ref_T = batch["ref_logp"][b, start:end] - logp_T
    A = batch["advantage"][b, start]
    surrogate_T = torch.minimum(ratio_T * A, ratio_T.clamp(0.8, 1.28) * A)
    weighted_T = batch["importance"][b, start:end] * surrogate_T
    kl_T = ref_T.exp() - ref_T - 1
    return hidden_TH[start:].mean(0), (args.beta * kl_T - weighted_T).sum()


def one_graph(policy, batch, head, args, norm="sequence"):
    """(L_GRPO + λ_cross L_cross + λ_in L_in, {"cross", "in": their losses}) in one graph.

    Pair by pair, over unpadded rows.
    """
    B = len(batch["ids"])
    tokens_B = batch["mask"].sum(1).tolist()
    h, grpo_loss = [], 0.0
    for b in range(B):
        h_b, loss_b = header_loss_of_row(policy, batch, b, args)
        h.append(h_b)
        denominators = {
            "sequence": B * tokens_B[b],
            "token": sum(tokens_B),
            "constant": B * args.max_new_tokens,
        }
        grpo_loss = grpo_loss + loss_b / denominators[norm]

    z = [head(h_b) / head(h_b).norm() for h_b in h]
    domain, group = batch["domain"].tolist(), batch["group"].tolist()
    groups = len(set(group))
    correct = batch["correct"].nonzero()[:, 0].tolist()
    wrong = (~batch["correct"]).nonzero()[:, 0].tolist()
    terms = {"cross": [], "in": []}

    def contrast_term(i, j, pool):
        positive = torch.exp(z[i] @ z[j] / args.tau)
        negatives = sum(torch.exp(z[i] @ z[n] / args.tau) for n in pool)
        return -torch.log(positive / (positive + negatives))

    for i in correct:
        prompts_ahead = {n: (group[n] - group[i]) % groups for n in wrong}
        pool = sorted(wrong, key=prompts_ahead.get)[: args.pool_size]
        if not pool:
            continue
        cosine = {}
        for j in correct:
            if domain[j] != domain[i]:
                cosine[j] = torch.cosine_similarity(h[i], h[j], 0).item()
        nearest = sorted(cosine, key=cosine.get, reverse=True)[: args.top_k]
        same_domain = [j for j in correct if domain[j] == domain[i] and j != i]
        terms["cross"] += [contrast_term(i, j, pool) for j in nearest]
        terms["in"] += [contrast_term(i, j, pool) for j in same_domain]
    losses = {name: sum(values) / max(1, len(values)) for name, values in terms.items()}
    contrast = args.lambda_cross * losses["cross"] + args.lambda_in * losses["in"]
    return grpo_loss + contrast, losses


def assert_metrics_have(losses: dict, contrast_metrics: dict, args) -> None:
    """A term's loss is logged where its λ is positive, and only there."""
    for name, value in losses.items():
        metric = f"contrast/{name}/loss"
        if metric in contrast_metrics:
            assert contrast_metrics[metric] == pytest.approx(value.item(), rel=1e-5)
    assert ("contrast/in/loss" in contrast_metrics) == (args.lambda_in > 0)
    assert ("contrast/cross/loss" in contrast_metrics) == (args.lambda_cross > 0)


@pytest.mark.parametrize(
    "extra",
    [
        (),
        ("--lambda-in", 0),
        ("--lambda-cross", 0, "--tau", 0.5, "--loss-norm", "token"),
        ("--top-k", 1, "--pool-size", 2, "--loss-norm", "constant"),
    ],
)
def test_gradients_are_those_of_one_graph_for_any_micro_batch(extra, architecture, float64):
    """For the policy and for the head, whether the h are reused or made anew."""
    policy, batch, state, args = setup(architecture, "--lambda-cross", 3, "--lambda-in", 2, *extra)
    noise_BT = 0.05 * torch.randn(batch["old_logp"].shape)
    batch["old_logp"] = batch["old_logp"] + noise_BT * batch["mask"]
    batch["importance"] = 0.5 + 1.5 * torch.rand(batch["importance"].shape)
    head = state["head"]
    loss, losses = one_graph(policy, batch, head, args, args.loss_norm)
    loss.backward()
    expected, expected_of_head = gradients(policy), gradients(head)
    grpo_stats = grpo.backward(policy, batch, args)
    contrast = gradients(policy) - expected
    assert contrast.norm() > 0.3 * expected.norm()  # the contrast is a large part of it

    for budget, mini_batch in ((10**6, 0), (40, 0), (1, 0), (10**6, 1), (30, 1)):
        args.micro_batch_tokens = budget
        state = {"head": copy.deepcopy(head)}
        state["head_optimizer"] = torch.optim.SGD(state["head"].parameters(), 1.0)
        columns = dict(batch)
        if mini_batch:  # the h are made anew, so what old_h holds does not matter
            columns["old_h"] = torch.randn_like(batch["old_h"])
        key = (0, 1, mini_batch)
        h_gradient, contrast_metrics = mcpo.pool_gradient(policy, columns, key, state, args)
        stats = mcpo.backward(policy, batch | {"h_gradient": h_gradient}, args)
        assert (gradients(policy) - expected).norm() < 1e-6 * expected.norm()
        moved = parameters(head) - parameters(state["head"])
        assert (moved - expected_of_head).norm() < 1e-6 * expected_of_head.norm()
        assert_metrics_have(losses, contrast_metrics, args)
        # The contrast's term has the value 0, so the loss is GRPO's.
        assert stats["loss"] == pytest.approx(grpo_stats["loss"], abs=1e-6)


def test_lambda_0_is_grpo_bit_for_bit():
    moved = {}
    for module, extra in ((grpo, []), (mcpo, ["--lambda-cross", "0", "--lambda-in", "0"])):
        policy = make_policy()
        batch, args = make_batch(policy), module.parse_args(extra)
        state = module.init_state(args, policy)
        assert state == {}
        optimizer = torch.optim.AdamW(policy.parameters(), 1e-2)
        for step in range(3):
            module.update(policy, optimizer, batch, 1e-2, (0, step, 0), state, args)
        moved[module] = parameters(policy)
    assert torch.equal(moved[grpo], moved[mcpo])


def test_a_run_without_lambda_is_grpos_run_and_with_it_is_not(toy, tmp_path):
    common = ["--steps", "3", "--lr", "1e-3", "--batch-prompts", "10", "--mini-batch-prompts", "5"]
    common += ["--eval-prompts", "4", "--eval-samples", "1"]

    def run(module, name: str, *extra) -> list[dict]:
        return metrics(module.main([*common, *extra, "--out", str(tmp_path / name)]))

    plain = run(grpo, "plain")
    without = run(mcpo, "without", "--lambda-cross", "0", "--lambda-in", "0")
    contrasted = run(mcpo, "contrasted")
    assert plain == without
    assert plain != contrasted
    assert contrasted[3]["contrast/in/anchors"] > 0.9


def test_the_contrast_alone_moves_the_policy_and_its_rows_are_kept():
    """Every advantage is 0, so with β = 0 GRPO would have no row left.

    Rows that are in nobody's pool are left out.
    """
    extra = ("--beta", 0, "--zero-advantage", "drop", "--pool-size", 1)
    policy, batch, state, args = setup("gpt2", *extra)
    batch["advantage"] = torch.zeros_like(batch["advantage"])
    h_gradient, _ = mcpo.pool_gradient(policy, batch, (0, 1, 0), state, args)
    batch["h_gradient"] = h_gradient
    kept_B = mcpo.moves_the_policy(batch)
    assert torch.equal(kept_B, (h_gradient != 0).any(2)[:, 0])
    assert kept_B[batch["correct"]].all()
    assert 0 < (~kept_B).sum()
    gradient = {}
    for rule in ("keep", "drop"):
        args.zero_advantage = rule
        mcpo.backward(policy, batch, args)
        gradient[rule] = gradients(policy)
    assert gradient["keep"].norm() > 0
    assert (gradient["keep"] - gradient["drop"]).norm() < 1e-6 * gradient["keep"].norm()
    before = parameters(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    mcpo.update(policy, optimizer, batch, 1e-3, (0, 1, 0), state, args)
    assert not torch.equal(before, parameters(policy))


def test_the_contrast_has_no_importance_weight():
    """With β = 0 and all weights 0 the gradient is the contrast's alone, whatever the advantage."""
    policy, batch, state, args = setup("gpt2", "--beta", 0, "--zero-advantage", "drop")
    batch["importance"] = torch.zeros_like(batch["importance"])
    batch["h_gradient"], _ = mcpo.pool_gradient(policy, batch, (0, 1, 0), state, args)
    mcpo.backward(policy, batch, args)
    weightless = gradients(policy)
    batch["importance"] = torch.ones_like(batch["importance"])
    batch["advantage"] = torch.zeros_like(batch["advantage"])
    mcpo.backward(policy, batch, args)
    contrast_alone = gradients(policy)
    assert contrast_alone.norm() > 0
    assert (weightless - contrast_alone).norm() < 1e-6 * contrast_alone.norm()


# ---------------- anchors, positives, negatives ----------------

ONE_DOMAIN = [0, 0, 0, 0, 0, 0, 0, 0]
TWO_DOMAINS = [0, 0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "correct, domain, terms",
    [
        pytest.param([1, 1, 1, 1, 1, 1, 1, 1], TWO_DOMAINS, [], id="no-negative"),
        pytest.param([0, 0, 0, 0, 0, 0, 0, 0], TWO_DOMAINS, [], id="no-anchor"),
        pytest.param([1, 0, 0, 0, 0, 0, 0, 0], ONE_DOMAIN, [], id="no-positive"),
        pytest.param([1, 0, 0, 0, 1, 0, 0, 0], ONE_DOMAIN, ["in"], id="one-domain"),
        pytest.param([1, 0, 0, 0, 1, 0, 0, 0], TWO_DOMAINS, ["cross"], id="two-domains"),
    ],
)
def test_anchors_without_a_positive_or_a_negative_count_for_nothing(correct, domain, terms):
    args = flags()
    head = mcpo.init_state(args, make_policy())["head"]
    draw = torch.Generator().manual_seed(0)
    h_BH = torch.randn(8, 32, generator=draw).requires_grad_()
    group_B = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    correct_B, domain_B = torch.tensor(correct).bool(), torch.tensor(domain)
    loss, contrast_metrics = mcpo.contrast(head, h_BH, correct_B, domain_B, group_B, args)
    loss.backward()
    assert h_BH.grad.isfinite().all()
    assert bool(h_BH.grad.any()) == bool(terms)
    assert loss.isfinite()
    assert all(value == value for value in contrast_metrics.values())  # no NaN
    names = ("cross", "in")
    assert [name for name in names if contrast_metrics[f"contrast/{name}/loss"] > 0] == terms
    if not terms:
        assert loss == 0
        assert contrast_metrics.get("contrast/in/anchors", 0) == 0
        assert contrast_metrics.get("contrast/cross/anchors", 0) == 0


Anchor = namedtuple("Anchor", "angle positive negatives")


def test_positives_and_the_pool_by_hand():
    """Unit vectors in a plane and no head: cosines are differences of angles."""
    angle_B = torch.deg2rad(torch.tensor([0.0, 50, 10, 80, 20, 170, 100, 30]))
    h_BH = torch.stack([angle_B.cos(), angle_B.sin()], 1)
    correct_B = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1]).bool()
    group_B = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    domain_B = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    args = flags("--top-k", 1, "--pool-size", 2, "--tau", 1)
    identity = torch.nn.Identity()
    _, contrast_metrics = mcpo.contrast(identity, h_BH, correct_B, domain_B, group_B, args)

    def cos(a: float, b: float) -> torch.Tensor:
        return torch.cos(torch.deg2rad(torch.tensor(float(a - b))))

    def mean_cosine(*pairs) -> float:
        return torch.stack([cos(a, b) for a, b in pairs]).mean().item()

    # The positive is the nearest correct one of the other domain. The negatives are the wrong ones
    # of the own prompt, then those of the next prompts.
    anchors = [
        Anchor(0, 20, (50, 10)),
        Anchor(80, 30, (10, 170)),
        Anchor(20, 0, (170, 100)),
        Anchor(30, 0, (100, 50)),
    ]
    losses = []
    for anchor in anchors:
        positive = cos(anchor.angle, anchor.positive).exp()
        negatives = sum(cos(anchor.angle, negative).exp() for negative in anchor.negatives)
        losses.append(-torch.log(positive / (positive + negatives)))
    cross_loss = torch.stack(losses).mean().item()
    assert contrast_metrics["contrast/cross/loss"] == pytest.approx(cross_loss, rel=1e-5)
    positive = mean_cosine(*[(anchor.angle, anchor.positive) for anchor in anchors])
    assert contrast_metrics["contrast/cross/positive"] == pytest.approx(positive, rel=1e-5)
    # the negatives of another domain than the anchor's, and those of the same
    across = mean_cosine((80, 170), (30, 50))
    assert contrast_metrics["contrast/cross/negative"] == pytest.approx(across, rel=1e-5)
    within = mean_cosine((0, 50), (0, 10), (80, 10), (20, 170), (20, 100), (30, 100))
    assert contrast_metrics["contrast/in/negative"] == pytest.approx(within, rel=1e-4, abs=1e-5)
    positive = mean_cosine((0, 80), (20, 30))
    assert contrast_metrics["contrast/in/positive"] == pytest.approx(positive, rel=1e-5)
    assert contrast_metrics["contrast/cross/anchors"] == 1
    assert contrast_metrics["contrast/in/anchors"] == 1


def test_the_cross_loss_falls_step_by_step_on_a_planted_example():
    """Correct responses of two domains share a token, and incorrect ones share another.

    So the policy can tell them apart.
    """
    extra = ("--beta", 0, "--lambda-in", 0, "--lambda-cross", 1)
    policy, batch, state, args = setup("gpt2", *extra, prompts=(2, 2))
    batch["advantage"] = torch.zeros_like(batch["advantage"])
    planted_B = torch.where(batch["correct"], 7, 11)
    batch["ids"] = torch.where(batch["mask"], planted_B[:, None], batch["ids"])
    # The head stays as it is: all of the fall is the policy's doing.
    state["head_optimizer"] = torch.optim.SGD(state["head"].parameters(), 0.0)
    optimizer = torch.optim.SGD(policy.parameters(), 0)
    losses = []
    for step in range(12):
        stats = mcpo.update(policy, optimizer, batch, 0.05, (0, step, 1), state, args)
        losses.append(stats["contrast/cross/loss"])
    assert all(after < before for before, after in zip(losses, losses[1:]))
    assert losses[-1] < 0.5 * losses[0]


# ---------------- the head ----------------


def test_the_head_has_a_clip_and_a_rate_of_its_own():
    """It is outside the policy's norm, its rate is --head-lr, and its start is the seed's."""
    extra = ("--max-grad-norm", 1e-3, "--head-lr", 0.5, "--lambda-in", 5)
    policy, batch, state, args = setup("gpt2", *extra)
    head = state["head"]
    assert state["head_optimizer"].param_groups[0]["lr"] == 0.5
    start = parameters(head)
    state["head_optimizer"] = torch.optim.SGD(head.parameters(), 1.0)

    # The norm of the policy's gradient alone, by a copy of the head that does not step.
    twin = copy.deepcopy(head)
    twin_state = {"head": twin, "head_optimizer": torch.optim.SGD(twin.parameters(), 0.0)}
    h_gradient, _ = mcpo.pool_gradient(policy, batch, (0, 1, 0), twin_state, args)
    mcpo.backward(policy, batch | {"h_gradient": h_gradient}, args)
    expected_norm = gradients(policy).norm().item()

    optimizer = torch.optim.SGD(policy.parameters(), 0.0)
    stats = mcpo.update(policy, optimizer, batch, 0.0, (0, 1, 0), state, args)
    assert (parameters(head) - start).norm() == pytest.approx(1e-3, rel=1e-3)
    assert stats["grad_norm"] == pytest.approx(expected_norm, rel=1e-5)
    same_seed = mcpo.init_state(flags("--seed", 0), policy)["head"]
    other_seed = mcpo.init_state(flags("--seed", 1), policy)["head"]
    assert torch.equal(parameters(same_seed), start)
    assert not torch.equal(parameters(other_seed), start)


def test_a_steps_first_mini_batch_needs_no_pass_of_its_own(monkeypatch):
    policy, batch, state, args = setup()
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    calls, log_probs = [], mcpo.log_probs

    def counting_log_probs(*arguments):
        calls.append(arguments)
        return log_probs(*arguments)

    monkeypatch.setattr(mcpo, "log_probs", counting_log_probs)
    for mini_batch, calls_so_far in ((0, 0), (1, 1), (2, 2)):
        mcpo.update(policy, optimizer, batch, 1e-3, (0, 1, mini_batch), state, args)
        assert len(calls) == calls_so_far


def test_the_head_is_kept_by_the_trainer_and_not_exported(toy, tmp_path):
    small = ["--steps", "1", "--eval-prompts", "0", "--batch-prompts", "5"]
    small += ["--mini-batch-prompts", "5"]
    out = mcpo.main([*small, "--out", str(tmp_path / "run")])
    saved = torch.load(out / "checkpoint/trainer.pt", weights_only=True)["state"]
    shapes = {name: tensor.shape for name, tensor in saved["head"].items()}
    assert shapes == {
        "0.weight": (256, 128),
        "0.bias": (256,),
        "2.weight": (128, 256),
        "2.bias": (128,),
    }
    assert len(saved["head_optimizer"]["state"]) == 4
    exported = load_file(out / "checkpoint/model.safetensors")
    assert exported.keys() == load_file(f"{toy}/model.safetensors").keys()


def test_a_group_of_one_is_refused(capsys):
    with pytest.raises(SystemExit):
        flags("--group-size", 1)
    assert "an advantage needs at least 2 responses" in capsys.readouterr().err

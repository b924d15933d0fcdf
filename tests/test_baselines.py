"""FAMO and PCGrad against their papers' formulas, and GRPO as their one-domain case."""

import numpy as np
import pytest
import torch

import cgpo
import famo
import grpo
import mcpo
import pcgrad
from common.keys import rng
from common.rows import DOMAINS
from conftest import gradients, make_batch, make_policy, parameters

NORMS = ["sequence", "token", "constant"]


def flags(module, *extra):
    return module.parse_args(["--max-grad-norm", "0", *map(str, extra)])


# ---------------- both ----------------


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("module", [famo, pcgrad])
def test_one_domain_is_grpo_bit_for_bit(module, norm):
    moved = {}
    for algorithm in (grpo, module):
        policy = make_policy()
        batch = make_batch(policy, prompts=(5,))
        args = algorithm.parse_args(["--loss-norm", norm])
        state = algorithm.init_state(args, policy)
        optimizer = torch.optim.AdamW(policy.parameters(), 1e-2)
        for step in range(3):
            algorithm.update(policy, optimizer, batch, 1e-2, (0, step, 0), state, args)
        moved[algorithm] = parameters(policy)
    assert torch.equal(moved[grpo], moved[module])
    assert not torch.equal(moved[grpo], parameters(make_policy()))


@pytest.mark.parametrize("module", [grpo, cgpo, famo, pcgrad, mcpo])
def test_no_update_mutates_its_batch(module):
    policy = make_policy()
    batch, args = make_batch(policy), flags(module)
    before = {name: column.clone() for name, column in batch.items()}
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-3)
    state = module.init_state(args, policy)
    module.update(policy, optimizer, batch, 1e-3, (0, 1, 0), state, args)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[name], before[name]) for name in before)
    assert not any(column.requires_grad for column in batch.values())


@pytest.mark.parametrize("module", [famo, pcgrad])
def test_a_group_of_one_is_refused(module, capsys):
    with pytest.raises(SystemExit):
        flags(module, "--group-size", 1)
    assert "an advantage needs at least 2 responses" in capsys.readouterr().err


def domain_gradients(policy, batch, args) -> list[torch.Tensor]:
    """∇L_GRPO,k of each domain, over its own rows alone."""
    gradient_K = []
    for k in batch["domain"].unique():
        grpo.backward(policy, grpo.take(batch, batch["domain"] == k), args)
        gradient_K.append(gradients(policy))
    return gradient_K


def shares_of_the_loss(batch, norm: str) -> list[torch.Tensor]:
    """Each domain's share of the sequences, or with the norm "token" of the tokens."""
    size_B = batch["mask"].sum(1) if norm == "token" else torch.ones(len(batch["mask"]))
    domains = batch["domain"].unique()
    return [size_B[batch["domain"] == k].sum() / size_B.sum() for k in domains]


class RecordingSGD(torch.optim.SGD):
    """Keeps the gradient that it was given last."""

    def step(self, closure=None):
        gradients_of_groups = []
        for group in self.param_groups:
            gradients_of_groups += [p.grad.flatten() for p in group["params"]]
        self.gradient = torch.cat(gradients_of_groups)
        return super().step(closure)


# ---------------- PCGrad ----------------


def project(vectors, orders):
    """Algorithm 1 on the vectors themselves."""
    total = torch.zeros_like(vectors[0])
    for i, order in enumerate(orders):
        g = vectors[i].clone()
        for j in order:
            if j != i and g @ vectors[j] < 0:
                g -= (g @ vectors[j]) / (vectors[j] @ vectors[j]) * vectors[j]
        total += g
    return total


def orders_of(key: tuple, K: int) -> list[list[int]]:
    """The random order of the other domains, for each domain."""
    return [rng(*key, "pcgrad", i).permutation(K).tolist() for i in range(K)]


def combine(vectors, key=(0, 1, 0)):
    """pcgrad.py's combination of the vectors, from their products alone."""
    V = torch.stack(vectors).double()
    weights = pcgrad.projection_weights((V @ V.T).numpy(), key)
    return torch.tensor(weights, dtype=V.dtype) @ V


def test_opposing_gradients_lose_exactly_the_conflicting_part():
    a, b = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([-1.0, 0.0, 3.0])
    # a·b = −2: a becomes a + 2/10 b, and b becomes b + 2/5 a
    expected = (a + 0.2 * b + b + 0.4 * a).double()
    assert torch.allclose(combine([a, b]), expected, atol=1e-12)
    # nothing is left of a full conflict
    assert torch.allclose(combine([a, -a]), torch.zeros(3).double(), atol=1e-12)
    assert torch.equal(combine([a, torch.zeros(3)]), a.double())


def test_orthogonal_and_agreeing_gradients_are_untouched():
    a = torch.tensor([2.0, 0.0, 0.0])
    b = torch.tensor([0.0, 3.0, 0.0])
    c = torch.tensor([1.0, 1.0, 5.0])
    dots_KK = np.array([[4.0, 0, 2], [0, 9.0, 3], [2, 3, 27.0]])
    assert pcgrad.projection_weights(dots_KK, (0,)) == [1.0, 1.0, 1.0]
    assert torch.equal(combine([a, b, c]), (a + b + c).double())


def test_the_products_alone_give_algorithm_1_in_every_order():
    draw = torch.Generator().manual_seed(0)
    conflicts = order_matters = 0
    for trial in range(30):
        vectors = list(torch.randn(4, 6, generator=draw, dtype=torch.float64))
        key = (0, trial, 0)
        orders = orders_of(key, 4)
        projected = project(vectors, orders)
        assert torch.allclose(combine(vectors, key), projected, atol=1e-12)
        reversed_orders = [order[::-1] for order in orders]
        conflicts += not torch.allclose(projected, sum(vectors))
        order_matters += not torch.allclose(projected, project(vectors, reversed_orders))
    assert conflicts > 20
    assert order_matters > 5


@pytest.mark.parametrize("norm", NORMS)
def test_the_update_follows_the_projected_sum_over_all_parameters(norm):
    policy = make_policy()
    batch = make_batch(policy, prompts=(3, 2, 1), seed=1)
    # math is not the first domain of the batch
    domain_K = torch.tensor([DOMAINS.index(domain) for domain in ("code", "math", "if")])
    batch["domain"] = domain_K[batch["domain"]]
    args = flags(pcgrad, "--loss-norm", norm, "--beta", 0.5)
    joint_stats = grpo.backward(policy, batch, args)
    joint = gradients(policy)
    share_K = shares_of_the_loss(batch, norm)
    parts = [g * share for g, share in zip(domain_gradients(policy, batch, args), share_K)]
    assert torch.allclose(sum(parts), joint, atol=1e-6)  # they are the parts of GRPO's gradient

    key = (0, 7, 0)
    optimizer = RecordingSGD(policy.parameters(), 1e-3)
    stats = pcgrad.update(policy, optimizer, batch, 1e-3, key, {}, args)
    difference = optimizer.gradient - project(parts, orders_of(key, 3))
    assert difference.norm() < 1e-5 * optimizer.gradient.norm()
    cosine = torch.cosine_similarity(parts[0], parts[1], 0).item()
    assert stats["cosine/math-code"] == pytest.approx(cosine, abs=1e-5)
    assert stats["extra_gradients_gib"] == pytest.approx(2 * joint.numel() * 4 / 2**30)
    assert stats["grad_norm"] == pytest.approx(optimizer.gradient.norm().item(), rel=1e-5)
    assert stats["loss"] == pytest.approx(joint_stats["loss"], rel=1e-5)


def test_a_conflict_between_domains_is_projected_away():
    """Two domains have the same rows with opposite advantages.

    GRPO's gradient is 0 but for the KL, so PCGrad's is too.
    """
    policy = make_policy()
    batch, args = make_batch(policy, prompts=(2, 2)), flags(pcgrad, "--beta", 0)
    half = len(batch["ids"]) // 2
    for name in ("ids", "mask", "length", "old_logp", "ref_logp"):
        batch[name] = torch.cat([batch[name][:half]] * 2)
    advantage_BT = batch["advantage"][:half]
    batch["advantage"] = torch.cat([advantage_BT, -advantage_BT])
    math_gradient, _ = domain_gradients(policy, batch, args)
    optimizer = RecordingSGD(policy.parameters(), 1e-3)
    stats = pcgrad.update(policy, optimizer, batch, 1e-3, (0, 1, 0), {}, args)
    assert stats["cosine/math-code"] == pytest.approx(-1)
    assert stats["grad_norm"] < 1e-5 * math_gradient.norm()


# ---------------- FAMO ----------------


def test_the_weights_by_hand_over_three_batches():
    """q = (z/ℓ) / Σ(z/ℓ); v by Adam along J_softmax(z)ᵀ (log ℓ_prev − log ℓ_now).

    The Jacobian is written out here.
    """
    args = flags(famo, "--famo-smooth", 0, "--famo-decay", 0.1)
    state = famo.init_state(args, None)
    v = torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([v], 0.025, weight_decay=0.1)
    domains = ["math", "code", "if"]
    previous = None
    for losses in ([1.0, 2.0, 0.5], [0.8, 2.0, 0.6], [0.4, 1.9, 0.6]):
        now = torch.tensor(losses)
        z = torch.softmax(v.detach(), 0)
        jacobian = torch.diag(z) - z[:, None] * z
        falls = torch.zeros(3) if previous is None else torch.log(previous / now)
        v.grad = jacobian @ falls
        adam.step()
        z = torch.softmax(v.detach(), 0)
        q = famo.domain_weights(dict(zip(domains, losses)), True, state, args)
        assert list(q) == domains
        expected = z / now / (z / now).sum()
        assert list(q.values()) == pytest.approx(expected.tolist(), rel=1e-5)
        assert sum(q.values()) == pytest.approx(1)
        previous = now
    assert v[0] < v[1]  # math improved the most and lost weight


def test_a_domain_that_is_absent_keeps_its_loss_its_logit_and_its_moments():
    args = flags(famo, "--famo-decay", 0.1)
    state = famo.init_state(args, None)
    famo.domain_weights({"math": 1.0, "code": 2.0}, True, state, args)
    famo.domain_weights({"math": 0.7, "code": 1.9}, True, state, args)

    def state_of_math():
        logit = state["logits"]["math"]
        moment = state["logits_optimizer"].state[logit]["exp_avg"]
        return state["loss"]["math"], logit.item(), moment.item()

    before = state_of_math()
    _, logit, moment = before
    assert logit != 0
    assert moment != 0
    q = famo.domain_weights({"code": 1.5, "writing": 1.0}, True, state, args)
    assert state_of_math() == before
    assert q.keys() == {"code", "writing"}
    assert state["logits"]["if"] == 0
    assert "if" not in state["loss"]


@pytest.mark.parametrize("norm, beta", [("sequence", 0.001), ("token", 0), ("constant", 0.5)])
def test_one_backward_pass_gives_the_weighted_sum_of_the_domains_gradients(norm, beta):
    policy = make_policy()
    batch = make_batch(policy, prompts=(3, 2, 1), seed=1)
    batch["reward"] = 1.5 * batch["reward"] - 0.5  # not the 0 and 1 of "correct"
    args = flags(famo, "--loss-norm", norm, "--beta", beta, "--reward-max", 3)
    gradient_K = domain_gradients(policy, batch, args)
    optimizer = RecordingSGD(policy.parameters(), 1e-3)
    state = famo.init_state(args, policy)
    stats = famo.update(policy, optimizer, batch, 1e-3, (0, 1, 0), state, args)
    losses = [3.0 - batch["reward"][batch["domain"] == k].mean().item() for k in range(3)]
    total = sum(1 / loss for loss in losses)
    q = [1 / loss / total for loss in losses]  # because v = 0 at first
    domains = ("math", "code", "science")
    assert [stats[f"domain_weight/{domain}"] for domain in domains] == pytest.approx(q)
    expected = sum(weight * gradient for weight, gradient in zip(q, gradient_K))
    assert (optimizer.gradient - expected).norm() < 1e-6 * optimizer.gradient.norm()


def test_smoothing_keeps_a_share_of_the_last_loss():
    args = flags(famo, "--famo-smooth", 0.75)
    state = famo.init_state(args, None)
    famo.domain_weights({"math": 1.0}, True, state, args)
    famo.domain_weights({"math": 0.6}, True, state, args)
    assert state["loss"]["math"] == pytest.approx(0.9)


def test_the_logits_step_once_a_rollout_by_what_all_its_mini_batches_showed():
    """Mini-batches of one rollout were sampled by one policy.

    What differs between them is no improvement.
    """
    args = flags(famo, "--famo-smooth", 0)
    state = famo.init_state(args, None)
    famo.domain_weights({"math": 1.0, "code": 1.0}, True, state, args)
    famo.domain_weights({"math": 0.5, "code": 1.0}, False, state, args)
    assert all(logit == 0 for logit in state["logits"].values())
    assert state["loss"]["math"] == 0.5
    assert state["loss_at_step"]["math"] == 1.0
    # 1.0 → 0.8: math improved and loses weight
    famo.domain_weights({"math": 0.8, "code": 1.0}, True, state, args)
    assert state["logits"]["math"] < 0 < state["logits"]["code"]
    assert state["loss_at_step"]["math"] == 0.8

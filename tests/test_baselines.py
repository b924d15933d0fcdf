"""FAMO and PCGrad against their papers' formulas, GRPO as their one-domain case, and the two curricula's resumption."""
import numpy as np
import pytest
import torch

import cgpo
import famo
import grpo
import mcpo
import pcgrad
from conftest import gradients, make_batch, make_policy, parameters
from data import DOMAINS


def flags(module, *extra):
    return module.parse_args(["--max-grad-norm", "0", *map(str, extra)])


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
@pytest.mark.parametrize("module", [famo, pcgrad])
def test_one_domain_is_grpo_bit_for_bit(module, norm):
    results = []
    for each in (grpo, module):
        policy = make_policy()
        batch, args = make_batch(policy, prompts=(5,)), each.parse_args(["--loss-norm", norm])
        state, optimizer = each.init_state(args, policy), torch.optim.AdamW(policy.parameters(), 1e-2)
        for step in range(3):
            each.update(policy, optimizer, batch, 1e-2, (0, step, 0), state, args)
        results.append(parameters(policy))
    assert torch.equal(*results) and not torch.equal(results[0], parameters(make_policy()))


@pytest.mark.parametrize("module", [grpo, cgpo, famo, pcgrad, mcpo])
def test_no_update_mutates_its_batch(module):
    policy = make_policy()
    batch, args = make_batch(policy), flags(module)
    before = {k: v.clone() for k, v in batch.items()}
    module.update(policy, torch.optim.AdamW(policy.parameters(), 1e-3), batch, 1e-3, (0, 1, 0), module.init_state(args, policy), args)
    assert batch.keys() == before.keys() and all(torch.equal(batch[k], before[k]) for k in before)
    assert not any(v.requires_grad for v in batch.values())


def domain_gradients(policy, batch, args) -> list[torch.Tensor]:
    """∇L_GRPO,k, each over its own rows alone."""
    found = []
    for k in batch["domain"].unique():
        grpo.backward(policy, grpo.take(batch, batch["domain"] == k), args)
        found.append(gradients(policy))
    return found


class Catch(torch.optim.SGD):
    """Keeps the gradient that it was given."""
    def step(self, closure=None):
        self.seen = torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]])
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


def combine(vectors, key=(0, 1, 0)):
    V = torch.stack(vectors).double()
    return torch.tensor(pcgrad.projected_sum((V @ V.T).numpy(), key), dtype=V.dtype) @ V


def test_opposing_gradients_lose_exactly_the_conflicting_part():
    a, b = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([-1.0, 0.0, 3.0])
    # a·b = −2: a keeps a + 2/10 b, b keeps b + 2/5 a
    assert torch.allclose(combine([a, b]), (a + 0.2 * b + b + 0.4 * a).double(), atol=1e-12)
    assert torch.allclose(combine([a, -a]), torch.zeros(3).double(), atol=1e-12)    # nothing is left of a full conflict
    assert torch.equal(combine([a, torch.zeros(3)]), a.double())


def test_orthogonal_and_agreeing_gradients_are_untouched():
    a, b, c = torch.tensor([2.0, 0.0, 0.0]), torch.tensor([0.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 5.0])
    assert pcgrad.projected_sum(np.array([[4.0, 0, 2], [0, 9.0, 3], [2, 3, 27.0]]), (0,)) == [1.0, 1.0, 1.0]
    assert torch.equal(combine([a, b, c]), (a + b + c).double())


def test_the_products_alone_give_algorithm_1_in_every_order():
    draw = torch.Generator().manual_seed(0)
    conflicts = orders_seen = 0
    for trial in range(30):
        vectors = list(torch.randn(4, 6, generator=draw, dtype=torch.float64))
        key = (0, trial, 0)
        orders = [grpo.rng(*key, "pcgrad", i).permutation(4).tolist() for i in range(4)]
        assert torch.allclose(combine(vectors, key), project(vectors, orders), atol=1e-12)
        conflicts += not torch.allclose(project(vectors, orders), sum(vectors))
        orders_seen += not torch.allclose(project(vectors, orders), project(vectors, [o[::-1] for o in orders]))
    assert conflicts > 20 and orders_seen > 5


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_the_update_follows_the_projected_sum_over_all_parameters(norm):
    policy = make_policy()
    batch, args = make_batch(policy, prompts=(3, 2, 1), seed=1), flags(pcgrad, "--loss-norm", norm, "--beta", 0.5)
    batch["domain"] = torch.tensor([DOMAINS.index(d) for d in ("code", "math", "if")])[batch["domain"]]  # not in DOMAINS' order
    grpo.backward(policy, batch, args)
    joint = gradients(policy)
    size = batch["mask"].sum(1) if norm == "token" else torch.ones(24)
    parts = [g * (size[batch["domain"] == k].sum() / size.sum()) for g, k in zip(
        domain_gradients(policy, batch, args), batch["domain"].unique())]
    assert torch.allclose(sum(parts), joint, atol=1e-6)                 # they are the parts of GRPO's gradient
    key = (0, 7, 0)
    orders = [grpo.rng(*key, "pcgrad", i).permutation(3).tolist() for i in range(3)]
    catch = Catch(policy.parameters(), 1e-3)
    stats = pcgrad.update(policy, catch, batch, 1e-3, key, {}, args)
    parts = [g * (size[batch["domain"] == k].sum() / size.sum()) for g, k in zip(
        domain_gradients(make_policy(), batch, args), batch["domain"].unique())]
    assert (catch.seen - project(parts, orders)).norm() < 1e-5 * catch.seen.norm()
    assert stats["cosine/math-code"] == pytest.approx(torch.cosine_similarity(parts[0], parts[1], 0).item(), abs=1e-5)
    assert stats["extra_gradients_gib"] == pytest.approx(2 * joint.numel() * 4 / 2**30)
    assert stats["grad_norm"] == pytest.approx(catch.seen.norm().item(), rel=1e-5)
    assert stats["loss"] == pytest.approx(grpo.backward(make_policy(), batch, args)["loss"], rel=1e-5)


def test_a_conflict_between_domains_is_projected_away():
    """Two domains, the same rows with opposite advantages: GRPO's gradient is 0 but for the KL, so is PCGrad's."""
    policy = make_policy()
    batch, args = make_batch(policy, prompts=(2, 2)), flags(pcgrad, "--beta", 0)
    half = len(batch["ids"]) // 2
    for name in ("ids", "mask", "length", "old_logp", "ref_logp"):
        batch[name] = torch.cat([batch[name][:half]] * 2)
    batch["advantage"] = torch.cat([batch["advantage"][:half], -batch["advantage"][:half]])
    catch = Catch(policy.parameters(), 1e-3)
    stats = pcgrad.update(policy, catch, batch, 1e-3, (0, 1, 0), {}, args)
    one = domain_gradients(make_policy(), batch, args)[0]
    assert stats["cosine/math-code"] == pytest.approx(-1) and catch.seen.norm() < 1e-5 * one.norm()


# ---------------- FAMO ----------------

def test_the_weights_by_hand_over_three_batches():
    """q = (z/ℓ)/Σ(z/ℓ); w by Adam on J_softmax(z)ᵀ(log ℓ_prev − log ℓ_now), computed here with the Jacobian written out."""
    args = flags(famo, "--famo-smooth", 0, "--famo-decay", 0.1)
    state = famo.init_state(args, None)
    w = torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([w], 0.025, weight_decay=0.1)
    names, last = ["math", "code", "if"], None
    for losses in ([1.0, 2.0, 0.5], [0.8, 2.0, 0.6], [0.4, 1.9, 0.6]):
        now = torch.tensor(losses)
        z = torch.softmax(w.detach(), 0)
        w.grad = (torch.diag(z) - z[:, None] * z) @ (torch.log(last / now) if last is not None else torch.zeros(3))
        adam.step()
        z = torch.softmax(w.detach(), 0)
        q = famo.domain_weights(dict(zip(names, losses)), True, state, args)
        assert list(q) == names and list(q.values()) == pytest.approx((z / now / (z / now).sum()).tolist(), rel=1e-5)
        assert sum(q.values()) == pytest.approx(1)
        last = now
    assert w[0] < w[1]                                                  # math improved the most and lost weight


def test_a_domain_that_is_absent_keeps_its_loss_its_logit_and_its_moments():
    args = flags(famo, "--famo-decay", 0.1)
    state = famo.init_state(args, None)
    famo.domain_weights({"math": 1.0, "code": 2.0}, True, state, args)
    famo.domain_weights({"math": 0.7, "code": 1.9}, True, state, args)
    kept = (state["loss"]["math"], state["w"]["math"].item(), state["w_optimizer"].state[state["w"]["math"]]["exp_avg"].item())
    assert kept[1] != 0 and kept[2] != 0
    q = famo.domain_weights({"code": 1.5, "writing": 1.0}, True, state, args)
    assert kept == (state["loss"]["math"], state["w"]["math"].item(), state["w_optimizer"].state[state["w"]["math"]]["exp_avg"].item())
    assert q.keys() == {"code", "writing"} and state["w"]["if"] == 0 and "if" not in state["loss"]


@pytest.mark.parametrize("norm, beta", [("sequence", 0.001), ("token", 0), ("constant", 0.5)])
def test_one_backward_pass_gives_the_weighted_sum_of_the_domains_gradients(norm, beta):
    policy = make_policy()
    batch, args = make_batch(policy, prompts=(3, 2, 1), seed=1), flags(famo, "--loss-norm", norm, "--beta", beta, "--reward-max", 3)
    batch["reward"] = 1.5 * batch["reward"] - 0.5                       # not the 0 and 1 of "correct"
    parts = domain_gradients(policy, batch, args)
    catch = Catch(policy.parameters(), 1e-3)
    stats = famo.update(policy, catch, batch, 1e-3, (0, 1, 0), famo.init_state(args, policy), args)
    losses = [3.0 - batch["reward"][batch["domain"] == k].mean().item() for k in range(3)]
    q = [1 / loss / sum(1 / x for x in losses) for loss in losses]      # w = 0 at first
    assert [stats[f"domain_weight/{d}"] for d in ("math", "code", "science")] == pytest.approx(q)
    assert (catch.seen - sum(a * g for a, g in zip(q, parts))).norm() < 1e-6 * catch.seen.norm()


def test_smoothing_keeps_a_share_of_the_last_loss():
    args = flags(famo, "--famo-smooth", 0.75)
    state = famo.init_state(args, None)
    famo.domain_weights({"math": 1.0}, True, state, args)
    famo.domain_weights({"math": 0.6}, True, state, args)
    assert state["loss"]["math"] == pytest.approx(0.9)


def test_w_steps_once_a_rollout_by_what_all_its_mini_batches_showed():
    """Mini-batches of one rollout were sampled by one policy: what differs between them is no improvement."""
    args = flags(famo, "--famo-smooth", 0)
    state = famo.init_state(args, None)
    famo.domain_weights({"math": 1.0, "code": 1.0}, True, state, args)
    famo.domain_weights({"math": 0.5, "code": 1.0}, False, state, args)
    assert all(w == 0 for w in state["w"].values()) and state["loss"]["math"] == 0.5 and state["compared"]["math"] == 1.0
    famo.domain_weights({"math": 0.8, "code": 1.0}, True, state, args)  # 1.0 → 0.8: math improved and loses weight
    assert state["w"]["math"] < 0 < state["w"]["code"] and state["compared"]["math"] == 0.8

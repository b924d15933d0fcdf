"""CGPO against its paper: Eq. 5, the shares of Algorithm 1, and GRPO as its one-domain case."""

import itertools

import pytest
import torch

import cgpo
import grpo
from conftest import gradients, make_batch, make_policy, parameters


def flags(*extra):
    return cgpo.parse_args(["--beta", "0", "--max-grad-norm", "0", *extra])


def domains_in_order(batch, key, order="random") -> list[int]:
    """The domain of each sub-step's first row."""
    sub_steps = cgpo.sub_batches(batch, key, order)
    return [int(batch["domain"][row_B][0]) for row_B, _ in sub_steps]


# ---------------- the expansion of Eq. 5 ----------------


def flatten(tensors) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def surrogate(policy, batch, k: int):
    """L_k by its formula, from the model's own logits: a function that can be derived twice."""
    total = 0.0
    rows = (batch["domain"] == k).nonzero()[:, 0].tolist()
    for b in rows:
        start, end = int(batch["mask"][b].int().argmax()), int(batch["length"][b])
        logits_TV = policy.model(batch["ids"][b : b + 1, :end]).logits[0]
        positions = torch.arange(start - 1, end - 1)
        logp_T = torch.log_softmax(logits_TV, -1)[positions, batch["ids"][b, start:end]]
        ratio_T = torch.exp(logp_T - batch["old_logp"][b, start:end])
        total = total - (ratio_T * batch["advantage"][b, start]).mean() / len(rows)
    return total


@pytest.fixture(scope="module")
def expansion():
    """(batch, g, Hg, ascent) at φ_0, in float64, of three domains with equally many prompts.

    g[k]: the gradient g_k. Hg[i, j]: the product H_i g_j. ascent: ∇ Σ_{i<j} g_i·g_j.
    """
    policy = make_policy(dtype=torch.float64)
    policy.model.set_attn_implementation("eager")  # the fused kernel has no second derivative
    batch = make_batch(policy, prompts=(1, 1, 1), group=4, dtype=torch.float64, seed=3)
    batch["reward"] = torch.tensor([0.0, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 1]).double()
    batch["advantage"] = cgpo.advantages(batch, {}, flags()).double()
    weights = list(policy.parameters())

    def derivative(scalar, **options):
        return flatten(torch.autograd.grad(scalar, weights, **options))

    graphs = [derivative(surrogate(policy, batch, k), create_graph=True) for k in range(3)]
    g = [graph.detach() for graph in graphs]
    Hg = {}
    for i in range(3):
        for j in range(3):
            Hg[i, j] = derivative(graphs[i] @ g[j], retain_graph=True)
    inner_products = sum(graphs[i] @ graphs[j] for i, j in itertools.combinations(range(3), 2))
    return batch, g, Hg, derivative(inner_products, retain_graph=True)


def sgd_step(batch, lr, key, *extra):
    """Displacement of one cgpo update by plain SGD from the fixed float64 start."""
    policy = make_policy(dtype=torch.float64)
    start = parameters(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr)
    cgpo.update(policy, optimizer, batch, lr, key, {}, flags(*extra))
    return parameters(policy) - start


def second_order_sum(Hg, sigma):
    """Σ_{l<k} H_σ(k) g_σ(l): what Eq. 5's second order holds."""
    return sum(Hg[sigma[k], sigma[m]] for k in range(3) for m in range(k))


def test_equation_5_holds_to_third_order(expansion):
    batch, g, Hg, _ = expansion
    assert all(g_k.norm() > 0 for g_k in g)
    key, alpha, K = (0, 1, 0), 1.2, 3
    sigma = domains_in_order(batch, key)
    errors = []
    for eta in (2e-3, 1e-3, 5e-4):
        first = -alpha * eta / K * sum(g)
        second = alpha * eta**2 / K**2 * second_order_sum(Hg, sigma)
        moved = sgd_step(batch, eta, key)
        errors.append((moved - first - second).norm().item())
        assert errors[-1] < 0.5 * (moved - first).norm()  # the second order explains what is left
    slopes = [torch.log2(torch.tensor(a / b)).item() for a, b in itertools.pairwise(errors)]
    assert min(slopes) >= 2.8


def test_the_mean_over_orders_climbs_the_gradients_inner_products(expansion):
    batch, g, Hg, ascent = expansion
    orders = list(itertools.permutations(range(3)))
    mean = sum(second_order_sum(Hg, sigma) for sigma in orders) / len(orders)
    assert torch.allclose(mean, ascent / 2, rtol=1e-9, atol=1e-12)

    # The code's own orders do it.
    key_of_order = {}
    for step in range(200):
        key = (0, step, 0)
        key_of_order.setdefault(tuple(domains_in_order(batch, key)), key)
    assert sorted(key_of_order) == orders  # every order occurs
    eta = 1e-3
    moved = sum(sgd_step(batch, eta, key, "--alpha", "1") for key in key_of_order.values()) / 6
    second = (moved + eta / 3 * sum(g)) / (eta**2 / 9)
    assert (second - ascent / 2).norm() < 0.02 * ascent.norm()


# ---------------- Algorithm 1 ----------------


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
def test_one_domain_and_alpha_1_is_grpo_bit_for_bit(norm):
    moved = {}
    for module, extra in ((grpo, []), (cgpo, ["--alpha", "1"])):
        policy = make_policy()
        batch = make_batch(policy, prompts=(5,))
        args = module.parse_args(["--loss-norm", norm, *extra])
        optimizer = torch.optim.AdamW(policy.parameters(), 1e-2)
        for step in range(3):
            module.update(policy, optimizer, batch, 1e-2, (0, step, 0), {}, args)
        moved[module] = parameters(policy)
    assert torch.equal(moved[grpo], moved[cgpo])
    assert not torch.equal(moved[grpo], parameters(make_policy()))


class RecordingAdamW(torch.optim.AdamW):
    """Keeps the learning rate of each step."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.rates = []

    def step(self, closure=None):
        self.rates.append(self.param_groups[0]["lr"])
        return super().step(closure)


def test_unequal_domains_scale_the_learning_rate_under_adamw():
    distance = {}
    for scaled in ("lr", "loss"):
        policy = make_policy()
        batch = make_batch(policy, prompts=(5, 2, 1))
        optimizer = RecordingAdamW(policy.parameters(), 1e-3, weight_decay=0.0)
        start = parameters(policy)
        key, args = (0, 1, 0), flags("--domain-weight", scaled, "--alpha", "1")
        cgpo.update(policy, optimizer, batch, 1e-3, key, {}, args)
        expected_rates = [1e-3, 1e-3, 1e-3]
        if scaled == "lr":
            shares = (5 / 8, 2 / 8, 1 / 8)
            expected_rates = [1e-3 * shares[k] for k in domains_in_order(batch, key)]
        assert optimizer.rates == pytest.approx(expected_rates)
        distance[scaled] = (parameters(policy) - start).norm()
    # Adam undoes a scaled loss: K full steps instead of one
    assert distance["loss"] > 1.5 * distance["lr"]


def test_orders():
    policy = make_policy()
    batch = make_batch(policy, prompts=(3, 2, 1))
    assert domains_in_order(batch, (0, 5, 0), "fixed") == [0, 1, 2]
    mixed = [row_B for row_B, _ in cgpo.sub_batches(batch, (0, 5, 0), "mixed")]
    assert torch.stack(mixed).sum(0).eq(1).all()  # every row in one sub-batch
    assert [len(batch["group"][row_B].unique()) for row_B in mixed] == [3, 2, 1]
    assert any(len(batch["domain"][row_B].unique()) > 1 for row_B in mixed)


# ---------------- cosines of the domains' gradients ----------------


def test_cosines_leave_no_gradient_behind():
    policy = make_policy()
    batch = make_batch(policy, prompts=(2, 2, 2))
    cosines = cgpo.domain_cosines(policy, batch, flags())
    assert len(cosines) == 3
    assert all(-1 <= cosine <= 1 for cosine in cosines.values())
    assert all(p.grad is None for p in policy.parameters())
    grpo.backward(policy, grpo.take(batch, batch["domain"] == 0), flags())
    math = gradients(policy)
    grpo.backward(policy, grpo.take(batch, batch["domain"] == 1), flags())
    code = gradients(policy)
    expected = (math @ code / math.norm() / code.norm()).item()
    assert cosines["cosine/math-code"] == pytest.approx(expected, abs=1e-5)


def test_a_domain_without_gradient_has_no_cosine():
    policy = make_policy()
    batch = make_batch(policy, prompts=(2, 2, 2))
    batch["advantage"][batch["domain"] == 1] = 0
    cosines = cgpo.domain_cosines(policy, batch, flags())
    assert list(cosines) == ["cosine/math-science"]
    assert -1 <= cosines["cosine/math-science"] <= 1


def test_a_group_of_one_is_refused(capsys):
    with pytest.raises(SystemExit):
        flags("--group-size", "1")
    assert "an advantage needs at least 2 responses" in capsys.readouterr().err

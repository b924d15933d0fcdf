"""MCPO against its header: the loss by explicit loops, exact gradients in any pieces, GRPO where both λ are 0."""
import copy

import pytest
import torch

import grpo
import mcpo
from conftest import gradients, make_batch, make_policy, parameters


def flags(*extra):
    return mcpo.parse_args(["--max-grad-norm", "0", *map(str, extra)])


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def setup(architecture="gpt2", *extra, **kwargs):
    """(policy, batch of three domains, state, args)"""
    dtype = torch.get_default_dtype()
    args, policy = flags(*extra), make_policy(architecture, dtype)
    batch = make_batch(policy, dtype=dtype, **{"prompts": (2, 2, 1), "seed": 3, **kwargs})
    return policy, batch, mcpo.init_state(args, policy), args


def one_graph(policy, batch, head, args, norm="sequence"):
    """(L_GRPO + λ_cross L_cross + λ_in L_in, the last two by name) in one graph, pair by pair, over unpadded rows."""
    B, h, grpo_loss = len(batch["ids"]), [], 0.0
    for b in range(B):
        n, start = int(batch["length"][b]), int(batch["mask"][b].int().argmax())
        hidden = policy.model.base_model(batch["ids"][b:b + 1, :n]).last_hidden_state[0]
        h.append(hidden[start:].mean(0))
        logp = torch.log_softmax(policy.model.lm_head(hidden[start - 1:-1]), -1)[range(n - start), batch["ids"][b, start:n]]
        ratio, ref = torch.exp(logp - batch["old_logp"][b, start:n]), batch["ref_logp"][b, start:n] - logp
        A = batch["advantage"][b, start]
        each = -torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A) + args.beta * (ref.exp() - ref - 1)
        grpo_loss = grpo_loss + each.sum() / {"sequence": B * len(each), "token": int(batch["mask"].sum()),
                                              "constant": B * args.max_new_tokens}[norm]
    z = [head(x) / head(x).norm() for x in h]
    right, domain, group = batch["correct"].tolist(), batch["domain"].tolist(), batch["group"].tolist()
    groups, terms = len(set(group)), {"cross": [], "in": []}
    for i in (i for i in range(B) if right[i]):
        pool = sorted((n for n in range(B) if not right[n]), key=lambda n: (group[n] - group[i]) % groups)[:args.pool_size]
        others = sorted((j for j in range(B) if right[j] and domain[j] != domain[i]),
                        key=lambda j: -torch.cosine_similarity(h[i], h[j], 0).item())[:args.top_k]
        for name, positives in (("cross", others), ("in", [j for j in range(B) if right[j] and domain[j] == domain[i] and j != i])):
            for j in positives:
                e = lambda k: torch.exp(z[i] @ z[k] / args.tau)  # noqa: B023, E731
                terms[name] += [-torch.log(e(j) / (e(j) + sum(e(n) for n in pool)))] if pool else []
    losses = {name: sum(found) / max(1, len(found)) for name, found in terms.items()}
    return grpo_loss + args.lambda_cross * losses["cross"] + args.lambda_in * losses["in"], losses


@pytest.mark.parametrize("extra", [(), ("--lambda-in", 0), ("--lambda-cross", 0, "--tau", 0.5, "--loss-norm", "token"),
                                   ("--top-k", 1, "--pool-size", 2, "--loss-norm", "constant")])
def test_gradients_are_those_of_one_graph_for_any_micro_batch(extra, architecture, float64):
    """For the policy and for the head, whether the h are reused or made anew (then old_h is rubbish here)."""
    policy, batch, state, args = setup(architecture, "--lambda-cross", 3, "--lambda-in", 2, *extra)
    batch["old_logp"] = batch["old_logp"] + 0.05 * torch.randn(batch["old_logp"].shape) * batch["mask"]
    head = state["head"]
    loss, losses = one_graph(policy, batch, head, args, args.loss_norm)
    loss.backward()
    expected, head_expected = gradients(policy), gradients(head)
    grpo.backward(policy, batch, args)
    assert (gradients(policy) - expected).norm() > 0.3 * expected.norm()  # the contrast is a large part of it
    for budget, mini in ((10**6, 0), (40, 0), (1, 0), (10**6, 1), (30, 1)):
        state = {"head": copy.deepcopy(head)}
        state["head_optimizer"] = torch.optim.SGD(state["head"].parameters(), 1.0)
        args.micro_batch_tokens = budget
        given = batch if mini == 0 else batch | {"old_h": torch.randn_like(batch["old_h"])}
        h_gradient, found = mcpo.pool_gradient(policy, given, (0, 1, mini), state, args)
        stats = mcpo.backward(policy, batch | {"h_gradient": h_gradient}, args)
        assert (gradients(policy) - expected).norm() < 1e-6 * expected.norm()
        moved = parameters(head) - parameters(state["head"])
        assert (moved - head_expected).norm() < 1e-6 * head_expected.norm()
        for name, value in losses.items():
            assert found.get(f"contrast/{name}/loss", 0) == pytest.approx(
                value.item() if f"contrast/{name}/loss" in found else 0, rel=1e-5)
        assert ("contrast/in/loss" in found, "contrast/cross/loss" in found) == (args.lambda_in > 0, args.lambda_cross > 0)
        assert stats["loss"] == pytest.approx(grpo.backward(policy, batch, args)["loss"], abs=1e-6)  # GRPO's: the term is 0
        policy.zero_grad(set_to_none=True)


def test_lambda_0_is_grpo_bit_for_bit():
    results = []
    for module, extra in ((grpo, []), (mcpo, ["--lambda-cross", "0", "--lambda-in", "0"])):
        policy = make_policy()
        batch, args = make_batch(policy), module.parse_args(extra)
        state, optimizer = module.init_state(args, policy), torch.optim.AdamW(policy.parameters(), 1e-2)
        assert state == {}
        for step in range(3):
            module.update(policy, optimizer, batch, 1e-2, (0, step, 0), state, args)
        results.append(parameters(policy))
    assert torch.equal(*results)


def test_a_run_without_lambda_is_grpos_run_and_with_it_is_not(toy, tmp_path):
    from test_runs import metrics
    common = ["--steps", "3", "--lr", "1e-3", "--mini-batch-prompts", "10", "--eval-samples", "1"]
    a = metrics(grpo.main([*common, "--out", str(tmp_path / "a")]))
    b = metrics(mcpo.main([*common, "--out", str(tmp_path / "b"), "--lambda-cross", "0", "--lambda-in", "0"]))
    c = metrics(mcpo.main([*common, "--out", str(tmp_path / "c")]))
    assert a == b and a != c and c[3]["contrast/in/anchors"] > 0.9


def test_the_contrast_alone_moves_the_policy_and_its_rows_are_kept():
    """Every advantage is 0: with β = 0 GRPO would have no row left; rows out of everyone's pool are left out."""
    policy, batch, state, args = setup("gpt2", "--beta", 0, "--zero-advantage", "drop", "--pool-size", 1)
    batch["advantage"] = torch.zeros_like(batch["advantage"])
    h_gradient, _ = mcpo.pool_gradient(policy, batch, (0, 1, 0), state, args)
    batch |= {"h_gradient": h_gradient}
    kept = mcpo.moves_the_policy(batch)
    assert torch.equal(kept, (h_gradient != 0).any(2)[:, 0]) and kept[batch["correct"]].all() and 0 < (~kept).sum()
    found = {}
    for rule in ("keep", "drop"):
        args.zero_advantage = rule
        mcpo.backward(policy, batch, args)
        found[rule] = gradients(policy)
    assert found["keep"].norm() > 0 and (found["keep"] - found["drop"]).norm() < 1e-6 * found["keep"].norm()
    before = parameters(policy)
    mcpo.update(policy, torch.optim.AdamW(policy.parameters(), 1e-3), batch, 1e-3, (0, 1, 0), state, args)
    assert not torch.equal(before, parameters(policy))


@pytest.mark.parametrize("correct, domain, terms", [
    ([1] * 8, [0, 0, 0, 0, 1, 1, 1, 1], []), ([0] * 8, [0, 0, 0, 0, 1, 1, 1, 1], []),            # no negative; no anchor
    ([1, 0, 0, 0, 0, 0, 0, 0], [0] * 8, []), ([1, 0, 0, 0, 1, 0, 0, 0], [0] * 8, ["in"]),        # no positive; one domain
    ([1, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1, 1], ["cross"])])
def test_anchors_without_a_positive_or_a_negative_count_for_nothing(correct, domain, terms):
    args = flags()
    head = mcpo.init_state(args, make_policy())["head"]
    h_BH = torch.randn(8, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    place = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    loss, found = mcpo.contrast(head, h_BH, torch.tensor(correct).bool(), torch.tensor(domain), place, args)
    loss.backward()
    assert h_BH.grad.isfinite().all() and bool(h_BH.grad.any()) == bool(terms) and loss.isfinite()
    assert all(value == value for value in found.values())
    assert [name for name in ("cross", "in") if found[f"contrast/{name}/loss"] > 0] == terms
    if not terms:
        assert loss == 0 and found.get("contrast/in/anchors", 0) == found.get("contrast/cross/anchors", 0) == 0


def test_positives_and_the_pool_by_hand():
    """Unit vectors in a plane and no head: cosines are differences of angles. One anchor's loss, written out."""
    angle = torch.deg2rad(torch.tensor([0.0, 50, 10, 80, 20, 170, 100, 30]))
    h_BH = torch.stack([angle.cos(), angle.sin()], 1)
    correct = torch.tensor([1, 0, 0, 1, 1, 0, 0, 1]).bool()
    place = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])                      # prompts 0, 1 of domain 0; 2, 3 of domain 1
    domain = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    args = flags("--top-k", 1, "--pool-size", 2, "--tau", 1)
    _, found = mcpo.contrast(torch.nn.Identity(), h_BH, correct, domain, place, args)
    cos = lambda a, b: torch.cos(torch.deg2rad(torch.tensor(float(a - b))))  # noqa: E731
    # anchors and their nearest correct one of the other domain; their pool: own prompt's wrong ones, then the next prompts'
    cases = [(0, 20, (50, 10)), (80, 30, (10, 170)), (20, 0, (170, 100)), (30, 0, (100, 50))]
    expected = [-torch.log(cos(i, j).exp() / (cos(i, j).exp() + sum(cos(i, n).exp() for n in pool))) for i, j, pool in cases]
    assert found["contrast/cross/loss"] == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    assert found["contrast/cross/positive"] == pytest.approx(torch.stack([cos(i, j) for i, j, _ in cases]).mean().item(), rel=1e-5)
    across = [cos(80, 170), cos(30, 50)]                                # the negatives of another domain than the anchor's
    within = [cos(0, 50), cos(0, 10), cos(80, 10), cos(20, 170), cos(20, 100), cos(30, 100)]
    assert found["contrast/cross/negative"] == pytest.approx(torch.stack(across).mean().item(), rel=1e-5)
    assert found["contrast/in/negative"] == pytest.approx(torch.stack(within).mean().item(), rel=1e-4, abs=1e-5)
    assert found["contrast/in/positive"] == pytest.approx(torch.stack([cos(0, 80), cos(20, 30)]).mean().item(), rel=1e-5)
    assert found["contrast/cross/anchors"] == found["contrast/in/anchors"] == 1


def test_the_cross_loss_falls_step_by_step_on_a_planted_example():
    """Correct responses of two domains share a token, incorrect ones another: the policy can tell them apart."""
    policy, batch, state, args = setup("gpt2", "--beta", 0, "--lambda-in", 0, "--lambda-cross", 1, prompts=(2, 2))
    batch["advantage"] = torch.zeros_like(batch["advantage"])
    batch["ids"] = torch.where(batch["mask"], torch.where(batch["correct"], 7, 11)[:, None], batch["ids"])
    state["head_optimizer"] = torch.optim.SGD(state["head"].parameters(), 0.0)     # all of it is the policy's doing
    optimizer = torch.optim.SGD(policy.parameters(), 0)
    falls = [mcpo.update(policy, optimizer, batch, 0.05, (0, step, 1), state, args)["contrast/cross/loss"] for step in range(12)]
    assert all(b < a for a, b in zip(falls, falls[1:])) and falls[-1] < 0.5 * falls[0]


def test_the_head_has_a_clip_and_a_rate_of_its_own():
    """Outside the policy's norm; its rate is --head-lr; its start is the seed's."""
    policy, batch, state, args = setup("gpt2", "--max-grad-norm", 1e-3, "--head-lr", 0.5, "--lambda-in", 5)
    assert state["head_optimizer"].param_groups[0]["lr"] == 0.5
    start = parameters(state["head"])
    state["head_optimizer"] = torch.optim.SGD(state["head"].parameters(), 1.0)
    twin = copy.deepcopy(state["head"])
    h_gradient, _ = mcpo.pool_gradient(policy, batch, (0, 1, 0), {
        "head": twin, "head_optimizer": torch.optim.SGD(twin.parameters(), 0.0)}, args)
    mcpo.backward(policy, batch | {"h_gradient": h_gradient}, args)
    expected = gradients(policy).norm()
    stats = mcpo.update(policy, torch.optim.SGD(policy.parameters(), 0.0), batch, 0.0, (0, 1, 0), state, args)
    assert (parameters(state["head"]) - start).norm() == pytest.approx(1e-3, rel=1e-3)
    assert stats["grad_norm"] == pytest.approx(expected.item(), rel=1e-5)
    again, other = (mcpo.init_state(flags("--seed", seed), policy)["head"] for seed in (0, 1))
    assert torch.equal(parameters(again), start) and not torch.equal(parameters(other), start)


def test_a_steps_first_mini_batch_needs_no_pass_of_its_own(monkeypatch):
    policy, batch, state, args = setup()
    calls, honest = [], mcpo.log_probs
    monkeypatch.setattr(mcpo, "log_probs", lambda *rest: (calls.append(1), honest(*rest))[1])
    for mini, count in ((0, 0), (1, 1), (2, 2)):
        mcpo.update(policy, torch.optim.AdamW(policy.parameters(), 1e-3), batch, 1e-3, (0, 1, mini), state, args)
        assert len(calls) == count


def test_the_head_is_kept_by_the_trainer_and_not_exported(toy, tmp_path):
    from safetensors.torch import load_file
    out = mcpo.main(["--steps", "1", "--eval-prompts", "0", "--out", str(tmp_path / "run")])
    kept = torch.load(out / "checkpoint/trainer.pt", weights_only=True)["state"]
    assert {k: v.shape for k, v in kept["head"].items()} == {"0.weight": (256, 128), "0.bias": (256,), "2.weight": (128, 256), "2.bias": (128,)}
    assert len(kept["head_optimizer"]["state"]) == 4
    assert load_file(out / "checkpoint/model.safetensors").keys() == load_file(f"{toy}/model.safetensors").keys()

"""The laptop's sampler: it follows the policy's distribution, and depends on nothing else."""

import pytest
import torch
from transformers import LogitsProcessor, MambaConfig, MambaForCausalLM

import grpo
from common import sampler
from common.errors import UserError
from conftest import make_policy
from sources.toy import toy_tokenizer


def test_the_sampler_follows_the_policys_distribution(architecture):
    """Frequencies of the first token against the softmax; log-probs against a forward pass."""
    policy = make_policy(architecture)
    prompts = [[5, 6, 7], [8]]
    N = 4000
    uniform = torch.rand(2 * N, 3, generator=torch.Generator().manual_seed(1))
    responses = sampler.generate(policy, prompts, uniform, 1.0)
    for p, prompt in enumerate(prompts):
        with torch.no_grad():
            logits = policy.model(torch.tensor([prompt])).logits[0, -1]
        expected = torch.softmax(logits, -1)
        first_tokens = torch.tensor([ids[0] for ids, _, _ in responses[p * N : (p + 1) * N]])
        frequencies = torch.bincount(first_tokens, minlength=40) / N
        assert (frequencies - expected).abs().max() < 0.03
    for b in (0, 1, N, 2 * N - 1):
        prompt = prompts[b // N]
        tokens, logps, _ = responses[b]
        ids = torch.tensor([prompt + tokens])
        mask = torch.arange(ids.shape[1])[None] >= len(prompt)
        own_logp = policy(ids, mask)[0][0, mask[0]]
        assert torch.allclose(own_logp, torch.tensor(logps), atol=1e-4)
    for tokens, _, truncated in responses:
        assert 0 not in tokens[:-1]  # nothing after the end token
        assert truncated == (tokens[-1] != 0)


def test_samples_do_not_depend_on_the_rest_of_the_batch_and_transformers_generate_agrees(
    architecture,
):
    policy = make_policy(architecture)
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    uniform = torch.rand(12, 6, generator=torch.Generator().manual_seed(2))
    responses = sampler.generate(policy, prompts, uniform, 1.0)
    alone = sampler.generate(policy, prompts[1:2], uniform[4:8], 1.0)
    assert [tokens for tokens, _, _ in alone] == [tokens for tokens, _, _ in responses[4:8]]

    class Inverse(LogitsProcessor):
        """The same random numbers, in transformers' generate."""

        def __call__(self, ids, scores):
            token, _ = sampler.sample(scores, uniform[:, ids.shape[1] - 5], 1.0)
            return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)

    ids = torch.tensor([[0] * (5 - len(p)) + p for p in prompts]).repeat_interleave(4, 0)
    mask = torch.tensor([[0] * (5 - len(p)) + [1] * len(p) for p in prompts])
    generated = policy.model.generate(
        ids,
        attention_mask=mask.repeat_interleave(4, 0),
        logits_processor=[Inverse()],
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=[0],
        pad_token_id=0,
    )[:, 5:].tolist()
    for theirs, (ours, _, _) in zip(generated, responses, strict=True):
        assert theirs[: len(ours)] == ours


def test_a_token_is_where_the_cumulative_distribution_passes_the_number():
    """The same token as by a plain sum in float64, and never an impossible one."""
    generator = torch.Generator().manual_seed(3)
    vocab = 3 * sampler.BLOCK + 17
    logits = 4 * torch.randn(200, vocab, generator=generator)
    logits[:, sampler.BLOCK : 2 * sampler.BLOCK] = -torch.inf  # a whole block, and the last tokens
    logits[:, -20:] = -torch.inf
    uniform = torch.rand(200, generator=generator, dtype=torch.float64)
    uniform[0], uniform[1] = 0.0, 1 - 2**-53
    tokens, logps = sampler.sample(logits, uniform, 0.7)
    expected = torch.log_softmax(logits.double() / 0.7, 1)
    cumulative = expected.exp().cumsum(1)
    for b, token in enumerate(tokens.tolist()):
        before = cumulative[b, token - 1].item() if token else 0.0
        assert before - 1e-6 <= uniform[b] <= cumulative[b, token] + 1e-6
        assert logits[b, token] > -torch.inf
        assert logps[b].item() == pytest.approx(expected[b, token].item(), abs=1e-5)
    greedy, logps = sampler.sample(logits, uniform, 0.0)
    assert torch.equal(greedy, logits.argmax(1))
    own = torch.log_softmax(logits.double(), 1).gather(1, greedy[:, None])[:, 0]
    assert torch.allclose(logps.double(), own, atol=1e-5)


def test_the_models_own_attention_is_back_after_sampling(architecture):
    policy = make_policy(architecture)
    own = policy.model.config._attn_implementation
    used = set()
    hook = policy.model.register_forward_hook(
        lambda *call: used.add(policy.model.config._attn_implementation)
    )
    sampler.generate(policy, [[5, 6], [7]], torch.rand(4, 3, dtype=torch.float64), 1.0)
    hook.remove()
    assert used == {sampler.GROUPED}
    assert policy.model.config._attn_implementation == own == "sdpa"


def test_an_unknown_cache_is_refused():
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=40, state_size=4)
    policy = grpo.Policy(MambaForCausalLM(config).eval(), 40, [0])
    with pytest.raises(UserError, match="not a plain KV cache"):
        sampler.generate(policy, [[5, 6, 7]], torch.rand(3, 6), 1.0)


def test_rollout_keeps_every_end_token_and_duplicate_rows_get_their_own_samples():
    policy = make_policy()
    policy.stop_ids = [0, 3]  # as Qwen: two ids end a turn
    tokenizer = toy_tokenizer()
    args = grpo.parse_args(["--max-new-tokens", "5"])
    row = {"id": "a", "domain": "math", "prompt": "?", "answer": "1", "ids": [5, 6], "opened": ""}

    batch, _, _, _ = grpo.rollout(policy, tokenizer, [row, row], 4, (0, 1), 1.0, args)
    texts = {tuple(ids[mask].tolist()) for ids, mask in zip(batch["ids"], batch["mask"])}
    assert len(texts) >= 7

    batch, _, _, _ = grpo.rollout(policy, tokenizer, [row] * 16, 8, (0, 1), 1.0, args)
    stopped = {0: 0, 3: 0}  # end token → responses that end with it
    for ids, mask, truncated in zip(batch["ids"], batch["mask"], batch["truncated"].tolist()):
        response = ids[mask].tolist()
        assert truncated == (response[-1] not in (0, 3))
        assert not {0, 3} & set(response[:-1])
        assert len(response) == 5 or not truncated
        if not truncated:
            stopped[response[-1]] += 1
    assert min(stopped.values()) > 3  # both end tokens were met

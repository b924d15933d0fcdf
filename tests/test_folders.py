"""Models' folders and checkpoints that are damaged, incomplete or of another model."""

import datetime
import json
import os
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

import grpo
import sft
from common import checkpoints, models
from common.errors import UserError
from helpers import ROOT

YESTERDAY = (datetime.date.today() - datetime.timedelta(days=1)).isoformat()
EMBEDDING = "transformer.wte.weight"
TRAINING = ["--data", "toy", "--batch-prompts", "4", "--mini-batch-prompts", "4"]
SFT_ROW = '{"domain": "math", "prompt": "1 + 1 =", "response": "2", "answer": "2"}\n'
TRAINING += ["--group-size", "4", "--save-every", "1", "--eval-prompts", "1"]


@pytest.fixture
def folder(toy, tmp_path):
    """A copy of the toy's folder."""
    shutil.copytree(toy, tmp_path / "model")
    return tmp_path / "model"


def change_weights(folder, change) -> None:
    """Write the folder's weights again, after change(name → tensor)."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def renamed(prefix):
    """A change of weights: every name gets a prefix."""
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


# ---------------- weights that do not fit their model ----------------


def without_a_tensor(weights):
    weights.pop("transformer.h.0.ln_1.weight")
    return weights


def with_a_tensor(weights):
    return {**weights, "extra.weight": torch.zeros(2)}


def with_another_shape(weights):
    return {**weights, "transformer.ln_f.weight": torch.zeros(3)}


def without_a_name(weights):
    return {f"w{i}": tensor for i, tensor in enumerate(weights.values())}


MISFITS = {
    without_a_tensor: "no tensor transformer.h.0.ln_1.weight",
    with_a_tensor: "a tensor extra.weight",
    with_another_shape: r"transformer.ln_f.weight has the shape \[3\]",
    without_a_name: "more of such faults",
}


@pytest.mark.parametrize("change", MISFITS, ids=lambda change: change.__name__)
def test_no_weight_is_random(folder, change):
    change_weights(folder, change)
    with pytest.raises(UserError, match=MISFITS[change]):
        models.load_model(str(folder))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_what_wrappers_put_before_names_is_left_out(folder, toy, prefix, capsys):
    change_weights(folder, renamed(prefix))
    _, model, _ = models.load_model(str(folder))
    _, expected, _ = models.load_model(str(toy))
    weights = model.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(weights[name], tensor), name
    assert prefix in capsys.readouterr().out


def test_the_hubs_old_layout_is_read(folder, toy):
    def old(weights):
        weights = {name.removeprefix("transformer."): weights[name] for name in weights}
        weights["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        weights["h.0.attn.masked_bias"] = torch.tensor(-1e4)
        return weights

    change_weights(folder, old)
    _, model, _ = models.load_model(str(folder))
    _, expected, _ = models.load_model(str(toy))
    assert torch.equal(
        model.state_dict()[EMBEDDING],
        expected.state_dict()[EMBEDDING],
    )


# ---------------- files that are damaged or missing ----------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def garbage(path):
    path.write_bytes(b"\x93garbage" * 50)


def no_object(path):
    path.write_text("[]")


DAMAGES = [
    ("model.safetensors", cut),
    ("model.safetensors", empty),
    ("model.safetensors", garbage),
    ("model.safetensors", os.unlink),
    ("config.json", cut),
    ("config.json", empty),
    ("config.json", garbage),
    ("config.json", no_object),
    ("tokenizer.json", cut),
    ("tokenizer.json", garbage),
    ("tokenizer.json", no_object),
]


@pytest.mark.parametrize("name, damage", DAMAGES)
def test_a_damaged_model_is_named_in_one_line(folder, name, damage):
    damage(folder / name)
    with pytest.raises(UserError, match="model") as caught:
        models.load_model(str(folder))
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_folder_without_a_tokenizer_is_refused(folder):
    for path in folder.glob("*token*"):
        path.unlink()
    for path in (*folder.glob("vocab*"), *folder.glob("merges*")):
        path.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        models.load_model(str(folder))


def test_a_script_ends_in_one_line(folder, tmp_path):
    change_weights(folder, without_a_tensor)
    command = [sys.executable, "grpo.py", "--model", str(folder), "--data", "toy"]
    command += ["--steps", "1", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "no tensor transformer.h.0.ln_1.weight" in done.stderr.splitlines()[-1]


# ---------------- saving ----------------


def test_a_checkpoints_files_have_the_permissions_of_new_files(tmp_path):
    old = os.umask(0o027)
    try:
        checkpoints.save_weights(tmp_path, [("w", torch.zeros(2))], 1 << 30)
    finally:
        os.umask(old)
    mode = (tmp_path / "model.safetensors").stat().st_mode
    assert stat.S_IMODE(mode) == 0o640


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """torch wraps the error in a CheckpointException, which is no Exception."""

    def write(folder):
        (folder / "half").write_text("half")
        full = OSError(28, "No space left on device")
        raise CheckpointException("write", {0: (full, None)})

    with pytest.raises(UserError, match="rank 0: .*No space left.*whole checkpoint is kept"):
        checkpoints.save_folder(tmp_path / "checkpoint", "000001", write)
    assert list(tmp_path.iterdir()) == []


def test_a_generation_config_that_transformers_does_not_write_is_kept(folder, tmp_path):
    """do_sample false beside a temperature, as checkpoints on the hub have."""
    config = json.loads((folder / "generation_config.json").read_text())
    config |= {"do_sample": False, "temperature": 0.6, "top_p": 0.95}
    (folder / "generation_config.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    flags = ["--max-prompt-tokens", "16", "--max-new-tokens", "18", "--system-prompt", ""]
    grpo.main([*TRAINING, *flags, "--model", str(folder), "--steps", "1", "--out", str(out)])
    saved = json.loads((out / "checkpoint" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.6
    assert saved["eos_token_id"] == config["eos_token_id"]


def without_room(monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=1 << 20)  # bytes; the toy's takes more
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    return "its disk has 0.0 GiB free, and 2 × 0.0 GiB are needed"


def without_links(monkeypatch):
    def refuse(*arguments, **options):
        raise PermissionError(1, "Operation not permitted")  # as file systems without links do

    monkeypatch.setattr(os, "symlink", refuse)
    return "Operation not permitted"


def without_a_tokenizer_that_saves(monkeypatch):
    def refuse(*arguments, **options):
        raise ValueError("cannot be saved")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", refuse)
    return "cannot be saved"


@pytest.mark.parametrize("script", [grpo, sft])
@pytest.mark.parametrize(
    "fault", [without_room, without_links, without_a_tokenizer_that_saves], ids=lambda f: f.__name__
)
def test_what_cannot_be_saved_is_found_before_the_first_step(
    script, fault, folder, tmp_path, monkeypatch
):
    """The command may be given again when the fault is mended."""
    out = tmp_path / "out"
    rows = tmp_path / "rows.jsonl"
    rows.write_text(SFT_ROW * 8)
    flags = {
        grpo: [*TRAINING, "--max-prompt-tokens", "16", "--max-new-tokens", "18"],
        sft: ["--data", str(rows), "--batch-rows", "4"],
    }[script]
    command = [*flags, "--model", str(folder), "--steps", "1", "--out", str(out)]
    command += ["--system-prompt", ""]
    with monkeypatch.context() as patch:
        message = fault(patch)
        with pytest.raises(UserError, match=message):
            script.main(command)
        assert {path.name for path in out.iterdir()} <= {"args.json", ".lock"}
    script.main(command)
    assert (out / "checkpoint" / "model.safetensors").exists()
    # sft.py has no --resume, so it keeps no optimizer
    assert (out / "checkpoint" / "optimizer").exists() == (script is grpo)
    assert not list(out.glob("trial*"))


# ---------------- resuming from a damaged checkpoint ----------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """The folder of a run of one step."""
    out = tmp_path_factory.mktemp("run") / "out"
    grpo.main([*TRAINING, "--steps", "1", "--out", str(out)])
    return out


CHECKPOINT_DAMAGES = [
    ("trainer.pt", cut),
    ("trainer.pt", empty),
    ("trainer.pt", os.unlink),
    ("optimizer/__0_0.distcp", cut),
    ("optimizer/__0_0.distcp", os.unlink),
    ("optimizer/.metadata", garbage),
    ("model.safetensors", cut),
]


@pytest.mark.parametrize("name, damage", CHECKPOINT_DAMAGES)
def test_a_damaged_checkpoint_is_named_and_left_as_it_is(run_folder, tmp_path, capfd, name, damage):
    out = tmp_path / "out"
    shutil.copytree(run_folder, out, symlinks=True)
    damage(out / "checkpoint" / name)
    lines = (out / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="checkpoint") as caught:
        grpo.main([*TRAINING, "--steps", "2", "--out", str(out), "--resume"])
    assert "\n" not in str(caught.value)
    assert (out / "metrics.jsonl").read_text() == lines
    assert "Traceback" not in capfd.readouterr().err


def test_a_link_to_nothing_is_named_and_costs_no_metrics(run_folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run_folder, out, symlinks=True)
    shutil.rmtree((out / "checkpoint").resolve())
    lines = (out / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="points to checkpoint-000001, which is not there"):
        grpo.main([*TRAINING, "--steps", "2", "--out", str(out), "--resume"])
    assert (out / "metrics.jsonl").read_text() == lines


def test_a_link_that_is_gone_costs_no_checkpoint(run_folder, tmp_path):
    """As after a copy that leaves links out."""
    out = tmp_path / "out"
    shutil.copytree(run_folder, out, symlinks=True)
    (out / "checkpoint").unlink()
    command = [*TRAINING, "--steps", "2", "--out", str(out), "--resume"]
    with pytest.raises(UserError, match="is not there, but checkpoint-000001 is: make the link"):
        grpo.main(command)
    (out / "checkpoint").write_text("checkpoint-000001")
    with pytest.raises(UserError, match="is no folder"):
        grpo.main(command)
    assert (out / "checkpoint-000001" / "trainer.pt").exists()


def test_metrics_that_are_gone_are_told(run_folder, tmp_path, capsys):
    out = tmp_path / "out"
    shutil.copytree(run_folder, out, symlinks=True)
    (out / "metrics.jsonl").unlink()
    grpo.main([*TRAINING, "--steps", "2", "--out", str(out), "--resume"])
    assert (
        "metrics.jsonl lacks lines of steps that are done, up to step 1" in capsys.readouterr().out
    )


@pytest.mark.parametrize("step", [0, -5, 10**9, "x", 1.5])
def test_a_step_that_is_not_the_checkpoints(run_folder, tmp_path, step):
    out = tmp_path / "out"
    shutil.copytree(run_folder, out, symlinks=True)
    path = out / "checkpoint" / "trainer.pt"
    torch.save(torch.load(path, weights_only=True) | {"step": step}, path)
    with pytest.raises(UserError, match="trainer.pt is damaged"):
        grpo.main([*TRAINING, "--steps", "2", "--out", str(out), "--resume"])


@pytest.mark.parametrize("changes", [{"date": "yesterday"}, {"date": 5}, {"history": 3}])
def test_values_in_args_json_that_are_none(run_folder, tmp_path, changes):
    out = tmp_path / "out"
    shutil.copytree(run_folder, out, symlinks=True)
    flags = json.loads((out / "args.json").read_text())
    (out / "args.json").write_text(json.dumps(flags | changes))
    with pytest.raises(UserError, match="args.json is damaged"):
        grpo.main([*TRAINING, "--steps", "2", "--out", str(out), "--resume"])


def test_a_run_that_was_copied_without_links_goes_on_and_saves(run_folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run_folder, out)
    grpo.main([*TRAINING, "--steps", "2", "--out", str(out), "--resume"])
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-000002"]
    assert (out / "checkpoint").is_symlink()
    assert (out / "checkpoint" / "trainer.pt").exists()


def test_two_resumes_at_once(run_folder, tmp_path):
    """The lock dies with its process: when the first is killed, the second is let in."""
    out = tmp_path / "out"
    shutil.copytree(run_folder, out, symlinks=True)
    hold = (
        "import argparse, time\nfrom pathlib import Path\nfrom common import runs\n"
        f"runs.lock(Path({str(out)!r}))\nprint('locked', flush=True)\ntime.sleep(1000)"
    )
    first = subprocess.Popen([sys.executable, "-c", hold], cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match="another process is training there"):
            grpo.main([*TRAINING, "--steps", "2", "--out", str(out), "--resume"])
    finally:
        first.kill()
        first.wait()
        first.stdout.close()
    grpo.main([*TRAINING, "--steps", "2", "--out", str(out), "--resume"])


def test_a_resumed_run_may_change_its_learning_rate_and_says_so(run_folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run_folder, out, symlinks=True)
    grpo.main([*TRAINING, "--steps", "2", "--lr", "0.0001", "--out", str(out), "--resume"])
    flags = json.loads((out / "args.json").read_text())
    assert flags["history"] == ["--lr 0.0005 → 0.0001; --steps 1 → 2"]
    assert flags["lr"] == 0.0001


def test_a_resumed_run_keeps_the_date_of_its_prompts(run_folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run_folder, out, symlinks=True)
    flags = json.loads((out / "args.json").read_text())
    assert flags["date"] in (datetime.date.today().isoformat(), YESTERDAY)
    (out / "args.json").write_text(json.dumps(flags | {"date": "2024-02-03"}))
    grpo.main([*TRAINING, "--steps", "2", "--out", str(out), "--resume"])
    assert json.loads((out / "args.json").read_text())["date"] == "2024-02-03"


def test_fewer_steps_than_are_done(run_folder, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run_folder, out, symlinks=True)
    grpo.main([*TRAINING, "--steps", "2", "--out", str(out), "--resume"])
    with pytest.raises(UserError, match="has done 2 steps already"):
        grpo.main([*TRAINING, "--steps", "1", "--out", str(out), "--resume"])
    assert json.loads((out / "args.json").read_text())["steps"] == 2


@pytest.mark.parametrize("damage", [cut, empty, garbage, no_object])
def test_a_damaged_args_json(run_folder, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(run_folder, out, symlinks=True)
    damage(out / "args.json")
    with pytest.raises(UserError, match="args.json is damaged"):
        grpo.main([*TRAINING, "--steps", "2", "--out", str(out), "--resume"])

"""Output files and folders: devices, pipes and links stay what they are; what cannot be written is
told before anything is computed."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT

import eval as evaluation
import merge
import sft
from common.errors import UserError
from common.files import (
    check_output_file,
    check_output_folder,
    descriptor_of,
    write_jsonl,
    write_text,
)
from helpers import fails, run
from studies import analyze, bench

FIT = ("fit", "--model", "qwen2.5-7b", "--device-gb", "80")  # computes in a moment


# ---------------- writing ----------------


@pytest.fixture
def pipe(tmp_path):
    """(path of a named pipe, function that returns what was read from it until its end)."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    texts = []
    reader = threading.Thread(target=lambda: texts.append(path.read_text()), daemon=True)
    reader.start()

    def received() -> str:
        reader.join(timeout=20)
        return texts[0]

    return path, received


def test_a_pipe_is_written_to_and_stays_a_pipe(pipe):
    path, received = pipe
    write_jsonl(path, [{"a": "é"}, {"a": 2}])
    assert received() == '{"a": "é"}\n{"a": 2}\n'
    assert path.is_fifo()
    assert os.listdir(path.parent) == ["pipe"]


@pytest.fixture
def device(tmp_path) -> Path:
    """A device that takes every text, as /dev/null does.

    Root gets one of its own, because a faulty script would replace the machine's.
    """
    if os.geteuid():
        return Path("/dev/null")
    path = tmp_path / "device"
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        path.write_text("")
    except PermissionError:
        pytest.skip("this container lets nobody make a device")
    return path


def test_a_device_is_written_to_and_stays_a_device(device):
    before = sorted(os.listdir(device.parent))
    write_text(device, "x")
    assert device.is_char_device()
    assert sorted(os.listdir(device.parent)) == before


def test_a_link_to_a_device_stays_a_link(device, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(device)
    write_text(link, "x")
    assert os.readlink(link) == str(device)
    assert device.is_char_device()


def test_a_link_goes_on_pointing_to_its_file(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("old")
    (tmp_path / "near").symlink_to("folder/file")
    (tmp_path / "far").symlink_to("near")
    (tmp_path / "new").symlink_to("folder/new")  # of a file that is not there yet
    write_text(tmp_path / "far", "one")
    write_text(tmp_path / "new", "two")
    assert (folder / "file").read_text() == "one"
    assert (folder / "new").read_text() == "two"
    assert all((tmp_path / name).is_symlink() for name in ("near", "far", "new"))
    assert sorted(os.listdir(folder)) == ["file", "new"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o444])
def test_a_file_keeps_its_permissions(mode, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    write_text(path, "new")
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_permissions_of_any_other(tmp_path):
    (tmp_path / "other").write_text("")
    write_text(tmp_path / "file", "")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("file", "other")]
    assert modes[0] == modes[1]


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_open_files_are_known_by_all_their_names(tmp_path):
    (tmp_path / "link").symlink_to("/dev/stderr")
    (tmp_path / "loop").symlink_to("loop")
    names = {
        "/dev/stdout": 1,
        "/dev/fd/1": 1,
        "/proc/self/fd/1": 1,
        f"/proc/{os.getpid()}/fd/1": 1,
        f"{tmp_path}/link": 2,
        "/proc/self/fd": None,
        "/dev/null": None,
        f"{tmp_path}/1": None,
        f"{tmp_path}/loop": None,
        "1": None,
    }
    assert {name: descriptor_of(Path(name)) for name in names} == names


# ---------------- the checks ----------------


def broken_outputs(folder: Path) -> dict[str, str]:
    """{name of an output that cannot be written: words of the error}."""
    (folder / "file").write_text("")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("missing/file")
    (folder / "to_folder").symlink_to("folder")
    return {
        f"{folder}": "it is a folder",
        f"{folder}/to_folder": "it is a folder",
        f"{folder}/new/": "it is a folder",
        f"{folder}/missing/x.json": "there is no folder",
        f"{folder}/file/x.json": "there is no folder",
        f"{folder}/nowhere": "there is no folder",
        f"{folder}/loop": "it is a link to itself",
        f"{folder}/{'x' * 300}": "it cannot be written (File name too long)",
        f"{folder}/{'x' * 254}": "it cannot be written (File name too long)",
        "/proc/x.json": "it cannot be written",
        "/dev/fd/999": "it cannot be written (Bad file descriptor)",
    }


def test_outputs_that_cannot_be_written_are_told_in_one_line(tmp_path):
    for name, words in broken_outputs(tmp_path).items():
        with pytest.raises(UserError) as error:
            check_output_file("--json", name)
        assert str(error.value).startswith(f"--json {name}: {words}"), name
        assert "\n" not in str(error.value)


def test_a_socket_and_an_open_file_that_is_only_read_are_refused(tmp_path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        with pytest.raises(UserError, match="it is a socket"):
            check_output_file("--json", str(tmp_path / "s"))
    with open(os.devnull) as file, pytest.raises(UserError, match="open for reading only"):
        check_output_file("--json", f"/dev/fd/{file.fileno()}")


def test_outputs_that_can_be_written_pass_and_are_left_as_they_are(tmp_path, pipe):
    path, received = pipe
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "unread").mkdir()
    os.mkfifo(tmp_path / "unread" / "pipe")  # nobody reads it: the check must not wait
    before = sorted(os.listdir(tmp_path))
    for name in ("old", "new", "link", "pipe", "unread/pipe", "../" + tmp_path.name + "/new"):
        check_output_file("--json", str(tmp_path / name))
    for name in ("/dev/null", "/dev/stdout", "/dev/fd/2"):
        check_output_file("--json", name, may_exist=False)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "old").read_text() == "old"
    with pytest.raises(UserError, match="old: it exists: choose another file"):
        check_output_file("--rated", str(tmp_path / "old"), may_exist=False)
    path.write_text("x")
    assert received() == "x"  # the check has not taken the pipe's reader


@pytest.mark.parametrize(
    "name, words",
    [
        ("file", "it is not a folder"),
        ("file/below", "file is not a folder"),
        ("file/far/below", "file is not a folder"),
        ("dangling", "it is not a folder"),
        ("dangling/below", "dangling is not a folder"),
        ("loop", "it is not a folder"),
        ("/dev/null", "it is not a folder"),
        ("/dev/null/below", "/dev/null is not a folder"),
        ("/proc/new/below", "it cannot be made"),
        ("x" * 300, "it cannot be made (File name too long)"),
    ],
)
def test_folders_that_cannot_be_made_are_told(name, words, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("missing")
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError) as error:
        check_output_folder("--out", str(tmp_path / name))
    assert words in str(error.value)
    assert str(error.value).startswith(f"--out {tmp_path / name}: ")
    assert sorted(os.listdir(tmp_path)) == before


def test_folders_that_can_be_made_pass_and_are_not_made(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("", "new", "new/far/below", "link", "link/new"):
        check_output_folder("--out", str(tmp_path / name))
    check_output_folder("--out", "new-below-the-current-folder")
    assert os.listdir(tmp_path) == ["link"]
    assert not Path("new-below-the-current-folder").exists()


# ---------------- the scripts' own flags ----------------


def must_not_run(*args, **options):
    raise AssertionError("something was computed before the output was checked")


def test_bench_writes_to_a_pipe(pipe):
    path, received = pipe
    bench.main([*FIT, "--json", str(path)])
    (result,) = json.loads(received())
    assert result.keys() == {"parts", "phases", "fits_with"}
    assert path.is_fifo()


def test_bench_tells_a_broken_json_before_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "fit", must_not_run)
    for name, words in broken_outputs(tmp_path).items():
        assert words in fails([*FIT, "--json", name], capsys, bench)


def run_bench(stdout) -> subprocess.CompletedProcess:
    """`studies.bench fit --json /dev/stdout` with this standard output."""
    command = [sys.executable, "-m", "studies.bench", *FIT, "--json", "/dev/stdout"]
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}  # what is printed waits in a buffer
    return subprocess.run(
        command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_standard_output_gets_the_table_and_then_the_numbers(tmp_path):
    """Whether it is a pipe, a file that the shell began (> log.txt), or one that goes on (>>)."""
    piped = run_bench(subprocess.PIPE)
    assert piped.returncode == 0, piped.stderr
    table, _, numbers = piped.stdout.partition("\n[")
    assert "peak of the update" in table
    assert json.loads("[" + numbers)

    log = tmp_path / "log.txt"
    log.write_text("before\n")
    with open(log, "a") as file:
        assert run_bench(file).returncode == 0
    assert log.read_text() == "before\n" + piped.stdout
    with open(log, "w") as file:
        assert run_bench(file).returncode == 0
    assert log.read_text() == piped.stdout


def test_eval_tells_broken_outputs_before_it_loads_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluation, "load_evaluation_rows", must_not_run)
    flags = ["--data", "toy", "--out", str(tmp_path / "scores"), "--rated"]
    for name, words in broken_outputs(tmp_path).items():
        assert words in fails([*flags, name], capsys, evaluation)
    for name in ("scores", "."):
        message = fails([*flags[:-1], "--rated", str(tmp_path / name)], capsys, evaluation)
        assert "folder" in message
    out = fails(["--data", "toy", "--out", str(tmp_path / "file")], capsys, evaluation)
    assert "file: it is not a folder" in out
    assert not (tmp_path / "scores").exists()


def test_rated_rows_may_go_to_a_pipe(pipe, capsys):
    path, received = pipe
    evaluation.check_outputs(str(path.parent / "scores"), str(path))
    rows = [{"id": "a", "pass_rate": 0.1}, {"id": "b"}]
    items = [{"id": "a", "accuracy": 0.5}, {"id": "b", "accuracy": None}]
    evaluation.write_rated(path, rows, items)
    assert received() == '{"id": "a", "pass_rate": 0.5}\n{"id": "b"}\n'
    assert path.is_fifo()
    assert "2 rows, 1 without a pass rate" in capsys.readouterr().out


def test_the_other_scripts_tell_a_broken_out_before_they_load_a_model(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(merge, "Checkpoint", must_not_run)
    monkeypatch.setattr(sft, "load_policy", must_not_run)
    (tmp_path / "file").write_text("old")
    for name in (str(tmp_path / "file"), "/dev/null", str(tmp_path / "file" / "below")):
        for module, flags in (
            (merge, ["--base", "x", "--experts", "y", "--method", "ta"]),
            (sft, ["--model", str(tmp_path), "--data", "rows.jsonl"]),
        ):
            assert "is not a folder" in fails([*flags, "--out", name], capsys, module)
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("name", ["/dev/null", "file"])
def test_a_training_run_does_not_take_a_file_for_its_folder(name, toy, tmp_path):
    (tmp_path / "file").write_text("old")
    done = run("grpo.py", "--model", toy, "--out", tmp_path / name)
    assert done.returncode == 1
    assert done.stderr == f"grpo.py: --out {tmp_path / name}: it is not a folder: " + (
        "choose another folder\n"
    )
    assert (tmp_path / "file").read_text() == "old"


def test_analyses_tell_a_broken_out_before_they_read_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(analyze.curves, "run", must_not_run)
    (tmp_path / "file").write_text("")
    (tmp_path / "a.json").mkdir()
    (tmp_path / "b.png").mkdir()
    for name, words in (
        (tmp_path / "a", "a.json: it is a folder"),
        (tmp_path / "b", "b.png: it is a folder"),
        (tmp_path / "file" / "c", "file: it is not a folder"),
        ("/dev/null", "OUT.json and OUT.png cannot be made of it"),
        ("/proc/x/y", "it cannot be made"),
    ):
        argv = ["curves", "--runs", "x", "--out", str(name)]
        assert words in fails(argv, capsys, analyze)
    assert not Path("/dev/null.json").exists()


def test_an_analysis_writes_through_links_and_devices(device, tmp_path, monkeypatch):
    numbers = tmp_path / "kept.json"
    numbers.write_text("old")
    (tmp_path / "out.json").symlink_to(numbers)
    (tmp_path / "out.png").symlink_to(device)

    def draw(args):
        figure, _ = analyze.pictures.grid(1, 1)
        return {"a": 1}, figure

    monkeypatch.setattr(analyze.curves, "run", draw)
    analyze.main(["curves", "--runs", "x", "--out", str(tmp_path / "out")])
    assert json.loads(numbers.read_text()) == {"a": 1}
    assert (tmp_path / "out.json").is_symlink()
    assert (tmp_path / "out.png").is_symlink()
    assert device.is_char_device()

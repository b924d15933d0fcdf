"""README stays true: its commands parse, its two first commands are the promised ones, its picture exists."""
import importlib
import re
import shlex

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:pip install -r \S+ && )?python (\w+)\.py ?([^#\n]*)", README, re.MULTILINE)


def test_there_are_commands_and_the_picture():
    assert len(COMMANDS) >= 4 and "pip install -r requirements-cpu.txt && python -m pytest" in README
    assert all((ROOT / path).exists() for path in re.findall(r"!\[.*?\]\((.+?)\)", README))


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_every_command_parses(script, flags):
    importlib.import_module(script).parse_args(shlex.split(flags))


def test_the_cpu_requirements_are_the_gpu_ones_without_vllm():
    gpu = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line[:1] not in ("#", "")]
    assert gpu == ["-r requirements-cpu.txt", "vllm==0.32.0"]
    assert "torch==2.13.0" in (ROOT / "requirements-cpu.txt").read_text()

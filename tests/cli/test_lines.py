"""Lines that tell how far it is, how long it took, and what to type next."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from cllm_spheres_cli.own_name import own_name
from cllm_spheres_cli.progress import progress_of
from rich.console import Console

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("terminal", [False, True])
def test_each_stage_of_preparing_leaves_a_line_with_its_seconds(terminal):
    out = io.StringIO()
    with progress_of(Console(file=out, force_terminal=terminal, width=80)) as progress:
        for stage, done in (("read", 0), ("read", 2e6), ("vocabulary", 0), ("tokens", 0), ("tokens", 2e6)):
            progress(stage, done, 2e6)
        progress("score", 0, 100)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", out.getvalue())  # without what moves the cursor
    lines = re.findall(r"^(\w[\w ]+): 2 MB in \d+\.\d s\s*$", shown, re.M)
    assert lines == ["Reading", "Making the vocabulary", "Encoding"]


@pytest.mark.parametrize("case", ["on the PATH", "below the working folder", "elsewhere", "python -m", "not a command"])
def test_lines_to_type_name_the_command_as_it_was_called(case, tmp_path, monkeypatch):
    command = tmp_path / "my env" / "bin" / "cllm-spheres"
    command.parent.mkdir(parents=True)
    command.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(command.parent) if case == "on the PATH" else "")
    monkeypatch.chdir(tmp_path if case == "below the working folder" else "/usr")
    called = {"python -m": "/x/cllm_spheres/__main__.py", "not a command": "/x/bin/pytest"}.get(case, str(command))
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr(sys, "executable", "/opt/python")
    assert (
        own_name()
        == {
            "on the PATH": "cllm-spheres",
            "below the working folder": "'my env/bin/cllm-spheres'",
            "elsewhere": f"'{command}'",
            "python -m": "/opt/python -m cllm_spheres",
            "not a command": "cllm-spheres",
        }[case]
    )


def test_make_train_says_each_part_with_its_seconds_and_ends_with_a_command_that_can_be_typed(tmp_path):
    """With a python and a pip that do nothing, in a folder of its own."""
    (tmp_path / "pyproject.toml").touch()
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nif [ "$2" = venv ]; then mkdir -p .venv/bin; cp {python} .venv/bin/python; fi\n')
    python.chmod(0o755)
    command = tmp_path / ".venv" / "bin" / "cllm-spheres"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    words = ["make", "--no-print-directory", "-f", ROOT / "Makefile", f"PYTHON={python}", "train"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=os.environ)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [bool(re.fullmatch(r"\.\.\. done in \d+ s\.", line)) for line in lines[:4]] == [False, True, False, True]
    last = re.fullmatch(r"All of it took \d+ s\. More text: (\S+) (generate --prompt 'class ')", lines[-1])
    again = subprocess.run(f"{last[1]} {last[2]}", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert again.stdout == "generate --prompt class \n"
    assert "train --preset small --steps 1500" in lines

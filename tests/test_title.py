"""What ps and top show of a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import WAIT_S

SHOW = """
import os, sys
from pathlib import Path
from cllm_spheres.title import set_title
before = Path("/proc/self/environ").read_bytes()
set_title("a longer role " + "é" * 1000, "books")
set_title(*sys.argv[1:3])
sys.stdout.buffer.write(Path("/proc/self/cmdline").read_bytes() + Path("/proc/self/comm").read_bytes())
assert Path("/proc/self/environ").read_bytes() == before and os.environ["HOME"] == "/nowhere"
"""


@pytest.mark.parametrize("role, run, shown, short", [
    ("worker 3 of 8", "books", "cllm-spheres worker 3 of 8: books", "cllm worker 3"),
    ("node zero", "", "cllm-spheres node zero", "cllm node zero"),
    ("worker 155 of 156", "é" * 1000, "cllm-spheres worker 155 of 156: ééé", "cllm worker 155"),
])  # fmt: skip
def test_a_process_shows_its_role_and_its_run_and_overwrites_nothing_else(role, run, shown, short):
    done = subprocess.run(
        [sys.executable, "-c", SHOW, role, run], env={"HOME": "/nowhere"}, capture_output=True, timeout=WAIT_S,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    title, _, rest = done.stdout.partition(b"\0")
    assert title.decode().startswith(shown) and title.decode().rstrip("é") == shown.rstrip("é")
    assert rest.strip(b"\0") == short.encode() + b"\n"

"""`cllm-spheres model`: the table of a preset, of a run and of a model folder, and what bad input brings."""

from __future__ import annotations

import re
import shutil
import textwrap
from pathlib import Path

import pytest

from cllm_spheres.doctor.needs import plan
from cllm_spheres.training.plan import memory_bytes, memory_parts
from tests.exchange.models import GOLDEN
from tests.runs import command_here

RUN = Path(__file__).parent.parent / "checkpoint/before_families/run"


def lines_of(*words, cwd):
    done = command_here("model", *words, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def cells(line):
    return re.split(r"\s{2,}", line.strip())


def test_a_preset_is_shown_with_its_blocks_once(tmp_path):
    lines = lines_of("tiny", "--dtype", "fp32", "--workers", 2, "--recompute", "none", cwd=tmp_path)
    assert lines[0].startswith("tiny: a GPT-2 of 92,480 parameters; 1 sequence of 16 tokens at a time")
    assert "forward, block 0 to 1 (2 x)" in lines and "backward, block 1 to 0 (2 x)" in lines
    rows = [cells(line) for line in lines if line.startswith("  ")]
    (head,) = [row for row in rows if row[0] == "head_train"]
    assert head[1:4] == ["head", "64 x 381", f"{3 * 2 * 64 * 381:,}"]
    assert ["linear_forward", "qkv", "64 x 192", "12,480", "24,576", "768"] in [row[:6] for row in rows]
    assert len([row for row in rows if row[0] == "attention_forward"]) == 1
    assert not any(line != line.rstrip() or "\x1b" in line for line in lines)
    assert not lines[0].endswith("computed again to save memory.")
    (first, *_) = lines_of("tiny", "--recompute", "cheap", cwd=tmp_path)
    assert first.endswith(", norms and activations computed again to save memory.")


def test_the_memory_is_that_of_the_plan(tmp_path):
    lines = lines_of("tiny", "--dtype", "fp32", "--spheres", 5, "--workers", 2, cwd=tmp_path)
    table = [cells(line) for line in lines[lines.index("") :] if line][1:]
    assert table[0] == ["memory of a training, MB", *(f"{n} sphere{'s' * (n > 1)}" for n in (1, 4, 5, 12, 63))]
    assert table[1] == ["workers", "1", "2", "2", "2", "2"]
    job = plan({"preset": "tiny", "dtype": "fp32", "spheres": 5, "workers": 2})[1]
    found = {row[0]: row[3] for row in table}
    for name, size in memory_parts(job).items():
        assert found.get(name, "0.0") == f"{size / 1e6:,.1f}", name
    assert sum(memory_parts(job).values()) == memory_bytes(job)
    assert found["all with --recompute none"] == f"{memory_bytes(job) / 1e6:,.1f}"


def test_computing_again_is_shown(tmp_path):
    calls = {
        mode: [cells(line)[0] for line in lines_of("tiny", "--dtype", "fp32", "--recompute", mode, cwd=tmp_path)]
        for mode in ("none", "cheap", "block")
    }
    counts = {mode: [found.count(op) for op in ("activate", "norm_forward", "linear_forward")]
              for mode, found in calls.items()}  # fmt: skip
    assert counts == {"none": [0, 3, 4], "cheap": [1, 5, 4], "block": [0, 5, 7]}  # the last product is not needed


def test_a_run_and_a_model_folder_have_their_own_sizes(tmp_path):
    shutil.copytree(RUN, tmp_path / "run", symlinks=True)
    lines = lines_of("run", cwd=tmp_path)
    assert lines[0].startswith("run: a GPT-2 of 7,424 parameters; 1 sequence of 12 tokens")
    assert any("4 spheres" in line for line in lines)
    shutil.rmtree(tmp_path / "run")
    shutil.copytree(GOLDEN / "plain", tmp_path / "hf")
    assert lines_of("hf", "--spheres", 2, cwd=tmp_path)[0].startswith("hf: a GPT-2 of 11,328 parameters;")


def test_the_tour_shows_the_table_of_its_command(tmp_path):
    tour = (Path(__file__).parents[2] / "docs/tour.md").read_text()
    command, shown = re.search(r"^\$ cllm-spheres model (.*)\n```\n((?:\n|    .*\n)+)", tour, re.M).groups()
    shown = textwrap.dedent(shown).strip()
    done = command_here("model", *command.split(), cwd=tmp_path)
    assert done.stdout.startswith(shown + "\n\nmemory of a training")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tyni"], "'tyni' is no folder and no preset: did you mean 'tiny'"),
        (["."], "neither a run"),
        (["a/" * 3000], "File name too long"),
        (["tiny", "--recompute", "all"], "--recompute cannot be 'all'"),
        (["tiny", "--dtype", "fp8"], "--dtype cannot be 'fp8'"),
        (["tiny", "--spheres", "2", "--workers", "3"], "--spheres 3"),
        (["tiny", "--spheres", "0"], "--spheres 0"),
    ],
)
def test_what_cannot_be_is_told(tmp_path, words, said):
    done = command_here("model", *words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and done.stdout == ""

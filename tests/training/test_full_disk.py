"""A disk that becomes full while a run goes on."""

from __future__ import annotations

import os
import subprocess

import pytest

from cllm_spheres.checkpoint.store import Store
from tests.runs import resume, train


@pytest.fixture
def small_disk(tmp_path):
    """A file system of three megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "none", place]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_older_checkpoints_whole(corpus, small_disk):
    outcome = train(corpus, small_disk / "run", steps=500, save_every=10, eval_every=500, keep=1000)
    assert outcome.code == 1
    assert "No space left on device" in outcome.message and "Older checkpoints are intact" in outcome.message
    assert "Traceback" not in outcome.message
    store = Store(outcome.run)
    steps = store.steps()
    assert len(steps) >= 3 and steps == list(range(10, steps[-1] + 1, 10))
    assert [store.load(step).step for step in steps] == steps
    assert f"The last checkpoint is {store.path(steps[-1])}" in outcome.message
    assert list((outcome.run / "checkpoints").glob(".tmp-*")) == []
    # with some room again it goes on
    store.prune(1)
    resumed = resume(outcome.run, stop_at=steps[-1] + 10)
    assert resumed.code == 0, resumed.message
    assert resumed.event("resume")["from_step"] == steps[-1]


def test_metrics_that_cannot_be_written_end_the_run_in_words(corpus, small_disk):
    outcome = train(corpus, small_disk / "run", steps=1_000_000, save_every=1_000_000, eval_every=1_000_000)
    assert outcome.code == 1
    assert "metrics.jsonl cannot be written: No space left on device" in outcome.message
    assert "Traceback" not in outcome.message
    assert outcome.of("step")[-1]["step"] > 1000

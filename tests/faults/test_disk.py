"""A disk that is full, or that can no longer be written, while a run goes on: it is told, tried again, and goes on."""

from __future__ import annotations

import os
import subprocess

import pytest

from cllm_spheres.checkpoint.store import Store
from cllm_spheres.events import read
from tests.runs import finished, resume, start, train, train_whole, wait_for_step, wait_until

STEPS = dict(steps=20_000, save_every=500, eval_every=5000, eval_tokens=200, keep=2)


def mount(place, *options) -> None:
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "none", str(place)]
    if os.getuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small file system")


def unmount(place) -> None:
    subprocess.run(["umount", "-l", str(place)], check=True)  # also where a test failed, and its run still writes


@pytest.fixture
def small_disk(tmp_path):
    """A file system of nine megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount(place, "size=9m")
    yield place
    unmount(place)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    return train_whole(corpus, tmp_path_factory.mktemp("undisturbed") / "run", **STEPS)


def events(run, name):
    return [r for r in read(run / "metrics.jsonl") if r.get("event") == name]


def test_a_disk_that_is_full_for_a_while_costs_nothing(undisturbed, corpus, small_disk):
    launch = start(corpus, small_disk / "run", **STEPS)
    run, ballast = small_disk / "run", small_disk / "ballast"
    wait_for_step(run, 1000)
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    wait_until(lambda: "No space left on device" in launch.status, "the word that the disk is full")
    size, steps = (run / "metrics.jsonl").stat().st_size, Store(run).steps()
    assert [Store(run).load(step).step for step in steps] == steps  # whole, all of them
    ballast.unlink()
    wait_until(lambda: (run / "metrics.jsonl").stat().st_size > size, "what had waited")
    outcome = finished(launch)
    assert outcome.code == 0, outcome.message
    assert [r["step"] for r in outcome.records if r["kind"] == "step"] == list(range(1, 20_001))
    assert outcome.bits == undisturbed.bits
    assert list((run / "checkpoints").glob(".tmp-*")) == []


def test_checkpoints_that_cannot_be_written_are_told_and_tried_again_and_training_goes_on(
    undisturbed, corpus, tmp_path
):
    launch = start(corpus, tmp_path / "run", **STEPS)
    run = tmp_path / "run"
    wait_for_step(run, 1000)
    wait_until(lambda: events(run, "saved"), "a checkpoint")
    mount(run / "checkpoints", "ro")
    try:
        # What was just being saved has lost its folder, and is told first.
        said = wait_until(
            lambda: [event for event in events(run, "unsaved") if "Read-only file system" in event["message"]],
            "the word that it cannot be saved",
        )[0]
        assert "Tried again in 10 s." in said["message"]
        step = events(run, "unsaved")[-1]["step"]
        wait_for_step(run, step + 600)
    finally:
        unmount(run / "checkpoints")
    outcome = finished(launch)
    assert outcome.code == 0, outcome.message
    assert outcome.bits == undisturbed.bits and Store(run).steps()[-1] == 20_000


def test_a_disk_that_stays_full_is_told_at_the_end_and_older_checkpoints_are_whole(corpus, small_disk):
    outcome = train(corpus, small_disk / "run", **STEPS | {"steps": 3000, "save_every": 10, "keep": 1000})
    assert outcome.code == 1
    assert "No space left on device" in outcome.message and "Older checkpoints are intact" in outcome.message
    assert "Traceback" not in outcome.message
    store = Store(outcome.run)
    steps = store.steps()
    assert len(steps) >= 3 and [store.load(step).step for step in steps] == steps
    assert f"The last checkpoint is {store.path(steps[-1])}" in outcome.message
    assert list((outcome.run / "checkpoints").glob(".tmp-*")) == []
    store.prune(1)  # with some room again it goes on
    resumed = resume(outcome.run, stop_at=steps[-1] + 10)
    assert resumed.code == 0, resumed.message
    assert resumed.of("event")[-1]["step"] == steps[-1] + 10


def test_metrics_that_cannot_be_written_to_the_end_are_told(corpus, small_disk):
    (small_disk / "ballast").write_bytes(bytes(8 << 20))  # a megabyte is left: the lines of some thousand steps
    outcome = train(corpus, small_disk / "run", **STEPS | {"steps": 8000, "save_every": 8000})
    assert outcome.code == 1
    assert "metrics.jsonl cannot be written: No space left on device" in outcome.message
    assert "Traceback" not in outcome.message

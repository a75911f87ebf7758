"""What is told of a worker that ended, and when the run may not go on."""

from __future__ import annotations

import signal

import pytest

from cllm_spheres.errors import SphereLost
from cllm_spheres.model.shape import Shape
from cllm_spheres.spheres import losses as module
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.crew import Ended
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.losses import Losses
from cllm_spheres.spheres.memory import SharedMemory


@pytest.fixture
def losses(monkeypatch):
    """Losses of 2 workers with 4 spheres; the kernel's counter is losses.kills[0]."""
    kills = [5]
    monkeypatch.setattr(module, "memory_kills", lambda: kills[0])
    monkeypatch.setattr(module, "memory_limit", lambda: 8_000_000_000)
    shape = Shape(vocab_size=257, block_size=8, layers=1, heads=2, width=32, ff_width=64)
    job = Job(
        shape=shape, batch_size=4, spheres=4, workers=2, seed=1, train="", val="", item_bytes=2, train_tokens=9,
        val_tokens=9, num_windows=0,
    )  # fmt: skip
    made = Losses(job, SharedMemory(job.sizes))
    made.kills = kills
    made.memory.worker_words()[:, M.W_STATE] = M.State.COMPUTING
    made.memory.worker_words()[1, M.W_SPHERE] = 3
    return made


def killed(worker=1):
    return Ended(worker, 4121, signal.SIGKILL)


def test_a_death_is_told_with_spheres_process_signal_phase_and_step(losses):
    told = losses.count(killed(), 318)
    assert told == "Spheres 1, 3 of worker 1 (pid 4121) ended by signal 9 (SIGKILL) while computing, step 318."


def test_where_memory_was_the_cause_that_is_said_with_numbers(losses):
    losses.kills[0] = 6
    told = losses.count(killed(), 318)
    assert "The memory ran out, and the kernel ended 1 of its processes." in told
    assert "of a limit of 8.0 GB. Try fewer --workers or --spheres." in told
    assert "memory" not in losses.count(killed(0), 318)  # it is one's cause, not the next one's


def test_a_sphere_that_ends_three_workers_within_a_step_ends_the_run(losses):
    for _ in range(2):
        losses.count(killed(), 7)
    with pytest.raises(SphereLost, match="Sphere 3 ended 3 workers in step 7"):
        losses.count(killed(), 7)


def test_a_shard_is_not_blamed_for_want_of_memory_and_its_place_is_given_up(losses):
    for kills in (6, 7, 8):
        assert losses.worn_out() is None
        losses.kills[0] = kills
        losses.count(killed(), 7)
    assert losses.worn_out() == 1


def test_a_sphere_that_is_complete_is_not_to_blame(losses):
    losses.memory.sphere_words()[3, M.P_COMPLETE] = 7
    for _ in range(3):
        losses.count(killed(), 7)
    assert losses.worn_out() == 1


def test_a_step_that_becomes_whole_forgets_the_deaths_before_it(losses):
    for step in range(1, 9):
        losses.count(killed(), step // 2)  # two within each
    assert losses.worn_out() is None


def test_an_error_of_its_own_ends_the_run_with_what_it_said(losses):
    losses.memory.set_error(1, "No space left on device while starting")
    with pytest.raises(SphereLost, match=r"ended with exit code 1(?s:.*)It said: No space left(?s:.*)8\.0 GB"):
        losses.count(Ended(1, 4121, 1 << 8), 7)

"""What a run saves: a copy of one moment, which takes memory no longer than it is being written."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from cllm_spheres.checkpoint.store import SaveFailed, Store
from cllm_spheres.config import merge
from cllm_spheres.model.layout import Layout
from cllm_spheres.spheres.memory import SharedMemory, Sizes
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training import saver
from cllm_spheres.training.keeper import Keeper, Progress
from cllm_spheres.training.plan import resolve, shape_of
from tests.runs import TINY, wait_until


@pytest.fixture
def keeper(char_corpus, tmp_path):
    """A keeper of a tiny run whose weights and moments are all 1."""
    prepared = Prepared.open(char_corpus)
    config = resolve(*merge(TINY), prepared)
    layout = Layout(shape_of(config))
    memory = SharedMemory(Sizes(layout.size, num_spheres=1, num_windows=0, has_squares=True))
    for buffer in (memory.params, memory.moments, memory.squares):
        buffer[:] = 1.0
    node_zero = SimpleNamespace(
        memory=memory, applied=0, job=SimpleNamespace(batch_size=4, dtype="fp32"),
        faults=SimpleNamespace(fire_save=lambda step: None),
    )  # fmt: skip
    metrics = SimpleNamespace(total_tokens=0, event=lambda *_, **__: None)
    return Keeper(tmp_path, layout, config, prepared, node_zero, metrics)


def failing(keeper, monkeypatch, failures, retry_s):
    """The first tries to write a checkpoint fail; the list grows with each."""
    monkeypatch.setattr(saver, "RETRY_S", retry_s)
    write, tries = keeper.store.save, []

    def save(*arguments):
        tries.append(arguments)
        if len(tries) <= failures:
            raise SaveFailed("The checkpoint could not be saved", "No space left on device", 100, 0)
        return write(*arguments)

    monkeypatch.setattr(keeper.store, "save", save)
    return tries


def values_of(run, step):
    """The different numbers of a checkpoint."""
    saved = Store(run).load(step)
    return {float(value) for tensors in (saved.model, saved.optimizer) for t in tensors.values() for value in t.flat}


def test_the_copy_of_a_checkpoint_is_given_back_when_it_is_written(keeper, tmp_path):
    for step in (1, 2):
        keeper.save(Progress(step))
        keeper.finish()
        assert keeper._copy == {}
        assert values_of(tmp_path, step) == {1.0}


def test_a_save_that_is_expected_finds_its_copy_with_pages(keeper, tmp_path):
    keeper.expect()
    keeper.expect()
    keeper.finish()
    taken = dict(keeper._copy)
    assert set(taken) == {"params", "moments", "squares"} and not any(buffer.any() for buffer in taken.values())
    keeper.save(Progress(1))
    assert all(buffer.all() for buffer in taken.values())  # no other was taken
    keeper.finish()
    assert keeper._copy == {} and values_of(tmp_path, 1) == {1.0}


def test_expecting_the_next_save_does_not_disturb_one_that_will_be_tried_again(keeper, tmp_path, monkeypatch):
    tries = failing(keeper, monkeypatch, failures=1, retry_s=0.3)
    keeper.save(Progress(1))
    wait_until(lambda: tries, "the first try")
    keeper.expect()
    wait_until(lambda: Store(tmp_path).steps() == [1], "the second try")
    keeper.finish()
    assert values_of(tmp_path, 1) == {1.0}


def test_what_is_tried_again_is_the_copy_and_not_what_was_trained_meanwhile(keeper, tmp_path, monkeypatch):
    tries = failing(keeper, monkeypatch, failures=2, retry_s=0.05)
    keeper.save(Progress(1))
    wait_until(lambda: tries, "the first try")
    keeper.node_zero.memory.params[:] = 2.0
    keeper.finish()
    assert len(tries) == 3 and values_of(tmp_path, 1) == {1.0}
    assert keeper._copy == {}


def test_a_copy_that_was_given_up_is_used_for_the_next(keeper, tmp_path, monkeypatch):
    tries = failing(keeper, monkeypatch, failures=1, retry_s=100.0)
    keeper.save(Progress(1))
    wait_until(lambda: tries, "the first try")
    first = dict(keeper._copy)
    assert all(np.all(buffer == 1.0) for buffer in first.values()) and len(first) == 3
    keeper.node_zero.memory.params[:] = 2.0
    keeper.save(Progress(2))
    keeper.finish()
    assert values_of(tmp_path, 2) == {1.0, 2.0} and Store(tmp_path).steps() == [2]
    assert keeper._copy == {}

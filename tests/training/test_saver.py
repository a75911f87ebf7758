"""Saving beside the training: what fails is tried again, what is newer replaces it, the end waits for it."""

from __future__ import annotations

import threading
import time

import pytest

from cllm_spheres.checkpoint.store import SaveFailed
from cllm_spheres.training import saver as module
from cllm_spheres.training.saver import Saver
from tests.runs import wait_until


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.05)
    monkeypatch.setattr(module, "LAST_RETRY_S", 0.05)


class Disk:
    """save() fails as often as it is told to."""

    def __init__(self, failures=0):
        self.failures, self.tries, self.saved = failures, 0, 0

    def save(self):
        self.tries += 1
        if self.tries <= self.failures:
            raise SaveFailed("The checkpoint could not be saved", "No space left on device", 100, 0)
        self.saved += 1


def test_what_is_given_is_saved_once():
    disk, saver = Disk(), Saver(lambda error, seconds: None)
    for _ in range(3):
        assert saver.free()
        saver.give(disk.save)
    saver.finish()
    assert disk.saved == disk.tries == 3


def test_what_fails_is_told_and_tried_again_at_growing_intervals():
    told = []
    disk, saver = Disk(failures=3), Saver(lambda error, seconds: told.append((str(error), seconds)))
    assert saver.free()
    saver.give(disk.save)
    wait_until(lambda: disk.saved, "the fourth try")
    assert [seconds for _, seconds in told] == [0.05, 0.1, 0.2]
    assert all("No space left on device" in error for error, _ in told)
    saver.finish()


def test_a_newer_copy_replaces_what_still_waits_to_be_tried_again(monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 100.0)
    full, disk, saver = Disk(failures=100), Disk(), Saver(lambda error, seconds: None)
    saver.give(full.save)
    wait_until(lambda: full.tries == 1 and saver.free(), "the first failure")
    saver.give(disk.save)
    saver.finish()
    assert (full.tries, disk.saved) == (1, 1)


def test_the_end_tries_at_once_and_then_says_why_it_failed(monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 100.0)
    disk, saver = Disk(failures=100), Saver(lambda error, seconds: None)
    saver.give(disk.save)
    wait_until(lambda: disk.tries == 1, "the first failure")
    with pytest.raises(SaveFailed, match="No space left on device"):
        saver.finish()
    assert disk.tries >= module.LAST_TRIES
    saver.finish()  # it was told once


def test_the_training_waits_for_a_slow_disk_but_not_for_ever():
    go, saver = threading.Event(), Saver(lambda error, seconds: None)
    saver.give(lambda: go.wait(10) and None)
    assert not saver.free(0.05)
    threading.Timer(0.1, go.set).start()
    began = time.monotonic()
    assert saver.free() and time.monotonic() - began < 5
    saver.finish()


def test_a_mistake_of_our_own_reaches_the_training():
    saver = Saver(lambda error, seconds: None)
    saver.give(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saver.finish()

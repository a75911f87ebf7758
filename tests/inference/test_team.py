"""Nobody passes a barrier before all have come, and helpers do every pass once."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from numba import njit

from cllm_spheres.inference import team
from cllm_spheres.kernels.arrays import integers
from cllm_spheres.spheres.atomics import load, store

ROUNDS = 300


@njit(nogil=True)
def walk(words, members, member, counts, rounds):
    """Count a round, meet, and look at the others; the number of those that were behind."""
    behind = 0
    for number in range(1, rounds + 1):
        store(counts + 8 * member, number)
        team.meet(words, members)
        for other in range(members):
            behind += 1 if load(counts + 8 * other) < number else 0
        team.meet(words, members)
    return behind


@njit(nogil=True)
def help_until_stopped(words, members, member, done):
    seen = 0
    while True:
        number = team.next_pass(words, seen)
        if number < 0:
            return
        seen = number
        integers(done, members)[member] += 1
        team.meet(words, members)


@pytest.mark.parametrize("members", [1, 2, 3, 9])
def test_nobody_passes_before_all_have_come(members):
    words, counts, behind = team.new_words(), np.zeros(members, np.int64), [None] * members

    def one(member):
        behind[member] = walk(words.ctypes.data, members, member, counts.ctypes.data, ROUNDS)

    threads = [threading.Thread(target=one, args=(member,)) for member in range(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert behind == [0] * members and (counts == ROUNDS).all()


@pytest.mark.parametrize("pause", [0.0, 0.002])  # helpers spin until the next pass, or sleep
def test_helpers_do_every_pass_once_and_leave_when_told(pause):
    members, words = 4, team.new_words()
    done = np.zeros(members, np.int64)
    arguments = (words.ctypes.data, members)
    helpers = [
        threading.Thread(target=help_until_stopped, args=(*arguments, member, done.ctypes.data))
        for member in range(1, members)
    ]
    for helper in helpers:
        helper.start()
    for number in range(1, 101):
        team.begin(words.ctypes.data)
        team.meet(*arguments)
        assert (done[1:] == number).all()
        threading.Event().wait(pause)
    team.stop(words.ctypes.data)
    for helper in helpers:
        helper.join(10)
    assert not any(helper.is_alive() for helper in helpers) and (done[1:] == 100).all()

"""Words in shared memory between processes: added to, exchanged, waited on."""

from __future__ import annotations

import mmap
import os
import threading
import time

import numpy as np
import pytest

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels import trace
from cllm_spheres.spheres import atomics
from tests.runs import WAIT_S


@kernel
def add_many(address, times):
    for _ in range(times):
        atomics.add(address, 1)


@kernel
def exchange_many(address, times):
    """Adds one `times` times, by exchanging: returns how often another was faster."""
    late = 0
    for _ in range(times):
        while True:
            old = atomics.load(address)
            if atomics.exchange_if(address, old, old + 1) == old:
                break
            late += 1
    return late


@pytest.fixture
def words():
    """Eight words of memory that a fork shares."""
    shared = mmap.mmap(-1, 4096)
    array = np.frombuffer(shared, np.int64)[:8]
    yield array
    del array


def at(words, i=0):
    return words.ctypes.data + 8 * i


def in_children(count, work):
    """work() in forked processes; all must end well."""
    children = []
    for _ in range(count):
        if (child := os.fork()) == 0:
            work()
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * count


def test_a_word_is_stored_loaded_added_to_and_exchanged(words):
    atomics.store_word(at(words), -(2**40))
    assert atomics.load_word(at(words)) == words[0] == -(2**40)
    assert atomics.add_to_word(at(words), 5) == -(2**40)
    assert words[0] == 5 - 2**40
    assert atomics.exchange_word(at(words, 1), 0, 9) == 0 and words[1] == 9
    assert atomics.exchange_word(at(words, 1), 0, 7) == 9 and words[1] == 9


def test_no_addition_of_any_process_is_lost(words):
    add_many(at(words), 1)
    exchange_many(at(words, 1), 1)  # both compiled before the fork

    def work():
        add_many(at(words), 100_000)
        exchange_many(at(words, 1), 100_000)

    in_children(3, work)
    assert words[0] == 300_001 and words[1] == 300_001


def test_a_waiting_thread_wakes_without_holding_up_the_others(words):
    timeout = np.array([WAIT_S, 0], np.int64)
    woken = threading.Event()

    def wait():
        while atomics.load_word(at(words)) == 0:
            atomics.wait_while(at(words), 0, timeout.ctypes.data)
        woken.set()

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.05)
    assert not woken.is_set()
    atomics.store_word(at(words), 1)
    atomics.wake_all(at(words))
    assert woken.wait(WAIT_S / 2)  # long before the time-out
    thread.join()


def test_processes_wake_each_other(words):
    timeout = np.array([WAIT_S, 0], np.int64)
    atomics.wait_while(at(words), 1, timeout.ctypes.data)  # compiled before the fork; 0 is not 1: no wait

    def work():
        atomics.add_to_word(at(words, 1), 1)
        while atomics.load_word(at(words)) == 0:
            atomics.wait_while(at(words), 0, timeout.ctypes.data)
        atomics.add_to_word(at(words, 2), 1)

    def release():
        while atomics.load_word(at(words, 1)) < 3:
            time.sleep(0.001)
        atomics.store_word(at(words), 1)
        atomics.wake_all(at(words))

    thread = threading.Thread(target=release)
    thread.start()
    in_children(3, work)
    thread.join()
    assert words[2] == 3


def test_a_wait_ends_with_its_time_out_and_is_not_begun_on_another_value(words):
    short, long = np.array([0, 1000], np.int64), np.array([10 * WAIT_S, 0], np.int64)
    atomics.wait_while(at(words), 0, short.ctypes.data)
    atomics.wait_while(at(words), 3, long.ctypes.data)  # the word is 0: no wait at all
    words[0] = 2**32 + 5  # a futex looks at the low half
    atomics.wait_while(at(words), 6, long.ctypes.data)


def test_the_clocks_are_those_of_the_system(words):
    monotonic, real = (trace.clock_ns(clock, at(words)) for clock in (1, 0))
    # asked a moment before: on any machine less than a minute
    assert 0 <= time.monotonic_ns() - monotonic < 60 * 10**9
    assert abs(time.time_ns() - real) < 60 * 10**9

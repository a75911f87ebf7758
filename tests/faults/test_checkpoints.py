"""Training is killed at any moment while it saves: a good checkpoint always loads.

A kill, an error and a power cut before, in and after every single operation: tests/checkpoint/test_disk.py and
test_power.py. Every truncation and every changed byte: tests/checkpoint/test_damage.py.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from cllm_spheres.checkpoint.store import Store
from tests.faults.amounts import WHOLE, amount
from tests.faults.saver import KEEP, content, is_best

ROOT = Path(__file__).parents[2]
SMALL, LARGE = 8_000, 400_000  # floats in each of three arrays: about 100 kB and 5 MB


class Killed:
    """A process that forks children that save, and kills each of them."""

    def __init__(self, run, num_floats):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.saver", run, str(num_floats)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )  # fmt: skip

    def after(self, seconds):
        """What a child that was killed `seconds` after it began had announced, and was at."""
        print(seconds, file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.communicate()


def assert_is_of_its_step(checkpoint, num_floats):
    expected = content(checkpoint.step, num_floats)
    for found, wanted in ((checkpoint.model, expected["model"]), (checkpoint.optimizer, expected["optimizer"])):
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[name], array) for name, array in wanted.items())
    assert (checkpoint.state, checkpoint.config) == (expected["state"], expected["config"])
    assert checkpoint.tokenizer_path.read_bytes() == expected["tokenizer"]


@pytest.mark.parametrize(
    "num_floats, kills", [(SMALL, amount(40, 600)), (LARGE, amount(16, 400))], ids=["100kB", "5MB"]
)
def test_a_kill_at_a_random_moment_leaves_a_good_checkpoint(tmp_path, num_floats, kills, capsys):
    run = tmp_path / "run"
    run.mkdir()
    store = Store(run)
    began = time.monotonic()
    for _ in range(3):
        store.save(1, **content(1, num_floats))
        store.mark_best(1)
    longest_s = min(0.5, time.monotonic() - began)  # a child comes to save a few times, as fast as this disk is
    moments, at = random.Random(num_floats), Counter()
    saved = marked = 1
    unpruned = 0  # children in a row that never came to the end of a prune
    with Killed(run, num_floats) as killed:
        for kill in range(kills):
            child = killed.after(moments.uniform(0, longest_s))
            assert child["code"] == -signal.SIGKILL
            at[child["doing"]] += 1
            if child["doing"] not in ("load", "compute"):
                at[f"{child['doing']}: {child['operation']}"] += 1
            told = {letter: [int(word[1:]) for word in child["announced"] if word[0] == letter] for letter in "rsmp"}
            saved, marked = max([saved, *told["r"], *told["s"]]), max([marked, *told["m"]])
            unpruned = 0 if told["p"] else unpruned + 1

            store = Store(run)
            good, refused = store.newest_good()
            assert refused == [] and good.step in (saved, saved + 1)  # the next may be whole and not yet announced
            for step in store.steps():
                assert_is_of_its_step(store.load(step), num_floats)
            best = store.best_step()
            assert best == marked or (best == good.step and is_best(best))  # marked, and not yet announced
            marked = best

            # Nothing grows: the newest that are kept, the best, one more of each child that did not prune; and
            # one entry half-made or half-removed, because each child begins by tidying up.
            assert len(store.steps()) <= KEEP + 2 + unpruned
            left = list(store.folder.glob(".tmp-*"))
            assert len(left) <= 1
            if kill % 2:  # the other half is left to the next child
                store.tidy()
                assert list(store.folder.glob(".tmp-*")) == []
                assert {entry.name for entry in store.folder.iterdir()} - {"best"} == {
                    store.path(step).name for step in store.steps()
                }
            saved = max(saved, store.steps()[-1])  # tidying may have finished a last rename
    store.tidy()
    store.prune(KEEP)
    assert len(store.steps()) <= KEEP + 1
    assert at["save"] > kills // 10, at
    if WHOLE:
        with capsys.disabled():
            print(f"\n{kills} kills, {saved} steps saved; they landed in:", dict(at.most_common()))

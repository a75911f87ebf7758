"""A run folder, a size and seconds on standard input -> children that save checkpoints, each killed after that time.

    python -m tests.faults.saver RUN NUM_FLOATS

For every line with a number of seconds a child is forked. It goes on where the newest checkpoint stands and
saves, marks and prunes as training does, until it is killed with SIGKILL that long after it began. The answer is
one line of JSON: what the child had announced, and what it was at. This process has no threads and little
memory, so that a fork takes a millisecond.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np

from cllm_spheres.checkpoint.disk import Disk
from cllm_spheres.checkpoint.store import Store

KEEP = 2
WORD = 20  # bytes of a word in shared memory


def content(step: int, num_floats: int) -> dict:
    """The arguments of a save: a pure function of the step, with three arrays of `num_floats`."""
    draw = np.random.default_rng(step).random
    arrays = {kind: draw(num_floats, np.float32).reshape(-1, 10) for kind in ("wte", "m.wte", "v.wte")}
    return dict(
        model={"wte": arrays.pop("wte"), "bias": np.full(3, step, np.float32)}, optimizer=arrays,
        state={"step": step, "best_loss": 1 / step}, config={"n_layer": 1}, tokenizer=b"{}",
    )  # fmt: skip


def is_best(step: int) -> bool:
    return step % 3 == 0


def train(run: Path, num_floats: int, words: mmap.mmap, announce: int) -> None:
    """Without end. Announced are, after resuming and each save, mark and prune: its first letter and the step."""

    def put(place: int, word: str) -> None:
        words[place * WORD : (place + 1) * WORD] = word.encode().ljust(WORD)

    def say(letter: str) -> None:
        os.write(announce, f"{letter}{step}\n".encode())

    store = Store(run, Disk(before=lambda operation, *paths: put(1, operation)))
    put(0, "tidy")
    os.write(announce, b"\n")
    store.tidy()
    put(0, "load")
    step = store.newest_good()[0].step
    say("r")
    while True:
        put(0, "compute")
        step += 1
        new = content(step, num_floats)
        put(0, "save")
        store.save(step, **new)
        say("s")
        if is_best(step):
            put(0, "mark")
            store.mark_best(step)
            say("m")
        put(0, "prune")
        store.prune(KEEP)
        say("p")


def killed_after(seconds: float, run: Path, num_floats: int, words: mmap.mmap) -> dict:
    words[:] = bytes(len(words))
    hear, announce = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            train(run, num_floats, words, announce)
        finally:
            os._exit(1)
    os.close(announce)
    with open(hear) as file:
        file.read(1)  # it has begun
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        announced = file.read().split()
    doing, operation = (words[place * WORD : (place + 1) * WORD].strip(b"\0 ").decode() for place in (0, 1))
    return dict(code=code, announced=announced, doing=doing, operation=operation)


if __name__ == "__main__":
    folder, floats = Path(sys.argv[1]), int(sys.argv[2])
    shared = mmap.mmap(-1, 2 * WORD)
    for line in sys.stdin:
        print(json.dumps(killed_after(float(line), folder, floats, shared)), flush=True)

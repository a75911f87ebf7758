"""Node Zero is killed at any moment: nothing of the run is left a second later, and a resume goes on exactly."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest

from cllm_spheres.checkpoint.store import Store
from cllm_spheres.training import session
from cllm_spheres.training.control import addresses
from cllm_spheres.training.launch import Launch
from tests.faults.amounts import amount
from tests.runs import Outcome, finished, lives, shared_files, start, train_whole, wait_until

OPTIONS = dict(spheres=7, batch_size=7, steps=6000, eval_every=500, save_every=200, eval_tokens=200)
KILLS, WORKERS = amount(4, 100), (1, 2, 7)


def family(node_zero: int) -> list[psutil.Process]:
    """Node Zero and all below it, as far as they have been started."""
    process = psutil.Process(node_zero)
    return [process, *process.children(recursive=True)]


def newest(run: Path) -> int:
    """The step of the newest checkpoint, -1 for none."""
    return max(Store(run).steps(), default=-1)


def sockets(run: Path) -> bool:
    """Whether somebody listens at the address of the run."""
    listening = Path("/proc/net/unix").read_text()
    return any(address[1:] in listening for address in addresses(run))


@pytest.mark.slow
def test_node_zero_killed_at_random_leaves_nothing_and_every_run_ends_in_the_same_bits(corpus, tmp_path, monkeypatch):
    undisturbed = train_whole(corpus, tmp_path / "undisturbed", **OPTIONS, workers=1)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    rng, kills, runs, steps = random.Random(amount(3, None)), 0, 0, []
    while kills < KILLS:
        run = tmp_path / f"run-{runs}"
        shared = shared_files()
        launch = start(corpus, run, **OPTIONS, workers=rng.choice(WORKERS))
        saved = -1
        while True:
            if kills % 3 == 2:  # on a busy machine it would else never come as far as a checkpoint
                wait_until(lambda: not launch.alive or newest(run) > saved, "a further checkpoint")  # noqa: B023
                saved = newest(run)
            time.sleep(rng.random() * 1.5)  # while it starts, and while it trains
            if not launch.alive or kills == KILLS:
                break
            processes = family(launch.process.pid)
            if kills % 4 == 0:
                stopped = rng.choice(processes[1:]) if len(processes) > 1 else processes[0]
                stopped.send_signal(signal.SIGSTOP)
            os.kill(launch.process.pid, signal.SIGKILL)
            kills += 1
            deadline = time.monotonic() + 1
            while any(map(lives, processes[1:])) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert [process for process in processes[1:] if lives(process)] == []
            assert launch.finish()[0] == 1
            assert shared_files() == shared and os.listdir(tmp_path / "temporary") == []
            assert not sockets(run)
            plan, done = session.resumed_run(run, {"workers": rng.choice(WORKERS)}, data=None)
            if done:
                break
            launch = Launch().obey(plan)
        outcome = finished(launch) if launch.process.returncode != -signal.SIGKILL else Outcome(run, 0, "")
        assert outcome.code == 0, outcome.message
        assert outcome.bits == undisturbed.bits
        assert list((run / "checkpoints").glob(".tmp-*")) == []
        steps += [r["from_step"] for r in outcome.of("event") if r["event"] == "resume"]
        runs += 1
    print(f"{kills} kills of Node Zero in {runs} runs; resumed from steps {sorted(steps)}")
    assert any(steps)  # some had saved something, and went on from there

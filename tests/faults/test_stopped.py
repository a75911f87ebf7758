"""A worker is stopped for long, and woken when it is too late."""

from __future__ import annotations

import os
import signal
import time

from tests.faults.amounts import amount
from tests.runs import Family, finished, lives, start, train_whole, wait_for_step, wait_until

HUNG_S = amount(3.0, None)  # None: what counts as hung where steps are short, 10 s
STOPPED_S = amount(5, 30)
STEPS = amount(10_000, 30_000)
OPTIONS = dict(spheres=4, batch_size=4, steps=STEPS, eval_every=STEPS, save_every=STEPS, eval_tokens=200)


def test_a_worker_stopped_for_long_is_replaced_in_time_and_waking_it_is_too_late(corpus, tmp_path, monkeypatch):
    if HUNG_S:
        site = f"from cllm_spheres.spheres import silence\nsilence.LEAST_S = {HUNG_S}\n"
        (tmp_path / "sitecustomize.py").write_text(site)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    undisturbed = train_whole(corpus, tmp_path / "undisturbed", **OPTIONS, workers=1)
    launch = start(corpus, tmp_path / "run", **OPTIONS, workers=3)
    family = Family.of(os.getpid(), 3)
    wait_for_step(tmp_path / "run", 100)
    stopped, began = family.workers[1], time.monotonic()
    stopped.send_signal(signal.SIGSTOP)
    wait_until(lambda: not lives(stopped), "the end of the worker that was stopped")
    while time.monotonic() - began < STOPPED_S:
        time.sleep(0.1)
    if stopped.is_running():
        stopped.send_signal(signal.SIGCONT)
    outcome = finished(launch)
    assert outcome.code == 0, outcome.message
    assert outcome.event("hung")["worker"] == 1 and outcome.event("recovered")["workers"] == [1]
    assert "may be stopped (SIGSTOP)" in outcome.event("hung")["message"].replace("\n", " ")
    assert outcome.bits == undisturbed.bits

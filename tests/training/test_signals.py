"""Signals to the command, to its process group and to Node Zero: what is saved, what is said, how it goes on."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import psutil
import pytest

from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import Interrupted
from cllm_spheres.training import session
from cllm_spheres.training import trainer as trainer_module
from cllm_spheres.training.launch import Launch
from cllm_spheres.training.trainer import Trainer
from tests.faults.amounts import amount
from tests.runs import (
    TINY,
    WAIT_S,
    Family,
    Outcome,
    begin,
    finished,
    resume,
    start,
    train_whole,
    wait_for_step,
    wait_until,
    words,
)

# Steps of some milliseconds, so that a signal comes in the middle of the run.
LONG = dict(layers=2, width=64, ff_width=256, block_size=64, batch_size=8, steps=240, eval_every=100, eval_tokens=640)
ENDLESS = dict(steps=10_000_000, eval_every=10_000_000, save_every=10_000_000, eval_tokens=64)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    return train_whole(corpus, tmp_path_factory.mktemp("undisturbed") / "run", **TINY | LONG)


@pytest.mark.slow
@pytest.mark.parametrize("to_the_group", amount([(True, False, True)], [(True, True, True), (False, False, False)]))
def test_a_run_stopped_by_every_signal_saves_says_how_to_go_on_and_ends_in_the_same_bits(
    undisturbed, corpus, tmp_path, to_the_group
):
    run = tmp_path / "run"
    arguments = [corpus, *words(TINY | LONG)]
    signals = (signal.SIGINT, 10, 130), (signal.SIGTERM, 60, 143), (signal.SIGHUP, 110, 129)
    for (number, after, code), group in zip(signals, to_the_group, strict=True):
        command = begin("train", *arguments, "--run", run, "--plain")
        family = Family.of(command.pid, 2)
        wait_for_step(run, after)
        if group:
            os.killpg(command.pid, number)
        else:
            command.send_signal(number)
        out, error = command.communicate(timeout=WAIT_S)
        outcome = Outcome(run, command.returncode, error)
        assert outcome.code == code, out + error
        assert family.alive == []
        assert f"cllm-spheres train --resume --run {run}" in error and "Traceback" not in out + error
        last = outcome.of("step")[-1]["step"]
        assert after <= last < 240
        assert Store(run).steps()[-1] == last and f"Saved step {last}." in error
        end = outcome.of("event")[-1]
        assert (end["event"], end["reason"], end["step"]) == ("end", "signal", last)
        arguments = ["--resume"]
    resumed = resume(run)
    assert resumed.code == 0, resumed.message
    assert (resumed.curve, resumed.files) == (undisturbed.curve, undisturbed.files)
    assert resumed.evaluations == undisturbed.evaluations


@pytest.fixture
def stuck(corpus, tmp_path):
    """A run in the middle of a step that does not end: one worker stops itself while it computes."""
    run, options = tmp_path / "run", TINY | LONG | {"save_every": 1000, "eval_every": 1000}
    launch = Launch().obey(session.new_run(corpus, options, run=run, file=None, faults=["forward:20:1:stop"]))
    family = Family.of(os.getpid(), 2)
    wait_for_step(run, 19)
    wait_until(lambda: family.workers[1].status() == psutil.STATUS_STOPPED, "a worker that has stopped")
    yield launch, family
    family.end()


@pytest.mark.slow
def test_a_step_that_does_not_end_is_dropped_and_a_resume_repeats_it_exactly(undisturbed, stuck):
    launch, family = stuck
    family.node_zero.send_signal(signal.SIGTERM)
    outcome = finished(launch)
    assert outcome.code == 143 and family.alive == []
    last = outcome.of("step")[-1]["step"]
    assert 3 <= last < 240 and Store(outcome.run).steps() == [last]
    assert f"Stopped by SIGTERM. Saved step {last}." in outcome.message
    resumed = resume(outcome.run)
    assert resumed.code == 0, resumed.message
    assert [r["step"] for r in resumed.of("step")] == list(range(1, 241))
    assert (resumed.curve, resumed.files) == (undisturbed.curve, undisturbed.files)


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(stuck):
    launch, family = stuck
    family.node_zero.send_signal(signal.SIGINT)
    time.sleep(0.5)  # two signals within a moment are one wish: some senders signal a process and then its group
    family.node_zero.send_signal(signal.SIGINT)
    outcome = finished(launch)
    assert outcome.code == 130 and "Left at once" in outcome.message
    wait_until(lambda: family.alive == [], "the workers' end")
    assert Store(outcome.run).steps() == []
    assert resume(outcome.run, stop_at=2).code == 0  # there was no checkpoint: it begins anew


def test_a_stop_while_starting_says_that_nothing_was_done(corpus, tmp_path):
    launch = start(corpus, tmp_path / "run", **ENDLESS)
    launch.pass_on(signal.SIGTERM)
    outcome = finished(launch)
    assert outcome.code == 143
    assert "Stopped by SIGTERM" in outcome.message and "Traceback" not in outcome.message
    assert outcome.of("step") == [] or Store(outcome.run).steps()
    assert resume(tmp_path / "run", stop_at=3).code == 0


def test_a_signal_is_heeded_at_once_between_steps_and_after_two_seconds_within_one(monkeypatch):
    calls = []
    trainer = SimpleNamespace(
        wishes=SimpleNamespace(number=signal.SIGTERM, at=10.0), _started=True, _stepping=False,
        _say_stopping=lambda: calls.append("say"), _drop_step=lambda: calls.append("drop"),
        _stop=lambda: (_ for _ in ()).throw(Interrupted("saved", signal.SIGTERM)),
    )  # fmt: skip
    with pytest.raises(Interrupted, match="saved"):  # while workers are replaced or their number changes, too
        Trainer._look(trainer)
    trainer._stepping = True
    for now in (11.9, 12.1):
        monkeypatch.setattr(trainer_module.time, "monotonic", lambda now=now: now)
        Trainer._look(trainer)
    assert calls == ["say", "say", "drop"]


def test_an_update_that_a_replacement_finishes_is_waited_for_however_long_ago_the_signal_came(monkeypatch):
    trainer = SimpleNamespace(
        node_zero=SimpleNamespace(close_gate=lambda: False, recovered_at=95.0), step=7,
        wishes=SimpleNamespace(at=10.0, number=signal.SIGTERM, name="SIGTERM"),
    )  # fmt: skip
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: 98.0)
    Trainer._drop_step(trainer)
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: 99.5)
    with pytest.raises(Interrupted, match="inside the update of step 8, which did not end"):
        Trainer._drop_step(trainer)

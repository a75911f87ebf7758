"""Whoever dies at whatever moment: the command ends, and its bits are those of an undisturbed one."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from cllm_spheres.errors import RunFailed, SphereLost
from cllm_spheres.model import dtypes
from cllm_spheres.model.shape import Shape
from cllm_spheres.spheres import crew, node_zero, serving, silence
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.group import ProcessGroup
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.node_zero import NodeZero
from tests.faults.amounts import amount
from tests.runs import WAIT_S, Family, finished, start, train_whole, wait_for_step, wait_until
from tests.spheres import stopping_server

SMALL = Shape(vocab_size=257, block_size=8, layers=1, heads=2, width=32, ff_width=64)
WIDE = Shape(vocab_size=257, block_size=64, layers=4, heads=4, width=256, ff_width=1024)  # steps that take a while
SPHERES, WINDOWS = 7, 40


class Run:
    """Node Zero in this process, with a log of what it tells."""

    def __init__(self, corpus, workers, shape=SMALL, **options):
        options = {"batch_size": 9, "spheres": SPHERES, "seed": 3, **options}
        job = Job(
            shape=shape, workers=workers, train=str(corpus / "train.bin"), val=str(corpus / "val.bin"), item_bytes=2,
            train_tokens=4000, val_tokens=400, num_windows=WINDOWS, **options,
        )  # fmt: skip
        self.told = []
        self.node = NodeZero(job, tell=lambda event, message, **facts: self.told.append((event, message)))
        self.node.start()
        memory = self.node.memory
        memory.doubles(memory.regions.rates, M.RING)[:] = 1e-3
        memory.words(memory.regions.window_starts, WINDOWS)[:] = np.arange(WINDOWS)
        memory.words(memory.regions.window_lengths, WINDOWS)[:] = shape.block_size

    def begin(self, steps, until=None):
        self.node.do(M.INITIALISE)
        self.node.set_position(0, 0)
        self.steps, self.records = steps, []
        self.node.give(M.STEPS, 1, (until or steps) + 1)

    def go_on(self, until):
        """A further command: its steps after those that are done."""
        self.node.give(M.STEPS, self.node.done + 1, until + 1)

    def disturbed(self, disturb, pause=0.0):
        """Until the command ends; `disturb` is called whenever everybody lives."""
        deadline = time.monotonic() + WAIT_S
        while not self.node.finished():
            time.sleep(pause)
            if not self.node.crew.lost and not self.node.finished():
                disturb()
            self.node.wait_for_bell()
            self.node.check()
            assert time.monotonic() < deadline
        memory, done = self.node.memory, self.node.done - self.node.base + 1
        losses = memory.ring_doubles()[:done, [M.R_LOSS, M.R_NORM, M.R_CLIPPED, M.R_LR]]
        self.records.append((losses.tobytes(), memory.ring_words()[:done, [M.R_STEP, M.R_SKIPPED]].tobytes()))

    def result(self):
        """Weights, moments, and of every step what must not depend on who computed it."""
        memory = self.node.memory
        assert (self.node.done, self.node.applied) == (self.steps, self.steps)
        curve = [b"".join(parts) for parts in zip(*self.records, strict=True)]
        return [a.tobytes() for a in (memory.params, memory.moments, memory.squares)] + curve

    def kill(self, *workers, number=signal.SIGKILL):
        for worker in workers:
            with contextlib.suppress(KeyError, ProcessLookupError):  # the last death has just been told
                os.kill(self.node.pids[worker], number)

    def events(self, name):
        return [message for event, message in self.told if event == name]


@pytest.fixture
def run(corpus):
    """run(workers): a Run; all of them are ended."""
    made = []

    def make(workers, **options):
        made.append(Run(corpus, workers, **options))
        return made[-1]

    yield make
    for one in made:
        one.node.kill()


@pytest.fixture(scope="module")
def undisturbed(corpus):
    """undisturbed(steps, **options): the result of one worker, to which nothing happens."""
    found = {}

    def result(steps, **options):
        key = (steps, *sorted(options.items()))
        if key not in found:
            one = Run(corpus, 1, **options)
            one.begin(steps)
            one.disturbed(lambda: None)
            found[key] = one.result()
            one.node.close()
        return found[key]

    return result


def killed_at_random_moments(one, rng, steps):
    """The result of a run whose workers are killed, one in each of many steps: too many within one end it."""
    one.begin(steps)
    last = -1

    def disturb():
        nonlocal last
        if one.node.done > last:
            last = one.node.done
            time.sleep(rng.random() * 0.02)
            if not one.node.finished():
                one.kill(rng.randrange(one.node.job.workers))

    one.disturbed(disturb)
    assert len(one.events("recovered")) >= 3
    return one.result()


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_workers_killed_at_random_moments_change_no_bit(run, undisturbed, workers):
    steps = amount(1000, 2000)
    assert killed_at_random_moments(run(workers), random.Random(workers), steps) == undisturbed(steps)


@pytest.mark.parametrize("seed", range(amount(3, 40)))
def test_models_of_any_shape_in_bfloat16_survive_kills_too_and_batches_of_one(run, undisturbed, seed):
    rng = random.Random(seed)
    heads, spheres = rng.randint(1, 5), 1 if seed % 2 == 0 else rng.randint(2, 5)
    shape = Shape(  # nothing is a multiple of anything
        vocab_size=rng.randint(257, 700), block_size=rng.randint(2, 40), layers=rng.randint(1, 3), heads=heads,
        width=heads * rng.randint(1, 17), ff_width=rng.randint(1, 150), bias=rng.random() < 0.5,
    )  # fmt: skip
    options = dict(
        shape=shape, spheres=spheres, batch_size=1 if spheres == 1 else rng.randint(spheres, 9),
        dtype=dtypes.usable("bf16"), dropout=rng.choice([0.0, 0.2]), optimizer=rng.choice(["adamw", "sgd"]),
    )  # fmt: skip
    one = run(rng.randint(1, spheres), **options)
    assert killed_at_random_moments(one, rng, 1000) == undisturbed(1000, **options)


@pytest.mark.parametrize("killed", [[0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6]])
def test_several_killed_at_once_change_no_bit(run, undisturbed, monkeypatch, killed):
    one, expected = run(7), undisturbed(1000)
    # A number may be somebody else's by now: descriptors of workers come from their parent, which waits for them.
    monkeypatch.setattr(crew.os, "pidfd_open", None)
    one.begin(1000)
    turns = iter(range(3))

    def disturb():
        if next(turns, None) is not None:
            one.kill(*killed)

    one.disturbed(disturb, pause=0.01)
    assert one.events("recovered") and one.result() == expected


def test_a_death_during_the_recovery_is_recovered_too(run, undisturbed, monkeypatch):
    one = run(3)
    one.begin(1000)
    spawn, again = one.node.crew.spawn, [2, 1]

    def spawn_and_kill(workers):
        if again:
            one.kill(again.pop())
        spawn(workers)

    monkeypatch.setattr(one.node.crew, "spawn", spawn_and_kill)
    one.kill(0)
    one.disturbed(lambda: None)
    assert not again and len(one.events("lost")) == 3
    assert one.result() == undisturbed(1000)


def test_a_worker_that_is_stopped_right_after_its_fork_is_ended_and_replaced(run, undisturbed, monkeypatch, tmp_path):
    monkeypatch.setattr(serving, "MODULE", stopping_server.__name__)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv(stopping_server.FILE, str(tmp_path / "stop"))
    one = run(3)
    one.begin(1000)
    server = one.node.server_pid
    monkeypatch.setattr(node_zero, "STOPPED_S", 0.5)
    (tmp_path / "stop").touch()
    one.kill(1)
    one.disturbed(lambda: None)
    (hung,) = one.events("hung")
    assert "worker 1 (pid " in hung and " while starting, step " in hung
    assert len(one.events("lost")) == 2 and one.node.server_pid == server  # the others need not be started again
    assert one.result() == undisturbed(1000)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_ends_or_hangs_while_it_starts_is_replaced(run, undisturbed, monkeypatch, number):
    monkeypatch.setattr(node_zero, "STOPPED_S", 0.5)
    spawn, servers = crew.Crew.spawn, []

    def spawn_and_hurt(one, workers):
        spawn(one, workers)
        servers.append(one.server.pid)
        if len(servers) == 1:
            os.kill(servers[0], number)

    monkeypatch.setattr(crew.Crew, "spawn", spawn_and_hurt)
    one = run(2)
    assert len(servers) == 2 and servers[0] != one.node.server_pid
    assert "The process that starts the workers ended by signal 9" in one.events("lost")[0]
    one.begin(100)
    one.disturbed(lambda: None)
    assert one.result() == undisturbed(100)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_death_of_the_process_that_starts_the_workers_changes_no_bit(run, undisturbed, workers):
    one = run(workers)
    one.begin(1000)
    before = one.node.pids
    os.kill(one.node.server_pid, signal.SIGKILL)
    one.disturbed(lambda: None)
    assert set(one.node.pids.values()).isdisjoint(before.values())
    assert not any(os.path.exists(f"/proc/{pid}/exe") for pid in before.values())
    assert one.result() == undisturbed(1000)


@pytest.mark.parametrize("delay_us", [0, 150, 300])
def test_a_stopped_worker_is_ended_and_replaced_and_waking_it_is_too_late(run, undisturbed, monkeypatch, delay_us):
    monkeypatch.setattr(silence, "LEAST_S", 0.5)
    one = run(3)
    one.begin(1000)
    while one.node.done < 20:
        one.node.wait_for_bell()
    time.sleep(delay_us / 1e6)
    stopped = one.node.pids[1]
    one.kill(1, number=signal.SIGSTOP)
    one.disturbed(lambda: None)
    assert one.node.pids[1] != stopped and not os.path.exists(f"/proc/{stopped}/exe")
    assert len(one.events("hung")) == len(one.events("recovered")) == 1
    assert one.result() == undisturbed(1000)


def test_a_worker_that_cannot_be_ended_stops_the_run_before_its_work_is_given_away(run, monkeypatch):
    monkeypatch.setattr(silence, "LEAST_S", 0.5)
    monkeypatch.setattr(crew, "ENDS_WITHIN_S", 0.3)
    one = run(3, faults=[("backward", 20, 1, "stop")])
    one.begin(100)
    kill = crew.signal.pidfd_send_signal
    monkeypatch.setattr(crew.signal, "pidfd_send_signal", lambda *arguments: None)  # as if the kernel held it
    with pytest.raises(RunFailed, match=r"Worker 1 \(pid \d+\) hangs in the kernel and cannot be ended"):
        one.disturbed(lambda: None)
    assert one.node.done == 19 and one.node.close_gate()  # the last whole step can be saved
    assert one.events("recovered") == []
    monkeypatch.setattr(crew.signal, "pidfd_send_signal", kill)


def test_workers_that_do_not_end_with_their_server_stop_the_run_before_their_work_is_given_away(run, monkeypatch):
    one = run(3)
    one.begin(1000)
    monkeypatch.setattr(ProcessGroup, "wait_for_all", lambda self, timeout_s: False)  # as if the kernel held some
    os.kill(one.node.server_pid, signal.SIGKILL)
    with pytest.raises(RunFailed, match="hang in the kernel and cannot be ended"):
        one.disturbed(lambda: None)
    assert one.events("recovered") == []


def test_a_worker_stopped_in_its_sleep_at_a_barrier_does_not_hold_up_a_recovery(run, undisturbed, monkeypatch):
    monkeypatch.setattr(silence, "LEAST_S", 4.0)  # longer than the fault that is slow
    one = run(3, faults=[("forward", 20, 2, "slow")])
    one.begin(100)
    while one.node.done < 19:
        one.node.wait_for_bell()
    states = one.node.memory.worker_words()[:3, M.W_STATE]
    wait_until(lambda: states[0] == states[1] == M.State.WAITING, "two that wait for the third")
    one.kill(0, number=signal.SIGSTOP)
    one.kill(2)
    one.disturbed(lambda: None)
    assert len(one.events("hung")) == 1 and len(one.events("lost")) == 2
    assert one.result() == undisturbed(100)


def test_a_worker_killed_during_an_evaluation_changes_no_loss(run):
    one = run(3, shape=WIDE)
    one.begin(2)
    one.disturbed(lambda: None)
    losses = one.node.memory.doubles(one.node.memory.regions.window_losses, WINDOWS)
    one.node.do(M.EVALUATE, 0, WINDOWS)
    hits = one.node.memory.words(one.node.memory.regions.window_hits, WINDOWS)
    expected, expected_hits = losses.copy(), hits.copy()
    losses[:], hits[:] = np.nan, -1
    one.node.give(M.EVALUATE, 0, WINDOWS)
    kills = iter(range(2))  # a third within one step would end the run
    one.disturbed(lambda: next(kills, None) is not None and one.kill(1), pause=0.01)
    assert one.events("recovered") and losses.tobytes() == expected.tobytes()
    assert (hits == expected_hits).all() and hits.max() > 0


def test_a_worker_killed_between_commands_is_replaced_before_the_next(run, undisturbed):
    one = run(2)
    one.node.do(M.INITIALISE)
    one.kill(1)
    while not one.node.crew.lost:
        one.node.wait_for_bell()
    one.node.check()
    one.begin(1000)
    one.disturbed(lambda: None)
    assert one.result() == undisturbed(1000)


@pytest.mark.parametrize("phase", ["gather", "update"])
def test_a_place_that_loses_too_many_within_a_step_is_given_up_and_the_rest_go_on_with_the_same_bits(
    run, undisturbed, phase
):
    one = run(3, faults=[(phase, 20, 1, "kill")] * 3)
    one.begin(100)
    one.disturbed(lambda: None)
    assert one.node.job.workers == 2 and len(one.node.pids) == 2
    (fewer,) = one.events("fewer")
    assert fewer == "Worker 1 ended 3 times within step 20: the run goes on with 2 workers. Its bits stay the same."
    assert one.result() == undisturbed(100)


def test_the_last_worker_that_ends_again_and_again_ends_the_run(run):
    one = run(1, faults=[("barrier", 20, 0, "kill")] * 3)
    one.begin(100)
    with pytest.raises(SphereLost, match=r"Worker 0 ended 3 times within step 20, and it was the last one\."):
        one.disturbed(lambda: None)
    assert one.node.done == 19 and one.node.close_gate()


def test_a_sphere_whose_shard_ends_three_workers_ends_the_run_and_is_named(run):
    one = run(3, faults=[("backward", 20, 4, "segv")] * 3)
    one.begin(100)
    with pytest.raises(SphereLost, match=r"Sphere 4 ended 3 workers in step 20: .*\bsignal 11 \(SIGSEGV\)"):
        one.disturbed(lambda: None)
    assert one.node.done == 19 and one.node.close_gate()


def test_a_server_that_ends_again_and_again_within_a_step_ends_the_run(run):
    one = run(2, shape=WIDE, batch_size=200)
    one.begin(1000)
    with pytest.raises(SphereLost, match=r"The process that starts the workers .* 3 times within step 1"):
        one.disturbed(lambda: os.kill(one.node.server_pid, signal.SIGKILL))


# --- other numbers of workers ---


def test_between_commands_the_number_of_workers_changes_and_no_bit(run, undisturbed):
    one = run(2)
    one.begin(1000, until=300)
    for workers, until in ((7, 600), (1, 800), (5, 1000)):
        one.disturbed(lambda: None)
        one.node.resize(workers)
        assert len(one.node.pids) == one.node.job.workers == workers
        one.go_on(until)
    one.disturbed(lambda: None)
    assert one.result() == undisturbed(1000)


@pytest.mark.parametrize("victim", ["worker", "server"])
def test_a_death_while_the_number_of_workers_changes_is_recovered_too(run, undisturbed, monkeypatch, victim):
    one = run(2)
    one.begin(1000, until=300)
    one.disturbed(lambda: None)
    spawn, left = one.node.crew.spawn, [victim]

    def spawn_and_kill(workers):
        spawn(workers)
        if left:
            wait_until(lambda: 1 in one.node.pids, "a new worker")
            os.kill(one.node.pids[1] if left.pop() == "worker" else one.node.server_pid, signal.SIGKILL)

    monkeypatch.setattr(one.node.crew, "spawn", spawn_and_kill)
    one.node.resize(5)
    one.go_on(1000)
    one.disturbed(lambda: None)
    assert len(one.node.pids) == 5 and one.events("recovered")
    assert one.result() == undisturbed(1000)


def test_a_worker_that_does_not_leave_when_the_number_changes_is_ended(run, undisturbed, monkeypatch):
    monkeypatch.setattr(crew, "LEAVES_WITHIN_S", 0.3)
    one = run(3)
    one.begin(1000, until=300)
    one.disturbed(lambda: None)
    stopped = one.node.pids[1]
    os.kill(stopped, signal.SIGSTOP)
    one.node.resize(4)
    assert not os.path.exists(f"/proc/{stopped}/exe")
    one.go_on(1000)
    one.disturbed(lambda: None)
    assert one.result() == undisturbed(1000) and one.told == []  # it was asked to leave: nothing was lost


# --- faults on purpose ---


PHASES = {"forward": "computing", "backward": "computing", "barrier": "", "gather": "gathering", "update": "updating"}
ACTIONS = {"kill": "signal 9", "segv": "signal 11", "stop": "signal 9", "slow": "signal 9"}


def check_faults(one, faults):
    """Each of a run's faults has cost it worker 2, once, in its step and phase."""
    one.begin(100)
    one.disturbed(lambda: None)
    lost = one.events("lost")
    assert len(lost) == len(faults) and one.node.faults.left == []
    for said, (phase, step, _, action) in zip(lost, faults, strict=True):
        assert "worker 2 (pid " in said and ACTIONS[action] in said and f"step {step}." in said
        assert PHASES[phase] in said


# The one that hangs comes first, and a slow one has a run of its own: after a long step more counts as slow.
@pytest.mark.parametrize(
    ("phase", "actions"),
    [
        *((phase, ("stop", "kill", "segv")) for phase in PHASES),
        *((phase, ("slow",)) for phase in amount(("forward", "update"), PHASES)),
    ],
)
def test_each_fault_fires_once_where_it_should_and_changes_no_bit(run, undisturbed, monkeypatch, phase, actions):
    monkeypatch.setattr(silence, "LEAST_S", 0.5)
    faults = [(phase, 20 * number, 5, action) for number, action in enumerate(actions, 1)]
    one, began = run(3, faults=faults), time.monotonic()
    check_faults(one, faults)
    assert time.monotonic() - began > 0.5  # and within that the first one was taken for one that hangs
    assert len(one.events("hung")) == 1
    assert one.result() == undisturbed(100)


@pytest.mark.skipif(dtypes.usable("bf16") != "bf16", reason="no bfloat16 here")
def test_a_fault_in_any_phase_in_bfloat16_changes_no_bit(run, undisturbed):
    faults = [(phase, 15 * number, 5, "kill") for number, phase in enumerate(PHASES, 1)]
    one = run(3, dtype="bf16", faults=faults)
    check_faults(one, faults)
    assert one.result() == undisturbed(100, dtype="bf16")


@pytest.mark.parametrize("phase", ["forward", "backward", "gather"])
def test_a_number_that_is_none_stops_the_step_before_its_update(run, phase):
    one = run(2, faults=[(phase, 20, 3, "nan")])
    one.begin(100)
    one.disturbed(lambda: None)
    assert one.node.halt == M.HALT_NONFINITE and one.node.done == 19
    assert np.isfinite(one.node.memory.params).all()


def test_a_number_that_is_none_in_the_update_is_found_in_the_next_step(run):
    one = run(2, faults=[("update", 20, 3, "nan")])
    one.begin(100)
    one.disturbed(lambda: None)
    assert one.node.halt == M.HALT_NONFINITE and one.node.done == 20
    assert np.isnan(one.node.memory.params).sum() == 1


def test_weights_that_are_no_numbers_stop_a_run_that_skips_too(run):
    one = run(2, faults=[("forward", 10, 3, "nan"), ("update", 20, 3, "nan")], skip_nonfinite=True)
    one.begin(100)
    one.disturbed(lambda: None)
    assert (one.node.halt, one.node.done, one.node.applied) == (M.HALT_NONFINITE, 20, 19)


def test_a_fault_that_has_not_fired_is_known(run):
    one = run(2, faults=[("update", 200, 3, "kill"), ("forward", 2, 0, "kill")])
    one.begin(100)
    one.disturbed(lambda: None)
    assert one.node.faults.left == ["update:200:3:kill"]


def test_a_whole_run_survives_its_workers_and_tells_of_each_loss(corpus, tmp_path):
    options = dict(
        layers=1, heads=2, width=32, ff_width=64, block_size=8, batch_size=4, spheres=4, dtype="fp32", lr=1e-2,
        steps=6000, eval_every=2000, save_every=3000, eval_tokens=200,
    )  # fmt: skip
    straight = train_whole(corpus, tmp_path / "straight", **options, workers=1)
    launch = start(corpus, tmp_path / "disturbed", **options, workers=3)
    family = Family.of(os.getpid(), 3)
    wait_for_step(tmp_path / "disturbed", 200)
    family.workers[1].send_signal(signal.SIGKILL)
    wait_for_step(tmp_path / "disturbed", 1500)
    family.server.send_signal(signal.SIGKILL)
    outcome = finished(launch)
    assert outcome.code == 0, outcome.message
    assert outcome.bits == straight.bits
    events = [r["event"] for r in outcome.of("event")]
    assert events.count("recovered") == 2 and events.count("lost") >= 2
    lost = next(r for r in outcome.of("event") if r["event"] == "lost")
    assert (lost["worker"], lost["pid"]) == (1, family.workers[1].pid) and "signal 9 (SIGKILL)" in lost["message"]
    assert [process for process in family.alive] == []

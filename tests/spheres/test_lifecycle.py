"""Who dies with whom: after any death nothing of a run is left, and the run can be resumed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import RunFailed
from cllm_spheres.events import read
from cllm_spheres.model.shape import Shape
from cllm_spheres.spheres import atomics, node_zero, silence
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.node_zero import NodeZero
from cllm_spheres.spheres.serving import start_server
from tests.runs import (
    WAIT_S,
    Family,
    finished,
    lives,
    resume,
    shared_files,
    start,
    wait_for_step,
    wait_until,
)
from tests.spheres import stopping_server

# Thousands of steps a second, so that it goes on until something happens to it.
ENDLESS = dict(steps=10_000_000, eval_every=10_000_000, save_every=500, eval_tokens=64)


@pytest.fixture
def going(corpus, tmp_path):
    """going(workers=2, ...): a run that has saved once, and its processes."""
    families = []

    def begin_run(workers=2, **options):
        before = shared_files()
        launch = start(corpus, tmp_path / "run", **ENDLESS | {"workers": workers} | options)
        families.append(Family.of(os.getpid(), workers))
        wait_until(lambda: Store(tmp_path / "run").steps(), "the first checkpoint")
        assert shared_files() == before  # nothing appears there while it runs either
        return launch, families[-1]

    yield begin_run
    for family in families:
        family.end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_ends_although_a_replacement_is_stopped_right_after_its_fork(going, monkeypatch, tmp_path, number):
    site = "from cllm_spheres.spheres import serving\nserving.MODULE = 'tests.spheres.stopping_server'\n"
    (tmp_path / "sitecustomize.py").write_text(site)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    monkeypatch.setenv(stopping_server.FILE, str(tmp_path / "stop"))
    launch, family = going()
    before = family.server.children()
    (tmp_path / "stop").touch()
    family.workers[1].kill()
    stopped = lambda: [c for c in family.server.children() if c.status() == psutil.STATUS_STOPPED]  # noqa: E731
    (replacement,) = wait_until(stopped, "a replacement that is stopped")
    assert replacement not in before
    family.node_zero.send_signal(number)
    outcome = finished(launch)
    time.sleep(1)  # the promise is: one second later
    assert family.alive == [] and not lives(replacement)
    if number == signal.SIGTERM:
        last = outcome.of("step")[-1]["step"]
        assert outcome.code == 143 and f"Stopped by SIGTERM. Saved step {last:,}." in outcome.message
        assert Store(outcome.run).steps()[-1] == last


def last_step(run):
    return [record for record in read(run / "metrics.jsonl") if record["kind"] == "step"][-1]["step"]


def last_event(run):
    return [record for record in read(run / "metrics.jsonl") if record["kind"] == "event"][-1]


def test_each_loss_of_a_worker_is_told_with_spheres_signal_and_step(going):
    launch, family = going()
    run = launch.plan.run
    told = lambda name: [r for r in read(run / "metrics.jsonl") if r.get("event") == name]  # noqa: E731
    victim = family.workers[1].pid
    for count, number in enumerate((signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS), 1):
        os.kill(victim, number)
        wait_until(lambda count=count: len(told("recovered")) == count, "the recovery")
        lost = told("lost")[-1]["message"]
        assert lost.startswith(
            f"Spheres 1, 3 of worker 1 (pid {victim}) ended by signal {int(number)} ({number.name}) while "
        )
        assert "memory" not in lost and told("recovered")[-1]["workers"] == [1]
        (victim,) = {child.pid for child in family.server.children()} - {family.workers[0].pid}
    family.node_zero.send_signal(signal.SIGTERM)
    assert finished(launch).code == 128 + signal.SIGTERM and family.alive == []


def test_ctrl_z_stops_all_of_a_run_until_it_is_continued(going):
    launch, family = going()
    everybody = [family.node_zero, family.server, *family.workers]
    all_stopped = lambda: {p.status() for p in everybody} == {psutil.STATUS_STOPPED}  # noqa: E731
    os.kill(family.node_zero.pid, signal.SIGTSTP)
    wait_until(all_stopped, "all are stopped")
    done = last_step(launch.plan.run)
    os.kill(family.node_zero.pid, signal.SIGCONT)
    wait_for_step(launch.plan.run, done + 100)
    launch.pass_on(signal.SIGTERM)
    assert finished(launch).code == 143 and family.alive == []


def test_nothing_survives_node_zero(going):
    launch, family = going(workers=4)
    family.workers[2].suspend()
    family.node_zero.send_signal(signal.SIGKILL)
    outcome = finished(launch)
    time.sleep(1)  # the promise is: one second later
    assert family.alive == []
    assert outcome.code == 1
    assert (
        f"Node Zero (pid {family.node_zero.pid}) was ended by signal 9. Go on from the last checkpoint"
        in outcome.message
    )
    saved = Store(outcome.run).steps()[-1]
    assert resume(outcome.run, stop_at=saved + 2).code == 0


STARTS_ONE_THAT_IS_STOPPED_AND_DIES = """
import os, signal
from cllm_spheres.spheres import group
group.die_with = lambda parent: os.kill(os.getpid(), signal.SIGSTOP)  # before it asks to die with us
pid = group.ProcessGroup(["/bin/sleep", "100"], [], {}).pid
os.waitid(os.P_PID, pid, os.WSTOPPED)
print(pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_child_that_is_stopped_right_after_its_fork_ends_with_its_parent():
    command = [sys.executable, "-c", STARTS_ONE_THAT_IS_STOPPED_AND_DIES]
    server = int(subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=WAIT_S).stdout)
    wait_until(lambda: not psutil.pid_exists(server) or not lives(psutil.Process(server)), "the server's end", 1.0)


@pytest.mark.slow
def test_63_workers_start_and_none_survives_node_zero(going):
    launch, family = going(workers=63, spheres=63, batch_size=63, save_every=5)
    for worker in (family.workers[7], family.workers[62]):
        worker.suspend()
    family.node_zero.send_signal(signal.SIGKILL)
    finished(launch)
    time.sleep(1)
    assert family.alive == []


LAUNCHES_AND_FORKS = """
import os, sys, time
from pathlib import Path
from tests.runs import start
from tests.spheres.test_lifecycle import ENDLESS
launch = start(Path(sys.argv[1]), Path(sys.argv[2]), **ENDLESS)
if child := os.fork():
    print(child, flush=True)
    launch.finish()
time.sleep(100)
"""


def test_a_run_whose_launcher_is_killed_saves_and_ends_although_a_child_of_it_lives(corpus, tmp_path):
    run = tmp_path / "run"
    command = subprocess.Popen(
        [sys.executable, "-c", LAUNCHES_AND_FORKS, corpus, run], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE
    )
    child = int(command.stdout.readline())  # it holds all pipes of the launcher
    family = Family.of(command.pid, 2)
    try:
        wait_for_step(run, 50)
        command.kill()
        command.wait()
        wait_until(lambda: family.alive == [], "the run's end")
        end = last_event(run)
        assert (end["event"], end["reason"]) == ("end", "signal")
        assert Store(run).steps()[-1] == last_step(run) == end["step"]
    finally:
        os.kill(child, signal.SIGKILL)
        family.end()


# --- Node Zero's own view, in this process ---


@pytest.fixture
def node(corpus):
    """node(workers=...): Node Zero with its spheres started."""
    made = []

    def make(workers, **options):
        job = Job(
            shape=Shape(vocab_size=257, block_size=8, layers=1, heads=2, width=32, ff_width=64), batch_size=4,
            spheres=4, workers=workers, seed=1, train=str(corpus / "train.bin"), val=str(corpus / "val.bin"),
            item_bytes=2, train_tokens=4000, val_tokens=400, num_windows=0, **options,
        )  # fmt: skip
        made.append(NodeZero(job))
        made[-1].start()
        made[-1].do(M.INITIALISE)
        made[-1].set_position(0, 0)
        return made[-1]

    yield make
    for one in made:
        one.kill()


def give_steps(node):
    node.memory.doubles(node.memory.regions.rates, M.RING)[:] = 1e-3
    node.give(M.STEPS, 1, M.RING + 1)


def watch(node):
    deadline = time.monotonic() + WAIT_S
    while not node.finished():
        node.wait_for_bell()
        node.check()
        assert time.monotonic() < deadline


def test_commands_are_done_and_close_leaves_nothing(node):
    one = node(2)
    give_steps(one)
    watch(one)
    assert one.done == one.applied == M.RING and one.halt == 0
    words = one.memory.worker_words()[:2]
    assert (words[:, M.W_COMPUTE_NS] > 0).all() and (words[:, M.W_UPDATE_NS] > 0).all()
    pids = [*one.pids.values(), one.server_pid]
    one.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_command_of_barriers_passes_that_many(node, workers):
    one = node(workers)
    release = one.memory.control(M.RELEASE)
    before = atomics.load_word(release)
    one.do(M.MEET, 0, 50)
    assert atomics.load_word(release) == before + 50 + 1  # one more ends the command


def test_a_stop_ends_after_a_whole_step(node):
    one = node(3)
    give_steps(one)
    while one.done < 5:
        one.wait_for_bell()
    one.request_stop()
    watch(one)
    assert one.halt == M.HALT_STOP and 5 <= one.done < M.RING
    assert one.memory.ring_words()[one.done - 1, M.R_STEP] == one.done


@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_does_nothing_for_long_is_the_one_that_is_replaced(node, monkeypatch, workers):
    monkeypatch.setattr(silence, "MOST_S", 0.5)  # there was no step yet that could be a measure
    one = node(workers)
    # Stopped before it has begun: the others wait for it, and are not to blame.
    before = one.pids
    os.kill(before[workers - 1], signal.SIGSTOP)
    give_steps(one)
    watch(one)
    assert one.done == M.RING
    assert {worker for worker, pid in one.pids.items() if pid != before[worker]} == {workers - 1}


def test_time_in_which_node_zero_did_not_run_does_not_count(node, monkeypatch):
    one = node(2)
    one.give(M.STEPS, 1, 1)  # a command without steps
    watch(one)
    now = time.monotonic()
    monkeypatch.setattr(silence.time, "monotonic", lambda: now + 3600)
    os.kill(one.pids[1], signal.SIGSTOP)
    give_steps(one)
    one.check()
    os.kill(one.pids[1], signal.SIGCONT)
    monkeypatch.undo()
    one._silence._looked_at = now
    watch(one)


def test_a_server_is_not_ended_because_its_kernels_took_long_to_compile(monkeypatch):
    killed = []
    group = SimpleNamespace(signal=lambda number: killed.append(now))
    crew = SimpleNamespace(warm_since=None, server=SimpleNamespace(group=group))
    memory = SimpleNamespace(worker_words=lambda: np.zeros((1, M.WORKER_WORDS)))
    node = SimpleNamespace(crew=crew, pids={}, memory=memory, server_pid=os.getpid())
    for now, warm_since, ended in ((99, None, False), (100, 99, False), (158, 99, False), (160, 99, True)):
        monkeypatch.setattr(node_zero.time, "monotonic", lambda now=now: now)
        crew.warm_since, node._looked_at = warm_since, now - 0.1
        assert NodeZero._end_who_does_not_start(node, 1.0) == (now if ended else 1.0) and bool(killed) is ended
    now, crew.warm_since = 1000, None
    monkeypatch.setattr(node_zero.time, "monotonic", lambda: now)
    assert NodeZero._end_who_does_not_start(node, 1.0) == 1000 and len(killed) == 1, "Node Zero was stopped itself"
    assert NodeZero._end_who_does_not_start(node, 1.0) == 1000 and len(killed) == 2


def test_where_no_process_may_be_started_that_is_said_and_nothing_is_left(monkeypatch):
    def refuse():
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", refuse)
    before, threads = set(os.listdir("/proc/self/fd")), threading.active_count()  # of earlier tests some may still end
    with pytest.raises(RunFailed, match=r"cannot be started: Resource temporarily unavailable.*doctor"):
        start_server()
    wait_until(
        lambda: set(os.listdir("/proc/self/fd")) <= before and threading.active_count() <= threads, "the thread's end"
    )

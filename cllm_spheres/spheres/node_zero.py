"""The control process's hold on its spheres: starts, commands, watches and ends the workers.

Node Zero never computes a batch. It writes commands into shared memory and waits on a bell that workers ring when
a command is finished; a thread listens to the server and rings it too when a worker ends.

A worker that ends or hangs is replaced, and the command is given again from the first step that is not whole: what
is complete stays, the rest is a pure function of shared memory, so the bits are those of an undisturbed run.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from cllm_spheres.errors import SphereLost
from cllm_spheres.machine import is_stopped, usable_cores
from cllm_spheres.spheres import atomics
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.crew import LEAVES_WITHIN_S, Crew
from cllm_spheres.spheres.fault_table import FaultTable
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.losses import MOST_DEATHS, Losses
from cllm_spheres.spheres.memory import SharedMemory
from cllm_spheres.spheres.placement import Claims, claim, read_cores
from cllm_spheres.spheres.serving import Server
from cllm_spheres.spheres.silence import Silence
from cllm_spheres.units import plural

NEVER = 1 << 62  # more barriers than are ever passed
LOOK_AROUND_S = 0.1  # how often Node Zero wakes without a bell
STOPPED_S = 5.0  # what does not start because somebody has stopped it is not waited for any longer
NOT_RUN_S = 2.0  # Node Zero, which looks ten times a second
READY_WITHIN_S = 60.0  # workers that are asked for, 63 of them in 0.7 s
COMPILED_WITHIN_S = 600.0  # the kernels, in 14 s; on a slow machine in a minute or two


class NodeZero:
    """The spheres of one run. `memory` is valid from `start` to `close`."""

    def __init__(
        self, job: Job, status: Callable[[str], None] = lambda text: None, look: Callable[[], None] = lambda: None,
        server: Server | None = None, tell: Callable[..., None] = lambda event, message, **facts: None,
    ) -> None:  # fmt: skip
        """status: told what a person may want to know; look: called about ten times a second in `start` and `do`, and
        in each recovery, which it may leave with an exception when the run shall end; server: one that has been
        started already; tell: told of each loss and recovery, as an event.
        """
        # The plan names cores as if the machine were ours; here those are taken that no other run has.
        self._claims, cores = claim(job.workers, read_cores(usable_cores())) if job.cores else (Claims(), [])
        self.job = job = replace(job, cores=cores)
        self.memory = SharedMemory(job.sizes)
        self._status, self._look, self._tell, self._server_given = status, look, tell, server
        self._command = (0, 0, 0, 0)  # number, kind, first, last
        self._recovering, self._recovered_at = False, 0.0
        self._looked_at = 0.0  # at who does not start
        self._frozen_units = job.sizes.frozen_units  # still to be packed, before the first command that reads them
        self.losses = Losses(job, self.memory)
        self.faults = FaultTable(self.memory, job.faults)
        for word, seconds, nanoseconds in (
            (M.LONG_TIMEOUT, 1, 0),
            (M.SHORT_TIMEOUT, 0, int(LOOK_AROUND_S * 1e9)),
        ):
            self._words(word, 2)[:] = (seconds, nanoseconds)
        self._silence = Silence(self.memory)

    # ---- starting and ending

    def start(self) -> None:
        """The server and all workers; returns when every worker is ready. SphereLost where memory ran out."""
        # The few pages that everybody writes are taken here, so that no worker can meet a bus error in them.
        self.memory.allocate(0, self.memory.regions.params)
        self.memory.allocate(self.memory.regions.frozen, 4 * self.job.sizes.num_frozen)
        self.faults.lay_down()
        self.crew = Crew(self.job, self.memory, self.ring_bell, self._status, self._server_given)
        self.crew.spawn(list(range(self.job.workers)))
        self._wait_until_ready()

    def _wait_until_ready(self) -> None:
        """Until all workers wait for commands; whoever ends meanwhile is replaced."""
        asked = time.monotonic()
        while not self.crew.ready():
            self.wait_for_bell()
            self._look()
            asked = self._end_who_does_not_start(asked)
            self.check()

    def _end_who_does_not_start(self, asked: float) -> float:
        """Where workers that were asked for are not ready in time they hang, or the server does. They are ended, which
        is noticed like any other end, and others are tried. Returns since when workers are waited for.

        The time that the kernels took to compile does not count as waiting for the workers. Who is stopped is not
        waited for so long.
        """
        now, warm_since = time.monotonic(), self.crew.warm_since
        before, self._looked_at = self._looked_at, now
        if asked <= before < now - NOT_RUN_S:  # Node Zero was stopped itself, as by Ctrl+Z: who waits is not late
            return now
        late = now > (asked + COMPILED_WITHIN_S if warm_since is None else max(asked, warm_since) + READY_WITHIN_S)
        if not late and now <= asked + STOPPED_S:
            return asked
        ready = self.memory.worker_words()[:, M.W_READY]
        starting = {worker: pid for worker, pid in self.pids.items() if not ready[worker]}
        hanging = [worker for worker, pid in starting.items() if late or is_stopped(pid)]
        for worker in hanging:
            self._tell_hung(worker, now - asked)
            self.crew.kill_worker(worker)
        if not starting and (late or is_stopped(self.server_pid)):
            self.crew.server.group.signal(signal.SIGKILL)
            return now
        return now if hanging else asked

    def close(self) -> None:
        """End every worker and the server; nothing of the run is left when this returns."""
        if not hasattr(self, "crew"):
            return
        if not self.crew.lost and self.finished():
            self._give(M.EXIT, 0, 0)
            self.crew.wait_for_ends(LEAVES_WITHIN_S, self.wait_for_bell)
        self.kill()

    def kill(self) -> None:
        """SIGKILL for all workers, confirmed by their parent, then the server's end."""
        self._claims.keep([])
        if hasattr(self, "crew"):
            self.crew.kill()

    def signal(self, number: int) -> None:
        """Send the server and all workers a signal; any thread may."""
        server = self.crew.server if hasattr(self, "crew") else self._server_given
        if server:
            server.group.signal(number)

    # ---- commands

    def give(self, kind: int, first: int = 0, last: int = 0) -> None:
        """Begin a command; `finished` tells when it is done."""
        if kind in (M.STEPS, M.EVALUATE) and self._frozen_units:
            self._frozen_units = 0
            self.do(M.PACK_FROZEN)
        for word, value in ((M.ABORT, 0), (M.HALT, 0), (M.STOP, 0), (M.BASE, first)):
            self._set(word, value)
        self._silence.forgive()
        self._give(kind, first, last)

    def do(self, kind: int, first: int = 0, last: int = 0) -> None:
        """A whole command: begin it and wait for its end."""
        self.give(kind, first, last)
        while not self.finished():
            self.wait_for_bell()
            self._look()
            self.check()

    def finished(self) -> bool:
        """Whether the last command has been finished by all workers."""
        return self._get(M.FINISHED) == self._command[0]

    def wait_for_bell(self) -> None:
        """Sleep until something happens, at most 0.1 s; other threads run meanwhile."""
        address = self.memory.control(M.BELL)
        seen = atomics.load_word(address)
        if seen == self._heard:
            atomics.wait_while(address, seen, self.memory.control(M.SHORT_TIMEOUT))
        self._heard = atomics.load_word(address)

    _heard = 0

    def ring_bell(self) -> None:
        """Wake Node Zero; any thread may."""
        atomics.add_to_word(self.memory.control(M.BELL), 1)
        atomics.wake_all(self.memory.control(M.BELL))

    def request_stop(self) -> None:
        """No further step begins; the current one ends."""
        self._set(M.STOP, 1)

    def close_gate(self) -> bool:
        """Drop the current step before its update. False while an update is being applied: try again soon."""
        done = self._get(M.DONE)
        return atomics.exchange_word(self.memory.control(M.GATE), done, -1 - done) == done

    def set_position(self, step: int, applied: int) -> None:
        """Say where the run stands before its first command: whole steps, and updates among them."""
        for word, value in ((M.DONE, step), (M.GATE, step), (M.APPLIED, applied)):
            self._set(word, value)
        self.memory.sphere_words()[:, M.P_COMPLETE] = 0
        self.memory.updated_words()[:] = 0

    @property
    def done(self) -> int:
        """The last whole step."""
        return self._get(M.DONE)

    @property
    def base(self) -> int:
        """The step whose record stands first in the ring."""
        return self._get(M.BASE)

    @property
    def applied(self) -> int:
        """Updates applied so far: the steps that were not skipped."""
        return self._get(M.APPLIED)

    @property
    def halt(self) -> int:
        """Why the last command of steps ended early: HALT_STOP, HALT_NONFINITE, or 0."""
        return self._get(M.HALT)

    @property
    def pids(self) -> dict[int, int]:
        """Worker -> process, of those that live."""
        return dict(self.crew.pids)

    @property
    def server_pid(self) -> int:
        return self.crew.server.pid

    def check(self) -> None:
        """Notice who has ended or hangs, and recover. SphereLost or another RunFailed where that is not possible."""
        if self.crew.lost:
            self._recover()
        # Once the command is aborted nobody may wait any more: who still sleeps at a barrier then is stopped there.
        release = NEVER if self._get(M.ABORT) else self._get(M.RELEASE)
        if hung := self._silence.hung(self.job.workers, self._command[0], release):
            worker, seconds = hung
            self._tell_hung(worker, seconds)
            self.crew.kill_worker(worker)
            self._recover()

    def _tell_hung(self, worker: int, seconds: float) -> None:
        self._tell(
            "hung", f"{self.losses.names(worker)} (pid {self.pids.get(worker)}) did nothing for {seconds:.0f} s"
            f" while {self.losses.state(worker)}, step {self.done + 1}. It may be stopped (SIGSTOP) or starved of"
            " its core. It is ended and replaced.", worker=worker,
        )  # fmt: skip

    @property
    def recovered_at(self) -> float:
        """When the last recovery ended, by time.monotonic: now while one is under way, 0 before the first."""
        return time.monotonic() if self._recovering else self._recovered_at

    # ---- losses, and other numbers of workers

    def resize(self, workers: int) -> None:
        """Have another number of workers from now on. No command may be under way."""
        self._claims.keep([])
        self._claims, cores = claim(workers, read_cores(usable_cores()))
        self._staff(workers, cores)
        self._set(M.FINISHED, self._command[0])  # or a loss from here on would have it given again
        self._wait_until_ready()

    def _staff(self, workers: int, cores: list[int]) -> None:
        """Workers of a new job are asked for; all others leave."""
        self.job = self.losses.job = replace(self.job, workers=workers, cores=cores)
        self._give(M.EXIT, 0, 0)
        self.crew.replace(self.job)
        self._set(M.ARRIVED, 0)
        self.losses.forget()

    def _recover(self) -> None:
        """Replace whoever has ended and give the command again. More may end meanwhile: they are replaced too."""
        if self._recovering:
            return
        self._recovering, began = True, time.monotonic()
        interrupted = self._command
        replaced: set[int] = set()
        try:
            while self.crew.lost:
                if self.crew.server_gone:
                    self._tell("lost", self.losses.count_server(self.crew.server_end(), self.done + 1))
                for ended in self.crew.take_ended():
                    self._tell("lost", self.losses.count(ended, self.done + 1), worker=ended.worker, pid=ended.pid)
                if self._command == interrupted:
                    self._leave_command()
                if (worker := self.losses.worn_out()) is not None:
                    self._go_on_without(worker)
                missing = self.crew.missing()
                replaced.update(missing)
                self.crew.spawn(missing)
                asked = time.monotonic()
                while not self.crew.ready() and not self.crew.lost:
                    self.wait_for_bell()
                    self._look()
                    asked = self._end_who_does_not_start(asked)
            self._give_again(*interrupted)
        finally:
            self._recovering, self._recovered_at = False, time.monotonic()
        seconds, workers = time.monotonic() - began, sorted(replaced)
        names = f"worker{'s' * (len(workers) > 1)} {', '.join(map(str, workers))}" if workers else "all workers"
        self._tell(
            "recovered", f"Replaced {names} within {seconds:.2f} s; step {self.done + 1} goes on.", seconds=seconds,
            workers=workers,
        )  # fmt: skip

    def _go_on_without(self, worker: int) -> None:
        """Fewer workers, and the core of this place is left alone. SphereLost where there are none left."""
        workers, step = self.job.workers - 1, self.done + 1
        why = f"Worker {worker} ended {MOST_DEATHS} times within step {step}"
        if workers == 0:
            raise SphereLost(f"{why}, and it was the last one.")
        goes_on = f"the run goes on with {plural(workers, 'worker')}. Its bits stay the same."
        self._tell("fewer", f"{why}: {goes_on}", workers=workers)
        cores = self.job.cores
        self._staff(workers, cores[:worker] + cores[worker + 1 :])

    def _leave_command(self) -> None:
        """Have the living leave the command that was interrupted; they wait for the next then."""
        self._set(M.ABORT, 1)
        while True:
            atomics.wake_all(self.memory.control(M.RELEASE))
            words = self.memory.worker_words()[list(self.pids)]
            # Whoever still starts is in no command.
            if ((words[:, M.W_LEFT] == self._command[0]) | (words[:, M.W_READY] == 0)).all():
                return
            self.wait_for_bell()
            self._look()
            self.check()  # who does not leave hangs, and is ended

    def _give_again(self, number: int, kind: int, first: int, last: int) -> None:
        """An interrupted command from where it stands. Nobody is in it any more."""
        whole = self._get(M.FINISHED) == number
        self._set(M.ARRIVED, 0)
        self._set(M.RELEASE, self._get(M.RELEASE) + 1)  # who had arrived at the barrier that was left waits no more
        self._set(M.ABORT, 0)
        if kind == M.STEPS:
            first = self.done + 1
            whole = whole or first == last or bool(self.halt)  # all that was lost is the barrier at its end
        if whole:
            self._set(M.FINISHED, self._command[0])
        else:
            self._give(kind, first, last)

    # ---- inside

    def _give(self, kind: int, first: int, last: int) -> None:
        for word, value in ((M.KIND, kind), (M.FIRST, first), (M.LAST, last)):
            self._set(word, value)
        self._command = (self._command[0] + 1, kind, first, last)
        self._set(M.COMMAND, self._command[0])
        atomics.wake_all(self.memory.control(M.COMMAND))

    def _words(self, word: int, count: int = 1) -> np.ndarray:
        return self.memory.words(self.memory.regions.control + word * M.LINE, count)

    def _get(self, word: int) -> int:
        return int(atomics.load_word(self.memory.control(word)))

    def _set(self, word: int, value: int) -> None:
        atomics.store_word(self.memory.control(word), value)

    def rehearsal_s(self, workers: int) -> float:
        """Seconds that one sequence took the slowest of the first workers in the last REHEARSE."""
        return float(self.memory.worker_words()[:workers, M.W_REHEARSAL_NS].max()) / 1e9

    def statistics(self) -> dict[str, Any]:
        """Copies of the workers' and spheres' words."""
        return {"workers": self.memory.worker_words().copy(), "spheres": self.memory.sphere_words().copy()}

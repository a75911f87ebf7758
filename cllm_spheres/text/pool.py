"""Tasks -> their results in order, from clean worker processes.

Workers are subprocesses that import only this package: nothing of the caller is forked or imported again,
so it works without a main guard, from a REPL and from a notebook.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from cllm_spheres.errors import RunFailed
from cllm_spheres.text.work import Task, run_task

_BOOT = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from cllm_spheres.text.work import main; main()"
_AHEAD = 4  # finished results a worker that wait for an earlier one: bounds the disk they take

Report = Callable[[int, int], None]


class Pool:
    """A context manager of worker processes; with 0 processes the tasks run in this one."""

    def __init__(self, processes: int) -> None:
        self._workers = [_Worker(processes) for _ in range(processes)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.kill()

    def map(self, tasks: Iterable[Task], report: Report | None = None) -> Iterator[Task]:
        """Results in the order of the tasks; `report` gets the numbers of long tasks and the bytes done in them.

        RunFailed where a worker process ends.
        """
        if not self._workers:
            for number, task in enumerate(tasks):
                yield run_task(task, partial(report, number) if report else lambda done: None)
            return
        waiting = iter(tasks)
        idle = deque(self._workers)
        done: dict[int, Task] = {}
        given, taken, exhausted = 0, 0, False
        with selectors.DefaultSelector() as selector:
            while True:
                while idle and not exhausted and given < taken + _AHEAD * len(self._workers):
                    try:
                        task = next(waiting)
                    except StopIteration:
                        exhausted = True
                        break
                    worker = idle.popleft()
                    worker.give(given, task)
                    selector.register(worker.stdout, selectors.EVENT_READ, worker)
                    given += 1
                while taken in done:
                    yield done.pop(taken)
                    taken += 1
                if exhausted and taken == given:
                    return
                for key, _ in selector.select():
                    worker = key.data
                    for message in worker.receive():
                        if "progress" in message:
                            if report:
                                report(worker.number, message["progress"])
                        else:
                            done[worker.number] = message
                            selector.unregister(worker.stdout)
                            idle.append(worker)


class _Worker:
    def __init__(self, processes: int) -> None:
        environment = os.environ | {"RAYON_NUM_THREADS": str(processes), "OPENBLAS_NUM_THREADS": "1"}
        paths = [path or os.getcwd() for path in sys.path]
        # Blocked signals stay blocked in the child, from its first instruction on: only the parent acts.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps(paths)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._stdin, self.stdout = self._process.stdin, self._process.stdout
        self._rest = b""
        self.number = -1

    def give(self, number: int, task: Task) -> None:
        self.number, self._task = number, task
        try:
            self._stdin.write(json.dumps(task).encode() + b"\n")
            self._stdin.flush()
        except OSError:
            self._lost()

    def receive(self) -> list[Task]:
        data = os.read(self.stdout.fileno(), 1 << 16)
        if not data:
            self._lost()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [json.loads(line) for line in lines]

    def _lost(self) -> None:
        code = self._process.wait(timeout=10)
        files = [entry[0] for entry in self._task.get("files", [])]
        where = f", reading {files[0]}" + (f" or one of {len(files) - 1} after it" * (len(files) > 1)) if files else ""
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise RunFailed(
            f"A preparing process (pid {self._process.pid}) ended by {how} in the step "
            f"{self._task['do']!r}{where}. Often the machine ran out of memory: try --processes 1."
        )

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(timeout=10)
        for pipe in (self._stdin, self.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

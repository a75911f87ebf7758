"""A plan -> Node Zero in a process of its own, and its outcome.

For the command and the library alike: the caller may be a notebook with threads, numpy and a forkserver running,
or a script without a main guard; none of that reaches Node Zero.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm_spheres.checkpoint.held import Held
from cllm_spheres.config import DEFAULT_PRESET, PRESETS
from cllm_spheres.errors import InputError
from cllm_spheres.limits import check_address_space, check_file_size, raised_files
from cllm_spheres.spheres.serving import clean_environment
from cllm_spheres.training.signals import HEEDED, STOP_SIGNALS

if TYPE_CHECKING:
    from cllm_spheres.training.folder import Plan


class Launch:
    """Node Zero's process: it warms up from the beginning, and works once it has a plan to obey.

        with Launch() as launch:
            code, message = launch.obey(plan).finish()

    On leaving without a plan it is ended. `alive` and `status` may be read at any time.
    """

    plan: Plan
    folder: Held  # the run's
    began: float  # Unix time of the order

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        """options: those of a new run, which tell early what kernels it needs; None: not known before its plan."""
        check_address_space()
        check_file_size()
        self.status = ""
        self._obeys = False
        self._outcome: dict[str, Any] | None = None
        self._errors: deque[str] = deque(maxlen=40)
        # Blocked here, the signals are blocked in the child from its first instruction on.
        old = signal.pthread_sigmask(signal.SIG_BLOCK, HEEDED)
        try:
            with raised_files():
                self.process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "cllm_spheres.training.process", str(os.getpid()), *_likely(options)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=clean_environment(),
                )  # fmt: skip
        except OSError as error:
            raise InputError(
                f"Node Zero cannot be started: {error.strerror}. Look at the limits: cllm-spheres doctor"
            ) from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, old)
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._obeys:
            self.process.kill()
            self.process.communicate()

    @property
    def run(self) -> Path:
        """The folder of the run as it is called now: somebody may have renamed it."""
        return self.folder.name

    def obey(self, plan: Plan) -> Launch:
        """Have Node Zero train this plan."""
        self.folder = Held(plan.run)
        self.plan, self._obeys, self.began = plan, True, time.time()
        order = {
            "run": str(self.run), "folder": self.folder.identity, "data": str(plan.prepared.folder),
            "changes": plan.changes, "resume": plan.resume,
            "exact": plan.exact, "stop_at": plan.stop_at,
            "profile": plan.profile, "faults": plan.faults, "notes": plan.notes,
        }  # fmt: skip
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: `finish` tells how
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        return self

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):
                message = json.loads(line)
                self.status = message.get("status", self.status)
                self._outcome = message.get("outcome", self._outcome)

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._errors.append(line.decode(errors="replace"))

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def pass_on(self, number: int) -> None:
        """Send a signal to Node Zero; a second one makes it leave at once."""
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def finish(self) -> tuple[int, str]:
        """Wait for the end: the exit code and what to tell the user."""
        code = self.process.wait()
        for thread in self._threads:
            thread.join(timeout=5)
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        if self._outcome is not None:
            return self._outcome["code"], self._outcome["message"]
        if 128 <= code < 160:
            return (
                code,
                f"Left at once. Go on from the last checkpoint: cllm-spheres train --resume --run {self.run}",
            )
        how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        said = "".join(self._errors).strip()
        saved = any(self.folder.path.glob("checkpoints/step-*"))
        return 1, (
            f"Node Zero (pid {self.process.pid}) {how}."
            f" {'Go on from the last checkpoint' if saved else 'No checkpoint had been saved. Begin anew'}:"
            f" cllm-spheres train --resume --run {self.run}" + (f"\nIt said:\n{said}" if said else "")
        )


def _likely(options: dict[str, Any] | None) -> list[str]:
    """dtype and width as far as the options tell, or nothing."""
    if options is None:
        return []
    preset = PRESETS.get(str(options.get("preset") or DEFAULT_PRESET), {})
    return [str(options.get("dtype") or "auto"), str(options.get("width") or preset.get("width", 0))]


@contextlib.contextmanager
def signals_passed_on(launch: Launch) -> Iterator[None]:
    """While inside, the signals that ask for an end go to Node Zero; only where this is the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda n, frame: launch.pass_on(n)) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

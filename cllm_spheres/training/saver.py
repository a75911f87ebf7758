"""A copy of where the run stands -> a checkpoint, written by a thread beside the training.

The training waits for the copy alone. Where writing fails, the thread tries the same again until it succeeds or a newer
copy comes; older checkpoints are never touched before the new one is whole.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from cllm_spheres.checkpoint.store import SaveFailed

RETRY_S = 10.0  # after a failure, and twice as long after each further one, up to
LONGEST_RETRY_S = 300.0
LAST_TRIES, LAST_RETRY_S = 5, 1.0  # when the run ends and waits for it
BUSY_S = 60.0  # what the training waits for the checkpoint before this one, at most


class Saver:
    """Carries out one job of saving at a time."""

    def __init__(self, failed: Callable[[SaveFailed, float], None]) -> None:
        """failed: told of each failure, and after how many seconds it is tried again."""
        self._failed = failed
        self._changed = threading.Condition()
        self._save: Callable[[], None] | None = None  # what is being written, or will be tried again
        self._writing = False
        self._hurry = threading.Event()  # do not sleep until the next try
        self._tries = 0
        self._error: SaveFailed | None = None
        self._fatal: BaseException | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def free(self, seconds: float | None = None) -> bool:
        """Wait until nothing is being written; what failed and waits is given up. False: it takes longer than that."""
        with self._changed:
            if not self._changed.wait_for(lambda: not self._writing, seconds):
                return False
            self._raise_fatal()
            self._save = None
            return True

    def give(self, save: Callable[[], None]) -> None:
        """Have this carried out, after `free`."""
        with self._changed:
            assert not self._writing
            self._save, self._writing, self._tries = save, True, 0
            self._changed.notify_all()

    def finish(self) -> None:
        """Wait until all is saved. SaveFailed where the last tries failed too."""
        with self._changed:
            self._tries = 0
            self._hurry.set()
            try:
                self._changed.wait_for(lambda: self._save is None or self._tries >= LAST_TRIES)
            finally:
                self._hurry.clear()
            self._raise_fatal()
            if self._save is not None and self._error is not None:
                self._save = None
                raise self._error

    def _raise_fatal(self) -> None:
        if self._fatal is not None:
            raise self._fatal

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._save is not None)
                save = self._save
                self._writing = True
            assert save is not None
            error = None
            try:
                save()
            except SaveFailed as failure:
                error = failure
            except BaseException as fault:  # our own mistake: told to the training, which ends with it
                self._fatal = fault
            with self._changed:
                self._writing, self._error = False, error
                self._tries += 1
                if error is None:
                    self._save = None
                hurried = self._hurry.is_set()
                pause = LAST_RETRY_S if hurried else min(LONGEST_RETRY_S, RETRY_S * 2 ** min(self._tries - 1, 10))
                self._changed.notify_all()
            if error is not None:
                self._failed(error, pause)
                self._sleep(pause, save, hurried)

    def _sleep(self, seconds: float, save: Callable[[], None], hurried: bool) -> None:
        """Until it is time to try again, or another job has come, or the run ends."""
        until = time.monotonic() + seconds
        with self._changed:
            while self._save is save and time.monotonic() < until and self._hurry.is_set() == hurried:
                self._changed.wait(0.1)

"""Records of a run that goes on -> the caller's own functions, which may have the run save or stop.

They are called in the caller's process and thread, in the order of the records, about ten times a second in groups: the
training does not wait for them, so it is some steps further when a wish reaches it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from cllm_spheres.checkpoint.held import Held
from cllm_spheres.errors import InputError, SpheresError, shown
from cllm_spheres.events import Record, Tail
from cllm_spheres.training.control import ask
from cllm_spheres.training.launch import Launch

Callback = Callable[[Record], str | None]
WISHES = ("save", "stop")
AGAIN_S = 0.1  # until a run that cannot fulfil a wish yet is asked once more


class Hooks:
    """on_step and on_eval get each record of their kind, and return None, "save" or "stop".

        hooks.begin(launch, run)
        launch.obey(plan)
        while launch.alive:
            hooks.poll()
        hooks.finish()

    Where one raises, the run is asked to stop, none is called again, and `finish` raises it.
    """

    def __init__(self, on_step: Callback | None, on_eval: Callback | None) -> None:
        """InputError where one cannot be called."""
        given = {"step": on_step, "eval": on_eval}
        self._callbacks = {kind: function for kind, function in given.items() if function is not None}
        for kind, function in self._callbacks.items():
            if not callable(function):
                raise InputError(f"on_{kind} is {shown(function)}: give a function of one record.")
        self._error: BaseException | None = None
        self._wishes: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None: the run has ended
        self._under_way: set[str] = set()

    def begin(self, launch: Launch, run: Path) -> None:
        """Follow this run from now on; what it has written before is left out."""
        if self._callbacks:
            self._launch, self._folder = launch, Held(run)  # it may be renamed while it goes on
            self._tail = Tail(self._folder.path / "metrics.jsonl")
            self._tail.skip()
            threading.Thread(target=self._ask, daemon=True).start()

    def poll(self) -> bool:
        """Hand over the records that are new; whether there is anybody to hand them to. Raises nothing."""
        try:
            for record in self._tail.read() if self._callbacks else ():
                self._hand_over(record)
        except BaseException as error:
            self._error = error
            self._callbacks.clear()
            self._wish("stop")
        return bool(self._callbacks)

    def finish(self) -> None:
        """The last records, after the end. Raises what a function has raised."""
        self.poll()
        self._wishes.put(None)
        if self._error is not None:
            raise self._error

    def _hand_over(self, record: Record) -> None:
        function = self._callbacks.get(record["kind"])
        wish = function(record) if function else None
        if wish is not None:
            if wish not in WISHES:
                raise InputError(f'on_{record["kind"]} has returned {shown(wish)}: return None, "save" or "stop".')
            self._wish(wish)

    def _wish(self, wish: str) -> None:
        if wish not in self._under_way:
            self._under_way.add(wish)
            self._wishes.put(wish)

    def _ask(self) -> None:
        """By a thread: an answer may take as long as a step and an evaluation."""
        while (wish := self._wishes.get()) is not None:
            while self._launch.alive:
                try:
                    ask(self._folder.path, {wish: True})
                except SpheresError:  # it still starts, or another wish is under way, or it has just ended
                    time.sleep(AGAIN_S)
                else:
                    break
            if wish == "save":
                self._under_way.discard(wish)

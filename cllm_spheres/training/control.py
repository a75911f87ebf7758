"""Wishes of other processes -> a run that goes on, and its answers: another number of workers, a save, an end.

Node Zero listens on an abstract socket that is named like the run's folder, by device and inode: it has no file, and
ends with its process. Only the same user, or root, is heard. Anybody may have taken the name before, so there are
several, and who asks looks whose socket it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm_spheres.errors import InputError, RunFailed
from cllm_spheres.training.new_run import preparing

PACKET_BYTES = 1 << 16
MOMENT_S = 2.0
SPEAKS_WITHIN_S = 5.0  # who connects says at once what it wishes
MOST_SILENT = 32
NAMES = 8
ANSWERS_WITHIN_S = 600.0  # the step in progress and an evaluation may have to end first


def addresses(run: Path) -> list[str]:
    """The names that a run may have, in the order in which they are tried."""
    stat = run.stat()
    return [f"\0cllm-spheres/run/{stat.st_dev}/{stat.st_ino}/{number}" for number in range(NAMES)]


def _user_of(connection: socket.socket) -> int:
    """The number of the user at the other end."""
    return int(struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1])


def _socket() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


@dataclass(frozen=True)
class Wish:
    """One message from another command, which waits for an answer."""

    connection: socket.socket
    message: dict[str, Any]

    @property
    def given_up(self) -> bool:
        """Whether nobody listens for the answer any more."""
        return bool(select.select([self.connection], [], [], 0)[0])  # nothing more is said, so this is its end

    def answer(self, **message: Any) -> None:
        """Reply, if it still listens, and be done with it."""
        with contextlib.suppress(OSError):
            self.connection.send(json.dumps(message).encode())
        self.connection.close()


class Control:
    """Node Zero's side. `wish` is the next one to be fulfilled, or None; `reachable`: whether it has a name."""

    def __init__(self, run: Path, on_wish: Callable[[], None]) -> None:
        self.wish: Wish | None = None
        self._on_wish = on_wish
        self._listener = _socket()
        self.reachable = any(map(self._has_bound, addresses(run)))
        if self.reachable:
            self._listener.listen()
            threading.Thread(target=self._listen, daemon=True).start()

    def _has_bound(self, address: str) -> bool:
        try:
            self._listener.bind(address)
        except OSError:  # somebody has it
            return False
        return True

    def take(self) -> Wish | None:
        """The wish, which is the caller's now; None where whoever wished has gone meanwhile."""
        wish, self.wish = self.wish, None
        if wish is not None and wish.given_up:
            wish.connection.close()
            return None
        return wish

    def _listen(self) -> None:
        silent: dict[socket.socket, float] = {}  # who has connected and said nothing yet, and how long it may
        while True:
            ready, _, _ = select.select([self._listener, *silent], [], [], 1.0 if silent else None)
            for source in ready:
                if source is not self._listener:
                    del silent[source]
                    self._hear(source)
                    continue
                try:
                    connection, _ = self._listener.accept()
                except OSError:  # too many open files: some are closed below
                    time.sleep(0.1)
                    continue
                connection.settimeout(SPEAKS_WITHIN_S)
                if _user_of(connection) in (0, os.getuid()):
                    silent[connection] = time.monotonic() + SPEAKS_WITHIN_S
                else:
                    Wish(connection, {}).answer(error="This run is another user's.")
            for number, (connection, until) in enumerate(reversed(silent.copy().items())):
                if number >= MOST_SILENT or time.monotonic() > until:
                    del silent[connection]
                    connection.close()

    def _hear(self, connection: socket.socket) -> None:
        """What somebody wishes, who has said it."""
        try:
            message = json.loads(connection.recv(PACKET_BYTES))
        except (OSError, ValueError, RecursionError):
            connection.close()
            return
        wish = Wish(connection, message if isinstance(message, dict) else {})
        if self.wish is not None:
            wish.answer(error="Another change is under way: try again in a moment.")
        else:
            self.wish = wish
            self._on_wish()


def _connected(run: Path) -> socket.socket | None:
    """A connection to the run's Node Zero; None where there is none. Whoever else has one of its names is passed by."""
    for address in addresses(run):
        connection = _socket()
        connection.settimeout(MOMENT_S)
        with contextlib.suppress(OSError):
            connection.connect(address)
            if _user_of(connection) in (0, os.getuid(), run.stat().st_uid):
                connection.settimeout(ANSWERS_WITHIN_S)
                return connection
        connection.close()
    return None


def ask(run: Path, message: dict[str, Any], waiting: Callable[[], None] = lambda: None) -> str:
    """Have a run that goes on fulfil a wish; its answer. InputError where it refuses or no run goes on there.

    waiting: called once where the answer takes longer than a moment.
    """
    connection = _connected(run) if run.exists() else None
    if connection is None:
        if how_far := preparing(run):
            raise InputError(f"The run in {run} is {how_far}. Ask it again when it trains.")
        raise InputError(
            f"No run is going on in {run}, on this machine. Go on with it: cllm-spheres train --resume --run {run}"
        )
    try:
        connection.send(json.dumps(message).encode())
        if not select.select([connection], [], [], MOMENT_S)[0]:
            waiting()
        data = connection.recv(PACKET_BYTES)
    except OSError as error:
        raise RunFailed(f"The run in {run} did not answer: {error.strerror or error}.") from None
    finally:
        connection.close()
    if not data:
        raise RunFailed(f"The run in {run} ended before it could answer.")
    answer = json.loads(data)
    if "error" in answer:
        raise InputError(str(answer["error"]))
    return str(answer["message"])

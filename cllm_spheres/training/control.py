"""Wishes of other processes -> a run that goes on, and its answers: another number of workers, a save, an end.

Node Zero listens on an abstract socket that is named like the run's folder, by device and inode: it has no file, and
ends with its process. Only the same user, or root, is heard.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm_spheres.errors import InputError, RunFailed
from cllm_spheres.training.new_run import preparing

PACKET_BYTES = 1 << 16
MOMENT_S = 2.0
ANSWERS_WITHIN_S = 600.0  # the step in progress and an evaluation may have to end first


def _address(run: Path) -> str:
    stat = run.stat()
    return f"\0cllm-spheres/run/{stat.st_dev}/{stat.st_ino}"


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
    """Node Zero's side. `wish` is the next one to be fulfilled, or None."""

    def __init__(self, run: Path, on_wish: Callable[[], None]) -> None:
        self.wish: Wish | None = None
        self._on_wish = on_wish
        self._listener = _socket()
        self._listener.bind(_address(run))
        self._listener.listen()
        threading.Thread(target=self._listen, daemon=True).start()

    def take(self) -> Wish | None:
        """The wish, which is the caller's now; None where whoever wished has gone meanwhile."""
        wish, self.wish = self.wish, None
        if wish is not None and wish.given_up:
            wish.connection.close()
            return None
        return wish

    def _listen(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            connection.settimeout(5)
            try:
                message = json.loads(connection.recv(PACKET_BYTES))
            except (OSError, ValueError):
                connection.close()
                continue
            wish = Wish(connection, message if isinstance(message, dict) else {})
            if uid not in (0, os.getuid()):
                wish.answer(error="This run is another user's.")
            elif self.wish is not None:
                wish.answer(error="Another change is under way: try again in a moment.")
            else:
                self.wish = wish
                self._on_wish()


def ask(run: Path, message: dict[str, Any], waiting: Callable[[], None] = lambda: None) -> str:
    """Have a run that goes on fulfil a wish; its answer. InputError where it refuses or no run goes on there.

    waiting: called once where the answer takes longer than a moment.
    """
    connection = _socket()
    connection.settimeout(ANSWERS_WITHIN_S)
    try:
        connection.connect(_address(run))
        connection.send(json.dumps(message).encode())
        if not select.select([connection], [], [], MOMENT_S)[0]:
            waiting()
        data = connection.recv(PACKET_BYTES)
    except (ConnectionRefusedError, FileNotFoundError):
        if how_far := preparing(run):
            raise InputError(f"The run in {run} is {how_far}. Ask it again when it trains.") from None
        raise InputError(
            f"No run is going on in {run}, on this machine. Go on with it: cllm-spheres train --resume --run {run}"
        ) from None
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

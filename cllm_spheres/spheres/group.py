"""A command -> a child process that leads a process group of its own, which ends as a whole, with us at the latest.

Asking for SIGKILL at the parent's death (`die_with`) leaves a gap: a process that is stopped between its fork and that
request would outlive everybody. So the group hangs on a pipe as well. Each of its processes holds the reading end from
its first moment on, only this process holds the writing end, and the kernel has been told (O_ASYNC) to send SIGKILL to
the group when the last writer is gone. That reaches stopped and newly forked processes too, and nobody has to live to
do it. Nothing is ever written into the pipe; where it has no readers left, the whole group has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import threading
from collections.abc import Collection, Mapping

from cllm_spheres.spheres.server import die_with

_CLOSE_RANGE, _UNSHARE = 436, 2  # the call has this number on x86-64 and aarch64
_libc = ctypes.CDLL(None, use_errno=True)


def ready(descriptor: int, timeout_s: float | None, events: int = select.POLLIN) -> bool:
    """Wait until a descriptor is ready; False where it is not in time. A pidfd is when its process has ended."""
    poll = select.poll()
    poll.register(descriptor, events)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1000))


class ProcessGroup:
    """A child and all that it forks. `pid` is the child's, and `handle` its pidfd, valid until `close`.

    Make it in the main thread: the kernel ends the child when the thread that started it ends.
    """

    def __init__(self, command: list[str], inherit: Collection[int], environment: Mapping[str, str]) -> None:
        """Start the command without standard input and output; `inherit` are the descriptors that it shall have.

        OSError where there may be no further process or thread.
        """
        reading, writing = os.pipe()
        fcntl.fcntl(reading, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(reading, fcntl.F_SETFL, fcntl.fcntl(reading, fcntl.F_GETFL) | os.O_ASYNC)
        self._code: int | None = None
        self._lock = threading.Lock()
        self._gone, held = threading.Event(), threading.Event()
        self._apart = False
        try:
            threading.Thread(target=self._hold, args=(writing, held), daemon=True).start()
        except RuntimeError:  # how Python says that there may be no further thread
            os.close(reading)
            os.close(writing)
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN)) from None
        held.wait()
        if self._apart:
            os.close(writing)
        parent = os.getpid()
        try:
            self.pid = os.fork()
        except OSError:
            os.close(reading)  # the thread ends with it
            raise
        if self.pid == 0:
            try:
                die_with(parent)
                os.setpgid(0, 0)
                _become(command, {reading, *inherit}, environment)
            finally:
                os._exit(127)
        with contextlib.suppress(PermissionError):  # it runs the command already, and has done this itself
            os.setpgid(self.pid, self.pid)
        fcntl.fcntl(reading, fcntl.F_SETOWN, -self.pid)
        os.close(reading)
        self.handle = os.pidfd_open(self.pid)

    def _hold(self, writing: int, held: threading.Event) -> None:
        """A thread that holds the writing end until nobody is left who holds the other, or until we end.

        It moves to a table of descriptors of its own, which holds nothing else: from the common one each fork copies
        the writing end, and a child that is stopped before its exec would keep the pipe open when we have ended. Where
        the kernel does not know the call (before 5.9), the end stays in the common table.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # a handler may need the common table
        first, last, flags = ctypes.c_uint(writing + 1), ctypes.c_uint(0xFFFFFFFF), ctypes.c_uint(_UNSHARE)
        self._apart = _libc.syscall(_CLOSE_RANGE, first, last, flags) == 0
        if self._apart:
            _libc.syscall(_CLOSE_RANGE, ctypes.c_uint(0), ctypes.c_uint(writing - 1), ctypes.c_uint(0))
        held.set()
        ready(writing, None, 0)  # the error that there are no readers is always reported
        self._gone.set()
        os.close(writing)

    def signal(self, number: int) -> None:
        """Send the whole group a signal."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._code is None:  # else its number may be another's by now
                os.killpg(self.pid, number)

    def wait(self, timeout_s: float | None = None) -> int | None:
        """The child's exit code, or minus the signal that ended it; None where it lives on. Its group ends with it."""
        if self._code is None and ready(self.handle, timeout_s):
            self.signal(signal.SIGKILL)
            with self._lock:
                if self._code is None:
                    try:
                        self._code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
                    except ChildProcessError:  # a program that calls us has chosen not to hear of its children
                        self._code = 0
        return self._code

    def wait_for_all(self, timeout_s: float) -> bool:
        """Whether every process of the group has ended, within that time."""
        return self._gone.wait(timeout_s)

    def close(self) -> None:
        """Give the handle back, once the child has ended."""
        if self.handle >= 0:
            os.close(self.handle)
            self.handle = -1


def _become(command: list[str], inherit: set[int], environment: Mapping[str, str]) -> None:
    """In a child: the command, with these descriptors and standard error; all others are closed."""
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        with contextlib.suppress(OSError):  # the one that listed them is closed already
            if descriptor in inherit:
                os.set_inheritable(descriptor, True)
            elif descriptor > 2:
                os.close(descriptor)
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1):
        os.dup2(null, standard)
    os.execve(command[0], command, environment)

"""One process at a time changes a run."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time

import pytest

from cllm_spheres.checkpoint.lock import Lock, is_held
from cllm_spheres.errors import InputError


def hold(run):
    """A forked child that holds the lock; returns its pid once it does."""
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        held = Lock(run)
        os.write(say, b"x")
        signal.pause()
        held.release()
        os._exit(0)
    os.close(say)
    assert os.read(ready, 1) == b"x"
    os.close(ready)
    return child


def forget(held):
    """Close its descriptors, as the end of this process would."""
    while held.descriptors:
        os.close(held.descriptors.pop())


def test_a_second_run_into_one_folder_is_refused_and_told_the_pid(run):
    with Lock(run), pytest.raises(InputError, match=rf"A run is going on in {run} \(pid {os.getpid()}\)"):
        Lock(run)
    Lock(run).release()


def test_asking_whether_a_run_is_locked_keeps_nobody_from_locking_it(run, monkeypatch):
    assert not is_held(run)
    with Lock(run):
        assert is_held(run)
        (run / "lock").unlink()
        assert is_held(run)
    assert not is_held(run)
    asking = os.open(run, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH)  # as is_held does, for a moment
    monkeypatch.setattr(time, "sleep", lambda seconds: fcntl.flock(asking, fcntl.LOCK_UN))
    Lock(run).release()
    os.close(asking)


def test_a_killed_holder_leaves_no_lock(run):
    child = hold(run)
    with pytest.raises(InputError, match=f"pid {child}"):
        Lock(run)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    Lock(run).release()


def test_a_run_stays_locked_where_the_file_of_its_lock_is_deleted(run):
    with Lock(run):
        (run / "lock").unlink()
        with pytest.raises(InputError, match="A run is going on in"):
            Lock(run)
        with pytest.raises(InputError, match="A run is going on in"):  # the file is there again, and says nobody
            Lock(run)
    Lock(run).release()


def test_the_file_alone_counts_where_a_file_system_locks_no_folders(run, monkeypatch):
    def flock(descriptor, operation):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # as NFS does for what is open for reading alone
        real(descriptor, operation)

    real = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    with Lock(run), pytest.raises(InputError, match=rf"\(pid {os.getpid()}\)"):
        Lock(run)
    Lock(run).release()


@pytest.mark.parametrize("pid", [4194305, 1, None])
def test_a_lock_file_that_nobody_holds_does_not_block_whatever_it_says(run, pid):
    (run / "lock").write_text("nonsense" if pid is None else f"{pid}\n")  # a dead process, a living one, neither
    with Lock(run), pytest.raises(InputError, match=rf"\(pid {os.getpid()}\)"):
        Lock(run)
    Lock(run).release()


@pytest.mark.parametrize("closes", [True, False])
def test_a_forked_child_keeps_the_lock_unless_it_closes_it(run, closes):
    held = Lock(run)
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        if closes:
            for descriptor in held.descriptors:
                os.close(descriptor)
        os.write(say, b"x")
        signal.pause()
    os.read(ready, 1)
    os.close(ready)
    os.close(say)
    try:
        if closes:
            with pytest.raises(InputError):  # closing in the child did not unlock
                Lock(run)
        forget(held)
        if closes:
            Lock(run).release()
        else:
            with pytest.raises(InputError):
                Lock(run)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_program_started_by_exec_does_not_keep_the_lock(run):
    held = Lock(run)
    program = subprocess.Popen(
        [sys.executable, "-c", "print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        close_fds=False,
    )
    try:
        program.stdout.readline()  # it has been started by now
        forget(held)
        Lock(run).release()
    finally:
        program.communicate(b"\n")


def test_releasing_twice_does_nothing(run):
    held = Lock(run)
    held.release()
    held.release()


@pytest.mark.parametrize("what", ["missing", "folder", "link"])
def test_a_folder_that_cannot_be_locked_is_said_so(run, what):
    if what == "missing":
        run.rmdir()
    elif what == "folder":
        (run / "lock").mkdir()
    else:
        (run / "lock").symlink_to("lock")
    with pytest.raises(InputError, match="Cannot lock the run"):
        Lock(run)

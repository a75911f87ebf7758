"""What the kernel lets this user open, start, map and write -> numbers to compare with what a run needs.

Everything here is cheap: files of /proc and a few system calls.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from cllm_spheres.errors import InputError
from cllm_spheres.units import size

ENOUGH_FILES = 4096  # what the soft limit is raised to: far above what a run of 156 workers needs
# Address space of a process besides shared memory and arena: the peak of Node Zero, which maps most.
ADDRESS_BYTES = 740_000_000
SHARED_BYTES = 600_000  # of any run, at least: the records of 4,096 steps
# Capabilities whose holders RLIMIT_NPROC does not hold back: CAP_SYS_ADMIN and CAP_SYS_RESOURCE.
_EXEMPT = 1 << 21 | 1 << 24


def read(which: int) -> tuple[int | None, int | None]:
    """(soft, hard) of a resource limit; None is no limit."""
    soft, hard = resource.getrlimit(which)
    return (None if soft == resource.RLIM_INFINITY else soft), (None if hard == resource.RLIM_INFINITY else hard)


def check_address_space(needed: int = ADDRESS_BYTES) -> None:
    """InputError where a process may not map what it needs; the least of any run can be asked before imports fail."""
    most = read(resource.RLIMIT_AS)[0]
    if most is not None and needed > most:
        raise InputError(
            f"Too little address space: each process of this run maps {size(needed)}, and {size(most)} are allowed"
            " (ulimit -v). Lift that limit: ulimit -v unlimited. Or try fewer --spheres."
        )


def check_file_size(needed: int = SHARED_BYTES) -> None:
    """InputError where files may not be as large as shared memory, which is one; the least of any run to ask early."""
    most = read(resource.RLIMIT_FSIZE)[0]
    if most is not None and needed > most:
        raise InputError(
            f"Too small files: the shared memory of this run is a file of {size(needed)}, and files may have"
            f" {size(most)} (ulimit -f). Lift that limit: ulimit -f unlimited. Or try fewer --spheres."
        )


def most_files() -> int | None:
    """Descriptors that a process of a run may open: its soft limit is raised as far as the hard one allows."""
    return read(resource.RLIMIT_NOFILE)[1]


@contextlib.contextmanager
def raised_files() -> Iterator[None]:
    """Processes started inside inherit a raised soft limit of open files; ours is as it was afterwards."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(ENOUGH_FILES, hard)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        yield
        return
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def tasks_left(needed: int) -> tuple[int, str] | None:
    """(processes and threads that may still be started, whose limit it is) of the tightest limit; None without one.

    needed: where so many are certainly left, the user's processes are not counted one by one.
    """
    from cllm_spheres.machine import task_limit  # here: whoever only raises a limit need not load psutil

    left = []
    if (group := task_limit()) is not None:
        left.append((group[0] - group[1], f"the control group's pids.max of {group[0]:,}"))
    most = read(resource.RLIMIT_NPROC)[0]
    if most is not None and not _exempt():
        used = _all_tasks()
        if most - used < needed:
            used = _tasks_of_user()
        left.append((most - used, f"the user's limit of {most:,} (ulimit -u)"))
    return min(left, default=None)


def _exempt() -> bool:
    """Whether RLIMIT_NPROC does not count for this process."""
    if os.getuid() == 0:
        return True
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return any(line.startswith("CapEff:") and int(line.split()[1], 16) & _EXEMPT for line in lines)
    except (OSError, ValueError):
        return False


def _all_tasks() -> int:
    """Threads of the whole machine."""
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].split("/")[1])
    except (OSError, ValueError, IndexError):
        return 1 << 30


def _tasks_of_user() -> int:
    """Threads of all processes of this user that can be seen."""
    total, user = 0, os.getuid()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if entry.stat().st_uid == user:
                    total += len(os.listdir(entry / "task"))
            except OSError:
                pass  # it has ended meanwhile
    return total


def existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    folder = Path(os.path.abspath(folder))
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def unwritable(folder: Path) -> str | None:
    """Why nothing can be written into an existing folder, in words; None where it can."""
    if not folder.is_dir():
        return f"{folder} is not a folder"
    if os.statvfs(folder).f_flag & os.ST_RDONLY:
        return f"{folder} lies on a file system that is mounted read-only"
    if not os.access(folder, os.W_OK | os.X_OK):
        return f"there is no permission to write in {folder}"
    return None


def free_bytes(folder: Path) -> int | None:
    """What this user may still write into an existing folder; None where its file system does not say."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize if stats.f_blocks else None

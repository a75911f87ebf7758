"""What this process may really use of the machine: cores and memory, with the limits of its control groups.

psutil and os.cpu_count do not see cgroup limits; both versions of cgroups occur.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from pathlib import Path

import psutil

from cllm_spheres.errors import InputError

_CGROUP = Path("/sys/fs/cgroup")
_NO_LIMIT = 1 << 62  # version 1 writes nearly 2**63 where there is none
_M_MMAP_THRESHOLD, _GIVEN_BACK_BYTES = -3, 1 << 17


def check_platform() -> None:
    """InputError where the futex calls and memory files that the spheres stand on do not exist."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        raise InputError(
            f"Training runs on Linux with x86-64 or aarch64; this is {sys.platform} on {platform.machine()}."
            " Run it in a Linux container or virtual machine."
        )


def _cgroup_folders(controller: str) -> list[Path]:
    """The folders, own and above, that limit this process for a controller; version 2 first."""
    folders = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        roots = [_CGROUP / controller] if controllers else [_CGROUP, _CGROUP / "unified"]
        for root in roots:
            folder = root / path.lstrip("/")
            while True:
                folders.append(folder)
                if folder == root or root not in folder.parents:
                    break
                folder = folder.parent
            folders.append(root)
    return folders


def _number(path: Path) -> int | None:
    try:
        text = path.read_text().split()[0]
        return int(text)
    except (OSError, ValueError, IndexError):
        return None


def cpu_quota() -> float | None:
    """Cores that the tightest cgroup quota allows; None without one."""
    quotas = []
    for folder in _cgroup_folders("cpu"):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            if quota != "max":
                quotas.append(int(quota) / int(period))
        except (OSError, ValueError):
            pass
        quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota_us and period_us and quota_us > 0:
            quotas.append(quota_us / period_us)
    return min(quotas, default=None)


def allowed_cores() -> list[int]:
    """One logical CPU of each physical core that the affinity of this process names."""
    cores: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        try:
            siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(cpu)
        cores.setdefault(siblings, cpu)
    return list(cores.values())


def usable_cores() -> list[int]:
    """One logical CPU of each physical core that this process may use, cut to the cgroup quota; at least one."""
    quota, chosen = cpu_quota(), allowed_cores()
    return chosen if quota is None else chosen[: max(1, int(quota))]


def available_memory() -> int:
    """Bytes that can still be taken: what the kernel calls available, and what each cgroup limit leaves."""
    available = [psutil.virtual_memory().available]
    for folder in _cgroup_folders("memory"):
        for limit, used, reclaimable in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None:
                available.append(most - now + (_statistic(folder / "memory.stat", reclaimable) or 0))
    return max(0, min(available))


def keep_no_large_blocks() -> None:
    """From now on each block of 128 KB or more goes back to the kernel when it is freed.

    So it begins in glibc; left alone it raises that size, up to 32 MB, as such blocks are freed.
    """
    with contextlib.suppress(AttributeError):  # other C libraries
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _GIVEN_BACK_BYTES)


def give_memory_back() -> None:
    """Have the C library give freed memory back to the kernel, where it can: glibc keeps it for what comes next."""
    with contextlib.suppress(AttributeError):  # other C libraries
        ctypes.CDLL(None).malloc_trim(0)


def memory_group() -> tuple[int, int] | None:
    """(limit, used) in bytes of the cgroup that leaves the least memory; None where no cgroup limits it."""
    limits = []
    for folder in _cgroup_folders("memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None and most < psutil.virtual_memory().total:
                limits.append((most, now))
    return min(limits, key=lambda pair: pair[0] - pair[1], default=None)


def task_limit() -> tuple[int, int] | None:
    """(limit, used) of processes and threads in the cgroup that leaves the fewest; None where no cgroup limits them."""
    limits = []
    for folder in _cgroup_folders("pids"):
        most, now = _number(folder / "pids.max"), _number(folder / "pids.current")
        if most is not None and now is not None:
            limits.append((most, now))
    return min(limits, key=lambda pair: pair[0] - pair[1], default=None)


def _statistic(path: Path, name: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            key, value = line.split()
            if key == name:
                return int(value)
    except (OSError, ValueError):
        pass
    return None


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP or a debugger."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_TRACING_STOP)
    except psutil.NoSuchProcess:
        return False


def memory_limit() -> int | None:
    """Bytes that the tightest control group allows; None without one."""
    limits = [_number(f / name) for f in _cgroup_folders("memory") for name in ("memory.max", "memory.limit_in_bytes")]
    return min((limit for limit in limits if limit is not None and limit < _NO_LIMIT), default=None)


def memory_kills() -> int | None:
    """How many processes the kernel has ended for want of memory: in our control group, else on the machine.

    None where neither can be read.
    """
    for folder in _cgroup_folders("memory"):
        for name in ("memory.events", "memory.oom_control"):
            if (kills := _statistic(folder / name, "oom_kill")) is not None:
                return kills
    return _statistic(Path("/proc/vmstat"), "oom_kill")

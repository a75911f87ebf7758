"""The machine itself -> findings: platform, cores, memory, CPU features, and what workers share."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import sys
import threading
import time

import psutil

from cllm_spheres.doctor.finding import Answer
from cllm_spheres.machine import (
    allowed_cores,
    available_memory,
    check_platform,
    cpu_quota,
    memory_group,
    usable_cores,
)
from cllm_spheres.units import size

LITTLE_MEMORY = 500_000_000  # bytes; a run of the preset tiny takes about 150 MB
_SYS_FUTEX = {"x86_64": 202, "aarch64": 98}
_FUTEX_WAIT, _FUTEX_WAKE = 0, 1


def look_at_platform() -> Answer:
    """Operating system, processor and Python; whatever else there is, training needs Linux."""
    check_platform()
    kernel, python = platform.release(), platform.python_version()
    return "ok", f"Linux {kernel} on {platform.machine()}, Python {python} ({sys.executable})"


def look_at_cores() -> Answer:
    """Logical and physical cores, and what affinity and the control group leave of them."""
    physical, affinity = psutil.cpu_count(logical=False), len(os.sched_getaffinity(0))
    allowed, usable, quota = len(allowed_cores()), len(usable_cores()), cpu_quota()
    found = (
        f"{usable} usable: {os.cpu_count()} logical and {physical or 'an unknown number of'} physical on the machine,"
        f" {affinity} logical allowed by affinity, {'no quota' if quota is None else f'a quota of {quota:g} cores'}"
    )
    if quota is not None and quota < allowed:
        return "note", found, f"The control group's quota keeps {allowed - usable} allowed cores idle: raise it."
    return "ok", found


def look_at_memory() -> Answer:
    """Memory of the machine and of the control group."""
    total, available, limit = psutil.virtual_memory().total, available_memory(), memory_group()
    group = "no cgroup limit" if limit is None else f"the cgroup uses {size(limit[1])} of {size(limit[0])}"
    found = f"{size(available)} available of {size(total)}, {group}"
    if available < LITTLE_MEMORY:
        return "bad", found, "End other programs, or raise the limit: less than 500 MB is too little for most models."
    return "ok", found


def look_at_cpu() -> Answer:
    """The features that matter and what the kernels make of them."""
    from cllm_spheres.crystal import cpu

    has = [level.title for level in cpu.LEVELS.values() if cpu.has(*level.needs)]
    fp32, bf16 = cpu.gemm_backend(), cpu.bf16_backend()
    held = f", held to that by {cpu.CPU_VARIABLE}" if cpu.cap() else ""
    found = (
        f"{cpu.cpu_name()} with {', '.join(has) or 'no vectors that the kernels know'}{held}:"
        f" float32 by {'our AVX-512 tiles' if fp32 == 'avx512' else 'OpenBLAS'},"
        f" bfloat16 {'not possible' if bf16 is None else 'by ' + ('AMX' if bf16 == 'amx' else 'AVX-512')}"
    )
    if "AMX" in has and bf16 != "amx":
        return "note", found, "AMX is there and not granted: a newer Linux (5.16), or another sandbox, would grant it."
    if platform.machine() == "x86_64" and "AVX2" not in has:
        return "note", found, "Without AVX2 the kernels are several times slower."
    return "ok", found


def look_at_sharing() -> Answer:
    """What processes share and how they wait: a memory file, a page of it taken now, futex words, pidfds."""
    advice = "A sandbox (seccomp, gVisor) forbids it, or Linux is older than 5.3: allow it, or train outside of it."
    step = "memfd_create"
    try:
        descriptor = os.memfd_create("cllm-spheres-doctor", os.MFD_CLOEXEC)
        try:
            step = "ftruncate and posix_fallocate"
            os.ftruncate(descriptor, mmap.PAGESIZE)
            os.posix_fallocate(descriptor, 0, mmap.PAGESIZE)
            step = "mmap"
            with mmap.mmap(descriptor, mmap.PAGESIZE, mmap.MAP_SHARED) as pages:
                step = "futex"
                _try_futex(pages)
        finally:
            os.close(descriptor)
        step = "pidfd_open"
        os.close(os.pidfd_open(os.getpid()))
    except OSError as error:
        return "bad", f"{step} does not work: {error.strerror or error}", advice
    return "ok", "memfd_create, posix_fallocate, futex and pidfd_open work"


def _try_futex(pages: mmap.mmap) -> None:
    """A thread sleeps on a word of shared memory and is woken. OSError where the kernel refuses, or nobody wakes."""
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    word = ctypes.c_int64.from_buffer(pages)
    try:
        number, address = _SYS_FUTEX[platform.machine()], ctypes.c_void_p(ctypes.addressof(word))
        timeout = (ctypes.c_int64 * 2)(2, 0)  # seconds, nanoseconds
        answers: list[int] = []

        def sleep() -> None:
            answer = syscall(ctypes.c_long(number), address, _FUTEX_WAIT, 0, timeout, None, 0)
            answers.append(0 if answer == 0 else ctypes.get_errno())

        thread = threading.Thread(target=sleep, daemon=True)
        thread.start()
        deadline = time.monotonic() + 1
        # Nobody is woken before the thread sleeps: it is tried until somebody is.
        while thread.is_alive() and not syscall(ctypes.c_long(number), address, _FUTEX_WAKE, 1, None, None, 0) > 0:
            if time.monotonic() > deadline:
                break
            time.sleep(0.001)
        thread.join(timeout=3)
        if answers != [0]:
            reason = os.strerror(answers[0]) if answers else "nobody was woken"
            raise OSError(answers[0] if answers else 0, reason)
    finally:
        del word  # it holds the pages

"""What this process may use, read from made-up control groups of both versions."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from cllm_spheres import machine
from cllm_spheres.errors import InputError
from cllm_spheres.training.footprint import own_bytes

GB = 10**9


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """groups(lines, files): /proc/self/cgroup and what lies below /sys/fs/cgroup."""

    def make(lines, files):
        root = tmp_path / "cgroup"
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        listing = tmp_path / "self"
        listing.write_text(lines)
        monkeypatch.setattr(machine, "_CGROUP", root)
        real = Path.read_text

        def read_text(path, *args, **kwargs):
            return real(listing if str(path) == "/proc/self/cgroup" else path, *args, **kwargs)

        monkeypatch.setattr(Path, "read_text", read_text)
        monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GB, total=99 * GB))
        monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(1000, 1008)))

    return make


def test_without_limits_everything_is_there(groups):
    groups("0::/\n", {})
    assert machine.cpu_quota() is None
    assert machine.available_memory() == 64 * GB
    assert machine.memory_group() is None and machine.task_limit() is None
    assert machine.usable_cores() == list(range(1000, 1008))  # these have no topology: each counts as a core


@pytest.mark.parametrize("folder", ["", "unified/"])
def test_version_2_the_tightest_limit_on_the_way_up_counts(groups, folder):
    groups(
        "0::/pod/container\n",
        {
            f"{folder}pod/cpu.max": "250000 100000\n",
            f"{folder}pod/container/cpu.max": "max 100000\n",
            f"{folder}pod/memory.max": "8000000000\n",
            f"{folder}pod/memory.current": "3000000000\n",
            f"{folder}pod/memory.stat": "anon 1\ninactive_file 1000000000\nfile 7\n",
            f"{folder}pod/container/memory.max": "max\n",
            f"{folder}pod/pids.max": "1000\n",
            f"{folder}pod/pids.current": "990\n",
            f"{folder}pod/container/pids.max": "100\n",
            f"{folder}pod/container/pids.current": "7\n",
            f"{folder}pod/container/memory.current": "1\n",
        },
    )
    assert machine.cpu_quota() == 2.5
    assert machine.usable_cores() == [1000, 1001]
    assert machine.available_memory() == 6 * GB  # what the page cache holds can be had back
    assert machine.memory_group() == (8 * GB, 3 * GB)
    assert machine.task_limit() == (1000, 990)


def test_version_1_controllers_have_folders_of_their_own(groups):
    groups(
        "5:pids:/docker/abc\n4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/docker/abc\n",
        {
            "cpu/docker/abc/cpu.cfs_quota_us": "350000\n",
            "cpu/docker/abc/cpu.cfs_period_us": "100000\n",
            "cpu/cpu.cfs_quota_us": "-1\n",
            "cpu/cpu.cfs_period_us": "100000\n",
            "memory/docker/abc/memory.limit_in_bytes": "4000000000\n",
            "memory/docker/abc/memory.usage_in_bytes": "3500000000\n",
            "memory/docker/abc/memory.stat": "total_inactive_file 250000000\n",
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "5000000000\n",
            "pids/docker/abc/pids.max": "50\n",
            "pids/docker/abc/pids.current": "20\n",
            "pids/pids.max": "max\n",
            "pids/pids.current": "20\n",
        },
    )
    assert machine.cpu_quota() == 3.5
    assert machine.usable_cores() == [1000, 1001, 1002] and len(machine.allowed_cores()) == 8
    assert machine.available_memory() == 750_000_000
    assert machine.memory_group() == (4 * GB, 3_500_000_000)
    assert machine.task_limit() == (50, 20)


def test_inside_a_container_the_own_limit_stands_at_the_top(groups):
    """The path of /proc/self/cgroup is the host's there, and does not exist below the mount."""
    files = {"cpu.max": "150000 100000", "memory.max": "2000000000", "memory.current": "500000000"}
    groups("0::/docker/elsewhere\n", files)
    assert machine.cpu_quota() == 1.5
    assert machine.usable_cores() == [1000]
    assert machine.available_memory() == 1_500_000_000


def test_less_than_a_core_is_still_one_and_less_than_nothing_is_nothing(groups):
    files = {"cpu.max": "20000 100000", "memory.max": "1000", "memory.current": "5000"}
    groups("0::/\n", files)
    assert machine.usable_cores() == [1000]
    assert machine.available_memory() == 0


def test_files_that_make_no_sense_are_passed_over(groups):
    groups("0::/\n", {"cpu.max": "", "memory.max": "lots", "memory.current": "5000", "memory.stat": "x\n"})
    assert machine.cpu_quota() is None
    assert machine.available_memory() == 64 * GB


@pytest.mark.parametrize(("system", "processor"), [("darwin", "arm64"), ("linux", "ppc64le")])
def test_other_machines_get_a_clear_word(monkeypatch, system, processor):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(machine.platform, "machine", lambda: processor)
    with pytest.raises(InputError, match=f"Linux with x86-64 or aarch64; this is {system} on {processor}"):
        machine.check_platform()


@pytest.mark.parametrize(
    ("lines", "file", "content"),
    [
        ("0::/pod\n", "pod/memory.events", "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\n"),
        ("9:memory:/pod\n", "memory/pod/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
    ],
)
def test_processes_that_the_kernel_ended_for_memory_are_those_of_the_own_group(groups, lines, file, content):
    groups(lines, {file: content})
    assert machine.memory_kills() == 2


def test_without_a_group_those_of_the_machine_count(groups):
    groups("0::/\n", {})
    assert machine.memory_kills() == machine._statistic(Path("/proc/vmstat"), "oom_kill")


def test_the_tightest_memory_limit_counts_and_none_is_none(groups):
    files = {"pod/memory.max": "8000000000\n", "pod/container/memory.max": "max\n", "memory.max": "9000000000\n"}
    groups("0::/pod/container\n", files)
    assert machine.memory_limit() == 8 * GB
    groups("9:memory:/pod\n", {"memory/pod/memory.limit_in_bytes": "9223372036854771712\n", "memory.max": "max\n"})
    assert machine.memory_limit() is None


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps nothing, or cannot be told")
def test_what_was_freed_between_others_is_given_back():
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
    libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    blocks = [libc.malloc(100_000) for _ in range(1000)]  # too small for pages of their own
    for block in blocks:
        libc.memset(block, 1, 100_000)
    for block in blocks[::2]:
        libc.free(block)
    before = own_bytes(os.getpid())
    machine.give_memory_back()
    given_back = before - own_bytes(os.getpid())
    for block in blocks[1::2]:
        libc.free(block)
    assert given_back > 40 * 10**6  # of 50 MB: blocks do not end at pages


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps nothing, or cannot be told")
def test_large_blocks_are_given_back_as_they_are_freed():
    code = (
        "import numpy as np\nfrom cllm_spheres import machine\nfrom cllm_spheres.training.footprint import own_bytes\n"
        "{before}np.ones(3_000_000)\nblocks = [np.ones(1_000_000) for _ in range(6)]\nwhole = own_bytes('self')\n"
        "del blocks[:-1]\nprint(whole - own_bytes('self'))\n"
    )
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", code.format(before=before)], capture_output=True, check=True).stdout)
        for before in ("", "machine.keep_no_large_blocks()\n")
    )
    assert kept < 10**6 and given_back > 39 * 10**6  # of 40 MB, below one that is still in use

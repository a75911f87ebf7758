"""Real control groups: what a process in one reads of its limits, and what a training does at them.

Skipped where no group can be made: it takes root, and a hierarchy that is mounted writable.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cllm_spheres import machine
from cllm_spheres.events import read
from tests.runs import COMMAND, WAIT_S, Family, corpus, wait_for_step, wait_until, words  # noqa: F401

MB = 10**6
# Of each controller: the file of its limit in version 2 and in version 1.
LIMITS = {
    "memory": ("memory.max", "memory.limit_in_bytes"),
    "pids": ("pids.max", "pids.max"),
    "cpu": ("cpu.max", "cpu.cfs_quota_us"),
}
LOOK = """
import json
from cllm_spheres import machine
names = ("cpu_quota", "usable_cores", "available_memory", "memory_group", "memory_limit", "task_limit", "memory_kills")
print(json.dumps({name: getattr(machine, name)() for name in names}))
"""
# Takes memory until the kernel has ended somebody for want of it.
HOG = """
import mmap, sys
from cllm_spheres.machine import memory_kills
taken, before = [], memory_kills()
while memory_kills() == before:  # looked at often: a worker frees little, and this would be the next to be ended
    taken.append(mmap.mmap(-1, 1 << 16))
    for page in range(0, 1 << 16, 4096):
        taken[-1][page] = 1
"""


class Group:
    """A control group below our own, in each hierarchy that has the controllers, for processes started inside."""

    def __init__(self, limits: dict[str, int]) -> None:
        self.folders: list[Path] = []
        for controller, value in limits.items():
            new, old = LIMITS[controller]
            folder = next(iter(machine._cgroup_folders(controller)), None)
            if folder is None:
                pytest.skip(f"this machine shows no control group for {controller}")
            try:
                inside = folder / f"cllm-spheres-test-{os.getpid()}"
                inside.mkdir(exist_ok=True)
                self.folders.append(inside)
                if (inside / new).exists():
                    (inside / new).write_text(f"{value} 100000" if controller == "cpu" else f"{value}")
                else:
                    (inside / old).write_text(f"{value}")
            except OSError as error:
                self.close()
                pytest.skip(f"no control group with a limit of {controller} can be made here: {error.strerror}")

    def join(self) -> None:
        """Between fork and exec: the process is inside from its first instruction on."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    def run(self, *words: object, **options: object) -> subprocess.CompletedProcess:
        return subprocess.run(
            list(map(str, words)), preexec_fn=self.join, capture_output=True, text=True, timeout=2 * WAIT_S, **options
        )

    def close(self) -> None:
        for folder in self.folders:
            wait_until(lambda folder=folder: not (folder / "cgroup.procs").read_text(), f"nobody is left in {folder}")
            folder.rmdir()


@pytest.fixture
def group():
    made: list[Group] = []
    yield lambda **limits: made.append(Group(limits)) or made[-1]
    for each in made:
        each.close()


def test_a_process_reads_the_limits_of_its_group(group):
    inside = group(memory=500 * MB, pids=50, cpu=50_000)
    done = inside.run(sys.executable, "-c", LOOK)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["cpu_quota"] == 0.5 and len(seen["usable_cores"]) == 1
    page = os.sysconf("SC_PAGE_SIZE")  # the kernel cuts a limit to whole pages
    assert seen["memory_limit"] == 500 * MB // page * page == seen["memory_group"][0]
    assert 0 < seen["memory_group"][1] < 100 * MB and 300 * MB < seen["available_memory"] <= 500 * MB
    assert seen["task_limit"][0] == 50 and 1 <= seen["task_limit"][1] < 5
    assert seen["memory_kills"] == 0


@pytest.mark.parametrize(
    ("limits", "options", "said"),
    [
        (dict(memory=300 * MB), dict(width=1024, layers=8), "Not enough memory"),
        (dict(pids=17), dict(workers=4, spheres=8, batch_size=8), "allowed by the control group's pids.max of 17"),
    ],
)
def test_a_training_that_its_group_cannot_hold_is_refused_in_words(group, corpus, tmp_path, limits, options, said):  # noqa: F811
    train = [COMMAND, "train", corpus, "--preset", "tiny", "--run", tmp_path / "run", *words(options)]
    done = group(**limits).run(*train)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_worker_that_the_kernel_ends_for_want_of_memory_is_told_so_and_replaced(group, corpus, tmp_path):  # noqa: F811
    inside, run = group(memory=900 * MB), tmp_path / "run"
    options = dict(preset="tiny", dtype="fp32", steps=10_000_000, spheres=4, workers=2, eval_every=10_000_000)
    arguments = [COMMAND, "train", corpus, "--plain", "--run", run, *words(options)]
    launcher = subprocess.Popen(
        list(map(str, arguments)), preexec_fn=inside.join, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        victim = Family.of(launcher.pid, 2).workers[0].pid
        wait_for_step(run, 1)
        Path(f"/proc/{victim}/oom_score_adj").write_text("1000")  # the kernel takes this one first
        hog = inside.run(sys.executable, "-c", HOG)
        assert hog.returncode == 0, hog.stderr
        recovered = wait_until(
            lambda: next((r for r in read(run / "metrics.jsonl") if r.get("event") == "recovered"), None),
            "a new worker",
        )
        wait_for_step(run, recovered["step"] + 2)
        launcher.terminate()
        said, _ = launcher.communicate(timeout=60)
    finally:
        launcher.kill()
        launcher.wait()
    assert launcher.returncode == 128 + signal.SIGTERM, said
    assert f"(pid {victim}) ended by signal 9 (SIGKILL)" in said
    assert "The memory ran out, and the kernel ended 1 of its processes." in said and "of a limit of 900 MB" in said

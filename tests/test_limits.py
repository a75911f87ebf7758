"""What a user may open, start and write: read from the kernel, and from made-up limits."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from cllm_spheres import limits, machine


def run_with_files(soft, hard, code):
    """What `code` prints where so many open files are allowed."""
    done = subprocess.run(
        [sys.executable, "-c", f"import resource, subprocess, sys\nfrom cllm_spheres import limits\n{code}"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


CHILD = (
    "subprocess.run([sys.executable, '-c', 'import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])'])"
)


@pytest.mark.parametrize(
    ("soft", "hard", "raised"), [(64, 200, 200), (64, 64, 64), (64, 10_000, 4096), (5000, 9000, 5000)]
)
def test_children_inherit_a_raised_limit_of_open_files_and_ours_stays(soft, hard, raised):
    if -1 < resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.skip("fewer files are allowed here")
    code = f"with limits.raised_files():\n {CHILD}\n{CHILD}\nprint(limits.most_files())"
    printed = run_with_files(soft, hard, code)
    assert printed == [str(raised), str(soft), str(hard)]  # ours comes last: it is printed as we end


def test_raising_fewer_files_loads_nothing_heavy():
    code = "with limits.raised_files(): pass\nprint([name for name in ('psutil', 'numpy') if name in sys.modules])"
    assert run_with_files(64, 64, code) == ["[]"]


@pytest.fixture
def allowed(monkeypatch):
    """allowed(user, group): limits of processes; None is none."""

    def make(user, group=None, exempt=False):
        infinite = resource.RLIM_INFINITY
        monkeypatch.setattr(limits.resource, "getrlimit", lambda which: (infinite if user is None else user, infinite))
        monkeypatch.setattr(limits, "_exempt", lambda: exempt)
        monkeypatch.setattr(machine, "task_limit", lambda: group)

    return make


def test_without_limits_any_number_of_processes_may_start(allowed):
    allowed(None)
    assert limits.tasks_left(10**6) is None
    allowed(10, exempt=True)  # root is not held back by its own limit
    assert limits.tasks_left(10**6) is None


def test_the_tightest_limit_of_processes_counts_and_is_named(allowed, monkeypatch):
    monkeypatch.setattr(limits, "_all_tasks", lambda: 5000)
    monkeypatch.setattr(limits, "_tasks_of_user", lambda: 30)
    allowed(100, (1000, 990))
    assert limits.tasks_left(5) == (10, "the control group's pids.max of 1,000")
    allowed(100, (1000, 10))
    assert limits.tasks_left(5) == (70, "the user's limit of 100 (ulimit -u)")


def test_processes_are_counted_one_by_one_only_where_it_matters(allowed, monkeypatch):
    monkeypatch.setattr(limits, "_all_tasks", lambda: 500)
    monkeypatch.setattr(limits, "_tasks_of_user", lambda: pytest.fail("counted"))
    allowed(1000)
    assert limits.tasks_left(500)[0] == 500


def test_the_processes_of_this_user_are_seen():
    assert limits._tasks_of_user() >= 1
    assert 1 <= limits._all_tasks() < 1 << 30


def test_folders_that_do_not_exist_yet_are_judged_by_the_one_above(tmp_path):
    assert limits.existing(tmp_path / "a" / "b") == tmp_path and limits.existing(tmp_path) == tmp_path
    assert limits.unwritable(tmp_path) is None and limits.free_bytes(tmp_path) > 0
    (tmp_path / "file").write_text("")
    assert "is not a folder" in limits.unwritable(tmp_path / "file")


def test_a_read_only_file_system_is_named(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", tmp_path]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount")
    try:
        assert limits.unwritable(tmp_path) == f"{tmp_path} lies on a file system that is mounted read-only"
    finally:
        subprocess.run(["umount", tmp_path], check=True)

"""Before a run begins: what this machine's limits make impossible is refused, what is only slow is said."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from dataclasses import replace

import pytest

from cllm_spheres import limits
from cllm_spheres.config import merge
from cllm_spheres.errors import InputError
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training import plan, session, start
from tests.runs import TINY, Family, begin, command, train_whole, wait_for_step, words

FILES = (64, 64)  # soft and hard limit of open files


@pytest.fixture
def machine(corpus, monkeypatch, tmp_path):
    """machine(cores, free, **options): the job of a configuration where there are so many cores; then `check`."""

    class Machine:
        def __call__(self, cores=2, free=10**12, files=20_000, tasks=None, memory=None, **options):
            monkeypatch.setattr(start, "usable_cores", lambda: list(range(cores)))
            monkeypatch.setattr(start, "allowed_cores", lambda: list(range(cores)))
            monkeypatch.setattr(start, "cpu_quota", lambda: None)
            monkeypatch.setattr(start, "has_vectors", lambda: True)
            monkeypatch.setattr(limits, "free_bytes", lambda folder: free)
            monkeypatch.setattr(limits, "most_files", lambda: files)
            monkeypatch.setattr(limits, "tasks_left", lambda needed: tasks)
            monkeypatch.setattr(limits, "read", lambda which: (memory, memory))
            config, given = merge({"preset": "tiny"} | options)
            self.prepared = Prepared.open(corpus)
            self.config = plan.resolve(config, given, self.prepared)
            return plan.make_job(self.config, self.prepared)

        def check(self, run=tmp_path / "run"):
            return start.check_start(self.config, self.prepared, run)

    return Machine()


def test_where_nothing_is_missing_nothing_is_said(machine):
    machine(workers=2)
    assert machine.check() == ()


def test_too_few_open_files_are_refused_with_what_would_fit(machine):
    machine(workers=63, files=64)
    with pytest.raises(InputError, match=r"63 workers need up to 103 in one process, and 64 are allowed") as refused:
        machine.check()
    assert "Or try --workers 24 --spheres 63." in str(refused.value)
    machine(workers=24, spheres=63, files=64)  # what it says is true: so many fit, one more does not
    assert machine.check()
    machine(workers=25, spheres=63, files=64)
    with pytest.raises(InputError):
        machine.check()


def test_a_pinned_worker_takes_two_files_and_choosing_cores_takes_one_for_each():
    assert start.files_needed(2, cores=2) == start.FILES + 4
    assert start.files_needed(2, cores=128) == start.FILES + 128
    assert start.files_needed(100, cores=128) == start.FILES + 200
    assert start.files_needed(156, cores=128) == start.FILES + 156


def test_too_few_processes_are_refused_with_the_limit_and_what_would_fit(machine):
    machine(workers=63, tasks=(40, "the control group's pids.max of 100"))
    with pytest.raises(
        InputError, match=r"are 77, and 40 more are allowed by the control group's pids.max of 100"
    ) as refused:
        machine.check()
    assert "or try --workers 26 --spheres 63" in str(refused.value)
    machine(workers=26, spheres=63, tasks=(40, "anything"))
    assert machine.check()
    machine(workers=2, tasks=(5, "anything"))
    with pytest.raises(InputError, match=r"Raise that limit, end other programs\.$"):
        machine.check()


def test_too_little_address_space_is_refused(machine):
    machine(workers=2, memory=500_000_000)
    with pytest.raises(
        InputError, match=r"each process of this run maps 7\d\d MB, and 500 MB are allowed \(ulimit -v\)"
    ):
        machine.check()


def test_files_that_may_not_be_as_large_as_shared_memory_are_refused(machine, monkeypatch, tmp_path):
    machine(workers=2)
    monkeypatch.setattr(limits, "read", lambda which: (2_000_000 if which == resource.RLIMIT_FSIZE else None,) * 2)
    with pytest.raises(InputError, match=r"is a file of \d MB, and files may have 2 MB \(ulimit -f\)"):
        machine.check()
    refused = command(
        "train", "--run", tmp_path / "run", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (102_400,) * 2)
    )
    assert refused.returncode == 2 and "is a file of 600 kB, and files may have 102 kB (ulimit -f)" in refused.stderr
    assert not any(tmp_path.iterdir()) and "Traceback" not in refused.stderr


def test_no_room_for_a_checkpoint_is_refused_and_room_for_one_alone_is_said(machine):
    needed = start.checkpoint_bytes(machine())
    assert needed > 12 * 80_000  # parameters and two moments in float32
    machine(free=needed - 1)
    with pytest.raises(InputError, match=r"one checkpoint takes 1 MB, 1 MB are free in .* Free some"):
        machine.check()
    machine(free=int(1.5 * needed))
    assert ["room for one checkpoint" in note for note in machine.check()] == [True]
    machine(free=None)  # a file system that does not say
    assert machine.check() == ()


def test_sgd_saves_one_moment(machine):
    assert start.checkpoint_bytes(machine(optimizer="sgd")) < 0.75 * start.checkpoint_bytes(machine())


def test_workers_that_share_cores_are_said(machine):
    machine(workers=63)
    (note,) = machine.check()
    assert note.startswith("63 workers share 2 cores: the same bits, at the speed of 2.")


def test_a_quota_below_the_affinity_is_said(machine, monkeypatch):
    machine(cores=8, workers=2)
    monkeypatch.setattr(start, "cpu_quota", lambda: 2.5)
    monkeypatch.setattr(start, "usable_cores", lambda: [0, 1])
    (note,) = machine.check()
    assert note.startswith("The control group's quota is 2.5 of 8 cores: 2 are used.")


def test_a_dtype_without_fast_kernels_is_said(machine):
    job = replace(machine(), dtype="fp32")
    assert "float32 is computed instead" in start.slow(job, "bf16")[0]
    assert start.slow(job, "fp32") == []


def test_a_cpu_without_vectors_is_said(machine, monkeypatch):
    machine(workers=2)
    monkeypatch.setattr(start, "has_vectors", lambda: False)
    (note,) = machine.check()
    assert note.startswith("This CPU has neither AVX2 nor AVX-512")


def test_a_new_run_and_a_resume_carry_the_sentences(corpus, tmp_path, monkeypatch):
    run = train_whole(corpus, tmp_path / "run", steps=3).run
    monkeypatch.setattr(start, "usable_cores", lambda: [0])
    assert "2 workers share 1 core:" in session.new_run(corpus, TINY, run=tmp_path / "new", file=None).notes[0]
    planned, finished = session.resumed_run(run, {"steps": 5}, data=None)
    assert not finished and "2 workers share 1 core:" in planned.notes[0]


def test_a_resume_is_refused_by_the_same_limits_and_changes_nothing(corpus, tmp_path, monkeypatch):
    run = train_whole(corpus, tmp_path / "run", steps=3).run
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr(limits, "free_bytes", lambda folder: 1000)
    with pytest.raises(InputError, match=r"one checkpoint takes .* 1 kB are free"):
        session.resumed_run(run, {"steps": 5}, data=None)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_a_resume_on_a_read_only_file_system_is_refused_in_words(corpus, tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    if os.getuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "none", place], capture_output=True).returncode != 0:
        pytest.skip("only root may mount")
    try:
        run = train_whole(corpus, place / "run", steps=3).run
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        result = command("train", "--resume", "--run", run, "--steps", 5)
        assert result.returncode == 2 and "is mounted read-only. Give another --run" in result.stderr
        assert "Traceback" not in result.stderr
    finally:
        subprocess.run(["umount", place], check=True)


# ---- the real limits, through the console script


def few_files(limit=FILES):
    return lambda: resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_63_workers_on_64_open_files_end_with_2_and_words_and_nothing_is_left(tmp_path):
    result = command("train", "--preset", "minimal", "--workers", 63, cwd=tmp_path, preexec_fn=few_files())
    assert result.returncode == 2, result.stderr
    assert "63 workers need up to 103 in one process, and 64 are allowed" in result.stderr
    assert "Traceback" not in result.stderr and result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_2_workers_train_on_64_open_files(corpus, tmp_path):
    options = TINY | {"workers": 2, "steps": 12, "save_every": 3}
    if start.files_needed(2, len(start.usable_cores())) > FILES[1]:
        pytest.skip("so many cores cannot be claimed with 64 files")
    result = command("train", corpus, "--run", tmp_path / "run", *words(options), preexec_fn=few_files())
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_low_soft_limit_is_raised_to_the_hard_one(corpus, tmp_path):
    options = TINY | {"workers": 63, "spheres": 63, "batch_size": 63, "steps": 3}
    result = command("train", corpus, "--run", tmp_path / "run", *words(options), preexec_fn=few_files((64, 500)))
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 20])
def test_no_process_of_a_run_has_more_files_open_than_is_asked_for(corpus, tmp_path, workers):
    options = TINY | {"workers": workers, "spheres": 20, "batch_size": 20, "steps": 10**6, "save_every": 5}
    process = begin("train", corpus, "--run", tmp_path / "run", *words(options))
    family = Family.of(process.pid, workers)
    try:
        wait_for_step(tmp_path / "run", 20)
        most = start.files_needed(workers, len(start.usable_cores()))
        for member in (family.node_zero, family.server, family.workers[-1]):
            assert len(os.listdir(f"/proc/{member.pid}/fd")) <= most - 15  # some head-room is left
    finally:
        process.terminate()
        process.communicate(timeout=60)
        family.end()
        shutil.rmtree(tmp_path / "run", ignore_errors=True)

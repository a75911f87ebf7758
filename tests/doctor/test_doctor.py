"""Each thing that may be broken is one bad line, with the numbers and what to do; never a traceback."""

from __future__ import annotations

import errno
import json
import os
import resource
from dataclasses import replace

import numpy as np
import pytest

from cllm_spheres import limits
from cllm_spheres.doctor import examine, needs, speed, system, twins
from cllm_spheres.doctor.finding import Finding, look
from cllm_spheres.errors import InputError
from cllm_spheres.kernels import gather, optimizer
from cllm_spheres.model import dtypes
from cllm_spheres.model.layout import Layout
from cllm_spheres.training import plan, start
from tests.naive import naive_loss_and_gradients
from tests.runs import command

USABLE = [dtype for dtype in dtypes.DTYPES if dtypes.usable(dtype) == dtype]


@pytest.fixture
def tiny():
    return needs.plan({"preset": "tiny", "workers": 2})[1]


# ---- one line


def test_a_check_that_raises_is_a_bad_line_with_the_reason():
    finding = look("anything", lambda: {}["missing\nkey"])
    assert finding.state == "bad" and "KeyError" in finding.found and "\n" not in finding.found and finding.advice
    assert look("fine", lambda: ("ok", "found")) == Finding("fine", "ok", "found")


def test_a_run_that_cannot_be_is_an_error_and_not_a_line():
    with pytest.raises(InputError, match="did you mean 'small'"):
        needs.plan({"preset": "smal"})
    with pytest.raises(InputError, match="--spheres 4"):
        needs.plan({"workers": 5, "spheres": 4})


def test_the_run_is_the_one_that_train_would_make(tiny):
    assert (tiny.spheres, tiny.workers, tiny.batch_size) == (4, 2, 4)
    config, job = needs.plan({"preset": "gpt2"})
    assert needs.look_at_run(config, job)[1].startswith("preset gpt2: 123,886,080 parameters, ")


# ---- the system


def test_this_machine_is_well():
    for check in (system.look_at_platform, system.look_at_cores, system.look_at_cpu, system.look_at_sharing):
        assert check()[0] in ("ok", "note"), check


def test_a_quota_is_to_note(monkeypatch):
    monkeypatch.setattr(system, "cpu_quota", lambda: 0.5)
    state, found, advice = system.look_at_cores()
    assert state == "note" and "a quota of 0.5 cores" in found and "raise it" in advice


def test_memory_that_is_gone_is_bad(monkeypatch):
    monkeypatch.setattr(system, "available_memory", lambda: 100_000_000)
    monkeypatch.setattr(system, "memory_group", lambda: (2_000_000_000, 1_900_000_000))
    state, found, _ = system.look_at_memory()
    assert state == "bad" and "100 MB available" in found and "the cgroup uses 1.9 GB of 2.0 GB" in found


def test_an_unknown_backend_is_a_bad_line(monkeypatch):
    monkeypatch.setenv("CLLM_SPHERES_GEMM", "mkl")
    finding = look("CPU", system.look_at_cpu)
    assert finding.state == "bad" and "CLLM_SPHERES_GEMM=mkl is not possible here" in finding.found


@pytest.mark.parametrize("call", ["memfd_create", "posix_fallocate", "pidfd_open"])
def test_a_sandbox_that_forbids_a_call_is_named(monkeypatch, call):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, call, refuse)
    state, found, _ = system.look_at_sharing()
    assert state == "bad" and call in found and "Operation not permitted" in found


def test_futex_words_that_do_not_wake_are_bad(monkeypatch):
    def refuse(pages):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(system, "_try_futex", refuse)
    assert system.look_at_sharing()[:2] == ("bad", "futex does not work: Function not implemented")


# ---- what a run needs


def test_what_is_computed_again_for_want_of_memory_is_said(monkeypatch):
    config, job = needs.plan({"preset": "tiny", "recompute": "none"})
    assert "computed again" not in needs.look_at_run(config, job)[1]
    monkeypatch.setattr(plan, "available_memory", lambda: 1_000_000)
    config, job = needs.plan({"preset": "tiny"})
    assert job.recompute == "block" and "every block of layers computed again" in needs.look_at_run(config, job)[1]


def test_too_little_memory_is_bad(tiny, monkeypatch):
    assert needs.look_at_memory(tiny)[0] == "ok"
    monkeypatch.setattr(needs, "available_memory", lambda: 1_000_000)
    state, found, _ = needs.look_at_memory(tiny)
    assert state == "bad" and "1 MB are available" in found


def test_limits_that_are_too_low_are_bad_with_the_words_of_train(tiny, monkeypatch):
    monkeypatch.setattr(limits, "read", lambda which: (30, 30))
    state, found, advice = needs.look_at_files(tiny)
    assert state == "bad" and "allowed are 30" in found and "Too few open files" in advice
    state, found, advice = needs.look_at_address_space(tiny)
    assert state == "bad" and "ulimit -v" in advice
    monkeypatch.setattr(limits, "tasks_left", lambda needed: (3, "the control group's pids.max of 9"))
    state, found, advice = needs.look_at_tasks(tiny)
    assert state == "bad" and "3 more are allowed by the control group's pids.max of 9" in found


def test_a_full_disk_and_a_folder_that_is_none_are_bad(tiny, monkeypatch, tmp_path):
    assert needs.look_at_run_folder(tmp_path / "run", tiny)[0] == "ok"
    (tmp_path / "file").write_text("")
    state, _, advice = needs.look_at_run_folder(tmp_path / "file" / "run", tiny)
    assert state == "bad" and "is not a folder" in advice
    monkeypatch.setattr(limits, "free_bytes", lambda folder: 20_000)
    state, found, advice = needs.look_at_run_folder(tmp_path / "run", tiny)
    assert state == "bad" and "20 kB are free" in found and "Too little disk space" in advice
    monkeypatch.setattr(limits, "free_bytes", lambda folder: int(1.5 * start.checkpoint_bytes(tiny)))
    assert needs.look_at_run_folder(tmp_path / "run", tiny)[0] == "note"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_no_folder_for_scratch_files_is_bad(monkeypatch, tmp_path):
    assert needs.look_at_temporary_folder()[0] == "ok"
    monkeypatch.setattr(needs.tempfile, "gettempdir", lambda: str(tmp_path / "gone"))
    state, found, advice = needs.look_at_temporary_folder()
    assert state == "bad" and "No such file" in found and "TMPDIR" in advice


def test_a_kernel_cache_that_nobody_keeps_is_to_note(monkeypatch, tmp_path):
    from cllm_spheres.crystal import jit

    assert needs.look_at_kernel_cache()[0] in ("ok", "note")
    monkeypatch.setattr(jit, "CACHE_FOLDER", tmp_path)
    state, _, advice = needs.look_at_kernel_cache()
    assert state == "note" and "XDG_CACHE_HOME" in advice
    monkeypatch.setattr(jit, "CACHE_FOLDER", tmp_path / "kernels" / "gone")
    assert needs.look_at_kernel_cache()[0] == "bad"


# ---- the kernels


def test_the_doctors_formula_is_the_twin_of_the_tests():
    rng, layout = np.random.default_rng(1), Layout(twins.SHAPE)
    params_P = (rng.standard_normal(layout.size) * 0.3).astype(np.float32)
    p = {name: view.astype(np.float64) for name, view in layout.views(params_P).items()}
    ids = rng.integers(0, 50, (2, 3, 20))
    expected, _ = naive_loss_and_gradients(twins.SHAPE, layout.views(params_P), ids[0], ids[1])
    assert twins.loss(twins.SHAPE, p, *ids) == pytest.approx(60 * expected, rel=1e-12)  # float64 in another order


@pytest.mark.parametrize("dtype", USABLE)
def test_the_kernels_of_this_machine_are_right(dtype):
    assert twins.look_at_model(dtype)[0] == "ok"


@pytest.mark.parametrize("dtype", USABLE)
@pytest.mark.parametrize(
    "fault", ["loss", "NaN", "wte.weight", "h.1.attn.c_attn.weight", "h.0.ln_2.bias", "ln_f.weight"]
)
def test_a_kernel_that_computes_wrongly_is_bad(monkeypatch, dtype, fault):
    real = twins.compute

    def broken(dtype, layout, *arguments):
        loss, segment_P = real(dtype, layout, *arguments)
        if fault in layout.views(segment_P):
            layout.views(segment_P)[fault][...] *= -1
        elif fault == "NaN":
            layout.views(segment_P)["wpe.weight"].flat[7] = np.nan
        return loss * (1.01 if fault == "loss" else 1), segment_P

    monkeypatch.setattr(twins, "compute", broken)
    state, found, advice = twins.look_at_model(dtype)
    assert state == "bad" and "delete the kernel cache" in advice
    assert fault in ("loss", "NaN") or fault in found


class Wrong:
    """An entry that calls the real one and then spoils what lies at its argument number `argument`."""

    def __init__(self, entry, argument):
        self.entry, self.argument = entry, argument

    def call(self, *arguments):
        answer = self.entry.call(*arguments)
        np.ctypeslib.as_array((np.ctypeslib.ctypes.c_float * 1).from_address(arguments[self.argument]))[0] += 1
        return answer


def test_a_gather_or_an_update_that_computes_wrongly_is_bad(monkeypatch):
    assert twins.look_at_optimizer()[0] == "ok"
    with monkeypatch.context() as patch:
        patch.setattr(gather, "gather_block", Wrong(gather.gather_block, 3))
        state, found, _ = twins.look_at_optimizer()
        assert state == "bad" and "other bits" in found
    monkeypatch.setattr(optimizer, "commit_block", Wrong(optimizer.commit_block, 1))
    assert twins.look_at_optimizer()[0] == "bad"


def test_the_fastest_dtype_is_measured_and_another_is_to_note(tiny, monkeypatch):
    monkeypatch.setattr(speed, "LEAST_S", 0.01)
    assert all(speed.tokens_per_s(needs.plan({"preset": "tiny", "dtype": dtype})[1]) > 0 for dtype in USABLE)
    monkeypatch.setattr(speed.dtypes, "usable", lambda dtype: dtype)
    monkeypatch.setattr(speed, "tokens_per_s", lambda job: 2000.0 if job.dtype == "fp32" else 5000.0)
    monkeypatch.setattr(speed, "rehearsal_bytes", lambda job: 10**6)
    state, _, advice = speed.look_at_speed(replace(tiny, dtype="fp32"))
    assert state == "note" and "--dtype bf16 is 2.5 times as fast" in advice
    assert speed.look_at_speed(replace(tiny, dtype="bf16"))[0] == "ok"


def test_what_does_not_fit_into_memory_is_not_measured(tiny, monkeypatch):
    monkeypatch.setattr(speed, "available_memory", lambda: 1000)
    state, found, _ = speed.look_at_speed(tiny)
    assert state == "note" and "not measured" in found


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGILL)", "ended with signal 4 (SIGILL)"),
        ("raise SystemExit(3)", "ended with exit code 3"),
        ("raise ImportError('no numba here')", "exit code 1: ImportError: no numba here"),
    ],
)
def test_kernels_that_end_their_process_are_a_bad_line(tiny, monkeypatch, tmp_path, code, expected):
    (tmp_path / "a_module_that_dies.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(examine, "CHILD", "a_module_that_dies")
    (finding,) = examine.look_inside(tiny, lambda text: None)
    assert finding.state == "bad" and expected in finding.found and finding.advice


# ---- the command


def test_the_command_finds_nothing_bad_here_and_leaves_nothing(tmp_path):
    result = command("doctor", "--preset", "minimal", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    lines = [line for line in result.stdout.splitlines() if not line.lstrip().startswith("->")]
    assert all(line.startswith(("ok", "note")) for line in lines[:-1]) and "Training will work." in lines[-1]
    assert {"kernels fp32", "shared memory"} <= {line[6:21].strip() for line in lines}
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_is_bad_as_json_too_and_ends_with_1(tmp_path):
    few = dict(cwd=tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)))
    result = command("doctor", "--preset", "minimal", "--workers", 63, "--json", **few)
    assert result.returncode == 1, result.stderr
    findings = json.loads(result.stdout)
    assert all(set(finding) == {"check", "state", "found", "advice"} for finding in findings)
    (bad,) = [finding for finding in findings if finding["state"] == "bad"]
    assert bad["check"] == "open files" and "allowed are 64" in bad["found"] and "--workers 24" in bad["advice"]
    assert any("63 workers share" in finding["advice"] for finding in findings) or len(os.sched_getaffinity(0)) > 62

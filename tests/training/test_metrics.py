"""metrics.jsonl: the words that scripts rely on, and that its numbers fit each other."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest

from cllm_spheres.errors import RunFailed
from cllm_spheres.events import EVENTS, read
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training import footprint as footprint_module
from cllm_spheres.training import metrics as metrics_module
from cllm_spheres.training.metrics import Metrics
from tests.runs import Family, finished, start, wait_until

PHASES = ("compute_s", "waiting_s", "gather_s", "update_s", "other_s")
STEP = {
    "kind", "step", "loss", "cross_entropy", "lr", "grad_norm", "clipped_norm", "tokens", "total_tokens", "time",
    "seconds", "tokens_per_s", *PHASES,
}  # fmt: skip
EVAL = {
    "kind", "step", "val_loss", "perplexity", "bits_per_byte", "unigram_loss", "bigram_loss", "tokens", "time",
    "seconds",
}  # fmt: skip
SPHERES = {
    "kind", "step", "time", "worker", "throughput", "waiting", "state", "memory", "cpu_percent", "memory_bytes",
}  # fmt: skip


def taken_bytes(process):
    """The kernel's own share of each page for a process; without pages of files, which other tests may use too."""
    rollup = dict(line.split(":") for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:])
    return 1024 * sum(int(rollup[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem"))


@pytest.fixture(scope="module")
def outcome(corpus, tmp_path_factory):
    """A run of two workers that has gone on for more than a second, stopped in the middle."""
    run = tmp_path_factory.mktemp("metrics") / "run"
    began = time.time()
    options = dict(layers=2, width=64, ff_width=256, block_size=32, batch_size=7, steps=10_000, eval_every=50)
    launch = start(corpus, run, **options, save_every=100_000, eval_tokens=2000)
    family = Family.of(os.getpid(), 2)
    for kind in ("spheres", "eval"):
        wait_until(lambda kind=kind: sum(r["kind"] == kind for r in read(run / "metrics.jsonl")) >= 2, f"two {kind}")
    taken = sum(map(taken_bytes, (family.node_zero, family.server, *family.workers)))
    launch.pass_on(signal.SIGTERM)
    result = finished(launch)
    assert result.code == 143, result.message
    object.__setattr__(result, "began", began)
    object.__setattr__(result, "taken", taken)
    return result


def test_every_line_is_an_object_with_a_kind(outcome):
    lines = (outcome.run / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]  # no NaN or Infinity
    assert records == outcome.records
    assert {record["kind"] for record in records} == {"step", "eval", "event", "spheres"}
    # written so that they read back as the same bits
    assert [json.dumps(record, separators=(",", ":")) for record in records] == lines


def test_a_step_has_every_field_and_steps_follow_each_other(outcome):
    steps = [record for record in outcome.records if record["kind"] == "step"]
    assert all(record.keys() == STEP for record in steps)
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    assert all(record["tokens"] == 7 * 32 for record in steps)
    assert [record["total_tokens"] for record in steps] == [7 * 32 * n for n in range(1, len(steps) + 1)]
    for record in steps:
        assert math.isfinite(record["loss"]) and record["grad_norm"] > 0
        assert record["clipped_norm"] == pytest.approx(min(1.0, record["grad_norm"]), rel=1e-15)  # a rounding or two


def test_the_phases_of_a_step_add_up_to_its_seconds_and_the_seconds_to_the_time_that_passed(outcome):
    steps = outcome.of("step")
    for record in steps:
        assert all(record[phase] >= 0 for phase in PHASES)
        # sums of a few float64 of times below a minute
        assert sum(record[phase] for phase in PHASES) == pytest.approx(record["seconds"], rel=1e-9, abs=1e-12)
        assert record["tokens_per_s"] == record["tokens"] / record["seconds"] > 0
    times = [record["time"] for record in steps]
    assert outcome.began < times[0] and times == sorted(times) and times[-1] <= time.time()
    # nothing is left out: between two steps lies what the second took, evaluations included.
    # The two clocks are read one after the other and may be adjusted meanwhile: 0.1 s.
    passed = times[-1] - times[0]
    assert sum(record["seconds"] for record in steps[1:]) == pytest.approx(passed, abs=0.1)


def test_an_evaluation_has_every_field_and_its_numbers_fit_each_other(outcome, corpus):
    evaluations = outcome.of("eval")
    assert [record["step"] for record in evaluations] == [50 * n for n in range(len(evaluations))]
    prepared = Prepared.open(corpus)
    for record in evaluations:
        assert record.keys() == EVAL
        assert record["perplexity"] == math.exp(record["val_loss"])
        assert record["tokens"] == 2000 // 32 * 32 < len(prepared.val)
        # bytes: every token but end of text, which is not in this single document, is one byte
        assert record["bits_per_byte"] == pytest.approx(record["val_loss"] / math.log(2), rel=1e-2)
        assert record["bigram_loss"] < record["unigram_loss"] < math.log(257)
    assert len({(r["unigram_loss"], r["bigram_loss"]) for r in evaluations}) == 1
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]


def test_a_sample_of_the_spheres_has_a_value_for_each(outcome):
    for record in outcome.of("spheres"):
        assert record.keys() == SPHERES
        assert record["worker"] == [0, 1, 0, 1]
        assert all(value > 0 for value in record["throughput"])
        assert all(0 <= value <= 1 for value in record["waiting"])
        assert all(isinstance(value, str) for value in record["state"])
        assert all(0 < value < record["memory_bytes"] for value in record["memory"])


def test_memory_is_what_the_run_takes_and_counts_what_its_processes_share_once(outcome):
    # Within a quarter: the processes are looked at in turn.
    assert outcome.of("spheres")[-1]["memory_bytes"] == pytest.approx(outcome.taken, rel=0.25)


def test_processes_are_looked_at_in_turn_and_others_are_taken_for_typical(monkeypatch):
    looked = []

    def own_bytes(pid):
        looked.append(pid)
        if pid == 4:
            raise ProcessLookupError
        return 1000 * pid

    monkeypatch.setattr(footprint_module, "own_bytes", own_bytes)
    footprint = footprint_module.Footprint()
    assert footprint.update([1, 2, 3, 4, 5]) == {1: 1000, 2: 2000, 3: 3000, 4: 2000, 5: 2000}
    assert footprint.update([1, 2, 3, 4, 5])[4] == 2000  # it has just ended
    assert footprint.update([1, 2, 3, 5])[5] == 5000
    assert footprint.update([1, 3, 5, 6]) == {1: 1000, 3: 3000, 5: 5000, 6: 6000}
    assert footprint.update([1, 3, 5, 6]) and looked == [1, 2, 3, 4, 5, 6, 1]


def test_events_tell_the_story_of_the_run(outcome):
    events = [record for record in outcome.of("event") if record["event"] != "note"]  # such as: this CPU is slow
    assert {record["event"] for record in events} <= set(EVENTS)
    assert all(record["message"] and record["time"] > outcome.began for record in events)
    assert [record["event"] for record in events][:3] == ["start", "ready", "eta"]
    first = events[0]
    assert (first["workers"], first["spheres"], first["batch_size"], first["block_size"]) == (2, 4, 7, 32)
    assert "2 workers, 4 spheres, batch 7 x 32 tokens" in first["message"]
    assert events[2]["seconds"] > 0
    assert events[-1]["event"] == "end"


# --- a disk that refuses


class FullDisk:
    """A file that takes only so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if not self.room:
            raise OSError(28, "No space left on device")
        taken = self.file.write(bytes(data[: self.room]))
        self.room -= taken
        return taken


@pytest.fixture
def full(tmp_path):
    """Metrics whose disk takes 25 bytes, and what was told meanwhile."""
    told = []
    metrics = Metrics(tmp_path / "metrics.jsonl", status=told.append)
    metrics._file = FullDisk(metrics._file, 25)
    metrics.told = told
    return metrics


def test_what_a_full_disk_does_not_take_waits_and_is_written_whole_and_in_order(full):
    for step in range(100):
        full.write({"kind": "step", "step": step})
    (said,) = full.told  # once, not a hundred times
    assert "metrics.jsonl cannot be written: No space left on device. 1 lines wait in memory." in said
    full.event("unsaved", "The checkpoint could not be saved.", 7)
    assert full.told[1:] == ["The checkpoint could not be saved."]  # or nobody would see it
    with pytest.raises(RunFailed, match=r"No space left on device\. 1\d\d lines wait in memory"):
        full.finish()
    full._file.room = 10**9
    full.write({"kind": "step", "step": 100})
    assert full.told[-1] == ""
    full.finish()
    steps = [r["step"] for r in read(full.path) if r["kind"] == "step"]
    assert steps == list(range(101)) and len(full.path.read_text().splitlines()) == 102


def test_so_many_waiting_lines_that_they_are_lost_end_the_run(full, monkeypatch):
    monkeypatch.setattr(metrics_module, "MOST_WAITING", 1000)
    full.check()
    for step in range(100):
        full.write({"kind": "step", "step": step})
    with pytest.raises(RunFailed, match="No space left on device"):
        full.check()

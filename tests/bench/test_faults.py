"""A small run of the benchmark of faults: it kills, compares, and writes what it found."""

from __future__ import annotations

import json

import pytest
from cllm_spheres_bench import faults
from cllm_spheres_bench.faults_run import Sample

from cllm_spheres.errors import InputError


@pytest.mark.bench
def test_disturbed_runs_are_compared_with_an_undisturbed_one(tmp_path, capsys):
    options = faults.Options(kills=6, workers=(1, 3), preset="tiny", steps=4000, every_s=0.02, out=tmp_path)
    assert faults.run(options) == 0
    found = json.loads((tmp_path / "faults.json").read_text())
    assert [kill["workers"] for kill in found["kills"]] == [1, 1, 1, 3, 3, 3]
    assert all(0 < kill["seconds"] < 60 for kill in found["kills"])
    assert "| all | " in (tmp_path / "faults.md").read_text()


def test_a_run_that_ends_in_other_bits_is_found(tmp_path, monkeypatch):
    bits = iter(range(10))
    monkeypatch.setattr(faults, "bits", lambda run: next(bits))
    options = faults.Options(kills=1, workers=(2,), preset="minimal", steps=3000, every_s=0.02, out=tmp_path)
    assert faults.run(options) == 1
    (kill,) = json.loads((tmp_path / "faults.json").read_text())["kills"]
    assert kill["workers"] == 2 and 0 < kill["seconds"] < 60


@pytest.mark.bench
def test_a_long_run_is_sampled(tmp_path):
    options = faults.Options(minutes=0.2, workers=(3,), preset="tiny", every_s=0.5, out=tmp_path)
    assert faults.run(options) == 0
    found = json.loads((tmp_path / "soak.json").read_text())
    samples = [Sample(**sample) for sample in found["samples"]]
    assert len(samples) >= 3 and len(found["kills"]) >= 3
    assert all(sample.processes <= 5 and sample.memory_bytes > 0 for sample in samples)
    assert max(s.descriptors for s in samples) < 100


def test_workers_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(InputError, match="from 1 to 156"):
        faults.run(faults.Options(workers=(157,), out=tmp_path))

"""The scaling benchmark: its model's arithmetic, its options, and a small run of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cllm_spheres_bench import scaling
from cllm_spheres_bench.scaling_model import (
    Parts,
    efficiency,
    fit_barrier,
    gather_bytes,
    step_s,
    update_bytes,
)

from cllm_spheres.errors import InputError

PARTS = Parts(
    shard_s=0.1, gather_alone_s=0.064, gather_together_s=0.04, update_alone_s=0.028, update_together_s=0.02,
    pack_alone_s=0.0, pack_together_s=0.0, spheres=63, has_squares=True, barrier_s=(1e-6, 2e-6),
)  # fmt: skip


def test_one_worker_does_everything_and_meets_nobody():
    assert step_s(PARTS, 1, 63, grows=True) == pytest.approx(63 * 0.1 + 0.064 + 0.028)


def test_workers_share_spheres_whole_and_bytes_evenly():
    barriers = 3 * (1e-6 + 16 * 2e-6)
    assert step_s(PARTS, 16, 63, grows=True) == pytest.approx(4 * 0.1 + (0.064 + 0.028) / 16 + barriers)
    # 63 spheres on 62 workers: one worker has two
    assert step_s(PARTS, 62, 63, grows=True) > 0.2 > step_s(PARTS, 63, 63, grows=True)


def test_a_bandwidth_that_stays_bounds_gather_and_update():
    grows, stays = (step_s(PARTS, 63, 63, grows=g) for g in (True, False))
    assert stays - grows == pytest.approx((0.04 - 0.064 / 63) + (0.02 - 0.028 / 63))


def test_fewer_spheres_have_fewer_bytes_to_gather():
    few = step_s(PARTS, 1, 12, grows=True) - 12 * 0.1
    assert few == pytest.approx(0.064 * 13 / 64 + 0.028)


def test_packing_takes_its_time_and_a_barrier_more():
    packs = replace(PARTS, pack_alone_s=0.02, pack_together_s=0.01)
    more = step_s(packs, 4, 63, grows=True) - step_s(PARTS, 4, 63, grows=True)
    assert more == pytest.approx(0.02 / 4 + 1e-6 + 4 * 2e-6)


def test_bytes_are_those_that_the_phases_move():
    # from three spheres on: read S segments, write the sum; read it, and weights and two moments both ways
    assert (gather_bytes(1000, 3), update_bytes(1000, 3, True)) == (16_000, 28_000)
    # with two the sum is not kept: the update reads the segments again
    assert (gather_bytes(1000, 2), update_bytes(1000, 2, True)) == (8_000, 32_000)
    assert update_bytes(1000, 3, False) == 20_000


def test_the_line_through_the_barriers():
    assert fit_barrier({1: 5.0, 2: 3.0, 4: 5.0, 8: 9.0}) == pytest.approx((1.0, 1.0))
    assert fit_barrier({1: 5.0}) == (0.0, 0.0) and fit_barrier({1: 5.0, 2: 3.0}) == (3.0, 0.0)
    assert fit_barrier({2: 9.0, 4: 1.0}) == (5.0, 0.0)  # noise that falls is no slope


def test_efficiency_counts_cores_and_not_workers_beyond_them():
    assert efficiency([1, 2, 4], [100.0, 190.0, 180.0], cores=2) == pytest.approx([1.0, 0.95, 0.9])


def test_numbers_of_workers_are_sorted_and_checked():
    assert scaling.numbers("4, 1,2,2") == (1, 2, 4)
    for words, said in (("1,two", "is not a list"), ("0,1", "from 1 to 156"), ("157", "from 1 to 156")):
        with pytest.raises(InputError, match=said):
            scaling.numbers(words)


def test_strong_scaling_keeps_the_batch_and_weak_scaling_the_shard(tmp_path):
    plan = scaling.jobs(scaling.Options(workers=(1, 3, 8), preset="tiny"), tmp_path / "corpus")
    assert [(j.workers, j.spheres, j.batch_size) for j in plan["strong"]] == [(1, 8, 16), (3, 8, 16), (8, 8, 16)]
    assert [(j.workers, j.spheres, j.batch_size) for j in plan["weak"]] == [(1, 1, 2), (3, 3, 6), (8, 8, 16)]
    with pytest.raises(InputError, match="8 workers are more than --spheres 4"):
        scaling.jobs(scaling.Options(workers=(1, 8), spheres=4), tmp_path)
    with pytest.raises(InputError, match="smaller than the 8 spheres"):
        scaling.jobs(scaling.Options(workers=(1, 8), batch_size=4), tmp_path)


@pytest.mark.bench
def test_a_small_run_writes_what_it_measured(tmp_path, capsys):
    options = scaling.Options(preset="minimal", dtype="fp32", workers=(1, 3), spheres=5, seconds=0.05, out=tmp_path)
    assert scaling.run(options) == 0
    result = json.loads((tmp_path / "scaling-minimal-fp32.json").read_text())
    strong, weak = result["points"]["strong"], result["points"]["weak"]
    assert [(p["workers"], p["spheres"], p["batch_size"]) for p in strong + weak] == [
        (1, 5, 10), (3, 5, 10), (1, 1, 2), (3, 3, 6),
    ]  # fmt: skip
    for point in strong + weak:
        tokens = point["batch_size"] * 8
        assert point["tokens_per_s"] == pytest.approx(tokens / point["step_s"])
        assert point["steps"] >= 1 and point["pss_bytes"] > 1e6 and point["barrier_s"] > 0
        busy = point["phases_s"]
        assert busy["compute"] > 0 and busy["gather"] > 0 and busy["update"] > 0 and busy["pack"] == 0
        assert sum(busy.values()) == pytest.approx(point["step_s"], rel=0.25)  # a worker's clock begins a bit later
    text = (tmp_path / "scaling-minimal-fp32.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "## A core for each worker: the model" in text and "Not measured:" in text
    if result["cores"] < 3:
        assert "**3 workers are more than the" in text

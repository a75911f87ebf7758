"""Weights are packed anew at the start of every step and evaluation, each unit once, by however many workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cllm_spheres.model import dtypes
from cllm_spheres.model.layout import Layout
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres import serving
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.node_zero import NodeZero
from cllm_spheres.training.metrics import Metrics
from tests.spheres import packed_server

ROOT = Path(__file__).parents[2]
WINDOWS = 3


@pytest.fixture
def node(corpus, monkeypatch):
    """node(workers, dtype): Node Zero with its spheres started, whose server knows the dtype "doubled"."""
    monkeypatch.setattr(dtypes, "rules", packed_server.rules)
    monkeypatch.setattr(serving, "MODULE", packed_server.__name__)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = []

    def make(workers, dtype="doubled"):
        job = Job(
            shape=packed_server.SHAPE, batch_size=7, spheres=7, workers=workers, seed=1, dtype=dtype,
            train=str(corpus / "train.bin"), val=str(corpus / "val.bin"), item_bytes=2, train_tokens=4000,
            val_tokens=400, num_windows=WINDOWS,
        )  # fmt: skip
        one = NodeZero(job)
        made.append(one)
        one.start()
        memory = one.memory
        memory.words(memory.regions.window_starts, WINDOWS)[:] = 0, 9, 30
        memory.words(memory.regions.window_lengths, WINDOWS)[:] = 8
        memory.doubles(memory.regions.rates, M.RING)[:] = 1e-3
        one.do(M.INITIALISE)
        one.set_position(0, 0)
        return one

    yield make
    for one in made:
        one.kill()


def packed(node):
    """The packed weights, and how often each unit was packed: the last one is of what is frozen."""
    start = node.memory.regions.packed
    counts = node.memory.words(start + 4 * packed_server.FLOATS, packed_server.UNITS + 1)
    return node.memory.floats(start, packed_server.FLOATS), counts.tolist()


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_every_step_and_evaluation_packs_the_weights_it_begins_with_and_nothing_else_packs(node, workers):
    one = node(workers)
    one.do(M.REHEARSE, 0, workers)
    assert packed(one)[1] == [0] * (packed_server.UNITS + 1)
    one.do(M.STEPS, 1, 5)
    before = one.memory.params.copy()
    one.do(M.STEPS, 5, 6)
    values, counts = packed(one)
    assert counts == [5] * packed_server.UNITS + [1]
    assert values.tobytes() == (2 * before).tobytes() != (2 * one.memory.params).tobytes()
    one.do(M.EVALUATE, 0, WINDOWS)
    values, counts = packed(one)
    assert counts == [6] * packed_server.UNITS + [1]
    assert values.tobytes() == (2 * one.memory.params).tobytes()


def test_packing_is_a_phase_of_its_own_in_the_metrics_only_where_there_is_any(node, tmp_path):
    lines = {}
    for dtype in ("doubled", "fp32"):
        one = node(2, dtype)
        one.do(M.STEPS, 1, 9)
        metrics = Metrics(tmp_path / dtype)
        metrics.start_clock()
        assert metrics.steps(one, 0) == 8
        lines[dtype] = (tmp_path / dtype).read_text().splitlines()
        pack_ns = one.memory.worker_words()[:2, M.W_PACK_NS]
        assert (pack_ns > 0).all() if dtype == "doubled" else not pack_ns.any()
        one.close()
    assert all('"pack_s":' in line for line in lines["doubled"])
    assert not any("pack_s" in line for line in lines["fp32"])


@pytest.mark.parametrize("workers", [2, 7])
def test_losses_and_weights_of_a_dtype_that_packs_do_not_depend_on_the_workers(node, workers):
    results = []
    for number in (1, workers):
        one = node(number)
        one.do(M.STEPS, 1, 9)
        one.do(M.EVALUATE, 0, WINDOWS)
        memory = one.memory
        losses = memory.ring_doubles()[:8, M.R_LOSS].tolist()
        windows = memory.doubles(memory.regions.window_losses, WINDOWS).tolist()
        results.append((losses, windows, memory.params.tobytes(), packed(one)[0].tobytes()))
        one.close()
    assert results[0] == results[1]
    assert np.isfinite(results[0][0] + results[0][1]).all()


def test_float32_has_no_packed_form_and_an_unknown_dtype_is_an_error():
    layout = Layout(packed_server.SHAPE)
    assert (dtypes.packing(layout, "fp32").size_bytes, dtypes.packing(layout, "fp32").units) == (0, 0)
    with pytest.raises(ValueError, match="no kernels for dtype 'fp8'"):
        dtypes.packing(layout, "fp8")

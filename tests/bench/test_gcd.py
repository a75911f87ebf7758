"""The benchmark of common divisors: its loops compute what they say, its ratios are right, and a small run."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from cllm_spheres_bench import gcd as benchmark
from cllm_spheres_bench import gcd_loops, machine
from cllm_spheres_bench.gcd_loops import PAIRS

from cllm_spheres.crystal.similarity import similarity


def test_every_loop_computes_all_of_its_pairs(rng):
    a, b = rng.integers(1, 1000, (2, 2 * PAIRS + 7))
    gcds = [math.gcd(*pair) for pair in zip(a.tolist(), b.tolist(), strict=True)]
    for loop in (gcd_loops.repeat_binary, gcd_loops.repeat_euclid):
        cursor = np.zeros(1, np.int64)
        assert loop(1, cursor, a, b) == sum(gcds[:PAIRS]) and cursor[0] == PAIRS
        assert loop(1, cursor, a, b) == sum(gcds[PAIRS : 2 * PAIRS]) and cursor[0] == 0
        assert loop(5, cursor, a, b) == 2 * sum(gcds[: 2 * PAIRS]) + sum(gcds[:PAIRS])
    alike = sum(similarity(x, y, 0.7, 0.3) for x, y in zip(a[:PAIRS], b[:PAIRS], strict=True))
    assert gcd_loops.repeat_similarity(1, np.zeros(1, np.int64), a, b) == alike


@pytest.mark.parametrize("d", [64, 128, 1024])
def test_the_dot_product_is_numpys(rng, d):
    table = rng.standard_normal((40, d), dtype=np.float32)
    a, b = rng.integers(0, 40, (2, PAIRS))
    expected = (table[a].astype(np.float64) * table[b]).sum()
    # sums of d and then of PAIRS standard normal products in float32: its last bit is 2e-7 of sums of about 700
    assert abs(gcd_loops.repeat_dots(1, np.zeros(1, np.int64), a, b, table) - expected) < 2e-5 * math.sqrt(PAIRS * d)


def test_every_matrix_is_of_all_pairs(monkeypatch):
    made = {}
    monkeypatch.setattr(benchmark, "repeat_matrix", lambda times, a, b, out: made.update({b.itemsize: (a, b, out)}))
    monkeypatch.setattr(benchmark, "repeat_rows", lambda times, count, out: made.update(rows=(count, out)))
    ways = benchmark.matrices(50_304, 300)
    for way in ways.values():
        way(1)
    for itemsize in (2, 4):
        a, b, out = made[itemsize]
        gcd_loops.repeat_matrix(2, a, b, out)
        assert (out == np.gcd.outer(a, b[:300].astype(np.int64))).all()
    count, out = made["rows"]
    gcd_loops.repeat_rows(1, count, out)
    assert (out == np.gcd(300, np.arange(1, 301))).all()  # of its last row


def test_a_ratio_above_1_says_that_the_gcd_is_faster():
    rate = benchmark.summed_up({"fast": machine.spread([1.0, 2.0, 4.0]), "slow": machine.spread([0.5])})
    pairs = dict.fromkeys(("binary gcd", "Euclid's gcd", "gcd and spiral"), rate["fast"])
    pairs |= {"dot of 64, in the cache": rate["slow"], "dot of 64, anywhere": rate["slow"]}
    matrix = dict.fromkeys(("gcd, 16 bits", "gcd, 31 bits", "gcd, by divisors", "numpy's gcd"), rate["slow"])
    matrix |= {"ours, 64": rate["fast"], "OpenBLAS, 64": rate["slow"], "numpy, 64": rate["slow"]}
    text = benchmark.report(
        machine.facts("a command")
        | {"repeats": 1, "seconds": 1, "dimensions": [64], "vocabulary": 9, "side": 4, "pairs": pairs, "matrix": matrix}
    )
    assert "| 64, anywhere | 2 (2 to 2) | 4.00 | 4.00 | 4.00 |" in text
    assert "| 64 | 0.5 (0.333 to 0.667) | 2 (2 to 2) | 2 (2 to 2) | 0.25 | 0.25 | 0.25 | 0.25 |" in text


def test_a_small_run_writes_its_tables_and_leaves_the_cores_as_they_were(tmp_path, capsys):
    before = os.sched_getaffinity(0)
    paths = benchmark.run(tmp_path, 2, 1e-4, "a command", dimensions=(64,), vocabulary=300, num_pairs=PAIRS, side=40)
    assert os.sched_getaffinity(0) == before
    found = json.loads(paths[0].read_text())
    rates = [*found["pairs"].values(), *found["matrix"].values()]
    assert len(rates) == 5 + 7 and all(0 < rate["min"] <= rate["median"] <= rate["max"] for rate in rates)
    assert paths[1].read_text() in capsys.readouterr().out and found["cores"] == len(before)


@pytest.mark.parametrize("words", [["--repeats", "0"], ["--seconds", "nan"], ["--what"]])
def test_what_cannot_be_measured_is_told(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gcd", *words])
    with pytest.raises(SystemExit) as left:
        benchmark.main()
    assert left.value.code == 2 and "gcd: error: " in capsys.readouterr().err


def test_a_folder_that_cannot_be_is_told_by_the_command():
    words = [sys.executable, "-m", "cllm_spheres_bench.gcd", "--out", "/proc/nowhere"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr

"""The benchmark of kernels alone: its lines, its counts, that its ways compute the same, its table, a small run."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from cllm_spheres_bench import kernel_cases, kernel_report, kernels, machine
from cllm_spheres_bench.kernel_cases import Product, attention_flops, head_flops, products
from cllm_spheres_bench.sizes import SIZES

from cllm_spheres.errors import InputError, RunFailed
from cllm_spheres.model.dtypes import usable
from cllm_spheres.model.shape import Shape
from tests.runs import command, command_here

HAS_BF16 = usable("bf16") == "bf16"
SMALL = Shape(vocab_size=10, block_size=6, layers=3, heads=2, width=4, ff_width=8)


def test_every_product_of_a_layer_and_the_head_is_there_with_its_shape():
    found = {p.name: (p.m, p.n, p.k) for p in products(SMALL, 12, 5)}
    assert found == {
        "qkv": (12, 12, 4), "qkv dx": (12, 4, 12), "qkv dw": (4, 12, 12),
        "projection": (12, 4, 4), "projection dx": (12, 4, 4), "projection dw": (4, 4, 12),
        "up": (12, 8, 4), "up dx": (12, 4, 8), "up dw": (4, 8, 12),
        "down": (12, 4, 8), "down dx": (12, 8, 4), "down dw": (8, 4, 12),
        "head logits": (5, 10, 4), "head dx": (5, 4, 10), "head dw": (10, 4, 5),
    }  # fmt: skip


def test_operations_are_those_counted_by_hand():
    assert Product("", 2, 3, 4, False, False).flops == 2 * 3 * 4 * 2
    # 6 x 6 scores of 2 x 2 products and as many for the values, two operations each, half of them hidden
    assert attention_flops(SMALL, sequences=1) == (36 * 4 + 36 * 4) * 2 // 2
    assert head_flops(SMALL, rows=5) == 3 * (5 * 10 * 4) * 2


@pytest.mark.parametrize("p", products(SIZES["S1"].shape, 32, 32), ids=lambda p: p.name)
def test_all_ways_to_a_product_give_the_same(p):
    ways, outputs = kernel_cases.product_candidates(p, None)
    assert set(ways) == set(outputs) == {"ours", "OpenBLAS", "numpy"}
    for name, way in ways.items():
        outputs[name].fill(np.nan)
        way(2)
    for found in outputs.values():
        # sums of up to 381 products of standard normal numbers, ~20, in float32: 1e-6 of that
        assert np.abs(found - outputs["numpy"]).max() < 1e-4


def test_the_lines_of_a_size_name_every_kernel_in_both_dtypes():
    lines = {(case.dtype, case.name) for case in kernels.cases_of(SIZES["S3"], None)}
    layer = {p.name for p in products(SIZES["S3"].shape, 256, 256)}
    both = layer | {"attention", "attention backward", "head, loss and gradients"}
    alone = {
        "layer norm", "layer norm backward", "GELU", "GELU backward", "softmax, cross-entropy", "gather of 2",
        "AdamW update",
    }  # fmt: skip
    expected = {("fp32", name) for name in both | alone}
    if HAS_BF16:
        expected |= {("bf16", name) for name in both | {"layer norm into tiles", "packing of the weights"}}
    assert lines == expected


def test_bytes_are_those_that_a_kernel_moves():
    lines = {case.name: case for case in kernels.cases_of(SIZES["S3"], None) if case.dtype == "fp32"}
    assert lines["layer norm"].sizes == "256 x 256" and lines["layer norm"].work == 2 * 4 * 256 * 256
    assert lines["GELU backward"].work == 3 * 4 * 256 * 1024
    # gradient, weights and two moments read, the last three written
    assert lines["AdamW update"].work == 7 * 4 * 5_820_416
    assert lines["gather of 2"].work == 2 * 4 * 5_820_416


def test_every_way_is_measured_as_often_and_its_rate_is_work_over_time():
    calls = {"a": 0, "b": 0}

    def way(name):
        def call(times):
            calls[name] += times
            time.sleep(1e-5 * min(times, 100))

        return call

    found = kernels.measure({name: way(name) for name in calls}, 1000, 1e-4, 3)
    assert all(len(found[name]["all"]) == 3 and found[name]["min"] > 0 for name in calls)
    assert min(calls.values()) > 3


def rates(**medians):
    return {name: machine.spread([value]) for name, value in medians.items()}


def result(*rows, torch="2.13.0"):
    return machine.facts("cllm-spheres bench kernels") | {
        "size": "S1", "describe": "small", "repeats": 5, "seconds": 0.03, "torch": torch, "rows": list(rows),
        "peaks": {"fp32": {"gflops": 200.0}}, "bandwidth_gb_per_s": {"read": 20.0, "triad": 16.0},
    }  # fmt: skip


def test_the_table_shows_rates_the_ratio_to_the_best_other_and_the_share_of_the_peak():
    row = {"table": "products", "dtype": "fp32", "name": "qkv", "sizes": "2 x 3 x 4", "work": 48}
    product = row | {"rates": rates(ours=150.0, OpenBLAS=120.0, numpy=90.0, torch=100.0)}
    other = row | {"table": "memory", "name": "GELU", "rates": rates(ours=8.0, numpy=2.0)}
    text = kernel_report.report({"S1": result(product, other)})
    cells = "| S1 | qkv | 2 x 3 x 4 | 150 (150 to 150) | 120 (120 to 120) | 90.0 (90.0 to 90.0) |"
    assert cells + " 100 (100 to 100) | **1.25** | 75% |" in text
    assert "| 8.0 (8.0 to 8.0) | 2.0 (2.0 to 2.0) | – | **4.00** | 50% |" in text
    assert "no bfloat16 arithmetic" in text and "PyTorch was not installed" not in text


def test_a_dtype_without_a_peak_or_another_has_neither_share_nor_ratio():
    row = {"table": "products", "dtype": "bf16", "name": "qkv", "sizes": "", "work": 48}
    text = kernel_report.report({"S1": result(row | {"rates": rates(multiply=900.0, project=800.0)}, torch=None)})
    assert "| 900 (900 to 900) | 800 (800 to 800) | – | – | – |" in text and "PyTorch was not installed" in text


@pytest.mark.bench
def test_a_run_of_the_smallest_size_writes_its_tables_and_keeps_other_sizes(tmp_path):
    other = result() | {"size": "S5"}
    (tmp_path / "kernels.json").write_text(json.dumps({"sizes": {"S5": other}}))
    words = "--sizes", "S1", "--repeats", "2", "--seconds", "0.001", "--out", tmp_path
    done = command("bench", "kernels", *words, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "kernels.json").read_text())["sizes"]
    assert list(found) == ["S1", "S5"] and found["S5"] == other
    rows = found["S1"]["rows"]
    assert [row["name"] for row in rows] == [case.name for case in kernels.cases_of(SIZES["S1"], None)]
    assert all(len(rate["all"]) == 2 and rate["min"] > 0 for row in rows for rate in row["rates"].values())
    text = (tmp_path / "kernels.md").read_text()
    assert "Matrix products, float32, GFLOP/s" in done.stdout and "| S1 | head dw | 381 x 64 x 32 |" in text
    assert ("Matrix products, bfloat16" in text) == HAS_BF16


def test_a_result_that_cannot_be_read_is_named_and_stays(tmp_path):
    path = tmp_path / "kernels.json"
    path.write_text("[]")
    with pytest.raises(InputError, match="move it away"):
        kernels.earlier(path)
    assert path.read_text() == "[]"


def test_a_measuring_process_that_fails_is_told():
    with pytest.raises(RunFailed, match="exit code 1"), kernels._measuring({"sizes": ["S7"]}) as lines:
        list(lines)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--sizes", "S7"], ["'S7'", "did you mean"]), (["--repeats", "0"], ["--repeats"]),
     (["--seconds", "0"], ["--seconds"])],
)  # fmt: skip
def test_what_is_not_possible_is_named(arguments, words, tmp_path):
    done = command_here("bench", "kernels", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and all(word in done.stderr for word in words)
    assert "Traceback" not in done.stderr

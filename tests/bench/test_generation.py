"""The comparison of generation: what a turn counts, and what the tables say."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cllm_spheres_bench import generation
from cllm_spheres_bench.generation import GGUF_DTYPES, LLAMA, MEMORY, OURS, TORCH, Side, memory_turn, numbers, our_turn
from cllm_spheres_bench.generation_report import report
from cllm_spheres_bench.sizes import Size

from cllm_spheres.errors import InputError
from cllm_spheres.text.cache import prepare_cached
from tests.inference.conftest import random_model
from tests.runs import text


@pytest.mark.parametrize(("texts", "threads"), [(1, 1), (3, 2)])
def test_a_turn_counts_the_tokens_that_were_written(texts, threads, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(generation.time, "perf_counter", lambda: float(next(ticks)))  # every look takes a second
    model = random_model(block_size=24)
    model.parameters["wte.weight"][model.tokenizer.eot] = 0  # no text ends early
    for tensor in ("ln_f.bias",):
        model.parameters[tensor][:] = 1
    seconds, steps = 50, 22  # a text of 24 positions: one was read, and one was written before the clock began
    per_s = our_turn(model, "fp32", threads, texts, seconds)
    # A look before and after each step, and one at the end: two texts are whole, a third is cut off.
    assert per_s == pytest.approx(texts * (2 * steps + 3) / (2 * (steps + 1) + 5), rel=0.1)


def test_reading_memory_gives_bytes_a_second():
    assert memory_turn(np.ones(100_000, np.float32), 2, 0.01) > 0


def side(name, dtype, threads, texts, found, weight_bytes=0):
    return Side("S2", name, dtype, threads, texts, lambda: 0.0, found, weight_bytes).record()


def test_the_tables_say_what_was_measured():
    sides = [
        side(MEMORY, "fp32", 1, 1, [39e9, 40e9, 41e9], 400_000_000),
        side(OURS, "fp32", 1, 1, [80.0, 90.0, 95.0], 400_000_000),
        side(OURS, "fp32", 1, 4, [200.0], 400_000_000),
        side(LLAMA, "fp32", 1, 1, [70.0]),
        side(TORCH, "fp32", 1, 1, [7.0]),
    ]
    facts = dict(machine="a CPU", cores=1, commit="abc", date="2026-01-01", command="bench generation")
    document = report({"facts": facts, "versions": {"torch": "2"}, "sides": json.loads(json.dumps(sides))})
    assert "| S2, fp32, 1 | memory | 100 |  | 40.0 GB/s | 100 % |" in document
    assert "| S2, fp32, 1 | cllm-spheres | 90 | 80 to 95 | 36.0 GB/s | 90 % |" in document
    assert "| S2, fp32, 1 | llama.cpp | 70 | 70 to 70 | 28.0 GB/s | 70 % |" in document
    assert "| S2, fp32, 1 | PyTorch without a cache | 7 | 7 to 7 |  |  |" in document
    assert "| S2, fp32, 1 | 90 | 200 |" in document


@pytest.mark.bench
def test_a_whole_comparison_is_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "text.txt").write_text(text(100))
    prepared = prepare_cached([tmp_path / "text.txt"], "byte")
    monkeypatch.setattr(generation, "prepare_text", lambda size: prepared)
    size = Size("S0", "tiny", "byte", 257)
    options = generation.Options(
        [size], list(GGUF_DTYPES), threads=(1,), texts=(1, 2), seconds=0.01, repeats=1, out=tmp_path
    )
    assert generation.run(options) == 0
    said = capsys.readouterr().out
    assert "llama.cpp is left out" in said and (tmp_path / "generation.md").read_text() in said
    sides = json.loads((tmp_path / "generation.json").read_text())["sides"]
    ours = [(s["dtype"], s["texts"]) for s in sides if s["name"] == OURS]
    assert ours == [("fp32", 1), ("fp32", 2), ("bf16", 1), ("bf16", 2)]
    assert all(s["per_s"]["median"] > 0 for s in sides)


@pytest.mark.parametrize("words", ["", "0", "1,x", "-1,2"])
def test_numbers_that_are_none_are_refused(words):
    with pytest.raises(InputError, match=r"--threads .*give numbers of 1 and above"):
        numbers(words, "--threads")

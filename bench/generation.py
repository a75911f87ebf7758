"""`cllm-spheres bench generation`: how fast the same model writes here, in llama.cpp and in PyTorch, in turn.

Each turn writes texts of up to a block's length from one token on, for some seconds. Beside the tokens a second stands
what memory gives: a buffer of the size of the weights is read in turn too, by as many threads, and a token needs all
weights once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cllm_spheres_bench.generation_report import LLAMA, MEMORY, OURS, TORCH, report
from cllm_spheres_bench.llama import Llama, load_library
from cllm_spheres_bench.machine import facts, installed, results_folder, spread, write_results
from cllm_spheres_bench.peer_torch import Order, Variant
from cllm_spheres_bench.sizes import Size, prepare_text

from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import InputError
from cllm_spheres.exchange.export import export
from cllm_spheres.inference.model import Model, load
from cllm_spheres.inference.options import Options as Writing
from cllm_spheres.inference.rules import strips_of
from cllm_spheres.model.arena import new_arena
from cllm_spheres.model.families import family_of
from cllm_spheres.model.initialise import initial_tables, initialise_block
from cllm_spheres.model.layout import Layout
from cllm_spheres.units import size as bytes_of

GGUF_DTYPES = {"fp32": "f32", "bf16": "bf16"}


@dataclass(frozen=True)
class Options:
    """What writes, and for how long."""

    sizes: list[Size]
    dtypes: list[str]
    threads: tuple[int, ...] = (1, 2)
    texts: tuple[int, ...] = (1, 4, 16, 32)
    seconds: float = 2.0
    repeats: int = 5
    llama: Path | None = None
    out: Path | None = None
    command: str = "cllm-spheres bench generation"


@dataclass
class Side:
    """One way to write a size's texts, and what its turns gave."""

    size: str
    name: str
    dtype: str
    threads: int
    texts: int
    turn: Callable[[], float]
    found: list[float] = field(default_factory=list)  # tokens/s; of memory bytes/s
    weight_bytes: int = 0  # read for each pass

    def record(self) -> dict[str, Any]:
        """As JSON's own types."""
        values = {name: value for name, value in vars(self).items() if name not in ("turn", "found")}
        return {**values, "per_s": spread(self.found)}


def make_run(size: Size, folder: Path) -> Path:
    """A run with the first weights of a training, and its tokenizer."""
    prepared, layout, config = prepare_text(size), Layout(size.shape), size.config
    params_P = np.empty(layout.size, np.float32)
    places, values = initial_tables(layout)
    for block in range(layout.num_blocks):
        initialise_block.call(
            params_P.ctypes.data, places.ctypes.data, values.ctypes.data, len(places), config.seed, block
        )
    run = folder / size.name
    run.mkdir()
    Store(run).save(
        0, layout.views(params_P), {}, {"layout": asdict(size.shape)},
        family_of(size.shape).files.config(size.shape, prepared.eot, 0.0),
        prepared.folder / "tokenizer.json",
    )  # fmt: skip
    return run


def our_turn(model: Model, dtype: str, threads: int, texts: int, seconds: float) -> float:
    """Tokens/s of so many texts at once, without the reading of their prompts."""
    options = Writing(tokens=model.shape.block_size - 1, temperature=0)
    tokens, took, first = 0, 0.0, 1
    while took < seconds:
        with model.writer(texts, dtype=dtype, threads=threads) as writer:
            for text in range(texts):
                writer.begin([(first + text) % model.tokenizer.eot], options)
            first += texts
            writer.step()
            began = time.perf_counter()
            while writer.busy and took + time.perf_counter() - began < seconds:
                tokens += sum(len(piece.tokens) for piece in writer.step())
            took += time.perf_counter() - began
    return tokens / took


def llama_turn(llama: Llama, block_size: int, seconds: float) -> float:
    """Tokens/s of one text after another."""
    tokens, took, first = 0, 0.0, 1
    while took < seconds:
        written = llama.greedy([first % llama.vocab_size], block_size - 1)
        next(written)
        began = time.perf_counter()
        for _ in written:
            tokens += 1
            if took + time.perf_counter() - began >= seconds:
                break
        took += time.perf_counter() - began
        written.close()
        first += 1
    return tokens / took


def memory_turn(buffer: np.ndarray, threads: int, seconds: float) -> float:
    """Bytes/s at which so many threads read a buffer of float32, each a part of its own."""
    from cllm_spheres_bench.kernel_loops import read_floats

    parts = np.array_split(buffer, threads)
    times = 0
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        while time.perf_counter() - began < seconds:
            list(pool.map(read_floats, parts))
            times += 1
        return times * buffer.nbytes / (time.perf_counter() - began)


@contextlib.contextmanager
def torch_turns(size: Size, weights: Path, folder: Path, threads: int, seconds: float) -> Iterator[Callable[[], float]]:
    """PyTorch in a process of its own; each call is a turn."""
    s = size.shape
    order = Order(
        variant=vars(Variant("fp32", "eager", "sdpa", "tanh", threads)), vocab_size=s.vocab_size,
        block_size=s.block_size, layers=s.layers, heads=s.heads, width=s.width, ff_width=s.ff_width, bias=s.bias,
        lr=0, min_lr=0, warmup=0, steps=0, beta1=0, beta2=0, weight_decay=0, clip=0, weights=str(weights), corpus="",
        starts="", metrics="", parent=os.getpid(),
    )  # fmt: skip
    path = folder / f"order-{size.name}-{threads}.json"
    order.write(path)
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cllm_spheres_bench.peer_generate", str(path)], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None

    def turn() -> float:
        process.stdin.write(f"{seconds}\n")
        process.stdin.flush()
        return float(json.loads(process.stdout.readline())["tokens_per_s"])

    try:
        yield turn
    finally:
        process.kill()
        process.communicate()


def sides_of(size: Size, options: Options, folder: Path, stack: contextlib.ExitStack) -> Iterator[Side]:
    """All ways to write a size's texts."""
    run = make_run(size, folder)
    model = load(run)
    (weights,) = run.glob("checkpoints/*/model.safetensors")
    matrices = sum(matrix.inputs * matrix.outputs for matrix in strips_of(model.shape, False)[0].values())
    for dtype in options.dtypes:
        weight_bytes = matrices * (2 if dtype == "bf16" else 4)
        buffer = new_arena(weight_bytes // 4)
        buffer[:] = 1
        for threads in options.threads:
            turn = partial(memory_turn, buffer, threads, options.seconds)
            yield Side(size.name, MEMORY, dtype, threads, 1, turn, weight_bytes=weight_bytes)
            for texts in options.texts:
                turn = partial(our_turn, model, dtype, threads, texts, options.seconds)
                yield Side(size.name, OURS, dtype, threads, texts, turn, weight_bytes=weight_bytes)
        if options.llama is not None:
            file = folder / f"{size.name}-{dtype}.gguf"
            export(run, "gguf", file, dtype=GGUF_DTYPES[dtype])
            library = load_library(options.llama)
            for threads in options.threads:
                llama = Llama(library, file, size.shape.block_size, threads)
                stack.callback(llama.close)
                turn = partial(llama_turn, llama, size.shape.block_size, options.seconds)
                yield Side(size.name, LLAMA, dtype, threads, 1, turn)
    if importlib.util.find_spec("torch") is not None:
        for threads in options.threads:
            turn = stack.enter_context(torch_turns(size, weights, folder, threads, options.seconds))
            yield Side(size.name, TORCH, "fp32", threads, 1, turn)


def run(options: Options) -> int:
    """Measure, print and write; the exit code."""
    out = results_folder(options.out)
    if options.llama is None:
        print("llama.cpp is left out: give --llama, the folder of the npm package @node-llama-cpp/linux-x64.")
    if importlib.util.find_spec("torch") is None:
        print("PyTorch is left out: pip install 'cllm-spheres[bench]'.")
    all_sides: list[Side] = []
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
            sides = list(sides_of(size, options, Path(name), stack))
            print(f"{size.name}: {size.describe()}; {len(sides)} sides, {options.repeats} turns each", flush=True)
            for _ in range(options.repeats):
                for side in sides:
                    side.found.append(side.turn())
            all_sides += sides
        records = [side.record() for side in all_sides]
        versions = {"torch": installed("torch"), "llama.cpp": options.llama is not None}
        result = {"facts": facts(options.command), "versions": versions, "sides": records}
        text = report(result)
        paths = write_results(out, "generation", result, text)
    print(text)
    print(f"Written: {paths[1]}, {paths[0]} ({bytes_of(paths[0].stat().st_size)})")
    return 0


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers between commas; InputError where one is none."""
    try:
        found = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise InputError(f"{option} {text!r}: give numbers of 1 and above between commas, such as 1,2.")
    return found

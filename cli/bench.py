"""`cllm-spheres bench ...`: one function a benchmark. What they measure with is loaded when one of them is called."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

bench = typer.Typer(
    help="Measure this machine: against PyTorch, by the number of workers, and kernel by kernel.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Out = Annotated[
    Path | None,
    typer.Option(help="Where the results go. Default: bench/results of a checkout, else the current folder."),
]


def _command() -> str:
    """As it was typed, for the head of a report."""
    return shlex.join(["cllm-spheres", *sys.argv[1:]])


def _measure(run: Callable[[Any], int], options: Any, left: str = "Nothing was written.") -> NoReturn:
    """Run a benchmark, and leave with its exit code. left: what is said where Ctrl+C ends it."""
    from cllm_spheres_cli.progress import interruptible

    with interruptible(left):
        raise typer.Exit(run(options))


def _words(text: str, option: str, known: tuple[str, ...]) -> list[str]:
    """Words between commas -> the words, each one known; InputError names the nearest."""
    from cllm_spheres.errors import InputError, nearest

    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    for word in words:
        if word not in known:
            raise InputError(f"{option}: there is no {word!r}: {nearest(word, known)}")
    if not words:
        raise InputError(f"{option} names none: known are {', '.join(known)}.")
    return words


@bench.command()
def peers(
    sizes: Annotated[str, typer.Option(help="Which models, of S1 to S5.")] = "S1,S2,S3,S4,S5",
    dtypes: Annotated[str, typer.Option(help="Arithmetic: fp32, bf16.")] = "fp32,bf16",
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.1, help="Length of a measured window.")] = 10.0,
    screen_seconds: Annotated[
        float, typer.Option(min=0.1, help="Length of a window while PyTorch's best variant is looked for.")
    ] = 3.0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Our worker processes. Default: the cores, at most the batch.")
    ] = None,
    spheres: Annotated[int | None, typer.Option(min=1, help="Our spheres. Default: as many as workers.")] = None,
    modes: Annotated[
        str, typer.Option(help="How PyTorch may run: eager, compile, max-autotune.")
    ] = "eager,compile,max-autotune",
    recompute: Annotated[
        str, typer.Option(help="What our side computes again to save memory, in turn: none, cheap, block.")
    ] = "none",
    out: Out = None,
) -> None:
    """Train the same models with cllm-spheres and with PyTorch, in turn, and print tokens/s, ratio and memory.

    PyTorch is an extra: pip install 'cllm-spheres\\[bench]'.
    """
    from cllm_spheres_bench import peers as comparison
    from cllm_spheres_bench.sizes import chosen_sizes

    from cllm_spheres.model.program import RECOMPUTE

    options = comparison.Options(
        sizes=chosen_sizes(sizes), dtypes=_words(dtypes, "--dtypes", comparison.DTYPES), repeats=repeats,
        seconds=seconds, screen_seconds=screen_seconds, workers=workers, spheres=spheres,
        modes=tuple(_words(modes, "--modes", comparison.MODES)),
        recompute=tuple(_words(recompute, "--recompute", RECOMPUTE)), out=out,
        command=_command(),
    )  # fmt: skip
    _measure(comparison.run, options, "What was measured until then is written.")


@bench.command()
def scaling(
    workers: Annotated[str, typer.Option(help="Numbers of workers.")] = "1,2,4,8,16,32,63",
    preset: Annotated[str, typer.Option(help="The model.")] = "medium",
    spheres: Annotated[
        int | None, typer.Option(min=1, help="Spheres of strong scaling. Default: the most workers.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences of strong scaling. Default: 2 a sphere.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.01, help="Length of a measurement, at least one step.")] = 5.0,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each measurement.")] = 1,
    dtype: Annotated[str, typer.Option(help="Arithmetic: auto, fp32 or bf16, as for train.")] = "auto",
    weak: Annotated[bool, typer.Option("--weak/--no-weak", help="Weak scaling too: a sphere for each worker.")] = True,
    out: Out = None,
) -> None:
    """Train with 1 to 63 workers: tokens/s, efficiency, time by phase, memory, barriers; and a model of more cores.

    The chart as a file is an extra: pip install 'cllm-spheres\\[plots]'.
    """
    from cllm_spheres_bench import scaling as benchmark

    options = benchmark.Options(
        preset=preset, workers=benchmark.numbers(workers), spheres=spheres, batch_size=batch_size, seconds=seconds,
        repeats=repeats, dtype=dtype, weak=weak, out=out, command=_command(),
    )  # fmt: skip
    _measure(benchmark.run, options)


@bench.command()
def kernels(
    sizes: Annotated[str, typer.Option(help="Which models, of S1 to S5.")] = "S1,S2,S3,S4,S5",
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each way to compute a kernel.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.0001, help="Length of a turn, at least one call.")] = 0.03,
    out: Out = None,
) -> None:
    """Time each kernel and matrix product alone, on one core, against numpy, OpenBLAS and PyTorch.

    Results of other sizes that are in the folder stay. PyTorch is an extra: pip install 'cllm-spheres\\[bench]'.
    """
    from cllm_spheres_bench import kernels as benchmark
    from cllm_spheres_bench.sizes import chosen_sizes

    options = benchmark.Options(
        sizes=chosen_sizes(sizes), repeats=repeats, seconds=seconds, out=out,
        command=_command(),
    )  # fmt: skip
    _measure(benchmark.run, options, "The sizes measured until then are written.")


@bench.command()
def generation(
    sizes: Annotated[str, typer.Option(help="Which models, of S1 to S5.")] = "S2,S3,S5",
    dtypes: Annotated[str, typer.Option(help="Of the weights: fp32, bf16.")] = "fp32,bf16",
    threads: Annotated[str, typer.Option(help="Numbers of threads.")] = "1,2",
    texts: Annotated[str, typer.Option(help="Numbers of texts that we write at once.")] = "1,4,16,32",
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each side.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="Length of a turn, at least one text.")] = 2.0,
    llama: Annotated[
        Path | None,
        typer.Option(help="The unpacked npm package @node-llama-cpp/linux-x64, to compare with llama.cpp."),
    ] = None,
    out: Out = None,
) -> None:
    """Write with the same models here, in llama.cpp and in PyTorch, in turn, beside what memory gives."""
    from cllm_spheres_bench import generation as benchmark
    from cllm_spheres_bench.sizes import chosen_sizes

    options = benchmark.Options(
        sizes=chosen_sizes(sizes), dtypes=_words(dtypes, "--dtypes", tuple(benchmark.GGUF_DTYPES)),
        threads=benchmark.numbers(threads, "--threads"), texts=benchmark.numbers(texts, "--texts"), seconds=seconds,
        repeats=repeats, llama=llama, out=out, command=_command(),
    )  # fmt: skip
    _measure(benchmark.run, options, "The sizes measured until then are written.")


@bench.command()
def faults(
    kills: Annotated[int, typer.Option(min=1, help="SIGKILLs, shared out among the numbers of workers.")] = 200,
    workers: Annotated[str, typer.Option(help="Numbers of workers.")] = "1,2,7,16",
    preset: Annotated[str, typer.Option(help="The model.")] = "small",
    steps: Annotated[int, typer.Option(min=8, help="Steps of a run; there are as many runs as the kills need.")] = 1000,
    seconds: Annotated[
        float | None, typer.Option(min=0, help="Mean time until the next kill. Default: 0.05; with --minutes 3.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Disturb one run for so long, and see that it does not grow.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of who is killed, and when.")] = 1,
    out: Out = None,
) -> None:
    """Kill processes of runs at random: the bits must be those of an undisturbed run. Prints how soon they recover."""
    from cllm_spheres_bench import faults as benchmark
    from cllm_spheres_bench.scaling import numbers

    options = benchmark.Options(
        kills=kills, minutes=minutes, every_s=seconds, workers=numbers(workers), preset=preset, steps=steps, seed=seed,
        out=out, command=_command(),
    )  # fmt: skip
    _measure(benchmark.run, options)


@bench.command()
def load(
    run: Annotated[
        Path | None, typer.Option(help="The run to serve. Default: a small model after a few steps.")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients at once.")] = 200,
    requests: Annotated[int, typer.Option(min=1, help="Requests of each client.")] = 10,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 64,
    bodies: Annotated[int, typer.Option(min=0, help="Bodies that are made wrong at random.")] = 10_000,
    slots: Annotated[int, typer.Option(min=1, help="Texts that the server writes at once.")] = 32,
    seed: Annotated[int, typer.Option(help="Of what is wrong, and when.")] = 1,
    out: Out = None,
) -> None:
    """Ask a server much and badly: every text must be right, nothing may leak. Prints throughput and latencies.

    The server is an extra: pip install 'cllm-spheres\\[web]'.
    """
    from cllm_spheres_bench import load as benchmark

    options = benchmark.Options(
        run=run, clients=clients, requests=requests, tokens=tokens, bodies=bodies, slots=slots, seed=seed, out=out,
        command=_command(),
    )  # fmt: skip
    _measure(benchmark.run, options)


@bench.command()
def crystal(
    text: Annotated[
        list[Path] | None, typer.Option(help="A text to train on besides the embedded corpus; may be repeated.")
    ] = None,
    embedded: Annotated[bool, typer.Option(help="Train on the embedded corpus.")] = True,
    only: Annotated[str, typer.Option(help="Parts: grid, final, cost; report: none anew.")] = "grid,final,cost",
    preset: Annotated[str, typer.Option(help="The model of the grid.")] = "small",
    final_preset: Annotated[str, typer.Option(help="The model of the final.")] = "medium",
    cost_presets: Annotated[str, typer.Option(help="The models whose steps are measured.")] = "small,medium",
    alphas: Annotated[str, typer.Option(help="Weights of the soft targets.")] = "0.05,0.1,0.3",
    inits: Annotated[str, typer.Option(help="How embeddings begin in the grid: gpt2, lattice.")] = "gpt2,lattice",
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="Seeds of the grid.")] = 5,
    final_seeds: Annotated[int, typer.Option(min=1, max=1000, help="Seeds of the final.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a run.")] = 1000,
    eval_tokens: Annotated[int, typer.Option(min=1, help="Validation tokens, at ten places of a run.")] = 100_000,
    dtype: Annotated[str, typer.Option(help="Arithmetic of the runs: auto, fp32 or bf16.")] = "auto",
    rounds: Annotated[
        int, typer.Option(min=0, help="Trainings with each loss, for the cost of a step; 0: of its arithmetic alone.")
    ] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="Length of each, and of each loss's arithmetic.")] = 6.0,
    workers: Annotated[int | None, typer.Option(min=1, help="Worker processes. They change no bit.")] = None,
    work: Annotated[Path, typer.Option(help="Where runs lie until they are done.")] = Path("runs/bench-crystal"),
    out: Out = None,
) -> None:
    """Train with the crystalline loss, the lattice, and their controls; say what each is worth, with intervals.

    The default takes an hour or more. What is done is kept: the same command goes on. Pictures are an extra:
    pip install 'cllm-spheres\\[plots]'.
    """
    from cllm_spheres_bench import crystal as benchmark
    from cllm_spheres_bench.crystal_grid import INITS

    from cllm_spheres.config import PRESETS

    parts = _words(only, "--only", (*benchmark.STAGES, "report"))
    options = benchmark.Options(
        texts=tuple(text or ()), embedded=embedded, only=tuple(part for part in parts if part != "report"),
        preset=preset, final_preset=final_preset, alphas=benchmark.alphas_of(alphas), seeds=seeds,
        inits=tuple(_words(inits, "--inits", INITS)),
        cost_presets=tuple(_words(cost_presets, "--cost-presets", tuple(PRESETS))), final_seeds=final_seeds,
        steps=steps, eval_tokens=eval_tokens, dtype=_words(dtype, "--dtype", ("auto", "fp32", "bf16"))[0],
        rounds=rounds, seconds=seconds, workers=workers, work=work, out=out,
        command=benchmark.without_folders(["cllm-spheres", *sys.argv[1:]]),
    )  # fmt: skip
    _measure(benchmark.run, options, "What is done is kept; the same command goes on.")

"""`cllm-spheres eval`: a run and a text -> loss, perplexity, bits per byte and accuracy, as a table or as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from cllm_spheres_cli.options import CheckpointName, NewestRun, newest

if TYPE_CHECKING:
    from cllm_spheres.training.score import Score


def evaluate(
    run: NewestRun = None,
    data: Annotated[
        Path | None,
        typer.Argument(
            help="A file or folder of text, or a prepared folder, whose validation part is taken. Default: the"
            " validation part of the run's own data.",
            metavar="DATA",
        ),
    ] = None,
    checkpoint: CheckpointName = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next, 1 to the window. Default: half a window.")
    ] = None,
    block_size: Annotated[int | None, typer.Option(help="Tokens of a window. Default: the model's block.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Score so many tokens at the beginning instead.")] = None,
    whole: Annotated[bool, typer.Option("--all", help="Score every token but the first.")] = False,
    dtype: Annotated[
        str,
        typer.Option(help="What is computed in. auto: what the run was trained in.", metavar="fp32|bf16|auto"),
    ] = "auto",
    workers: Annotated[
        int | None, typer.Option(help="Processes; their number changes no bit. Default: one a core.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """Say how well a trained model predicts a text.

    As many tokens are scored as in an evaluation of the training, in windows evenly spread over the text; with --all
    each but the first, once.
    """
    from cllm_spheres_cli.progress import interruptible, progress_of
    from rich.console import Console

    from cllm_spheres.training.score import score

    run, errors = newest(run), Console(stderr=True)

    def tell(text: str) -> None:
        errors.print(text, markup=False, highlight=False, soft_wrap=True)

    with interruptible("Nothing was evaluated."), progress_of(errors) as progress:
        result = score(
            run, data, checkpoint=checkpoint, stride=stride, block_size=block_size, workers=workers, dtype=dtype,
            max_tokens=max_tokens, whole=whole, progress=progress, tell=tell,
        )  # fmt: skip
    if as_json:
        values = {name: None if value == math.inf else value for name, value in asdict(result).items()}
        print(json.dumps(values, indent=1, allow_nan=False))
    else:
        _show(result)


def _show(result: Score) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    from cllm_spheres.units import duration, plural

    what = "the validation part of " if result.part == "val" else ""
    table = Table()
    columns = {
        "tokens": f"{result.tokens:,}",
        "windows": f"{result.windows:,}",
        "loss": f"{result.loss:.4f}",
        "perplexity": f"{result.perplexity:,.2f}",
        "bits/byte": "-" if result.bits_per_byte is None else f"{result.bits_per_byte:.4f}",
        "accuracy": f"{100 * result.accuracy:.2f} %",
        "tokens/s": f"{result.tokens_per_s:,.0f}",
    }
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row(*columns.values())
    console = Console()
    title = f"{result.run}, step {result.step:,}, on {what}{result.data}"
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    lines = [
        f"Windows of {plural(result.block_size, 'token')}, {result.stride:,} apart, in {result.dtype}; "
        f"{plural(result.workers, 'worker')}, {result.seconds:.1f} s."
    ]
    if result.unigram_loss is not None and result.bigram_loss is not None:
        lines.append(
            f"Counting alone reaches {result.unigram_loss:.4f} (unigrams), {result.bigram_loss:.4f} (bigrams)."
        )
    if result.tokens < result.text_tokens:
        left_s = result.text_tokens / result.tokens_per_s
        lines.append(
            f"These are {result.tokens:,} of {result.text_tokens:,} tokens. All of them: --all, about"
            f" {duration(left_s)}."
        )
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

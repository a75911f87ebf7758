"""`cllm-spheres generate`: a run and a prompt -> text, as it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def generate(
    run: Annotated[Path | None, typer.Argument(help="The folder of a run. Default: the newest in runs/.")] = None,
    prompt: Annotated[str, typer.Option(help="The text to go on from. Default: an end of text.")] = "",
    tokens: Annotated[int, typer.Option(help="How many tokens to write; an end of text stops before.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy; 1 samples what the model believes.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest tokens that reach this probability.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 1337,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="best, last, or a step. Default: best, where validation found one.", metavar="best|last|STEP"
        ),
    ] = None,
) -> None:
    """Let a trained model write."""
    import sys

    from cllm_spheres.inference.model import load, newest_run

    model = load(run or newest_run(Path("runs")), checkpoint)
    stream = model.stream(prompt, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    try:
        sys.stdout.write(prompt)
        for piece in stream:
            sys.stdout.write(_harmless(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print()
        raise typer.Exit(130) from None
    print()


def _harmless(text: str) -> str:
    """Without the control characters that would command a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)

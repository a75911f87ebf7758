"""`cllm-spheres import`: a GPT-2 as Hugging Face keeps it -> a run that writes, and that can be trained further."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from cllm_spheres_cli.own_name import own_name


def import_(
    folder: Annotated[
        Path,
        typer.Argument(help="A folder with config.json, safetensors weights and a tokenizer.", metavar="HF_FOLDER"),
    ],
    run: Annotated[Path, typer.Argument(help="The folder of the run to make.")],
) -> None:
    """Make a run of a GPT-2 that Hugging Face's transformers has saved."""
    import sys

    from cllm_spheres_cli.progress import interruptible

    from cllm_spheres.exchange.importing import import_model
    from cllm_spheres.model.layout import Layout

    with interruptible("Nothing was imported."):
        print(f"Importing {folder} ...", file=sys.stderr)
        source = import_model(folder, run)
    shape = source.shape
    print(
        f"{run}: {Layout(shape).num_parameters:,} parameters, {shape.layers} layers, width {shape.width},"
        f" {shape.heads} heads, block {shape.block_size:,}, vocabulary {shape.vocab_size:,}."
    )
    for note in source.notes:
        print(note)
    name = shlex.quote(str(run))
    print(f"Let it write: {own_name()} generate {name}\nTrain it further: {own_name()} train DATA --from {name}")

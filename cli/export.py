"""`cllm-spheres export`: a run -> a folder for Hugging Face's transformers, or a file for llama.cpp."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from cllm_spheres_cli.options import CheckpointName, NewestRun, newest


def export(
    run: NewestRun = None,
    target: Annotated[
        Path | None,
        typer.Argument(
            help="The folder (hf) or file (gguf) to write. Alone, it is of the newest run.",
            metavar="TARGET",
            show_default=False,
        ),
    ] = None,
    to: Annotated[
        str, typer.Option(help="hf: for Hugging Face's transformers; gguf: for llama.cpp.", metavar="hf|gguf")
    ] = ...,  # type: ignore[assignment]
    dtype: Annotated[
        str, typer.Option(help="How the weights are stored; q8_0 and q4_0 for gguf.", metavar="f32|f16|bf16|q8_0|q4_0")
    ] = "f32",
    checkpoint: CheckpointName = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an export that stands there.")] = False,
) -> None:
    """Write a trained model in the form that other tools read.

    Token ids and logits there are those of this package.
    """
    import sys

    from cllm_spheres_cli.progress import interruptible

    from cllm_spheres.errors import InputError
    from cllm_spheres.exchange.export import export as write
    from cllm_spheres.units import plural, size

    if target is None:
        run, target = None, run
    if target is None or (run is None and (target / "checkpoints").exists()):
        raise InputError("The target is missing, what shall be written: cllm-spheres export RUN TARGET --to hf|gguf")
    run = newest(run)
    with interruptible("Nothing was written."):
        print(f"Exporting {run} ...", file=sys.stderr)
        exported = write(run, to, target, dtype=dtype, which=checkpoint, force=force)
    files, source = exported.files, exported.source
    print(
        f"{target}: step {source.checkpoint.step:,} of {run} as {dtype}, {plural(len(files), 'file')},"
        f" {size(sum(files.values()))}: {', '.join(sorted(files))}."
    )
    for note in exported.notes:
        print(note)
    if to == "hf":
        most = max(1, source.shape.block_size - 1)
        print(
            "Next, in Python:\n"
            "  from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            f"  model, tokenizer = (kind.from_pretrained({str(target)!r}) for kind in (AutoModelForCausalLM,"
            " AutoTokenizer))\n"
            f"  print(tokenizer.decode(model.generate(do_sample=True, max_new_tokens={most})[0]))"
        )
    else:
        print(f'Next: llama-completion -m {shlex.quote(str(target))} -p "..."')

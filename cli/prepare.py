"""`cllm-spheres prepare`: text of any kind -> a prepared folder."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from cllm_spheres_cli.own_name import own_name


def prepare(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Files and folders of text; none: the source text of Python's standard library.",
            metavar="PATH...",
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write; a prepared folder there is replaced.")] = ...,  # type: ignore[assignment]
    tokenizer: Annotated[
        str | None, typer.Option(help="byte, char, word or bpe. Default: bpe.", show_default=False)
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(help="Vocabulary of bpe (default 1024) or word (default: every word, at most 65,536)."),
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", help="Take the tokenizer of a run, or of a folder of Hugging Face's.", metavar="FOLDER"),
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the text kept for validation.")] = 0.1,
    processes: Annotated[
        int | None, typer.Option(help="Default: every usable core. The output does not depend on it.")
    ] = None,
) -> None:
    """Turn text into tokens on disk, for `cllm-spheres train DIR`.

    Reads text in any common encoding, html, .jsonl with texts or dialogues, gz,
    and with the extra `documents` PDF and DOCX, whatever the files are called.
    Skips hidden and binary files and exact duplicates, and says which.
    """
    from cllm_spheres_cli.progress import interruptible, progress_of
    from rich.console import Console

    from cllm_spheres.text.prepare import prepare as prepare_text
    from cllm_spheres.text.report import left_out_lines
    from cllm_spheres.units import plural

    given = None
    if from_ is not None:
        from cllm_spheres.errors import InputError
        from cllm_spheres.exchange.source import open_source

        if tokenizer is not None or vocab_size is not None:
            raise InputError("--from takes the tokenizer as it is: leave --tokenizer and --vocab-size out.")
        source = open_source(from_)
        given, tokenizer, vocab_size = source.tokenizer_json, source.tokenizer.kind, source.tokenizer.vocab_size
    console, name = Console(), shlex.quote(str(out))
    with interruptible("Nothing was written."), progress_of(console) as progress:
        prepared = prepare_text(
            paths or None,
            out,
            tokenizer=tokenizer or "bpe",
            vocab_size=vocab_size,
            val_fraction=val_fraction,
            processes=processes,
            progress=progress,
            given=given,
        )
    manifest = prepared.manifest
    console.print(
        f"{out}: {plural(manifest['documents'], 'document')}, {manifest['bytes']:,} bytes, "
        f"{manifest['tokens']:,} tokens; "
        f"{manifest['tokenizer']} with a vocabulary of {manifest['vocab_size']:,}, "
        f"{manifest['bytes_per_token']:.2f} bytes a token.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    lines = [f"For validation: {prepared.share_text()}.", prepared.share_warning(), *manifest["notes"]]
    lines += [f"Skipped: {line}" for line in left_out_lines(manifest["left_out"])]
    if manifest["left_out"]:
        lines.append(f"All that was skipped: {own_name()} data {name} --files --skipped")
    for line in [*filter(None, lines), f"Next: {own_name()} train {name}"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

"""`cllm-spheres data`: what is in a prepared folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.text import Text

    from cllm_spheres.text.tokenizer import Tokenizer

_SAMPLES = 3
_SAMPLE_TOKENS = 80


def data(
    folder: Annotated[Path, typer.Argument(help="A prepared folder.", metavar="DIR")],
) -> None:
    """Show the counts, the vocabulary and samples of a prepared folder, and check its files."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cllm_spheres.text.files import describe_skipped
    from cllm_spheres.text.prepared import Prepared

    console = Console()
    prepared = Prepared.open(folder)
    prepared.verify()
    manifest = prepared.manifest
    table = Table(title=Text(str(folder)), title_justify="left")
    table.add_column("")
    for name in ("documents", "bytes", "tokens", "bytes/token"):
        table.add_column(name, justify="right")
    for name, part in (("train", manifest["train"]), ("val", manifest["val"]), ("both", manifest)):
        ratio = f"{part['bytes'] / part['tokens']:.3f}" if part["tokens"] else "-"
        table.add_row(name, *(f"{part[key]:,}" for key in ("documents", "bytes", "tokens")), ratio)
    console.print(table)
    skipped = describe_skipped(manifest["skipped"])
    vocabulary = f"vocabulary {prepared.vocab_size:,}, end of text {prepared.eot}"
    facts = {
        "sources": ", ".join(manifest["sources"]),
        "tokenizer": f"{manifest['tokenizer']}, {vocabulary}",
        "validation": prepared.share_text(),
        "skipped": ", ".join(skipped) or "nothing",
        "files": f"{manifest['dtype']}, sha256 as in the manifest, data {prepared.fingerprint[:16]}",
    }
    if notes := [*manifest["notes"], *filter(None, [prepared.share_warning()])]:
        facts["notes"] = " ".join(notes)
    for name, fact in facts.items():
        console.print(Text.assemble((f"{name:10} ", "bold"), fact), soft_wrap=True)
    for part, ids in (("train", prepared.train), ("val", prepared.val)):
        for i in range(_SAMPLES if part == "train" else 1):
            start = len(ids) * i // _SAMPLES
            sample = ids[start : start + _SAMPLE_TOKENS].tolist()
            if sample:
                console.rule(Text(f"{part}, token {start:,}"), align="left", characters="-")
                console.print(_shown(prepared.tokenizer, sample), soft_wrap=True)


def _shown(tokenizer: Tokenizer, sample: list[int]) -> Text:
    """The text of a sample; end of text as a line of its own, control characters made harmless."""
    from rich.text import Text

    pieces: list[list[int]] = [[]]
    for token in sample:
        if token == tokenizer.eot:
            pieces.append([])
        else:
            pieces[-1].append(token)
    text = "\n<end of text>\n".join(map(tokenizer.decode, pieces))
    return Text("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text))

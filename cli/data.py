"""`cllm-spheres data`: what is in a prepared folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.text import Text

    from cllm_spheres.text.tokenizer import Tokenizer

_SAMPLES = 3
_SAMPLE_TOKENS = 80


def data(
    folder: Annotated[Path, typer.Argument(help="A prepared folder.", metavar="DIR")],
    files: Annotated[bool, typer.Option("--files", help="Show what became of each file instead.")] = False,
    skipped: Annotated[bool, typer.Option("--skipped", help="With --files: only those that were left out.")] = False,
) -> None:
    """Show the counts, the vocabulary and samples of a prepared folder, and check its files."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from cllm_spheres.text.files import describe_skipped
    from cllm_spheres.text.prepared import Prepared

    console = Console()
    prepared = Prepared.open(folder)
    if files or skipped:
        for record in prepared.report():
            if not skipped or record.get("reason") or record.get("skipped"):
                print(_line(record))
        return
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
    left_out = describe_skipped(manifest["skipped"])
    vocabulary = f"vocabulary {prepared.vocab_size:,}, end of text {prepared.eot}"
    facts = {
        "sources": ", ".join(manifest["sources"]),
        "tokenizer": f"{manifest['tokenizer']}, {vocabulary}",
        "validation": prepared.share_text(),
        "skipped": ", ".join(left_out) or "nothing",
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


def _line(record: dict[str, Any]) -> str:
    """part, tokens, bytes, kind, encoding and path of a file, and what was left out of it."""
    from cllm_spheres.text.files import describe_skipped

    path, of = (
        "".join(c if c.isprintable() else ascii(c)[1:-1] for c in record.get(name, "")) for name in ("path", "of")
    )
    what = f"{record.get('kind', '-')}, {record['encoding']}" if record.get("encoding") else record.get("kind", "-")
    if reason := record.get("reason"):
        return f"{'skipped':>7} {reason:>14} {record['bytes']:>13,}  {what}  {path}" + (f"  (of {of})" if of else "")
    left_out = describe_skipped(record.get("skipped", {}))
    if lost := record.get("lost"):
        left_out.append(f"{lost:,} bytes became U+FFFD")
    if fields := record.get("fields"):
        left_out.append(f"no known field: {', '.join(fields)}")
    more = f"  ({'; '.join(left_out)})" if left_out else ""
    return f"{record.get('part', '-'):>7} {record.get('tokens', 0):>14,} {record['bytes']:>13,}  {what}  {path}{more}"


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

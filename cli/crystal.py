"""`cllm-spheres crystal`: the tokens of a corpus on Ulam's spiral, their neighbours, the 12 groups, similarities."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cllm_spheres_cli.crystal_corpus import Corpus

    from cllm_spheres.text.prepared import Prepared

VIEWS = ("spiral", "neighbours", "groups", "matrix")
SUFFIXES = (".png", ".svg")


def crystal(
    data: Annotated[
        Path | None,
        typer.Argument(
            help="A prepared folder, or text as in `train`. Default: the source text of Python's standard library.",
            metavar="DATA",
        ),
    ] = None,
    show: Annotated[
        str | None,
        typer.Option(help="Default: spiral, or neighbours of a --token.", metavar="|".join(VIEWS), show_default=False),
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="Whose neighbours: a token's text, as it is shown, or its id.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help="Numbers on the spiral, neighbours, tokens of a group or of the matrix. Default: what fits."),
    ] = None,
    gcd_weight: Annotated[
        float | None, typer.Option(help="Of the common divisor in a similarity. Default: 0.7.", show_default=False)
    ] = None,
    ulam_weight: Annotated[
        float | None, typer.Option(help="Of the distance on the spiral. Default: 0.3.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A picture instead of text, *.png or *.svg.", metavar="FILE", show_default=False)
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Whose tokenizer prepares text. Default: small.", show_default=False)
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="byte, char, word or bpe.", show_default=False)] = None,
    vocab_size: Annotated[int | None, typer.Option(help="Of bpe or word.", show_default=False)] = None,
) -> None:
    """Show the crystal: what primes, Ulam's spiral and common divisors make of a corpus's tokens.

    A token's number is its rank by frequency + 1. docs/crystal.md says what that
    is worth for a language model. Pictures are an extra:
    pip install 'cllm-spheres\\[plots]'.
    """
    from cllm_spheres_cli import crystal_terminal as terminal
    from cllm_spheres_cli.crystal_corpus import Corpus

    from cllm_spheres.crystal.similarity import GCD_WEIGHT, ULAM_WEIGHT
    from cllm_spheres.errors import InputError, nearest, shown

    show = show or ("spiral" if token is None else "neighbours")
    if show not in VIEWS:
        raise InputError(f"--show cannot be {shown(show)}: {nearest(show, VIEWS)}")
    weighs = show in ("neighbours", "matrix")
    for name, given, used in (
        ("--token", token, show == "neighbours"), ("--gcd-weight", gcd_weight, weighs),
        ("--ulam-weight", ulam_weight, weighs),
    ):  # fmt: skip
        if given is not None and not used:
            raise InputError(f"--show {show} has no use for {name}: leave it out.")
    if show == "neighbours" and token is None:
        raise InputError("--show neighbours needs --token: whose? Give its text or its id.")
    if out is not None:
        _check_picture(out)
    weights = (
        GCD_WEIGHT if gcd_weight is None else gcd_weight,
        ULAM_WEIGHT if ulam_weight is None else ulam_weight,
    )
    corpus = Corpus.of(_prepared(data, {"preset": preset, "tokenizer": tokenizer, "vocab_size": vocab_size}))
    number = None if token is None else corpus.find(token)
    _check_count(show, count, corpus)
    if out is not None:
        from cllm_spheres_cli import crystal_picture as picture

        picture.write(out, picture.FIGURES[show](corpus, count, number, *weights))
        typer.echo(f"Wrote {out}.")
    else:
        terminal.SHOWN[show](corpus, count, number, *weights)


def _prepared(data: Path | None, options: dict[str, str | int | None]) -> Prepared:
    """The corpus as `train` would prepare it; of a run what it is trained on."""
    from cllm_spheres_cli.progress import interruptible, progress_of
    from rich.console import Console

    from cllm_spheres.config import flag, merge
    from cllm_spheres.errors import InputError
    from cllm_spheres.text.embedded import minimal_text
    from cllm_spheres.text.prepared import Prepared
    from cllm_spheres.training.folder import read_config
    from cllm_spheres.training.session import prepare_data

    config, given = merge(options)
    if data is not None and (data / "config.toml").is_file():
        where = read_config(data)[1]["data"]
        if given:
            raise InputError(f"{data} is a run, whose text is prepared already: leave {flag(min(given))} out.")
        return Prepared.open(where)
    text = minimal_text() if data is None and config.preset == "minimal" else data
    with interruptible("Nothing was shown."), progress_of(Console(stderr=True)) as progress:
        return prepare_data(text, config.tokenizer, config.vocab_size, given, progress)


def _check_count(show: str, count: int | None, corpus: Corpus) -> None:
    from cllm_spheres.errors import InputError

    if show == "neighbours" and corpus.size < 2:
        raise InputError("A vocabulary of 1 has no neighbours: the crystal needs at least 2 tokens.")
    largest = corpus.size - 1 if show == "neighbours" else corpus.size
    if count is not None and not 1 <= count <= largest:
        raise InputError(
            f"--count {count:,} is not possible for --show {show}: give 1 to {largest:,} with a vocabulary of "
            f"{corpus.size:,}."
        )


def _check_picture(path: Path) -> None:
    """InputError where there is no matplotlib, or the file cannot be a picture."""
    from cllm_spheres.errors import InputError, shown

    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"--out {shown(str(path))} ends neither in .png nor in .svg: which picture shall it be?")
    try:
        wrong = "it is" if path.is_dir() else None if path.parent.is_dir() else f"{path.parent} is not"
    except OSError as error:
        raise InputError(f"Cannot write {shown(str(path))}: {error.strerror}.") from None
    if wrong:
        raise InputError(f"Cannot write {path}: {wrong} a folder.")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError("A picture needs matplotlib. Install it: pip install 'cllm-spheres[plots]'") from None

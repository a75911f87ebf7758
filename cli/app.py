"""argv -> one command. Each command stands in a module of its own, named like it."""

from __future__ import annotations

import contextlib
import errno
import sys
from typing import Annotated

import typer
from cllm_spheres_cli.bench import bench
from cllm_spheres_cli.cache import cache
from cllm_spheres_cli.chat import chat
from cllm_spheres_cli.crystal import crystal
from cllm_spheres_cli.data import data
from cllm_spheres_cli.doctor import doctor
from cllm_spheres_cli.eval import evaluate
from cllm_spheres_cli.export import export
from cllm_spheres_cli.generate import generate
from cllm_spheres_cli.import_ import import_
from cllm_spheres_cli.model import model
from cllm_spheres_cli.prepare import prepare
from cllm_spheres_cli.prune import prune
from cllm_spheres_cli.runs import runs
from cllm_spheres_cli.scale import scale
from cllm_spheres_cli.serve import serve
from cllm_spheres_cli.train import TrainCommand, train
from cllm_spheres_cli.watch import watch

from cllm_spheres.errors import SpheresError

app = typer.Typer(
    name="cllm-spheres",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from cllm_spheres import __version__

        print(f"cllm-spheres {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version, and leave.")
    ] = False,
) -> None:
    """Train a small GPT on your own text, on every core of a CPU server, and let it write."""


app.command(cls=TrainCommand)(train)
for command in (scale, watch, runs, prune, generate, chat, serve, export, prepare, data, crystal, model, doctor, cache):
    app.command()(command)
app.command("eval")(evaluate)
app.command("import")(import_)
app.add_typer(bench, name="bench")


def run() -> None:
    """The console script: 0, 1 for a failed run, 2 for bad input, 128 + signal for an interrupted run."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):  # it is closed, or none of Python's own
            stream.reconfigure(errors="backslashreplace")  # a name or a text that is not UTF-8 is shown all the same
    try:
        app()
    except SpheresError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EPIPE):
            raise
        sys.stdout = None  # what it still holds cannot be written either
        print(f"The output could not be written: {error.strerror}.", file=sys.stderr)
        sys.exit(1)

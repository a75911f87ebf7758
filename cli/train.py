"""`cllm-spheres train`: text in, a trained run out. Its options are the fields of `Config`, with their help."""

import inspect
import shlex
import types
import typing
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from cllm_spheres_cli.options import newest
from cllm_spheres_cli.own_name import own_name
from typer.core import TyperCommand

from cllm_spheres.config import PRESETS, Config, flag

MOST_METAVAR = 20  # characters
AUTO = "--resume-auto"  # what `--resume auto` becomes
MAIN = "Options"  # typer's name of the panel that comes first
# What a newcomer needs, then what shapes a model and its learning, then what is needed seldom: the order of --help.
PANELS = {
    MAIN: ("preset", "run", "steps", "epochs", "resume", "workers", "from_", "config", "plain"),
    "Text": ("tokenizer", "vocab_size"),
    "Model": ("block_size", "layers", "heads", "width", "ff_width", "bias", "dropout", "init"),
    "Learning": (
        "batch_size", "lr", "min_lr", "warmup", "schedule", "optimizer", "beta1", "beta2", "weight_decay", "clip",
        "on_nonfinite",
    ),
    "Evaluation and checkpoints": ("eval_every", "eval_tokens", "save_every", "keep", "stop_at", "early_stop"),
    "Exactness and speed": ("spheres", "seed", "dtype", "recompute", "exact", "profile"),
    "Loss": ("loss", "alpha", "neighbours", "neighbour_temperature", "gcd_weight", "ulam_weight"),
    "Faults on purpose": ("fault",),
}  # fmt: skip


def _option(name: str) -> inspect.Parameter:
    """The command-line option of a field of Config; unset is None, so that presets and files can decide."""
    field = Config.model_fields[name]
    annotation: Any = field.annotation
    words = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    metavar = None
    choices = list(PRESETS) if name == "preset" else words if typing.get_origin(annotation) is typing.Literal else []
    if typing.get_origin(annotation) is typing.Literal:
        annotation, metavar = str, "|".join(words)
        if len(metavar) > MOST_METAVAR:  # its help names them, or the table would not fit 80 columns
            metavar = "NAME"
    elif words:
        annotation = words[0]
    elif annotation is bool:
        metavar = ""
    text = field.description or ""
    if field.default is not None and name not in ("preset", "bias"):
        text += f" Default: {field.default}, or the preset's." if _varies(name) else f" Default: {field.default}."
    flags = [f"{flag(name)}/--no-{name}"] if annotation is bool else [flag(name)]
    option = typer.Option(*flags, help=text, metavar=metavar, show_default=False, autocompletion=_beginning(choices))
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation | None, option]
    )


class TrainCommand(TyperCommand):
    """Lets --resume stand alone or take the word auto; an option of typer takes a value always or never."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:
        words: list[str] = []
        for word in args:
            if word == "auto" and words[-1:] == ["--resume"]:
                words[-1] = AUTO
            else:
                words.append(AUTO if word == "--resume=auto" else word)
        return super().parse_args(ctx, words)


def _beginning(choices: list[str]) -> Callable[[str], list[str]] | None:
    """For the shell's completion: those of the choices that begin like what was typed."""
    if not choices:
        return None
    return lambda incomplete: [choice for choice in choices if choice.startswith(incomplete)]


def _varies(name: str) -> bool:
    return any(name in values for values in PRESETS.values())


def train(
    data: Annotated[
        Path | None,
        typer.Argument(
            help="A prepared folder, or a file or folder of text. Default: the source of Python's standard library."
        ),
    ] = None,
    *,
    run: Annotated[Path | None, typer.Option(help="The folder of the run. Default: a new one in runs/.")] = None,
    from_: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Begin with the weights, the shape and the tokenizer of a run, or of a folder of Hugging Face's.",
            metavar="FOLDER",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in --run, exactly; without --run with the newest in runs/. --resume auto begins"
            " it where there is none yet.",
            metavar="",
        ),
    ] = False,
    resume_auto: Annotated[bool, typer.Option(AUTO, hidden=True)] = False,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact",
            help="With --resume: refuse where other library versions or another CPU may change bits.",
            metavar="",
        ),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Trace a step: profile.md and profile.json in the run's folder, and a table.",
            metavar="",
        ),
    ] = False,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FAULT",
            help="See the run survive. PHASE:STEP:SPHERE:ACTION: kill, stop, segv, nan or slow in forward, backward,"
            " barrier, gather, update or save of a step. May be given several times.",
            show_default=False,
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of the dashboard.", metavar="")] = False,
    config: Annotated[Path | None, typer.Option(help="Options from a TOML file.", metavar="FILE")] = None,
    **options: Any,
) -> None:
    """Train a small GPT on every core, and watch it.

    The same seed, spheres and batch give the same bits on any number of workers.

    Ctrl+C saves and leaves; --resume goes on from there.
    """
    from cllm_spheres.training.launch import Launch

    if resume and not resume_auto:
        run = newest(run)
    with Launch(None if resume or resume_auto or from_ else options) as launch:
        from cllm_spheres_cli.progress import interruptible, progress_of
        from rich.console import Console

        from cllm_spheres.api import attend
        from cllm_spheres.training import session

        given = {name: value for name, value in options.items() if value is not None}
        with interruptible("Nothing was trained."), progress_of(Console(stderr=True)) as progress:
            plan, finished = session.make_plan(
                data, given, run=run, resume="auto" if resume_auto else resume, exact=exact, file=config, faults=fault,
                progress=progress, start_from=from_,
            )  # fmt: skip
        if finished:
            print(finished)
            return
        code, message = attend(launch.obey(replace(plan, profile=profile)), plain=plain or None)
        folder = launch.run  # it may have been renamed meanwhile
    print(message, file=None if code == 0 else typer.get_text_stream("stderr"))
    if profile and (folder / "profile.md").is_file():
        print((folder / "profile.md").read_text())
    if code == 0:
        print(f"Let it write: {own_name()} generate {shlex.quote(str(folder))}")
    raise typer.Exit(code)


def _parameters() -> list[inspect.Parameter]:
    """Those of the command: its own and the fields of Config, in the order of PANELS."""
    own = dict(inspect.signature(train).parameters)
    del own["options"]
    found = [own.pop("data")]
    for panel, names in PANELS.items():
        for name in names:
            parameter = own.pop(name, None) or _option(name)
            (option,) = typing.get_args(parameter.annotation)[1:]
            option.rich_help_panel = None if panel == MAIN else panel
            found.append(parameter)
    found += own.values()  # the hidden ones
    assert {p.name for p in found} > set(Config.model_fields)
    return found


_all = _parameters()
train.__signature__ = inspect.Signature(_all)  # type: ignore[attr-defined]
train.__annotations__ |= {parameter.name: parameter.annotation for parameter in _all}

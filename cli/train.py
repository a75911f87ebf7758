"""`cllm-spheres train`: text in, a trained run out. Its options are the fields of `Config`, with their help."""

import inspect
import types
import typing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from cllm_spheres.config import PRESETS, Config, flag

AUTO = "--resume-auto"  # what `--resume auto` becomes
PANELS = {
    "Run": ("preset", "workers", "spheres", "steps", "epochs", "batch_size", "seed", "stop_at", "dtype"),
    "Model": ("block_size", "layers", "heads", "width", "ff_width", "bias", "dropout", "init"),
    "Text": ("tokenizer", "vocab_size"),
    "Loss": ("loss", "alpha", "neighbours", "neighbour_temperature", "gcd_weight", "ulam_weight"),
    "Optimizer": (
        "optimizer", "lr", "min_lr", "warmup", "schedule", "beta1", "beta2", "weight_decay", "clip", "on_nonfinite",
    ),
    "Evaluation and checkpoints": ("eval_every", "eval_tokens", "early_stop", "save_every", "keep"),
}  # fmt: skip


def _option(name: str) -> inspect.Parameter:
    """The command-line option of a field of Config; unset is None, so that presets and files can decide."""
    field = Config.model_fields[name]
    annotation: Any = field.annotation
    words = [a for a in typing.get_args(annotation) if a is not types.NoneType]
    metavar = None
    if typing.get_origin(annotation) is typing.Literal:
        annotation, metavar = str, "|".join(words)
    elif words:
        annotation = words[0]
    elif name == "preset":
        metavar = "|".join(PRESETS)
    text = field.description or ""
    if field.default is not None and name not in ("preset", "bias"):
        text += f" Default: {field.default}, or the preset's." if _varies(name) else f" Default: {field.default}."
    panel = next(title for title, names in PANELS.items() if name in names)
    flags = [f"{flag(name)}/--no-{name}"] if annotation is bool else [flag(name)]
    option = typer.Option(*flags, help=text, metavar=metavar, show_default=False, rich_help_panel=panel)
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
            "--resume", help="Continue the run in --run, exactly. --resume auto begins it where there is none yet."
        ),
    ] = False,
    resume_auto: Annotated[bool, typer.Option(AUTO, hidden=True)] = False,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="With --resume: refuse where other library versions or another CPU may change bits."
        ),
    ] = False,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Trace a step: profile.md and profile.json in the run's folder, and a table."),
    ] = False,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PHASE:STEP:SPHERE:ACTION",
            help="See the run survive: kill, stop, segv, nan or slow in forward, backward, barrier, gather, update or"
            " save of a step. May be given several times.",
            show_default=False,
        ),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Lines instead of the dashboard.")] = False,
    config: Annotated[Path | None, typer.Option(help="Options from a TOML file.", metavar="FILE.toml")] = None,
    **options: Any,
) -> None:
    """Train a small GPT on every core, and watch it.

    The same seed, spheres and batch give the same bits on any number of workers.

    Ctrl+C saves and leaves; --resume goes on from there.
    """
    from cllm_spheres.training.launch import Launch

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
        print(f"Let it write: cllm-spheres generate {folder}")
    raise typer.Exit(code)


_own = inspect.signature(train).parameters
train.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [p for p in _own.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    + [_option(name) for names in PANELS.values() for name in names]
)
train.__annotations__ |= {name: _option(name).annotation for name in Config.model_fields}
assert {name for names in PANELS.values() for name in names} == set(Config.model_fields)

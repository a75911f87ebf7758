"""The library: `train`, `load`, `evaluate`. Imported when first used."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from cllm_spheres.errors import InputError, Interrupted, RunFailed, nearest, shown
from cllm_spheres.inference.model import Model, load
from cllm_spheres.text.handed import as_folder, as_path, as_paths
from cllm_spheres.training import session
from cllm_spheres.training.hooks import Callback, Hooks
from cllm_spheres.training.launch import Launch, signals_passed_on
from cllm_spheres.training.score import Score, score

__all__ = ["Model", "Run", "Score", "evaluate", "load", "runs", "train"]

Data = str | os.PathLike[str] | Iterable[os.PathLike[str]] | Iterable[str]


@dataclass(frozen=True, init=False)
class Run:
    """A run on disk, by the path of its folder. InputError where there is none."""

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        object.__setattr__(self, "path", as_folder(path))
        self._check()

    def _check(self) -> None:
        from cllm_spheres.watch.follow import find_run

        if not (self.path / "checkpoints").is_dir():  # an imported one has nothing else
            find_run(self.path)

    def __fspath__(self) -> str:
        return str(self.path)

    def metrics(self, kind: str = "step") -> list[dict[str, Any]]:
        """The records of metrics.jsonl of one kind: "step", "eval", "spheres" or "event"; the last of a step wins.

        Those of a kind are flat and have the same keys, but for events: pandas.DataFrame(run.metrics()) is a table.
        """
        from cllm_spheres.events import KINDS, read

        if kind not in KINDS:
            raise InputError(f"There are no records of kind {shown(kind)}: {nearest(str(kind), KINDS)}")
        self._check()
        records = [record for record in read(self.path / "metrics.jsonl") if record["kind"] == kind]
        if kind in ("step", "eval"):
            return list({record["step"]: record for record in records if type(record.get("step")) is int}.values())
        return records

    def evaluate(self, data: str | Path | None = None, **options: Any) -> Score:
        """What the trained model says of a text, or of its validation part: see `cllm_spheres.evaluate`."""
        return evaluate(self.path, data, **options)

    def load(self, checkpoint: str | int | None = None) -> Model:
        """The trained model: its best checkpoint, or "last", or a step."""
        return load(self.path, checkpoint)

    def export(
        self, to: str, target: str | Path, *, dtype: str = "f32", checkpoint: str | int | None = None,
        force: bool = False,
    ) -> Path:  # fmt: skip
        """Write the model for another tool, as `cllm-spheres export` does: to "hf", a folder, or "gguf", a file."""
        from cllm_spheres.exchange.export import export

        export(self.path, to, Path(target), dtype=dtype, which=checkpoint, force=force)
        return Path(target)


def train(
    data: Data | None = None,
    *,
    run: str | os.PathLike[str] | None = None,
    resume: bool | Literal["auto"] = False,
    exact: bool = False,
    faults: Sequence[str] = (),
    profile: bool = False,
    config: str | os.PathLike[str] | None = None,
    start_from: str | os.PathLike[str] | None = None,
    quiet: bool = False,
    on_step: Callback | None = None,
    on_eval: Callback | None = None,
    **options: Any,
) -> Run:
    """Train as `cllm-spheres train` does, in processes of their own, and return the run when it has ended.

    data: a path, as str or Path: of a prepared folder, or of a file or folder of text. Or a list of Paths, for several.
    Or a list or an iterator of str: the texts themselves, each a document; the run does not remember where they came
    from, so a resume needs them again once its cache is gone. None is the embedded corpus. options: the fields of
    `cllm_spheres.config.Config`, such as preset, steps, workers. exact: refuse to resume where other library
    versions or another CPU may change bits. resume: "auto" begins the run where
    there is none yet. faults: PHASE:STEP:SPHERE:ACTION each, to see the run survive them. profile: trace a step into
    profile.md and profile.json in the run's folder. start_from: a run or a folder of Hugging Face's, whose weights,
    shape and tokenizer the run begins with. quiet: print no lines.
    on_step, on_eval: functions that get each record of their kind, as in metrics.jsonl, in this process; the training
    goes on meanwhile. One that returns "save" has the next whole step saved, "stop" has the run evaluated, saved and
    ended there, as stop_at does; what one raises is raised here, after such an end.

    Raises InputError for bad input, RunFailed where the run failed, Interrupted after a signal other than Ctrl+C,
    and KeyboardInterrupt after Ctrl+C; the run is saved then.
    """
    if name := next((name for name in ("from", "from_") if name in options), None):
        raise InputError(f"There is no option {name!r} in Python, where it is a word of the language: give start_from.")
    hooks = Hooks(on_step, on_eval)
    folder, file, start = as_path(run, "run"), as_path(config, "config"), as_path(start_from, "start_from")
    with Launch(None if resume or start_from else options) as launch:
        with as_paths(data) as source:
            plan, finished = session.make_plan(
                source, options, run=folder, resume=resume, exact=exact, file=file, faults=list(faults),
                start_from=start,
            )  # fmt: skip
        if finished:
            code, message = 0, finished
        else:
            hooks.begin(launch, plan.run)
            code, message = attend(launch.obey(replace(plan, profile=profile)), plain=True, quiet=quiet, hooks=hooks)
            plan = replace(plan, run=launch.run)
    if code == 130:
        if not quiet:
            print(message, file=sys.stderr)
        raise KeyboardInterrupt(message)
    if code > 128:
        raise Interrupted(message, code - 128)
    if code == 2:
        raise InputError(message)
    if code:
        raise RunFailed(message)
    if not quiet:
        print(message)
    return Run(plan.run)


def evaluate(
    run: str | Path | Run,
    data: str | Path | None = None,
    *,
    checkpoint: str | int | None = None,
    stride: int | None = None,
    block_size: int | None = None,
    workers: int | None = None,
    dtype: str = "auto",
    max_tokens: int | None = None,
    whole: bool = False,
) -> Score:
    """Loss, perplexity, bits per byte and accuracy of a run's model, as `cllm-spheres eval` finds them.

    data: a file or folder of text, or a prepared folder, of which the validation part is taken; None: that of the
    run's own data. checkpoint: "best", "last" or a step. Windows of block_size tokens (None: the model's) begin
    `stride` tokens apart (None: half of that). As many tokens are scored as in an evaluation of the run's training, in
    windows evenly spread over the text; with max_tokens so many at its beginning; with whole=True each but the first,
    once. workers: None is a worker a core; their number changes no bit. dtype: "fp32", "bf16", or "auto", that of the
    training. The first call on a machine compiles the kernels.

    Raises InputError for bad input, RunFailed where the workers cannot do it.
    """
    return score(
        as_folder(run), as_path(data, "data"), checkpoint=checkpoint, stride=stride, block_size=block_size,
        workers=workers, dtype=dtype, max_tokens=max_tokens, whole=whole,
    )  # fmt: skip


def runs(folder: str | os.PathLike[str] = "runs") -> list[dict[str, Any]]:
    """A flat record of each run in a folder, the one that changed last at the end: the rows of a table.

    The fields are those of `cllm_spheres.watch.overview.Overview`: name, path, state, step, steps, loss, val_loss,
    best_val_loss, tokens_per_s, total_tokens, size_bytes, changed. InputError where there is no such folder.
    """
    from cllm_spheres.watch.overview import overviews

    return [asdict(overview) for overview in overviews(as_folder(folder, "folder"))]


def attend(
    launch: Launch, *, plain: bool | None, quiet: bool = False, hooks: Hooks | None = None
) -> tuple[int, str]:  # fmt: skip
    """Show a launched run until it ends, and pass signals on to it; its exit code, and what to tell the user.

    plain: lines instead of the dashboard; None looks at the terminal. A fault of the display never ends a training.
    hooks: get the records meanwhile; what they raise is raised after the end.
    """
    from cllm_spheres.watch.follow import POLL_S, follow

    hooks = hooks or Hooks(None, None)

    def alive() -> bool:
        hooks.poll()
        return launch.alive

    with signals_passed_on(launch):
        if not quiet:
            try:
                follow(
                    launch.folder.path, plain=plain, alive=alive, status=lambda: launch.status, since=launch.began,
                    stop_when_ended=False, endings=False,
                )  # fmt: skip
            except Exception as error:
                print(f"The display failed ({type(error).__name__}: {error}); the training goes on.", file=sys.stderr)
        while hooks.poll() and launch.alive:
            time.sleep(POLL_S)
        outcome = launch.finish()
    hooks.finish()
    return outcome

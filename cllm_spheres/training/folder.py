"""A run folder: config.toml written and read back, new names, and what a resume may change.

RUN/config.toml     the resolved configuration, and where the data are
RUN/metrics.jsonl   what happened
RUN/checkpoints/    see cllm_spheres.checkpoint
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cllm_spheres.checkpoint.checkpoint import Checkpoint
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.config import DATA_KEYS, Config, build, flag, read_toml, to_toml
from cllm_spheres.errors import InputError, nearest
from cllm_spheres.events import read
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training.plan import check_memory, shape_of
from cllm_spheres.training.start import check_start

MADE_WITH = ("seed", "spheres", "batch_size")  # besides the shape: in the state of a checkpoint
NEW_CONFIG = ".config.toml.new"  # all that is left where somebody dies while making a run
MAY_CHANGE = ("workers", "steps", "stop_at")  # on a resume, without changing what the run is


@dataclass(frozen=True)
class Plan:
    """What Node Zero's process needs to run: everything is checked."""

    run: Path
    config: Config
    prepared: Prepared
    stop_at: int | None = None
    resume: bool = False
    profile: bool = False  # trace a step
    faults: tuple[str, ...] = ()  # that the run brings upon itself, as faults.Fault spells them
    exact: bool = False  # refuse to resume where the numerics are not the checkpoint's
    notes: tuple[str, ...] = ()  # sentences on what will make the run slow here, for its events

    @property
    def changes(self) -> dict[str, Any]:
        """What a resume may have changed of config.toml."""
        return {"workers": self.config.workers, "steps": self.config.steps, "warmup": self.config.warmup}


def new_name(preset: str | None) -> Path:
    """runs/NAME that does not exist yet: the preset and the time."""
    name = time.strftime(f"{preset or 'run'}-%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        path = Path("runs") / (name + suffix)
        if not path.exists():
            return path
    raise InputError("runs/ is full of runs of this very second.")


def check_new(run: Path) -> None:
    """InputError where a run cannot be made here; called before the long work of preparing text."""
    if run.exists() and (not run.is_dir() or any(entry.name != NEW_CONFIG for entry in run.iterdir())):
        hint = f"Continue it with: cllm-spheres train --resume --run {run}. " if (run / "config.toml").exists() else ""
        raise InputError(f"{run} exists already. {hint}Or give another --run.")
    folder = run
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Give another --run.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"No permission to write in {folder.resolve()}. Give another --run.")


def create(run: Path, config: Config, prepared: Prepared, text: str | None) -> None:
    """Make the folder with its config.toml; nothing is left where that fails."""
    check_new(run)
    made = not run.exists()
    try:
        run.mkdir(parents=True, exist_ok=True)
        write_config(run, config, prepared, text)
    except OSError as error:
        if made:
            shutil.rmtree(run, ignore_errors=True)
        raise InputError(f"{run} cannot be made: {error.strerror}. Give another --run.") from None


def write_config(run: Path, config: Config, prepared: Prepared, text: str | None) -> None:
    """config.toml, replaced at once. text: the raw text that was prepared, "" for the embedded corpus."""
    extra = {"data": str(Path(prepared.folder).resolve()), "data_fingerprint": prepared.fingerprint}
    if text is not None:
        extra["text"] = text
    temporary = run / NEW_CONFIG
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(to_toml(config.model_copy(update={"stop_at": None, "epochs": None}), extra))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(run / "config.toml")
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def change_config(run: Path, config: Config, prepared: Prepared) -> None:
    """Write config.toml anew, keeping where the text is."""
    write_config(run, config, prepared, read_config(run)[1]["text"])


def read_config(run: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration of a run, and where its data are; InputError where it is no run."""
    if not (run / "config.toml").is_file():
        parent = run.parent
        known = [p.parent.name for p in parent.glob("*/config.toml")] if parent.is_dir() else []
        hint = f" In {parent}: {nearest(run.name, known)}" if known else ""
        raise InputError(f"{run} is not a run: it has no config.toml.{hint}")
    values = read_toml(run / "config.toml")
    data = {key: values.pop(key, None) for key in DATA_KEYS}
    missing = [key for key in ("vocab_size", "steps", "spheres", "batch_size", "seed") if key not in values]
    missing += [key for key in ("data", "data_fingerprint") if not data[key]]
    if missing:
        raise InputError(f"{run / 'config.toml'} is damaged: {', '.join(missing)} missing.")
    try:
        return build(values), data
    except InputError as error:
        raise InputError(f"{run / 'config.toml'} is damaged: {error}") from None


def check_same(run: Path, config: Config, given: dict[str, Any]) -> None:
    """InputError where a resume asks for another configuration than the run's."""
    asked = build(config.model_dump() | given)  # as the run's own values were made: clip 0 is None
    for key, value in given.items():
        if key not in MAY_CHANGE and getattr(config, key) != getattr(asked, key):
            raise InputError(
                f"{run} was begun with {flag(key)} {getattr(config, key)}, and {value} was given."
                f" A resume keeps what the run is; only {', '.join(map(flag, MAY_CHANGE))} may change."
                " Begin a new run for another configuration."
            )


def plan_resume(
    run: Path, config: Config, where: dict[str, Any], given: dict[str, Any], prepared: Prepared
) -> tuple[Plan, str | None]:
    """A run as it stands, with new workers, steps or stop_at; the second value says that it is finished already.

    InputError where the data are others, or where the numbers do not fit.
    """
    if prepared.fingerprint != where["data_fingerprint"]:
        raise InputError(
            f"{run} was begun with other data: {prepared.folder} has fingerprint {prepared.fingerprint[:12]},"
            f" the run's is {str(where['data_fingerprint'])[:12]}. Give the data that it was begun with."
        )
    steps, stop_at, workers = given.get("steps"), given.get("stop_at"), given.get("workers")
    reached = max(Store(run).steps(), default=0)
    if steps is not None and steps < reached:
        raise InputError(f"--steps {steps} is before step {reached}, which {run} has reached. Give {reached} or more.")
    if workers is not None and config.spheres is not None and workers > config.spheres:
        raise InputError(
            f"--workers {workers} are more than the run's {config.spheres} spheres. Give {config.spheres} or fewer."
        )
    horizon = steps or config.steps
    assert horizon is not None
    finished = None
    if reached >= horizon and _evaluated(run, reached):
        finished = f"{run} is finished: step {reached} of {horizon}. Go on with --steps {2 * reached}."
    elif stop_at is not None and stop_at <= reached:
        finished = f"{run} has reached step {reached}, and --stop-at is {stop_at}."
    update = {key: value for key, value in (("workers", workers), ("steps", steps)) if value is not None}
    if config.warmup is not None and config.warmup >= horizon:
        update["warmup"] = horizon // 10
    config = build(config.model_dump() | update)
    notes: tuple[str, ...] = ()
    if not finished:
        check_memory(config, prepared, resume=True)
        notes = check_start(config, prepared, run)
    return Plan(run, config, prepared, stop_at, resume=True, notes=notes), finished


def _evaluated(run: Path, step: int) -> bool:
    """Whether the checkpoint of a step came after its evaluation: a signal may have come between them."""
    try:
        return json.loads((Store(run).path(step) / "state.json").read_text())["evaluated"] == step
    except (OSError, ValueError, KeyError, TypeError):
        return False


def newest_checkpoint(run: Path, config: Config) -> tuple[Checkpoint | None, list[str]]:
    """The newest good checkpoint and why newer ones were refused; None for a run that has saved none yet.

    InputError where checkpoints have vanished, or where config.toml is not what they were made with.
    """
    store = Store(run)
    store.tidy()
    if not store.steps():
        saved = [r["step"] for r in read(run / "metrics.jsonl") if r.get("event") in ("saved", "best")]
        if saved:
            raise InputError(f"{store.folder} is empty, though step {saved[-1]} was saved. Begin a new run.")
        return None, []
    checkpoint, refused = store.newest_good()
    made = {"layout": asdict(shape_of(config)), **{key: getattr(config, key) for key in MADE_WITH}}
    for key, value in made.items():
        if checkpoint.state.get(key) != value:
            raise InputError(
                f"{run / 'config.toml'} says {key} {value}, but {checkpoint.path} was made with"
                f" {checkpoint.state.get(key)}. Set it back, or begin a new run."
            )
    return checkpoint, refused

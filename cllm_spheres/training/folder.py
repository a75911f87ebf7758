"""A run folder: config.toml written and read back, new names, and what a resume may change.

RUN/config.toml     the resolved configuration, and where the data are
RUN/metrics.jsonl   what happened
RUN/checkpoints/    see cllm_spheres.checkpoint
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cllm_spheres.checkpoint import tensors
from cllm_spheres.checkpoint.checkpoint import MODEL, OPTIMIZER, STATE, Checkpoint, NoOptimizer, looks_whole
from cllm_spheres.checkpoint.files import Damaged, parse, read_bytes
from cllm_spheres.checkpoint.lock import NAME as LOCK
from cllm_spheres.checkpoint.saved_model import layout_of
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.config import DATA_KEYS, ORIGIN_KEYS, Config, build, flag, read_toml, to_toml
from cllm_spheres.errors import InputError, nearest, shown
from cllm_spheres.events import PREPARING, read
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training.plan import check_shape, shape_of
from cllm_spheres.training.soft_targets import check_loss
from cllm_spheres.training.start import check_start
from cllm_spheres.units import plural

CONFIG_TOML, METRICS = "config.toml", "metrics.jsonl"
# Of a configuration all that does not shape the weights; the shape of the model is compared whole.
FREE = (
    "preset", "workers", "steps", "epochs", "stop_at", "early_stop", "eval_every", "eval_tokens", "save_every", "keep",
    "tokenizer", "recompute", *(field.name for field in fields(Shape)),
)  # fmt: skip
ALWAYS_THERE = ("layout", "seed", "spheres", "batch_size")  # also in the checkpoints of older versions
LOCK_BYTES = 20  # a process number and a newline: a larger file of this name is somebody else's
NEW_CONFIG = ".config.toml.new"  # all that is left where somebody dies while making a run
COUNTERS = ("applied", "total_tokens", "evaluated", "best_step", "worse")  # that a resume takes from the state
STATE_BYTES = 1 << 20  # a real one has about 1,000
DECIDED = (
    "vocab_size", "steps", "spheres", "batch_size", "seed", "workers", "ff_width", "warmup", "min_lr", "eval_every",
    "eval_tokens", "save_every",
)  # fmt: skip
MAY_CHANGE = ("workers", "steps", "stop_at", "early_stop", "recompute")  # on a resume, without changing what the run is


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
        return {key: getattr(self.config, key) for key in ("workers", "steps", "warmup", "early_stop", "recompute")}


def new_names(preset: str | None) -> Iterator[Path]:
    """runs/NAME that do not exist yet, of the preset and the time: another process may take the first meanwhile."""
    name = time.strftime(f"{preset or 'run'}-%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        path = Path("runs") / (name + suffix)
        if not path.exists():
            yield path
    raise InputError("runs/ is full of runs of this very second.")


def check_new(run: Path) -> None:
    """InputError where a run cannot be made here; called before the long work of preparing text."""
    try:
        _check_place(run)
    except OSError as error:  # a name that is too long, a link to itself
        raise InputError(f"{run} cannot be made: {error.strerror}. Give another --run.") from None


def _check_place(run: Path) -> None:
    if run.exists() and (not run.is_dir() or not all(map(_may_be_replaced, run.iterdir()))):
        hint = f"Continue it with: cllm-spheres train --resume --run {run}. Or" * (run / CONFIG_TOML).exists()
        raise InputError(f"{run} exists already. {hint or 'Please'} give another --run.")
    folder = run
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder. Give another --run.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"No permission to write in {folder.resolve()}. Give another --run.")


def _may_be_replaced(entry: Path) -> bool:
    """Whether this is left of one who died while he made a run, or prepared its text."""
    if entry.name == METRICS:
        return entry.is_file() and _only_preparing(entry)
    if entry.name == LOCK:
        return entry.is_file() and entry.stat().st_size <= LOCK_BYTES
    return entry.name == NEW_CONFIG


def _only_preparing(path: Path) -> bool:
    """Whether every line is of such an event, the last perhaps torn: other programs have a metrics.jsonl too."""
    begins = f'{{"kind":"event","event":"{PREPARING}",'.encode()  # as `events.dumps` writes it
    with path.open("rb") as file:
        return all(line.startswith(begins) or (not line.endswith(b"\n") and begins.startswith(line)) for line in file)


def check_name(path: Path) -> None:
    """InputError where config.toml, which is UTF-8, could not name the data."""
    name = str(Path(path).resolve())
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"The name {name!r} is not UTF-8, so that config.toml cannot hold it. Rename it.") from None


def write_config(run: Path, config: Config, prepared: Prepared, origin: Mapping[str, str | None]) -> None:
    """config.toml, replaced at once.

    origin: of ORIGIN_KEYS what is known: the raw text that was prepared, "" for the embedded corpus; the model folder
    whose weights the run begins with, and its fingerprint.
    """
    extra = {"data": str(Path(prepared.folder).resolve()), "data_fingerprint": prepared.fingerprint}
    extra |= {key: value for key in ORIGIN_KEYS if (value := origin.get(key)) is not None}
    temporary = run / NEW_CONFIG
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(to_toml(config.model_copy(update={"stop_at": None, "epochs": None}), extra))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(run / CONFIG_TOML)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def change_config(run: Path, config: Config, prepared: Prepared) -> None:
    """Write config.toml anew, keeping where text and weights came from."""
    write_config(run, config, prepared, read_config(run)[1])


def read_config(run: Path) -> tuple[Config, dict[str, Any]]:
    """The configuration of a run, and where its data are; InputError where it is no run."""
    try:
        found = (run / CONFIG_TOML).is_file()
    except OSError as error:
        raise InputError(f"Cannot read {run}: {error.strerror}.") from None
    if not found:
        parent = run.parent
        known = [p.parent.name for p in parent.glob("*/config.toml")] if parent.is_dir() else []
        hint = f" In {parent}: {nearest(run.name, known)}" if known else ""
        if Store(run).steps():
            raise InputError(
                f"{run} was imported and has no text of its own (no config.toml): name one, or train it in a run of its"
                f" own: cllm-spheres train DATA --from {run}"
            )
        raise InputError(f"{run} is not a run: it has no config.toml.{hint}")
    values = read_toml(run / CONFIG_TOML)
    data = {key: values.pop(key, None) for key in DATA_KEYS}
    missing = [key for key in DECIDED if key not in values]
    missing += [key for key in ("data", "data_fingerprint") if not data[key]]
    if missing:
        raise InputError(f"{run / 'config.toml'} is damaged: {', '.join(missing)} missing.")
    for key, value in data.items():
        if value is not None and not isinstance(value, str):
            raise InputError(f"{run / 'config.toml'} is damaged: {key} is {shown(value)}.")
    try:
        config = build(values)
        check_shape(config)
        assert config.vocab_size is not None
        check_loss(config, config.vocab_size)
        assert config.workers is not None and config.spheres is not None and config.batch_size is not None
        if not config.workers <= config.spheres <= config.batch_size:
            raise InputError(
                f"workers {config.workers}, spheres {config.spheres} and batch_size {config.batch_size} do not grow."
            )
        return config, data
    except InputError as error:
        raise InputError(f"{run / 'config.toml'} is damaged: {error}") from None


def check_same(run: Path, config: Config, given: dict[str, Any]) -> None:
    """InputError where a resume asks for another configuration than the run's."""
    asked = build(config.model_dump() | given)  # as the run's own values were made: clip 0 is None
    for key, value in given.items():
        if key not in MAY_CHANGE and getattr(config, key) != getattr(asked, key):
            raise InputError(
                f"{run} was begun with {flag(key)} {_spelled(getattr(config, key))}, and {_spelled(value)} was given."
                f" A resume keeps what the run is; only {', '.join(map(flag, MAY_CHANGE))} may change."
                " Begin a new run for another configuration."
            )


def _spelled(value: object) -> object:
    """A value as it is given on the command line, where 0 is off."""
    return 0 if value is None else value


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
    if config.vocab_size != prepared.vocab_size:
        raise InputError(
            f"{run / 'config.toml'} says vocab_size {config.vocab_size}, {prepared.folder} has {prepared.vocab_size}."
            " Set it back, or begin a new run."
        )
    steps, stop_at, workers = given.get("steps"), given.get("stop_at"), given.get("workers")
    early_stop = given.get("early_stop", config.early_stop)
    horizon = steps or config.steps
    assert horizon is not None
    reached = _reached(Store(run), min(horizon, stop_at or horizon))
    if steps is not None and steps < reached:
        raise InputError(f"--steps {steps} is before step {reached}, which {run} has reached. Give {reached} or more.")
    if workers is not None and config.spheres is not None and workers > config.spheres:
        raise InputError(
            f"--workers {workers} are more than the run's {config.spheres} spheres. Give {config.spheres} or fewer."
        )
    finished = None
    stale = _evaluated(run, reached)
    if reached >= horizon and stale is not None:
        finished = f"{run} is finished: step {reached} of {horizon}. Go on with --steps {2 * reached}."
    elif early_stop is not None and stale is not None and stale >= early_stop and _whole(run, reached):
        finished = (
            f"{run} was stopped early at step {reached} of {horizon}: its validation loss has not improved for"
            f" {plural(stale, 'evaluation')}, and --early-stop is {early_stop}. Go on with --early-stop {2 * stale}, or"
            " with --early-stop 0 to the end."
        )
    elif stop_at is not None and stop_at <= reached:
        finished = f"{run} has reached step {reached}, and --stop-at is {stop_at}."
    update = {key: given[key] for key in ("workers", "steps", "recompute") if given.get(key) is not None}
    update["early_stop"] = early_stop
    if config.warmup is not None and config.warmup >= horizon:
        update["warmup"] = horizon // 10
    config = build(config.model_dump() | update)
    notes: tuple[str, ...] = ()
    if not finished:
        if reached and not (Store(run).path(reached) / OPTIMIZER).exists():
            Store(run).newest_good()  # says what is missing, and whether by damage
        notes = check_start(config, prepared, run, resume=True)
    return Plan(run, config, prepared, stop_at, resume=True, notes=notes), finished


def _reached(store: Store, least: int) -> int:
    """The step from which a resume will go on; 0 where there is none. Contents are verified from step `least` on.

    Below, the step decides nothing here: Node Zero verifies what it takes.
    """
    good = (s for s in reversed(store.steps()) if looks_whole(store.path(s)) and (s < least or _whole(store.run, s)))
    return next(good, 0)


def _whole(run: Path, step: int) -> bool:
    """Whether the checkpoint of a step verifies: where it does not, a run goes on from another."""
    try:
        Store(run).load(step)
    except NoOptimizer:
        return True
    except Damaged:
        return False
    return True


def _evaluated(run: Path, step: int) -> int | None:
    """Of the checkpoint of a step: how many evaluations in a row had not improved the validation loss.

    None where it came before its step's evaluation: a signal may have come between them.
    """
    path = Store(run).path(step)
    try:
        state = parse(path, STATE, read_bytes(path, STATE, STATE_BYTES))
    except Damaged:
        return None
    stale = state.get("stale", state.get("worse"))
    return stale if state.get("evaluated") == step and type(stale) is int else None


def made_with(config: Config, data: str) -> dict[str, Any]:
    """All that shapes the weights, for the state of a checkpoint: a resume goes on with the same or not at all.

    data: the fingerprint of the text. `steps` is for comparing alone: a resume may change it, and the warm-up with it.
    """
    shaping = {key: getattr(config, key) for key in Config.model_fields if key not in FREE}
    return {"layout": asdict(shape_of(config)), "data": data, "steps": config.steps, **shaping}


def newest_checkpoint(run: Path, config: Config, data: str) -> tuple[Checkpoint | None, list[str]]:
    """The newest good checkpoint and why newer ones were refused; None for a run that has saved none yet.

    data: the fingerprint of the text. InputError where checkpoints have vanished, or where the configuration or the
    data are not what they were made with.
    """
    store = Store(run)
    store.tidy()
    if not store.steps():
        saved = [r.get("step") for r in read(run / "metrics.jsonl") if r.get("event") in ("saved", "best")]
        if saved:
            raise InputError(f"{store.folder} is empty, though step {shown(saved[-1])} was saved. Begin a new run.")
        return None, []
    checkpoint, refused = store.newest_good()
    found = checkpoint.state | {"layout": layout_of(checkpoint.state)}
    may_differ = ("steps",) if found.get("steps") == config.steps else ("steps", "warmup")
    for key, value in made_with(config, data).items():
        if key not in may_differ and (key in found or key in ALWAYS_THERE) and found.get(key) != value:
            raise InputError(
                f"{run / 'config.toml'} says {key} {value}, but {checkpoint.path} was made with"
                f" {shown(found.get(key))}. Set it back, or begin a new run."
            )
    _check_contents(checkpoint, config)
    return checkpoint, refused


def _check_contents(checkpoint: Checkpoint, config: Config) -> None:
    """Damaged where a whole checkpoint does not hold what a resume takes from it: its hashes do not say so."""
    state = checkpoint.state
    for key in ("step", *COUNTERS):
        if type(state.get(key)) is not int:
            raise Damaged(checkpoint.path, f"{STATE} has {key} {shown(state.get(key))}")
    if state["step"] != checkpoint.step:
        raise Damaged(checkpoint.path, f"{STATE} is of step {state['step']}")
    if type(state.get("stale", 0)) is not int or not isinstance(state.get("regular_best"), float | None):
        raise Damaged(checkpoint.path, f"{STATE} has no number as stale or regular_best")
    if not isinstance(state.get("best_loss"), float | None) or not isinstance(state.get("fingerprint"), dict):
        raise Damaged(checkpoint.path, f"{STATE} has no best_loss or no fingerprint")
    kinds = ("moments", "squares") if config.optimizer == "adamw" else ("moments",)
    shapes = {tensor.name: tensor.shape for tensor in Layout(shape_of(config)).tensors}
    moments = {f"{kind}.{name}": shape for kind in kinds for name, shape in shapes.items()}
    for file, expected in ((MODEL, shapes), (OPTIMIZER, moments)):
        found = tensors.shapes(checkpoint.path, file)
        if wrong := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
            raise Damaged(
                checkpoint.path,
                f"{file} has {shown(wrong[0])} as {shown(found.get(wrong[0]))}, expected {expected.get(wrong[0])}",
            )

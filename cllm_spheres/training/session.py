"""Options -> the plan of a run: what the command `train` and `cllm_spheres.train` both begin with.

Text is prepared if it has to be, everything is checked, and the run's folder is made.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from cllm_spheres.config import OFF_AT_0, Config, merge, read_toml
from cllm_spheres.errors import InputError, shown
from cllm_spheres.exchange.source import open_source
from cllm_spheres.faults import parse
from cllm_spheres.text.cache import prepare_cached
from cllm_spheres.text.embedded import minimal_text
from cllm_spheres.text.folder import is_prepared, read_regular
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training import folder
from cllm_spheres.training.beginning import origin_of, tokenizer_of, with_model
from cllm_spheres.training.folder import Plan
from cllm_spheres.training.new_run import NewRun
from cllm_spheres.training.plan import check_shape, places, resolve
from cllm_spheres.training.start import check_start

Progress = Callable[[str, float, float], None]
Data = Path | list[Path] | None  # a prepared folder, raw text, several paths of raw text, or the embedded corpus


def make_plan(
    data: Data,
    options: dict[str, Any],
    *,
    run: Path | None = None,
    resume: bool | Literal["auto"] = False,
    exact: bool = False,
    file: Path | None = None,
    faults: list[str] | None = None,
    progress: Progress | None = None,
    start_from: Path | None = None,
) -> tuple[Plan, str | None]:
    """A new run, or one that goes on; the second value is a sentence where there is nothing left to do.

    resume: "auto" is whichever of the two the folder `run` asks for. start_from: a run or a model folder whose
    weights, shape and tokenizer a new run takes. InputError where it cannot work; nothing is left
    behind then.
    """
    if resume not in (True, False, "auto"):
        raise InputError(f'resume is {shown(resume)}: give True, False or "auto".')
    if isinstance(faults, str):
        raise InputError(f"faults is {shown(faults)}: give a list, such as [{shown(faults)}].")
    auto = resume == "auto"
    if auto:
        if run is None:
            raise InputError("--resume auto needs --run: the same folder each time.")
        try:
            resume = (run / folder.CONFIG_TOML).is_file()
        except OSError as error:
            raise InputError(f"Cannot read {run}: {error.strerror}.") from None
        if resume:
            _check_same_model(run, start_from)
            options, file = _as_given(options, file), None
        exact = exact and resume
    if not resume:
        if exact:
            raise InputError("--exact is for --resume: a new run has nothing to differ from.")
        plan = new_run(data, options, run=run, file=file, faults=faults, progress=progress, start_from=start_from)
        return plan, None
    if run is None:
        raise InputError("--resume needs --run: which run shall go on?")
    if file is not None:
        raise InputError("--resume takes its configuration from the run: leave --config out.")
    if start_from is not None and not auto:
        raise InputError("--from is for a new run; --resume goes on with the run's own weights. Leave one of them out.")
    config, names = merge(options)  # names unknown options and values out of range
    options = {name: getattr(config, name) for name in names}  # "3" is 3 from here on
    plan, finished = resumed_run(run, options, data=data, exact=exact, progress=progress)
    return replace(plan, faults=_faults(faults, plan.config, plan.stop_at)), finished


def _faults(texts: list[str] | None, config: Config, stop_at: int | None) -> tuple[str, ...]:
    """Those that a run can have; where a resume will begin is known when its checkpoint has been verified."""
    if not texts:
        return ()
    assert config.spheres and config.steps
    return tuple(map(str, parse(texts, config.spheres, stop_at or config.steps)))


def _as_given(options: dict[str, Any], file: Path | None) -> dict[str, Any]:
    """The options with which a run was begun, to be compared with its own; those that it resolves are left out."""
    config, names = merge(options, file)
    resolved = {"epochs"} | ({"dtype"} if config.dtype == "auto" else set())
    values = {name: getattr(config, name) for name in names - resolved}
    values |= {name: 0 for name in OFF_AT_0 if name in values and values[name] is None}
    return {name: value for name, value in values.items() if value is not None}


def new_run(
    data: Data,
    options: dict[str, Any],
    *,
    run: Path | None,
    file: Path | None,
    faults: list[str] | None = None,
    progress: Progress | None = None,
    start_from: Path | None = None,
) -> Plan:
    """Check everything, prepare the text, make the run folder. InputError leaves nothing behind."""
    config, given = merge(options, file)
    recorded = read_toml(file) if file and data is None else {}
    if "data" in recorded:  # the config.toml of another run: the same again
        if not isinstance(recorded["data"], str):
            raise InputError(f"{file} has data = {shown(recorded['data'])}: it must be the path of a folder.")
        data = Path(recorded["data"])
        start_from = start_from or _recorded_model(recorded, file)
    source = None
    if start_from is not None:
        folder.check_name(start_from)
        config, source = with_model(config, given, open_source(start_from))
        source.check_finite()
        if config.init != "gpt2":
            raise InputError(f"--init {config.init} contradicts --from, whose weights come first. Leave one out.")
    check_shape(config)
    places(config, given)
    text = minimal_text() if data is None and config.preset == "minimal" else data
    if isinstance(text, Path):
        folder.check_name(text)
    tokenizer = source.tokenizer_json if source else None
    with NewRun(run, config.preset, progress) as new:
        prepared = prepare_data(text, config.tokenizer, config.vocab_size, given, new.progress, tokenizer)
        if recorded.get("data_fingerprint") not in (None, prepared.fingerprint):
            raise InputError(f"{prepared.folder} is not what {file} was written with: its text has changed since.")
        resolved = resolve(config, given, prepared)
        chosen = _faults(faults, resolved, config.stop_at)
        notes = check_start(resolved, prepared, new.path) + (source.notes if source else ())
        notes = (*filter(None, [prepared.share_warning()]), *notes)
        run = new.fill(resolved, prepared, {"text": _raw(text), **origin_of(source)})
    return Plan(run, resolved, prepared, config.stop_at, faults=chosen, notes=notes)


def prepare_data(
    source: Data,
    tokenizer: str,
    vocab_size: int | None,
    given: set[str],
    progress: Progress | None,
    tokenizer_json: bytes | None = None,
) -> Prepared:
    """The prepared form of `source`, every byte verified.

    tokenizer_json: the tokenizer to prepare with, instead of one made from the text. InputError where options that
    were given, or that tokenizer, contradict a prepared folder.
    """
    own_vocab = "vocab_size" in given
    wanted = vocab_size if own_vocab or tokenizer in ("bpe", "word") else None
    prepared = prepare_cached(
        [source] if isinstance(source, Path) else source, tokenizer, wanted, exact=own_vocab, progress=progress,
        given=tokenizer_json,
    )  # fmt: skip
    if tokenizer_json is not None and not _same(tokenizer_json, prepared.folder / "tokenizer.json"):
        raise InputError(
            f"{prepared.folder} was prepared with another tokenizer ({prepared.manifest['tokenizer']},"
            f" {prepared.vocab_size:,} tokens) than the model's ({tokenizer}, {vocab_size:,}). Give the text itself"
            " instead, or prepare it with: cllm-spheres prepare PATH --from MODEL --out DIR"
        )
    for key, value, actual in (
        ("tokenizer", tokenizer, prepared.manifest["tokenizer"]), ("vocab_size", vocab_size, prepared.vocab_size),
    ):  # fmt: skip
        if key in given and value != actual:
            raise InputError(
                f"{prepared.folder} was prepared with {key} {actual}, and {value} was given. Leave it out."
            )
    prepared.verify()
    return prepared


def resumed_run(
    run: Path, given: dict[str, Any], *, data: Data, exact: bool = False, progress: Progress | None = None
) -> tuple[Plan, str | None]:
    """The plan of a run that goes on, and, where it is finished already, a sentence that says so.

    Prepared data that are gone are prepared again from the text that they came from.
    """
    config, where = folder.read_config(run)
    folder.check_same(run, config, given)
    text = where["text"]
    if data is None and where["data"] and (is_prepared(Path(where["data"])) or text is None):
        data = Path(where["data"])
    source = data or (Path(text) if text else None)
    tokenizer = None if isinstance(source, Path) and is_prepared(source) else tokenizer_of(run, where)
    prepared = prepare_data(source, config.tokenizer, config.vocab_size, set(), progress, tokenizer)
    plan, finished = folder.plan_resume(run, config, where, given, prepared)
    return replace(plan, exact=exact), finished


def _recorded_model(recorded: dict[str, Any], file: Path | None) -> Path | None:
    """The model that another run's config.toml says it began from; InputError where that has changed since."""
    path = recorded.get("from")
    if path is None:
        return None
    if not isinstance(path, str):
        raise InputError(f"{file} has from = {shown(path)}: it must be the path of a folder.")
    if open_source(Path(path)).fingerprint != recorded.get("from_fingerprint"):
        raise InputError(f"{path} is not what {file} was written with: its weights or its tokenizer have changed.")
    return Path(path)


def _check_same_model(run: Path, start_from: Path | None) -> None:
    """InputError where a run goes on that began from another model than the one given."""
    began = folder.read_config(run)[1]["from"]
    if start_from is not None and (began is None or not Path(began).is_relative_to(start_from.resolve())):
        raise InputError(f"{run} began from {began or 'new weights'}, and --from {start_from} was given. Leave it out.")


def _same(tokenizer_json: bytes, path: Path) -> bool:
    """Whether a tokenizer.json holds the same, however it is spelled."""
    try:
        return json.loads(tokenizer_json) == json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return False


def _raw(source: Data) -> str | None:
    """How config.toml names raw text; None for a folder that was prepared by the user, and for several paths."""
    if source is None:
        return ""
    return None if isinstance(source, list) or is_prepared(source) else str(source.resolve())

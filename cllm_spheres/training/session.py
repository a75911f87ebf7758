"""Options -> a finished run: what the command `train` and `cllm_spheres.train` both do.

Text is prepared if it has to be, the run is planned and its folder made, Node Zero is launched; then the caller
watches until it ends.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cllm_spheres.config import merge, read_toml
from cllm_spheres.errors import InputError
from cllm_spheres.text.embedded import minimal_text
from cllm_spheres.text.prepared import Prepared, prepare_cached
from cllm_spheres.training import folder
from cllm_spheres.training.folder import MAY_CHANGE, Plan
from cllm_spheres.training.launch import Launch
from cllm_spheres.training.plan import check_shape, resolve

Progress = Callable[[str, float, float], None]


def new_run(
    data: Path | None,
    options: dict[str, Any],
    *,
    run: Path | None,
    file: Path | None,
    progress: Progress | None = None,
) -> Plan:
    """Check everything, prepare the text, make the run folder. InputError leaves nothing behind."""
    config, given = merge(options, file)
    recorded = read_toml(file) if file and data is None else {}
    if "data" in recorded:  # the config.toml of another run: the same again
        data = Path(recorded["data"])
    check_shape(config)
    run = run or folder.new_name(config.preset)
    folder.check_new(run)
    prepared = prepare_data(data, config.preset, config.tokenizer, config.vocab_size, given, progress)
    if recorded.get("data_fingerprint") not in (None, prepared.fingerprint):
        raise InputError(f"{prepared.folder} is not what {file} was written with: its text has changed since.")
    resolved = resolve(config, given, prepared)
    folder.create(run, resolved, prepared)
    return Plan(run, resolved, prepared, config.stop_at)


def prepare_data(
    data: Path | None, preset: str | None, tokenizer: str, vocab_size: int | None, given: set[str],
    progress: Progress | None,
) -> Prepared:  # fmt: skip
    """The prepared form of a folder, of raw text, or of the embedded corpus; options that contradict it are refused."""
    source = minimal_text() if data is None and preset == "minimal" else data
    own_vocab = "vocab_size" in given
    wanted = vocab_size if own_vocab or tokenizer in ("bpe", "word") else None
    prepared = prepare_cached(
        None if source is None else [source], tokenizer, wanted, exact=own_vocab, progress=progress
    )
    for key, value, actual in (
        ("tokenizer", tokenizer, prepared.manifest["tokenizer"]), ("vocab_size", vocab_size, prepared.vocab_size),
    ):  # fmt: skip
        if key in given and value != actual:
            raise InputError(
                f"{prepared.folder} was prepared with {key} {actual}, and {value} was given. Leave it out."
            )
    return prepared


def start(plan: Plan) -> Launch:
    """Node Zero, at work on a plan."""
    changes = {}
    if plan.resume:
        changes = {key: getattr(plan.config, key) for key in MAY_CHANGE if key != "stop_at"}
    return Launch(plan, changes)

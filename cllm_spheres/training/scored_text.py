"""A run, and the text that a user named or nothing -> the ids on disk that are to be scored."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cllm_spheres.checkpoint.checkpoint import Checkpoint
from cllm_spheres.errors import InputError, nearest
from cllm_spheres.text.cache import prepare_cached
from cllm_spheres.text.files import describe_skipped
from cllm_spheres.text.folder import is_prepared
from cllm_spheres.text.prepare import Progress
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.text.tokenizer import Tokenizer
from cllm_spheres.training.folder import read_config

Ids = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True, eq=False)
class ScoredText:
    """`ids` in the file `path`, of the tokenizer of the run; `fingerprint` names the prepared data that hold them.

    train: the ids that the run learned from, where these are of its own data.
    """

    source: str
    part: str  # "val" of prepared data, or the whole "text"
    path: Path
    ids: Ids
    fingerprint: str
    notes: list[str]
    train: Ids | None = None


def text_to_score(
    run: Path, data: Path | None, saved: Checkpoint, tokenizer: Tokenizer, progress: Progress | None = None
) -> ScoredText:
    """Of a prepared folder (None: of the run's own data) the validation part, of anything else all its text.

    Raw text is prepared into the cache with the run's tokenizer. InputError for bad input, such as data of another
    tokenizer, or fewer than two tokens.
    """
    if data is None or is_prepared(data):
        prepared = _own(run, saved, progress) if data is None else Prepared.open(data)
        prepared.verify()
        _check_tokenizer(prepared, saved, tokenizer)
        if len(prepared.val) < 2:
            raise InputError(
                f"The validation part of {prepared.folder} has {_tokens(len(prepared.val))}, and 2 are needed to"
                " predict one. Name a text to evaluate: cllm-spheres eval RUN TEXT"
            )
        return ScoredText(
            str(prepared.folder), "val", Path(prepared.folder).resolve() / "val.bin", prepared.val,
            prepared.fingerprint, [], prepared.train if data is None else None,
        )  # fmt: skip
    _check_exists(data)
    prepared = prepare_cached([data], tokenizer.kind, val_fraction=0.0, progress=progress, given=_bytes_of(saved))
    prepared.verify()
    if len(prepared.train) < 2:
        raise InputError(f"{data} has {_tokens(len(prepared.train))}, and 2 are needed to predict one: give more text.")
    skipped = describe_skipped(prepared.manifest["skipped"])
    notes = ["Skipped: " + ", ".join(skipped) + "."] if skipped else []
    return ScoredText(
        str(data), "text", Path(prepared.folder).resolve() / "train.bin", prepared.train, prepared.fingerprint, notes
    )  # fmt: skip


def _own(run: Path, saved: Checkpoint, progress: Progress | None) -> Prepared:
    """The data that a run was trained on, prepared anew where only their text is still there."""
    config, where = read_config(run)
    folder, text = Path(where["data"]), where["text"]
    if is_prepared(folder) or text is None:
        prepared = Prepared.open(folder)
    else:
        source = [text] if text else None
        prepared = prepare_cached(source, config.tokenizer, progress=progress, given=_bytes_of(saved))
    if prepared.fingerprint != where["data_fingerprint"]:
        raise InputError(
            f"{prepared.folder} is not what {run} was trained on: its fingerprint is {prepared.fingerprint[:12]},"
            f" the run's is {where['data_fingerprint'][:12]}. Name a text to evaluate: cllm-spheres eval {run} TEXT"
        )
    return prepared


def _bytes_of(saved: Checkpoint) -> bytes:
    """The checkpoint's tokenizer.json, which has been verified."""
    return saved.tokenizer_path.read_bytes()


def _check_tokenizer(prepared: Prepared, saved: Checkpoint, tokenizer: Tokenizer) -> None:
    """InputError where the ids of prepared data mean something else to the run."""
    contents = [(Path(prepared.folder) / "tokenizer.json").read_bytes(), _bytes_of(saved)]
    if contents[0] == contents[1] or json.loads(contents[0]) == json.loads(contents[1]):
        return
    of_data, of_run = (f"{kind} with {size:,} tokens" for kind, size in (
        (prepared.manifest["tokenizer"], prepared.vocab_size), (tokenizer.kind, tokenizer.vocab_size),
    ))  # fmt: skip
    if of_data == of_run:
        of_run = "another one of that size"
    text = " ".join(prepared.manifest["sources"])
    raise InputError(
        f"{prepared.folder} was prepared with another tokenizer: {of_data}, the run's is {of_run}. Name the text that"
        f" it was prepared from ({text}): it is encoded with the run's tokenizer then."
    )


def _check_exists(path: Path) -> None:
    """InputError with the nearest name where there is no such path."""
    try:
        os.lstat(path)
        return
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        return  # whoever reads it says what is wrong
    try:
        known = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return
    hint = f" In {path.parent}: {nearest(path.name, known)}" if 0 < len(known) <= 1000 else ""
    raise InputError(f"There is no {path}.{hint}")


def _tokens(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"

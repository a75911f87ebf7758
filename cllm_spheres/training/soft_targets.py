"""A run's loss and the frequencies of its text -> RUN/soft_targets.bin: which tokens share a target with each token.

    int32 [V, K]      the neighbours of every token, the most similar first
    float32 [V, K]    their weights, which sum to 1
    32 bytes          the sha256 of what they were made from and of both

Node Zero computes the table once; workers map the file. It is a pure function of configuration and data, so one that is
missing or damaged is made again. V vocabulary, K neighbours.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cllm_spheres.config import Config, flag
from cllm_spheres.crystal.soft_targets import crystal_rows, random_rows
from cllm_spheres.errors import InputError, RunFailed
from cllm_spheres.text.frequency import frequency_order
from cllm_spheres.text.prepared import Prepared

NAME = "soft_targets.bin"
DEFAULTS = {"alpha": 0.1, "neighbours": 16, "neighbour_temperature": 0.1, "gcd_weight": 0.7, "ulam_weight": 0.3}
# The options that a loss has.
OPTIONS: dict[str, tuple[str, ...]] = {
    "cross-entropy": (), "smoothing": ("alpha",), "crystalline": tuple(DEFAULTS), "random": tuple(DEFAULTS),
}  # fmt: skip
APART = 0.1  # of the work, between two words on how far it is


def loss_options(config: Config, vocab_size: int) -> dict[str, Any]:
    """The loss's options with nothing left open; those that it does not have are None.

    InputError where one is given that it does not have, or where the vocabulary is too small.
    """
    has, options = OPTIONS[config.loss], {}
    for name, default in DEFAULTS.items():
        value = getattr(config, name)
        if name not in has and value is not None:
            others = [loss for loss, names in OPTIONS.items() if name in names]
            raise InputError(
                f"{flag(name)} {value:g} means nothing to --loss {config.loss}: leave it out, or choose --loss"
                f" {' or '.join(others)}."
            )
        options[name] = (default if value is None else value) if name in has else None
    if not has:
        return options
    if vocab_size < 2:
        raise InputError(f"--loss {config.loss} needs two tokens or more, and the vocabulary is {vocab_size}.")
    if "neighbours" not in has:
        return options
    if options["gcd_weight"] == options["ulam_weight"] == 0:
        raise InputError("--gcd-weight 0 and --ulam-weight 0: no token is more similar than another. Raise one.")
    if config.neighbours is None:
        options["neighbours"] = min(DEFAULTS["neighbours"], vocab_size - 1)
    elif config.neighbours >= vocab_size:
        raise InputError(
            f"--neighbours {config.neighbours} are more than the others of a vocabulary of {vocab_size:,}. Give"
            f" {vocab_size - 1:,} or fewer."
        )
    return options


def table_file(run: Path, config: Config, prepared: Prepared, status: Callable[[str], None]) -> Path | None:
    """The file of the table, made where it is missing or not this run's; None for a loss that has none.

    status: told how far it is. RunFailed where it cannot be written.
    """
    if config.neighbours is None:
        return None
    path, about = run / NAME, _about(config, prepared)
    if _holds(path, about, prepared.vocab_size, config.neighbours):
        return path
    ids_VK, weights_VK = table(config, prepared, status)
    temporary = path.with_name(f".{NAME}.new")
    try:
        with temporary.open("wb") as file:
            file.write(ids_VK.tobytes() + weights_VK.tobytes() + _digest(about, ids_VK, weights_VK))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise RunFailed(f"{path} cannot be written: {error.strerror}.") from None
    return path


def table(
    config: Config, prepared: Prepared, status: Callable[[str], None] = lambda text: None
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours int32 [V, K] and weights float32 [V, K] of every token id, for a resolved configuration."""
    assert config.neighbours and config.neighbour_temperature and config.gcd_weight is not None
    assert config.ulam_weight is not None
    told = 0.0

    def progress(done: float, total: float) -> None:
        nonlocal told
        if done / total >= told + APART:
            told = done / total
            status(f"Finding the {config.neighbours} nearest of {prepared.vocab_size:,} tokens: {told:.0%}")

    ids_VK, weights_VK = crystal_rows(
        frequency_order(prepared)[0], config.neighbours, config.neighbour_temperature, config.gcd_weight,
        config.ulam_weight, progress,
    )  # fmt: skip
    if config.loss == "random":  # the control: the crystal's weights, other tokens
        ids_VK = random_rows(prepared.vocab_size, config.neighbours, config.seed)
    return ids_VK, weights_VK


def _about(config: Config, prepared: Prepared) -> bytes:
    """All that decides the table."""
    made_of: dict[str, Any] = {name: getattr(config, name) for name in DEFAULTS if name != "alpha"}
    made_of |= {"loss": config.loss, "data": prepared.fingerprint, "vocab_size": prepared.vocab_size}
    made_of |= {"seed": config.seed} if config.loss == "random" else {}
    return json.dumps(made_of, sort_keys=True).encode()


def _digest(about: bytes, *arrays: np.ndarray) -> bytes:
    digest = hashlib.sha256(about)
    for array in arrays:
        digest.update(array.tobytes())
    return digest.digest()


def _holds(path: Path, about: bytes, vocab_size: int, neighbours: int) -> bool:
    """Whether a file is whole, and of this configuration and these data."""
    half = 4 * vocab_size * neighbours
    try:
        with path.open("rb") as file:
            data = file.read(2 * half + 33)
    except OSError:
        return False
    return len(data) == 2 * half + 32 and hashlib.sha256(about + data[: 2 * half]).digest() == data[2 * half :]

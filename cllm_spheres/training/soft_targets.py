"""A run's loss and the frequencies of its text -> RUN/soft_targets.bin: which tokens share a target with each token.

    int32 [V, K]      the neighbours of every token, the most similar first
    float32 [V, K]    their weights, which sum to 1
    32 bytes          the sha256 of what they were made from and of both

Node Zero computes the table once, and lays it into the memory that all share whenever the run starts. It is a pure
function of configuration and data, so a file that is missing or damaged is made again. V vocabulary, K neighbours.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cllm_spheres.config import LOSSES, Config, flag
from cllm_spheres.crystal.soft_targets import crystal_rows, random_rows
from cllm_spheres.errors import InputError, RunFailed, shown
from cllm_spheres.text.folder import read_regular
from cllm_spheres.text.frequency import frequency_order
from cllm_spheres.text.prepared import Prepared

NAME = "soft_targets.bin"
DEFAULTS = {"alpha": 0.1, "neighbours": 16, "neighbour_temperature": 0.1, "gcd_weight": 0.7, "ulam_weight": 0.3}
HASH_BYTES = 32


def loss_options(config: Config, vocab_size: int) -> dict[str, Any]:
    """The loss's options with nothing left open; those that it does not have are None.

    InputError where one is given that it does not have, or where the vocabulary is too small.
    """
    has, options = LOSSES[config.loss], {}
    for name, default in DEFAULTS.items():
        value = getattr(config, name)
        if name not in has and value is not None:
            others = [loss for loss, names in LOSSES.items() if name in names]
            raise InputError(
                f"{flag(name)} {value:g} means nothing to --loss {config.loss}: leave it out, or choose --loss"
                f" {' or '.join(others)}."
            )
        options[name] = (default if value is None else value) if name in has else None
    if "neighbours" in has and config.neighbours is None:
        options["neighbours"] = max(1, min(int(DEFAULTS["neighbours"]), vocab_size - 1))
    check_loss(config.model_copy(update=options), vocab_size)
    return options


def check_loss(config: Config, vocab_size: int) -> None:
    """InputError where a resolved configuration lacks an option of its loss, has one of another, or cannot work."""
    has = LOSSES[config.loss]
    for name in DEFAULTS:
        value = getattr(config, name)
        if value is None and name in has:
            raise InputError(f"{name} is missing, which loss {config.loss} has.")
        if value is not None and name not in has:
            raise InputError(f"{name} is {shown(value)}, which loss {config.loss} does not have.")
    if has and vocab_size < 2:
        raise InputError(f"--loss {config.loss} needs two tokens or more, and the vocabulary is {vocab_size}.")
    if config.neighbours is None:
        return
    if config.gcd_weight == config.ulam_weight == 0:
        raise InputError("--gcd-weight 0 and --ulam-weight 0: no token is more similar than another. Raise one.")
    if config.neighbours >= vocab_size:
        raise InputError(
            f"--neighbours {config.neighbours} are more than the others of a vocabulary of {vocab_size:,}. Give"
            f" {vocab_size - 1:,} or fewer."
        )


def table_bytes(run: Path, config: Config, prepared: Prepared, progress: Callable[[float, float], None]) -> bytes:
    """Both arrays of the run's table, whose file is made where it is missing or is not this run's.

    progress: told (done, total) while it is made, and may raise. RunFailed where the file cannot be written.
    """
    assert config.neighbours
    path, about = run / NAME, _about(config, prepared)
    size = 8 * prepared.vocab_size * config.neighbours
    with contextlib.suppress(OSError):  # it is missing, or no file
        data = read_regular(path, size + HASH_BYTES)
        if len(data) == size + HASH_BYTES and _hash(about, data[:size]) == data[size:]:
            return data[:size]
    data = b"".join(array.tobytes() for array in table(config, prepared, progress))
    temporary = path.with_name(f".{NAME}.new")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.write(_hash(about, data))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunFailed(f"{path} cannot be written: {error.strerror}.") from None
    return data


def table(
    config: Config, prepared: Prepared, progress: Callable[[float, float], None] = lambda done, total: None
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours int32 [V, K] and weights float32 [V, K] of every token id, for a resolved configuration."""
    assert config.neighbours and config.neighbour_temperature and config.gcd_weight is not None
    assert config.ulam_weight is not None
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


def _hash(about: bytes, data: bytes) -> bytes:
    return hashlib.sha256(about + data).digest()

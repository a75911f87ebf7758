"""The folder of one checkpoint -> its verified contents. Nothing here changes anything on disk.

Data from elsewhere may be anything: whatever is wrong with them is Damaged, with the file and the numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cllm_spheres.checkpoint import tensors
from cllm_spheres.checkpoint.files import MANIFEST, Damaged, parse, read_bytes, read_manifest, verify
from cllm_spheres.errors import InputError, shown

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
STATE, CONFIG, TOKENIZER = "state.json", "config.json", "tokenizer.json"
FILES = (MODEL, OPTIMIZER, STATE, TOKENIZER, CONFIG)
WEIGHTS_ONLY = {*FILES} - {OPTIMIZER}  # what `cllm-spheres prune --weights-only` leaves
STEP = re.compile(r"step-([0-9]{8,18})")


class NoOptimizer(InputError):
    """A checkpoint that holds the weights alone, where a run was to go on from it."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"The checkpoint {path} holds the weights alone: `cllm-spheres prune --weights-only` has removed the"
            f" moments of the optimizer ({OPTIMIZER}), without which a run cannot go on. Train the weights further in a"
            f" new run: cllm-spheres train DATA --from {path.parent.parent} --run NEW"
        )


class Checkpoint:
    """One verified checkpoint: `path`, `step`, `state` and `config` at hand, tensors read when asked for."""

    def __init__(self, path: Path, optimizer: bool = True) -> None:
        """Verify the checkpoint in the folder `path`. Raises Damaged.

        Without `optimizer` only the size of that file is looked at, until `optimizer` is asked for. NoOptimizer where
        it is asked for and has been removed.
        """
        manifest = read_manifest(path)
        self._entries: dict[str, dict[str, Any]] = manifest["files"]
        self.path = path
        self.step: int = manifest["step"]
        self.tokenizer_path = path / TOKENIZER
        if set(self._entries) not in (set(FILES), WEIGHTS_ONLY):
            raise Damaged(path, f"{MANIFEST} names {shown(list(self._entries))}; expected {', '.join(FILES)}")
        named = STEP.fullmatch(path.name)
        if named is not None and int(named[1]) != self.step:
            raise Damaged(path, f"{MANIFEST} is of step {self.step}, the folder's name says {int(named[1])}")
        for name in self._entries:  # sizes first: they are cheap
            verify(path, name, self._entries[name], contents=False)
        if optimizer and OPTIMIZER not in self._entries:
            raise NoOptimizer(path)
        for name in self._entries:
            if optimizer or name != OPTIMIZER:
                verify(path, name, self._entries[name])
        tensors.check(path, MODEL, only="F32")
        if optimizer:
            tensors.check(path, OPTIMIZER)
        self._optimizer_verified = optimizer
        self.state = parse(path, STATE, read_bytes(path, STATE, self._entries[STATE]["bytes"]))
        self.config = parse(path, CONFIG, read_bytes(path, CONFIG, self._entries[CONFIG]["bytes"]))

    @cached_property
    def model(self) -> dict[str, np.ndarray]:
        """Name -> float32 array, writable copies that are kept as long as this object."""
        return dict(self.model_tensors())

    @cached_property
    def optimizer(self) -> dict[str, np.ndarray]:
        """Name -> array, writable copies. Raises Damaged where only now it is verified, and is not whole."""
        return dict(self.optimizer_tensors())

    def model_tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """The model one tensor at a time: for copying it into place without a second whole copy."""
        return tensors.iterate(self.path, MODEL)

    def optimizer_tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """The optimizer's tensors, one at a time."""
        if OPTIMIZER not in self._entries:
            raise NoOptimizer(self.path)
        if not self._optimizer_verified:
            verify(self.path, OPTIMIZER, self._entries[OPTIMIZER])
            tensors.check(self.path, OPTIMIZER)
            self._optimizer_verified = True
        return tensors.iterate(self.path, OPTIMIZER)


def looks_whole(path: Path) -> bool:
    """The manifest verifies and every file has its size; contents are not read."""
    try:
        entries = read_manifest(path)["files"]
        for name in FILES:
            if name in entries or name in WEIGHTS_ONLY:
                verify(path, name, entries.get(name, {"bytes": -1}), contents=False)
    except Damaged:
        return False
    return True

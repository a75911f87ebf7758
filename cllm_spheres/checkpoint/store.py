"""The checkpoints of one run: save, find, mark the best, prune, and load what verifies.

    RUN/checkpoints/step-00000100/  model.safetensors optimizer.safetensors state.json tokenizer.json
                                    config.json manifest.json
    RUN/checkpoints/best            a link to the one with the lowest validation loss
    RUN/checkpoints/.tmp-...        in the making, or left by a dead process: the next save tidies it

One process at a time changes a run's checkpoints (lock.py); any number may read them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cllm_spheres.checkpoint import tensors
from cllm_spheres.checkpoint.checkpoint import (
    CONFIG,
    MODEL,
    OPTIMIZER,
    STATE,
    STEP,
    TOKENIZER,
    Checkpoint,
    looks_whole,
)
from cllm_spheres.checkpoint.disk import Disk, remove_tree
from cllm_spheres.checkpoint.files import (
    MANIFEST,
    Damaged,
    NewFolder,
    leftovers,
    read_manifest,
    release,
    remove_whole,
    seal,
    sync_whole,
    temporary,
)
from cllm_spheres.errors import InputError, RunFailed, nearest

BEST = "best"

Which = int | str | None  # a step, "best", "last", or None: the best if there is one, else the last


class SaveFailed(RunFailed):
    """A checkpoint could not be written. Older ones are intact; training may go on and try again."""

    def __init__(self, what: str, reason: str, needed_bytes: int, free_bytes: int | None) -> None:
        free = "an unknown amount is" if free_bytes is None else f"{free_bytes / 1e6:,.1f} MB are"
        super().__init__(
            f"{what}: {reason}. It needs {needed_bytes / 1e6:,.1f} MB, {free} free. Older checkpoints are intact."
        )
        self.reason = reason
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes


class Store:
    """The checkpoints of the run folder `run`. Every change on disk goes through `disk`."""

    def __init__(self, run: Path, disk: Disk | None = None) -> None:
        self.run = Path(run)
        self.folder = self.run / "checkpoints"
        self.disk = disk or Disk()
        self._refused: set[int] = set()  # steps found damaged: they do not count as kept

    def save(
        self,
        step: int,
        model: Mapping[str, np.ndarray],
        optimizer: Mapping[str, np.ndarray],
        state: Mapping[str, Any],
        config: Mapping[str, Any],
        tokenizer: Path | bytes,
    ) -> Path:
        """Write checkpoints/step-N and return its path; on return it survives a power cut.

        `model` is float32. `state` and `config` hold JSON's own types and finite floats, which read back as
        the same bits; anything else is a ValueError or TypeError before the disk is touched. The arrays must
        not change meanwhile and are not copied. A checkpoint of the same step is replaced. Raises SaveFailed,
        and InputError where the file `tokenizer` cannot be read.
        """
        for name, array in model.items():
            if array.dtype != np.float32:
                raise ValueError(f"Model tensor {name!r} is {array.dtype}, expected float32")
        files = {MODEL: tensors.File(model), OPTIMIZER: tensors.File(optimizer)}
        texts = {STATE: _json(state), CONFIG: _json(config), TOKENIZER: _bytes(tokenizer)}
        target = self.path(step)
        needed = sum(file.size_bytes for file in files.values()) + sum(map(len, texts.values()))
        new = None
        try:
            if not self.folder.is_dir():
                self.disk.create_folder(self.folder)
            if not self.steps():  # whoever created it may have died before this
                self.disk.sync_folder(self.run)
            self.tidy()
            new = NewFolder(self.folder, self.disk)
            for name, file in files.items():
                new.write(name, file.chunks())
            for name, text in texts.items():
                new.write(name, [memoryview(text)])
            new.publish(target, step)
        except BaseException as error:
            if new is not None:
                new.discard()
            if isinstance(error, OSError):
                raise self._failed(f"The checkpoint {target} could not be saved", error, needed) from error
            raise
        self._refused.discard(step)
        return target

    def tidy(self) -> None:
        """Remove what dead processes left half-made or half-removed, where possible; `save` does so too.

        A whole checkpoint that is newer than all others gets its name instead: whoever was about to rename it,
        or had set it aside to replace it, died between two renames.
        """
        for entry in leftovers(self.folder) if self.folder.is_dir() else []:
            with contextlib.suppress(OSError):
                if not entry.is_symlink() and looks_whole(entry):
                    self._restore(entry)
                    self.disk.sync_folder(self.folder)  # a power cut must not give its name back to what goes now
                if entry.is_symlink() or entry.exists():
                    remove_tree(entry, self.disk)

    def _restore(self, entry: Path) -> None:
        with contextlib.suppress(Damaged):
            step = read_manifest(entry)["step"]
            if all(step > other for other in self.steps() if looks_whole(self.path(other))):
                Checkpoint(entry, optimizer=(entry / OPTIMIZER).exists())  # its contents too
                sync_whole(entry, self.disk)
                self.disk.rename(entry, self.path(step))

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending, verified or not."""
        if not self.folder.is_dir():
            return []
        found = [STEP.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir()]
        steps = {int(match[1]) for match in found if match is not None}
        return sorted(step for step in steps if self.path(step).is_dir())

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"step-{step:08d}"

    def find(self, which: Which = None) -> Path:
        """The folder of a checkpoint; a step may be digits too. Raises InputError naming what exists."""
        try:
            steps = self.steps()
        except OSError as error:
            raise InputError(f"Cannot read {self.folder}: {error.strerror}.") from None
        if not steps:
            if (self.run / "config.json").is_file():
                raise InputError(f"{self.run} is a model of another tool: cllm-spheres import {self.run} RUN")
            if not self.run.is_dir():
                raise InputError(f"The run {self.run} does not exist: train one with: cllm-spheres train")
            if not (self.run / "config.toml").is_file():
                raise InputError(f"{self.run} is not a run: it has neither a config.toml nor checkpoints.")
            go_on = f"cllm-spheres train --resume --run {self.run}"
            raise InputError(f"The run {self.run} has no checkpoints yet. It goes on with: {go_on}")
        if isinstance(which, str) and re.fullmatch("[0-9]{1,18}", which):
            which = int(which)
        if which is None or which == BEST:
            best = self.best_step()
            if best is None and which == BEST:
                raise InputError(f"The run {self.run} has no best checkpoint yet: take the last, step {steps[-1]}.")
            return self.path(steps[-1] if best is None else best)
        if which == "last":
            return self.path(steps[-1])
        if not isinstance(which, int):
            raise InputError(f"There is no checkpoint {which!r}: {nearest(which, [BEST, 'last', *map(str, steps)])}")
        if which not in steps:
            near = min(steps, key=lambda step: abs(step - which))
            raise InputError(
                f"The run {self.run} has no checkpoint of step {which}: the nearest is {near}, "
                f"of {len(steps)} from {steps[0]} to {steps[-1]}."
            )
        return self.path(which)

    def load(self, which: Which = None, optimizer: bool = True) -> Checkpoint:
        """A verified checkpoint. Raises InputError where there is none, Damaged where it does not verify."""
        path = self.find(which)
        try:
            return Checkpoint(path, optimizer)
        except Damaged:
            if match := STEP.fullmatch(path.name):
                self._refused.add(int(match[1]))
            raise

    def newest_good(self) -> tuple[Checkpoint, list[str]]:
        """The newest checkpoint that verifies, and why newer ones were refused. InputError if none does."""
        refused: list[str] = []
        for step in reversed(self.steps()):
            try:
                return self.load(step), refused
            except Damaged as error:
                refused.append(error.what)
        if refused:
            lines = [f"None of the checkpoints in {self.folder} can be used.", *refused]
            raise InputError("\n".join([*lines, "Restore one from a backup, or begin a new run in another folder."]))
        self.find()  # says that there are none
        raise InputError(f"The checkpoints in {self.folder} were removed while they were read.")

    def distrust_after(self, step: int) -> None:
        """What is newer than the checkpoint that was taken has been refused: it does not count as kept."""
        self._refused.update(newer for newer in self.steps() if newer > step)

    def mark_best(self, step: int) -> None:
        """Point checkpoints/best to an existing step, at once and safe from power cuts. Raises SaveFailed."""
        assert self.path(step).is_dir(), step
        best, new = self.folder / BEST, temporary(self.folder)
        try:
            if best.is_dir() and not best.is_symlink():  # a copy of the run that followed links
                remove_whole(best, self.disk)
            self.disk.symlink(self.path(step).name, new)
            self.disk.rename(new, best)
            self.disk.sync_folder(self.folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.disk.remove(new)
            raise self._failed(f"{best} could not be pointed to step {step}", error, 0) from error
        finally:
            release(new)

    def best_step(self) -> int | None:
        """The step marked as best, if its checkpoint is there."""
        best = self.folder / BEST
        try:
            if best.is_symlink():
                match = STEP.fullmatch(best.readlink().name)
                step = int(match[1]) if match else None
            else:
                step = int(read_manifest(best)["step"]) if best.is_dir() else None
        except (OSError, Damaged):
            return None
        return step if step in self.steps() else None

    def prune(self, keep: int) -> list[int]:
        """Remove what is older than the newest `keep` whole checkpoints, never the best; returns the removed.

        What is known to be damaged does not count as kept: a damaged checkpoint never pushes out a good one.
        Manifests and sizes are looked at here, contents only by loading. Raises SaveFailed.
        """
        assert keep >= 1, keep
        kept: list[int] = []
        removed: list[int] = []
        best = self.best_step()
        for step in reversed(self.steps()):
            if len(kept) < keep:
                if step not in self._refused and looks_whole(self.path(step)):
                    kept.append(step)
            elif step != best:
                try:
                    remove_whole(self.path(step), self.disk)
                except OSError as error:
                    raise self._failed(f"{self.path(step)} could not be removed", error, 0) from error
                removed.append(step)
        return removed

    def drop_optimizer(self, step: int) -> None:
        """Remove the optimizer's state of a checkpoint, which is whole at every moment. Raises Damaged, SaveFailed.

        What is left writes text, is exported and is trained further by `--from`; a run cannot go on from it.
        """
        path = self.path(step)
        new, manifest = path / f"{MANIFEST}.new", read_manifest(path)
        try:
            if manifest["files"].pop(OPTIMIZER, None) is not None:
                if new.exists():  # of a process that died here
                    self.disk.remove(new)
                descriptor = self.disk.create(new)
                try:
                    self.disk.write(descriptor, new, memoryview(seal(manifest)))
                    self.disk.sync(descriptor, new)
                finally:
                    os.close(descriptor)
                self.disk.rename(new, path / MANIFEST)
                self.disk.sync_folder(path)
            if (path / OPTIMIZER).exists():
                self.disk.remove(path / OPTIMIZER)
                self.disk.sync_folder(path)
        except OSError as error:
            raise self._failed(f"The moments of {path} could not be removed", error, 0) from error

    def _failed(self, what: str, error: OSError, needed_bytes: int) -> SaveFailed:
        try:
            free = self.disk.free_bytes(self.folder if self.folder.is_dir() else self.run)
        except OSError:
            free = None
        return SaveFailed(what, error.strerror or str(error), needed_bytes, free)


def _bytes(tokenizer: Path | bytes) -> bytes:
    if isinstance(tokenizer, bytes):
        return tokenizer
    try:
        return tokenizer.read_bytes()
    except OSError as error:
        raise InputError(f"Cannot read the tokenizer {tokenizer}: {error.strerror}.") from None


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(value), indent=1, allow_nan=False).encode() + b"\n"

"""The weights in shared memory and where the run stands -> checkpoints, and back."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cllm_spheres.checkpoint.checkpoint import Checkpoint
from cllm_spheres.checkpoint.disk import Disk
from cllm_spheres.checkpoint.fingerprint import differences
from cllm_spheres.checkpoint.store import SaveFailed, Store
from cllm_spheres.config import Config
from cllm_spheres.errors import InputError
from cllm_spheres.exchange.source import Source
from cllm_spheres.model.families import family_of
from cllm_spheres.model.initialise import lattice_embedding
from cllm_spheres.model.layout import Layout
from cllm_spheres.spheres.node_zero import NodeZero
from cllm_spheres.text.frequency import frequency_order
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training.folder import made_with
from cllm_spheres.training.metrics import Metrics
from cllm_spheres.training.numerics import fingerprint
from cllm_spheres.training.saver import BUSY_S, Saver


@dataclass
class Progress:
    """Where a run stands. Steps count from 1; -1 is never."""

    step: int = 0
    evaluated: int = -1  # the last step that was evaluated
    saved: int = -1  # the last step that was saved
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0  # evaluations since the best
    # The same over the evaluations of --eval-every alone: where a run was stopped and evaluated in between, it must not
    # end earlier or later than without.
    regular_best: float | None = None
    stale: int = 0

    def note(self, val_loss: float) -> None:
        """An evaluation of --eval-every."""
        improved = math.isfinite(val_loss) and (self.regular_best is None or val_loss < self.regular_best)
        self.regular_best, self.stale = (val_loss, 0) if improved else (self.regular_best, self.stale + 1)


class Keeper:
    """Saves and restores one run. What is saved is copied first; a thread writes it while the training goes on."""

    def __init__(
        self, run: Path, layout: Layout, config: Config, prepared: Prepared, node_zero: NodeZero, metrics: Metrics
    ) -> None:
        self.store = Store(run, Disk(self._before))
        self.layout, self.config, self.prepared = layout, config, prepared
        self.node_zero, self.metrics = node_zero, metrics
        self._tokenizer = (prepared.folder / "tokenizer.json").read_bytes()  # the folder may vanish meanwhile
        self._saver = Saver(self._failed)
        self._copy: dict[str, np.ndarray] = {}  # what is being saved: 12 bytes a parameter, held no longer than needed
        self._step = 0  # that is being saved
        self._unsaved_best: int | None = None  # the step, until it is saved

    def expect(self) -> None:
        """A save is near: the saver's thread takes the pages of its copy, which takes far longer than copying."""
        if not self._copy:  # else it is being written, or will be tried again
            self._saver.free()
            self._copy = self._room()
            self._saver.give(self._take_pages)

    def save(self, progress: Progress, best: bool = False, last: bool = False) -> None:
        """Have the last whole step saved; `best` points checkpoints/best to it. Older ones are pruned.

        Where the disk is still busy with the checkpoint before for very long, this one is left out, unless it is the
        last.
        """
        if not self._saver.free(None if last else BUSY_S):
            self.metrics.event(
                "unsaved", f"Step {progress.step:,} is not saved: the disk is still busy with step {self._step:,}.",
                progress.step, seconds=BUSY_S,
            )  # fmt: skip
            return
        if self._unsaved_best is not None:
            self.metrics.event(
                "unsaved", f"Step {self._unsaved_best:,}, the best so far, could not be saved and is given up for step"
                f" {progress.step:,}.", progress.step, seconds=0.0,
            )  # fmt: skip
        began = time.monotonic()
        self._copy = self._copy or self._room()
        for name, buffer in self._buffers().items():
            np.copyto(self._copy[name], buffer)
        state = {
            **asdict(progress), "applied": self.node_zero.applied,
            "sequences": progress.step * self.node_zero.job.batch_size, "total_tokens": self.metrics.total_tokens,
            **made_with(self.config, self.prepared.fingerprint), "fingerprint": fingerprint(self.node_zero.job.dtype),
        }  # fmt: skip
        self._step = progress.saved = progress.step
        self._unsaved_best = progress.step if best else None
        self._saver.give(partial(self._write, progress.step, best, state, time.monotonic() - began))

    def finish(self) -> None:
        """Wait until all is saved. SaveFailed where the disk does not take it."""
        self._saver.finish()

    def _room(self) -> dict[str, np.ndarray]:
        """Room for a copy. Its pages are taken as they are first written."""
        return {name: np.empty_like(buffer) for name, buffer in self._buffers().items()}

    def _take_pages(self) -> None:
        for buffer in self._copy.values():
            np.copyto(buffer, 0)

    def _write(self, step: int, best: bool, state: dict[str, Any], copy_s: float) -> None:
        """One checkpoint, by the saver's thread. SaveFailed."""
        began = time.monotonic()
        views = {name: self.layout.views(buffer) for name, buffer in self._copy.items()}
        model = views.pop("params")
        optimizer = {f"{kind}.{name}": view for kind, tensors in views.items() for name, view in tensors.items()}
        shape = self.layout.shape
        config = family_of(shape).files.config(shape, self.prepared.eot, self.config.dropout)
        path = self.store.save(step, model, optimizer, state, config, self._tokenizer)
        if best:
            self.store.mark_best(step)
            self._unsaved_best = None
        self.store.prune(self.config.keep)
        seconds = time.monotonic() - began
        self.metrics.event(
            "best" if best else "saved",
            f"Saved step {step:,}{', the best so far,' if best else ''} in {seconds:.2f} s.",
            step, path=str(path), seconds=seconds, copy_s=copy_s, **({"val_loss": state["best_loss"]} if best else {}),
        )  # fmt: skip
        self._copy.clear()

    def _failed(self, error: SaveFailed, again_s: float) -> None:
        """Told by the saver's thread; the training goes on."""
        self.metrics.event("unsaved", f"{error} Tried again in {again_s:.0f} s.", self._step, seconds=again_s)

    def _before(self, operation: str, *paths: Path) -> None:
        """Before each change on disk: a fault on purpose comes when the first file has been written."""
        if operation == "sync":
            self.node_zero.faults.fire_save(self._step)

    def begin_from(self, source: Source) -> None:
        """The weights of another model instead of the initialisation; moments and padding are zero already."""
        params = self.layout.views(self.node_zero.memory.params)
        for name, tensor in source.tensors():
            params[name][...] = tensor

    def begin_on_lattice(self) -> None:
        """The token embeddings from the lattice, after the initialisation."""
        order_R, _ = frequency_order(self.prepared)
        name, embedding_VC = lattice_embedding(order_R, self.layout.shape)
        self.layout.views(self.node_zero.memory.params)[name][...] = embedding_VC

    def restore(self, checkpoint: Checkpoint, exact: bool) -> tuple[Progress, int]:
        """Weights, moments and counters as they were; the padding is zero already. Also the updates applied.

        Where the numerics are not the checkpoint's, an event says so; with `exact` that is an InputError.
        """
        self.store.distrust_after(checkpoint.step)
        state = checkpoint.state
        views = {name: self.layout.views(buffer) for name, buffer in self._buffers().items()}
        for name, tensor in checkpoint.model_tensors():
            views["params"][name][...] = tensor
        for name, tensor in checkpoint.optimizer_tensors():
            kind, _, tensor_name = name.partition(".")
            views[kind][tensor_name][...] = tensor
        self.metrics.total_tokens, self.metrics.skipped = state["total_tokens"], state["step"] - state["applied"]
        changed = differences(state["fingerprint"], fingerprint(self.node_zero.job.dtype))
        if changed and exact:
            raise InputError(
                f"--exact: the numerics are not those of {checkpoint.path}: {'; '.join(changed)}."
                " Without --exact the run goes on, with other bits."
            )
        if changed:
            self.metrics.event(
                "fingerprint", "The numerics are not the checkpoint's, so the bits may differ: " + "; ".join(changed),
                checkpoint.step, differences=changed,
            )  # fmt: skip
        progress = Progress(
            checkpoint.step, state["evaluated"], checkpoint.step, state["best_loss"], state["best_step"],
            state["worse"], state.get("regular_best", state["best_loss"]), state.get("stale", state["worse"]),
        )  # fmt: skip
        return progress, state["applied"]

    def _buffers(self) -> dict[str, np.ndarray]:
        """What a checkpoint holds, as it lies in shared memory."""
        memory = self.node_zero.memory
        squares = {"squares": memory.squares} if memory.sizes.has_squares else {}
        return {"params": memory.params, "moments": memory.moments, **squares}

"""A run that has ended -> the same run on less disk: the best and the last checkpoint are left."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from cllm_spheres.checkpoint.checkpoint import NoOptimizer
from cllm_spheres.checkpoint.files import Damaged
from cllm_spheres.checkpoint.lock import Lock, is_held
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import InputError


@dataclass(frozen=True)
class Pruned:
    """What a run lost and what it has still."""

    removed: list[int]  # the steps whose checkpoints are gone
    kept: list[int]
    best: int | None
    freed_bytes: int
    left_bytes: int  # of all checkpoints


def check_idle(run: Path) -> None:
    """InputError where the run goes on, or has no checkpoints."""
    if is_held(run):
        raise InputError(
            f"{run} is going on, and removes old checkpoints by itself (--keep). Prune it when it has ended."
        )
    Store(run).find()


def prune(run: Path, *, weights_only: bool = False) -> Pruned:
    """Remove all checkpoints but the best and the last; with weights_only also the moments of the optimizer in those.

    The last one is read first: a checkpoint that is damaged and newer than the last good one is left, and does not push
    that one out. InputError where the run goes on, or no checkpoint verifies; SaveFailed where the disk refuses.
    """
    check_idle(run)
    with Lock(run):
        store = Store(run)
        before = _size(store.folder)
        store.tidy()
        _find_damaged(store)
        removed = store.prune(keep=1)
        if weights_only:
            for step in store.steps():
                try:
                    store.drop_optimizer(step)
                except Damaged:
                    continue
        left = _size(store.folder)
        return Pruned(removed, store.steps(), store.best_step(), before - left, left)


def _find_damaged(store: Store) -> None:
    """Read checkpoints, the newest first, until one verifies: the store then knows which newer ones are damaged."""
    for step in reversed(store.steps()):
        try:
            with contextlib.suppress(NoOptimizer):
                store.load(step)
                return
            store.load(step, optimizer=False)  # the moments were removed before
            return
        except Damaged:
            continue
    raise InputError(f"None of the checkpoints in {store.folder} can be used, so none was removed.")


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())

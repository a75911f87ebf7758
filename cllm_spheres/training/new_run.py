"""The folder of a run that is being made: locked from its first moment, and gone again where nothing comes of it.

Preparing text may take an hour. Its folder and a first event are there from the beginning, and metrics.jsonl says how
far it is, so that `watch`, `scale` and `runs` know the run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from cllm_spheres.checkpoint.disk import Disk
from cllm_spheres.checkpoint.held import Held
from cllm_spheres.checkpoint.lock import NAME as LOCK
from cllm_spheres.checkpoint.lock import Lock, is_held
from cllm_spheres.config import Config
from cllm_spheres.errors import InputError
from cllm_spheres.events import PREPARING, dumps, event, read
from cllm_spheres.text.prepare import SHARES, STAGE_NAMES, Progress
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training.folder import METRICS, check_name, check_new, new_names, write_config
from cllm_spheres.units import percent

TELLS_EVERY_S = 2.0


class NewRun:
    """with NewRun(run, preset, progress) as new: prepare(progress=new.progress); new.fill(...)

    The folder is made at the first word of progress, or by `fill`; on leaving without `fill` it is removed again.
    """

    def __init__(self, run: Path | None, preset: str | None, progress: Progress | None = None) -> None:
        """run: None is a new folder in runs/. progress: told the same as this."""
        self._wanted, self._preset, self._show = run, preset, progress
        self._lock: Lock | None = None
        self._folder: Held | None = None  # the same, while it is locked: somebody may rename it meanwhile
        self._made: list[Path] = []
        self._filled = False
        self._stage, self._told_at, self._began = "", 0.0, time.monotonic()
        self.path = run or next(new_names(preset))  # where it is, or will be unless another takes the name
        check_new(self.path)

    def __enter__(self) -> NewRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._lock is None or self._folder is None:
            return
        if not self._filled:
            with contextlib.suppress(OSError):
                (self._folder.path / METRICS).unlink(missing_ok=True)
                if self.path in self._made:
                    (self._folder.path / LOCK).unlink()
                    self._made[0] = self._folder.name
        self._lock.release()
        if not self._filled:
            self._remove_made()
        self._folder.close()

    def progress(self, stage: str, done: float, total: float) -> None:
        """How far the preparing of text is: told to whoever looks at the run. InputError where it cannot be made."""
        self._make()
        now = time.monotonic()
        if stage != self._stage or now - self._told_at >= TELLS_EVERY_S:
            self._stage, self._told_at = stage, now
            share = _share(stage, done / total if total else 1.0)
            self._tell(f"Preparing text, {percent(round(share, 2))}: {STAGE_NAMES[stage].lower()}.", share=share)
        if self._show:
            self._show(stage, done, total)

    def fill(self, config: Config, prepared: Prepared, origin: Mapping[str, str | None]) -> Path:
        """Write config.toml, and return the folder; origin: as for `write_config`."""
        check_name(prepared.folder)
        made = self._make()
        try:
            write_config(made.path, config, prepared, origin)
        except OSError as error:
            raise InputError(f"{made.name} cannot be made: {error.strerror}. Give another --run.") from None
        self._filled = True
        if self._stage:
            self._tell(f"The text is prepared after {time.monotonic() - self._began:.1f} s.", share=1.0)
        for folder in {made.path, *(folder.parent for folder in self._made)}:
            with contextlib.suppress(OSError):  # one that may not be read cannot be synced
                Disk().sync_folder(folder)  # or a power cut takes the run away, checkpoints and all
        return made.name

    def _make(self) -> Held:
        """Make the folder, lock and hold it. InputError where another process is just making a run there."""
        if self._folder is not None:
            return self._folder
        for path in [self._wanted] if self._wanted else new_names(self._preset):
            self._made = [folder for folder in path.parents if not folder.exists()]  # the deepest first
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):
                    path.mkdir()
                    self._made.insert(0, path)
                if self._wanted is None and path not in self._made:
                    continue  # another run of this very second has just taken the name
                self.path, self._lock = path, Lock(path)
                check_new(path)  # another process may have made a run here just before the lock was taken
                (path / METRICS).unlink(missing_ok=True)  # of one that died while it prepared its text
                self._folder = Held(path)
                return self._folder
            except (OSError, InputError) as error:
                if self._lock is not None:
                    if path in self._made:
                        with contextlib.suppress(OSError):
                            (path / LOCK).unlink()
                    self._lock.release()
                    self._lock = None
                self._remove_made()
                if isinstance(error, InputError):
                    raise
                raise InputError(f"{path} cannot be made: {error.strerror}. Give another --run.") from None
        raise AssertionError("new_names ends with an error")

    def _remove_made(self) -> None:
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # where it is empty

    def _tell(self, message: str, **fields: Any) -> None:
        record = event("preparing", message, step=0, time=time.time(), **fields)
        assert self._folder is not None
        with contextlib.suppress(OSError), (self._folder.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(dumps(record) + "\n")  # a full disk: what cannot be told does not stop the work


def _share(stage: str, within: float) -> float:
    """Of all preparing, from the share of one stage; all of it only when the run can start."""
    before = 0.0
    for name, share in SHARES.items():
        if name == stage:
            return min(0.99, before + share * within)
        before += share
    return before


def preparing(run: Path) -> str:
    """ "preparing text, 41 %" of a run whose text is being prepared right now, else ""."""
    records = read(run / METRICS, last=True)
    if not records or records[-1].get("event") != PREPARING or not is_held(run):
        return ""
    share = records[-1].get("share")
    return f"preparing text, {percent(round(share, 2))}" if isinstance(share, float) else "preparing text"

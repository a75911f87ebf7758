"""A Hugging Face folder -> a run folder with one checkpoint, of step 0: what `generate` and `train --from` load."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cllm_spheres.checkpoint.store import SaveFailed, Store
from cllm_spheres.errors import InputError
from cllm_spheres.exchange.source import Source, open_source
from cllm_spheres.model.families import family_of


def import_model(folder: Path, run: Path) -> Source:
    """Make the run. InputError where the folder is no model of ours, or the run exists; nothing is left then."""
    if os.path.lexists(run) and (not run.is_dir() or any(run.iterdir())):
        raise InputError(f"{run} exists already. Give another folder for the run.")
    source = open_source(folder)
    if source.checkpoint is not None:
        raise InputError(f"{folder} is a run already. Train it further: cllm-spheres train DATA --from {folder}")
    weights = dict(source.tensors())
    moments = {
        f"{kind}.{name}": np.zeros_like(values) for kind in ("moments", "squares") for name, values in weights.items()
    }
    state = {
        "step": 0, "evaluated": -1, "saved": 0, "best_loss": None, "best_step": 0, "worse": 0, "applied": 0,
        "sequences": 0, "total_tokens": 0, "layout": asdict(source.shape), "imported": source.path.name,
    }  # fmt: skip
    made = [parent for parent in (run, *run.parents) if not parent.exists()]  # the deepest first
    try:
        run.mkdir(parents=True, exist_ok=True)
        config = family_of(source.shape).files.config(source.shape, source.tokenizer.eot, 0.0)
        Store(run).save(0, weights, moments, state, config, source.tokenizer_json)
    except BaseException as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
            for parent in made:
                parent.rmdir()
        if isinstance(error, SaveFailed):
            raise InputError(f"{run} cannot be written: {error.reason}. Give another folder for the run.") from None
        if isinstance(error, OSError):
            raise InputError(f"{run} cannot be made: {error.strerror}. Give another folder for the run.") from None
        raise
    return source

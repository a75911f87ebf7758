"""A small checkpoint to save, and what is expected of it when loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cllm_spheres.checkpoint.disk import Disk
from cllm_spheres.checkpoint.store import Store

CONFIG = {"model_type": "gpt2", "n_layer": 1}
TOKENIZER = b'{"version": "1.0"}'


def content(step):
    """The arguments of a save that differ in every tensor from step to step."""
    bias = np.arange(3, dtype=np.float32) + step
    model = {"wte.weight": np.full((5, 3), step, np.float32), "ln_f.bias": bias}
    optimizer = {f"m.{name}": array * 2 for name, array in model.items()} | {"t": np.array(step, np.int64)}
    state = {"step": step, "best_loss": 0.1 + step}
    return dict(model=model, optimizer=optimizer, state=state, config=CONFIG, tokenizer=TOKENIZER)


class Recorder(Disk):
    """A disk that lists its operations as (name, *paths)."""

    def __init__(self):
        self.operations = []
        super().__init__(before=lambda *operation: self.operations.append(operation))


@pytest.fixture
def save():
    """save(store, step): a checkpoint that differs from that of every other step."""
    return lambda store, step: store.save(step, **content(step))


@pytest.fixture
def make_content():
    return content


@pytest.fixture
def recorder():
    return Recorder


@pytest.fixture
def run(tmp_path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    return path


@pytest.fixture
def store(run) -> Store:
    return Store(run)


@pytest.fixture
def assert_same():
    """assert_same(checkpoint): it holds exactly what was saved at its step."""

    def check(checkpoint):
        expected = content(checkpoint.step)
        for found, wanted in (
            (checkpoint.model, expected["model"]),
            (checkpoint.optimizer, expected["optimizer"]),
        ):
            assert found.keys() == wanted.keys()
            for name, array in wanted.items():
                assert found[name].dtype == array.dtype and found[name].shape == array.shape
                assert found[name].tobytes() == array.tobytes()
        assert checkpoint.state == expected["state"] and checkpoint.config == expected["config"]
        assert checkpoint.tokenizer_path.read_bytes() == expected["tokenizer"]

    return check


@pytest.fixture
def leftovers():
    """leftovers(run): the temporary entries in its checkpoints folder."""
    return lambda run: [entry.name for entry in (run / "checkpoints").glob(".tmp-*")]

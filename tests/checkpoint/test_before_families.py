"""A run that was made before checkpoints named a family (before_families/): it is a GPT-2, and goes on.

6 of 9 steps in float32 with dropout; `layout` in its state.json has neither a family nor what later versions add.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import MISSING, asdict, fields
from pathlib import Path

import numpy as np
import pytest

from cllm_spheres.checkpoint.saved_model import layout_of, open_run, shape_of_state
from cllm_spheres.events import read
from cllm_spheres.exchange.export import export
from cllm_spheres.inference.model import load
from cllm_spheres.model.shape import Shape
from tests.runs import command

SHAPE = Shape(vocab_size=40, block_size=12, layers=2, heads=2, width=16, ff_width=64)
# What the version that made the run has exported, computed and trained from it.
WEIGHTS = "e9b8159086eb99ae8f938c26f88d1be322beb87b7f70e187fa2ffefbbe8d33ef"
SQUARED_LOGITS = [131.03700278265273, 130.28083566766136, 129.575597438796, 129.85031481196125, 128.98966282438397]
LOSSES = {7: 2.8587315345753788, 8: 2.9141210929301216, 9: 3.124884094949907}


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with a copy of the run and of its text."""
    return Path(shutil.copytree(Path(__file__).with_name("before_families"), tmp_path / "place", symlinks=True))


def test_it_is_a_gpt2(place):
    saved, shape, tokenizer = open_run(place / "run")
    assert "family" not in saved.state["layout"] and shape == SHAPE and shape.family == "gpt2"
    assert tokenizer.vocab_size == 40


def test_its_weights_are_exported_bit_for_bit(place):
    export(place / "run", "hf", place / "model")
    assert hashlib.sha256((place / "model/model.safetensors").read_bytes()).hexdigest() == WEIGHTS


def test_it_computes_the_same_logits_and_writes(place):
    model = load(place / "run")
    logits_TV = model.logits(model.tokenizer.encode("The s")).astype(np.float64)
    # Another CPU sums float32 in another order.
    np.testing.assert_allclose((logits_TV**2).sum(1), SQUARED_LOGITS, rtol=1e-4)
    done = command("generate", place / "run", "--prompt", "The ", "--tokens", 8, "--seed", 1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The ") and len(done.stdout) > 8


def test_it_resumes_with_its_moments(place):
    done = command("train", "--resume", "--run", "run", "--plain", cwd=place)
    assert done.returncode == 0, done.stderr
    losses = {r["step"]: r["loss"] for r in read(place / "run/metrics.jsonl") if r["kind"] == "step"}
    # The same steps, of the same sequences and masks; without its moments step 8 is off by 0.012.
    assert all(abs(losses[step] - loss) < 1e-3 for step, loss in LOSSES.items()), losses
    state = json.loads((place / "run/checkpoints/step-00000009/state.json").read_text())
    assert state["layout"] == asdict(SHAPE) and state["layout"]["family"] == "gpt2"
    assert open_run(place / "run", "last")[1] == SHAPE


def test_what_a_layout_lacks_has_the_default_of_shape():
    least = {field.name: getattr(SHAPE, field.name) for field in fields(Shape) if field.default is MISSING}
    assert shape_of_state({"layout": least}) == SHAPE
    assert layout_of({"layout": least | {"bias": False}}) == asdict(SHAPE) | {"bias": False}


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (None, "has layout None"), ([], r"has layout \[\]"), ({}, "has layout"), ({"width": None}, "has width None"),
        ({"rotary": 5}, "has layout"), ({"family": "lama"}, "no family 'lama', only gpt2"),
        ({"family": 1}, "has family 1"), ({"family": ["gpt2"]}, r"has family \['gpt2'\]"),
        ({"heads": 3}, "3 heads do not divide a width of 16"), ({"bias": 1}, "has bias 1"),
        ({"layers": True}, "has layers True"), ({"layers": 0}, "has layers 0"),
    ],
)  # fmt: skip
def test_a_layout_of_no_model_is_refused_by_name(layout, said):
    layout = asdict(SHAPE) | layout if layout else layout
    with pytest.raises(ValueError, match=rf"state\.json.*{said}"):
        shape_of_state({"layout": layout})

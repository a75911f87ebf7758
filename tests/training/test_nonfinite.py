"""A loss or a gradient that is not finite: stop with an explanation, or skip the step."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.checkpoint.store import Store
from tests.runs import TINY, resume, train, train_whole

# The first update throws the weights so far away that the next gradient overflows.
ABSURD = dict(lr=1e30, min_lr=1e30, warmup=0, steps=6, save_every=1, keep=10)


def test_it_stops_with_the_step_the_sphere_and_the_tensor_and_keeps_the_last_checkpoint(corpus, tmp_path):
    outcome = train(corpus, tmp_path / "run", **ABSURD)
    assert outcome.code == 1
    assert outcome.message.startswith("NonFinite: Step 2: the gradient of sphere 0 is not finite, first in ")
    assert "try a smaller --lr or a longer --warmup" in outcome.message
    assert f"The last checkpoint is {outcome.run}/checkpoints/step-00000001." in outcome.message
    named = outcome.message.split("first in ")[1].split(" ")[0]
    assert named in outcome.weights()
    assert [r["step"] for r in outcome.of("step")] == [1]
    assert outcome.event("failed")["error"] == "NonFinite"
    assert Store(outcome.run).steps() == [1] and Store(outcome.run).load(1)
    again = resume(outcome.run)
    assert again.code == 1 and "NonFinite: Step 2" in again.message


def test_a_skipped_step_leaves_the_weights_and_adams_t_but_the_data_advance(corpus, tmp_path):
    outcome = train_whole(corpus, tmp_path / "run", **ABSURD, on_nonfinite="skip")
    assert [r["step"] for r in outcome.of("step")] == list(range(1, 7))
    skips = [e for e in outcome.of("event") if e["event"] == "skip"]
    assert [e["step"] for e in skips] == [2, 3, 4, 5, 6]
    assert all("was skipped" in e["message"] for e in skips)
    assert len({outcome.file("model.safetensors", step) for step in range(1, 7)}) == 1
    assert len({outcome.file("optimizer.safetensors", step) for step in range(1, 7)}) == 1
    state = Store(outcome.run).load(6).state
    assert (state["step"], state["applied"]) == (6, 1)
    assert (state["sequences"], state["total_tokens"]) == (6 * 4, 6 * 4 * 8)


def test_weights_that_are_not_finite_are_named(corpus, tmp_path):
    run = train_whole(corpus, tmp_path / "run", steps=4, stop_at=2).run
    store = Store(run)
    saved = store.load(2)
    saved.model["h.0.mlp.c_fc.weight"][3, 5] = np.nan
    store.save(2, saved.model, saved.optimizer, saved.state, saved.config, saved.tokenizer_path)
    outcome = resume(run)
    assert outcome.code == 1
    assert "Step 3: the weights themselves are not finite, first in h.0.mlp.c_fc.weight." in outcome.message


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_without_a_cause_nothing_is_skipped(corpus, tmp_path, optimizer):
    skip = train_whole(corpus, tmp_path / "skip", steps=5, on_nonfinite="skip", optimizer=optimizer)
    stop = train_whole(corpus, tmp_path / "stop", steps=5, on_nonfinite="stop", optimizer=optimizer)
    assert skip.bits == stop.bits
    assert TINY["lr"] > skip.of("step")[-1]["lr"]

"""A loss or a gradient that is not finite: stop with an explanation, or skip the step."""

from __future__ import annotations

import json
import shlex

import numpy as np
import pytest

from cllm_spheres.checkpoint.store import Store
from cllm_spheres.config import Config
from cllm_spheres.training import session
from cllm_spheres.training.launch import Launch
from cllm_spheres.training.nonfinite import way_out
from tests.runs import TINY, Outcome, command, finished, resume, train, train_whole

# The first update throws the weights so far away that the next gradient overflows.
ABSURD = dict(lr=1e30, min_lr=1e30, warmup=0, steps=6, save_every=1, eval_every=6, keep=10)


def test_it_stops_with_the_step_the_sphere_and_the_tensor_and_keeps_the_last_checkpoint(corpus, tmp_path):
    outcome = train(corpus, tmp_path / "run", **ABSURD)
    assert outcome.code == 1
    assert outcome.message.startswith("NonFinite: Step 2: the gradient of sphere 0 is not finite, first in ")
    assert "Often the learning rate is too high, and --resume would compute the same again." in outcome.message
    assert f"The last checkpoint is {outcome.run}/checkpoints/step-00000001." in outcome.message
    named = outcome.message.split("first in ")[1].split(" ")[0]
    assert named in outcome.weights()
    assert [r["step"] for r in outcome.of("step")] == [1]
    assert outcome.event("failed")["error"] == "NonFinite"
    assert Store(outcome.run).steps() == [1] and Store(outcome.run).load(1)
    again = resume(outcome.run)
    assert again.code == 1 and "NonFinite: Step 2" in again.message
    (advised,) = [line for line in outcome.message.splitlines() if line.startswith("  cllm-spheres train")]
    assert advised.endswith(f"config.toml --lr 0.001 --min-lr 0.0001 --run {outcome.run}-2")  # step 1 is no way out


def test_the_command_that_is_advised_goes_on_from_the_best_checkpoint(corpus, tmp_path):
    plan = session.new_run(
        corpus, TINY | {"steps": 12, "eval_every": 2, "keep": 10, "init": "lattice"}, run=tmp_path / "my run",
        file=None, faults=["backward:8:0:nan"],
    )  # fmt: skip
    outcome = finished(Launch().obey(plan))
    assert outcome.code == 1 and "Step 8: the gradient of sphere 0 is not finite" in outcome.message
    (advised,) = [line for line in outcome.message.splitlines() if line.startswith("  cllm-spheres train")]
    took = command(*shlex.split(advised)[1:])
    assert took.returncode == 0 and "Ended at step 12" in took.stdout, took.stderr
    again = Outcome(tmp_path / "my run-2", 0, "")
    best = outcome.weights(Store(outcome.run).best_step())
    assert all(np.array_equal(again.weights(0)[name], values) for name, values in best.items())
    assert again.config.lr == 0.001 and again.config.batch_size == TINY["batch_size"]


def test_where_nothing_good_was_saved_the_way_out_begins_anew_and_a_name_of_many_words_is_quoted(tmp_path):
    run, config = tmp_path / "my run", Config(lr=0.03, min_lr=0.003, init="lattice")
    run.mkdir()
    said = way_out(run, Store(run), config)
    assert f"\n  cllm-spheres train --config '{run}/config.toml' --lr 0.001 --min-lr 0.0001 --run '{run}-2'\n" in said
    (tmp_path / "my run-2").mkdir()
    assert f"--lr 3.3e-05 --run '{run}-3'" in way_out(run, Store(run), Config(lr=1e-4, min_lr=1e-5))


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
    assert "--from" not in outcome.message  # of what was saved nothing is good


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_without_a_cause_nothing_is_skipped(corpus, tmp_path, optimizer):
    skip = train_whole(corpus, tmp_path / "skip", steps=5, on_nonfinite="skip", optimizer=optimizer)
    stop = train_whole(corpus, tmp_path / "stop", steps=5, on_nonfinite="stop", optimizer=optimizer)
    assert skip.bits == stop.bits
    assert TINY["lr"] > skip.of("step")[-1]["lr"]


def test_a_model_whose_loss_is_not_finite_is_explained_and_is_never_the_best(corpus, tmp_path):
    """Its weights are finite, and 1e30 times too large."""
    good = train_whole(corpus, tmp_path / "good", steps=2).run
    store = Store(good)
    saved = store.load("last")
    store.save(
        2, {name: values * np.float32(1e30) for name, values in saved.model.items()}, saved.optimizer, saved.state,
        saved.config, saved.tokenizer_path,
    )  # fmt: skip
    options = {name: TINY[name] for name in ("batch_size", "spheres", "workers", "lr", "dtype")} | {"steps": 2}
    for policy in ("stop", "skip"):
        plan = session.new_run(
            corpus, options | {"on_nonfinite": policy}, run=tmp_path / policy, file=None, start_from=good
        )
        outcome = finished(Launch().obey(plan))
        for line in (outcome.run / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=pytest.fail)  # no NaN and no Infinity
        assert outcome.of("eval")[0]["val_loss"] is None
        assert Store(outcome.run).best_step() is None and "Traceback" not in outcome.message
        if policy == "stop":
            assert outcome.code == 1
            assert "NonFinite: The evaluation after step 0: the loss of window 0 is nan, though the weights are" in (
                outcome.message
            )
            assert outcome.message.endswith("no learning rate mends them: begin from another model.")
        else:
            assert outcome.code == 0, outcome.message
            assert Store(outcome.run).load("last").state["best_loss"] is None

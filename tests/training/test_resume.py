"""What stands in a run's folder, what a resume takes from it, and what it refuses."""

from __future__ import annotations

import json
import math
import shutil
import tomllib

import pytest

import cllm_spheres as cs
from cllm_spheres.checkpoint.pruning import prune
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import InputError
from cllm_spheres.exchange.source import open_source
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training import session
from cllm_spheres.training.folder import change_config
from cllm_spheres.training.keeper import Progress
from cllm_spheres.training.schedule import learning_rate
from tests.runs import TINY, resume, text, train_whole


@pytest.fixture(scope="module")
def ended(corpus, tmp_path_factory):
    """A run of 20 steps that has ended."""
    options = dict(steps=20, eval_every=4, save_every=5, keep=2, eval_tokens=400)
    return train_whole(corpus, tmp_path_factory.mktemp("ended") / "run", **options)


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """A run of 12 steps that has ended, with a checkpoint of every third. Do not change it."""
    run = tmp_path_factory.mktemp("straight") / "run"
    return train_whole(corpus, run, steps=12, save_every=3, eval_every=3, keep=9)


def test_config_toml_holds_the_resolved_configuration_and_where_the_data_are(ended, corpus):
    values = tomllib.loads((ended.run / "config.toml").read_text())
    assert values["data"] == str(corpus)
    assert values["data_fingerprint"] == Prepared.open(corpus).fingerprint
    assert values["steps"] == 20 and values["vocab_size"] == 257 and values["workers"] == 2
    assert values | TINY == values


def test_a_checkpoint_holds_what_it_promises(ended):
    checkpoint = Store(ended.run).load("last")
    assert checkpoint.step == 20
    assert {path.name for path in checkpoint.path.iterdir()} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "tokenizer.json", "config.json", "manifest.json",
    }  # fmt: skip
    state = checkpoint.state
    assert (state["step"], state["applied"], state["sequences"], state["total_tokens"]) == (20, 20, 80, 640)
    assert (state["seed"], state["spheres"], state["batch_size"]) == (1337, 4, 4)
    assert {"arithmetic", "blas", "numba", "llvmlite", "cpu", "flush_to_zero"} <= state["fingerprint"].keys()
    config = json.loads((checkpoint.path / "config.json").read_text())
    assert (config["n_layer"], config["n_head"], config["n_embd"], config["vocab_size"]) == (1, 2, 32, 257)
    model = checkpoint.model
    moments = {name.partition(".")[2] for name in checkpoint.optimizer if name.startswith("moments.")}
    squares = {name.partition(".")[2] for name in checkpoint.optimizer if name.startswith("squares.")}
    assert moments == squares == set(model)


def test_the_newest_and_the_best_checkpoints_are_kept(ended):
    evaluations = {r["step"]: r["val_loss"] for r in ended.of("eval")}
    assert list(evaluations) == [0, 4, 8, 12, 16, 20]
    store = Store(ended.run)
    best = min(evaluations, key=evaluations.get)
    assert store.best_step() == best == Store(ended.run).load().step
    saves = [e["step"] for e in ended.of("event") if e["event"] in ("saved", "best")]
    assert set(saves) >= {5, 10, 15, 20}
    assert store.steps() == sorted({best, *saves[-2:]})


def test_a_finished_run_says_so(ended, corpus):
    _, finished = session.resumed_run(ended.run, {}, data=None)
    assert "is finished: step 20 of 20. Go on with --steps 40" in finished
    _, finished = session.resumed_run(ended.run, {"steps": 30, "stop_at": 20}, data=corpus)
    assert "has reached step 20, and --stop-at is 20" in finished


def damage(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def test_a_finished_run_whose_last_checkpoint_is_damaged_is_not_finished(straight, tmp_path):
    run = shutil.copytree(straight.run, tmp_path / "run", symlinks=True)
    damage(Store(run).path(12) / "model.safetensors")
    resumed = resume(run)
    assert resumed.code == 0 and resumed.event("resume")["from_step"] == 9, resumed.message
    assert resumed.files == straight.files
    for step in Store(run).steps():
        damage(Store(run).path(step) / "state.json")
    refused = resume(run)
    assert refused.code == 2 and "None of the checkpoints" in refused.message
    assert "Restore one from a backup" in refused.message and "--checkpoint" not in refused.message


def test_what_works_with_the_weights_alone_and_what_does_not(ended, tmp_path):
    run = shutil.copytree(ended.run, tmp_path / "run", symlinks=True)
    before = cs.load(run).logits([1, 2])
    assert prune(run, weights_only=True).kept == Store(run).steps()
    assert (cs.load(run).logits([1, 2]) == before).all()
    assert cs.evaluate(run, max_tokens=100).tokens == 100
    assert cs.Run(run).export("hf", tmp_path / "hf").is_dir() and open_source(run).shape.width == 32
    _, finished = session.resumed_run(run, {}, data=None)
    assert "is finished: step 20 of 20" in finished
    with pytest.raises(InputError, match=r"step-00000020 holds the weights alone.*--from"):
        session.resumed_run(run, {"steps": 30}, data=None)


def test_stop_at_saves_and_ends_without_touching_the_schedule(corpus, tmp_path):
    stopped = train_whole(corpus, tmp_path / "run", steps=20, stop_at=7, save_every=100, eval_every=100)
    assert Store(stopped.run).steps() == [7]
    assert [step for step, *_ in stopped.evaluations] == [0, 7]
    assert stopped.event("end")["reason"] == "stop_at"
    assert [r["lr"] for r in stopped.of("step")] == [learning_rate(n, stopped.config) for n in range(1, 8)]
    assert stopped.config.steps == 20 and stopped.config.stop_at is None
    resumed = resume(stopped.run)
    assert resumed.of("step")[-1]["step"] == 20
    assert [r["lr"] for r in resumed.of("step")] == [learning_rate(n, stopped.config) for n in range(1, 21)]
    assert resumed.of("event")[-1]["reason"] == "done"


def test_a_run_stops_early_at_the_same_step_after_interruptions(corpus, tmp_path):
    # so small a rate changes no weight: no evaluation after the first is better
    options = dict(steps=40, eval_every=3, save_every=40, lr=1e-30, early_stop=3)
    straight = train_whole(corpus, tmp_path / "straight", **options)
    assert straight.event("end")["reason"] == "early_stop" and straight.of("step")[-1]["step"] == 9
    assert "Stopped early at step 9: no better validation loss for 3 evaluations" in straight.message
    run = train_whole(corpus, tmp_path / "run", **options, stop_at=4).run  # evaluated at 4 too, which does not count
    resumed = resume(run)
    assert resumed.evaluations[-1][0] == resumed.of("step")[-1]["step"] == 9 and resumed.files == straight.files

    _, finished = session.resumed_run(run, {}, data=None)
    assert (
        "was stopped early at step 9 of 40" in finished and "--early-stop is 3. Go on with --early-stop 6" in finished
    )
    for early_stop in (4, None):
        plan, finished = session.resumed_run(run, {"early_stop": early_stop}, data=None)
        assert finished is None and plan.config.early_stop == plan.changes["early_stop"] == early_stop


def test_resume_auto_may_switch_early_stopping_off(ended, tmp_path):
    run = shutil.copytree(ended.run, tmp_path / "run", symlinks=True)
    plan, _ = session.make_plan(None, {"early_stop": 7, "steps": 30}, run=run, resume="auto")
    assert plan.config.early_stop == 7
    change_config(run, plan.config, plan.prepared)
    plan, _ = session.make_plan(None, {"early_stop": 0, "steps": 30}, run=run, resume="auto")
    assert plan.config.early_stop is None
    with pytest.raises(InputError, match=r"was begun with --clip 1\.0, and 0 was given"):
        session.make_plan(None, {"clip": 0, "steps": 30}, run=run, resume="auto")


def test_only_better_evaluations_keep_a_run_going():
    progress = Progress()
    for val_loss in (math.nan, 3.0, 2.0, 2.0, math.nan, 2.5):
        progress.note(val_loss)
    assert (progress.regular_best, progress.stale) == (2.0, 3)
    progress.note(1.5)
    assert (progress.regular_best, progress.stale) == (1.5, 0)


def test_new_steps_on_a_resume_replan_the_schedule_as_an_event(corpus, tmp_path):
    run = train_whole(corpus, tmp_path / "run", steps=10, stop_at=6, warmup=2).run
    resumed = resume(run, steps=14)
    assert resumed.code == 0, resumed.message
    event = resumed.event("replan")
    assert (event["step"], event["steps"]) == (6, 14)
    assert resumed.config.steps == 14
    rates = [r["lr"] for r in resumed.of("step")]
    before = resumed.config.model_copy(update={"steps": 10})
    assert rates[:6] == [learning_rate(n, before) for n in range(1, 7)]
    assert rates[6:] == [learning_rate(n, resumed.config) for n in range(7, 15)]
    longer = resume(run, steps=15)  # a finished run goes on too
    assert longer.of("step")[-1]["step"] == 15


def test_a_resume_takes_the_newest_good_checkpoint_says_what_it_refused_and_cuts_a_torn_line_off(
    straight, corpus, tmp_path
):
    run = train_whole(corpus, tmp_path / "run", steps=12, save_every=3, eval_every=3, stop_at=9).run
    damage(Store(run).path(9) / "model.safetensors")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind":"step","step":10,"lo')  # torn by a death
    resumed = resume(run)
    assert resumed.code == 0, resumed.message
    assert resumed.event("resume")["from_step"] == 6
    assert "step-00000009 is damaged: model.safetensors" in resumed.event("refused")["message"]
    assert (resumed.curve, resumed.files) == (straight.curve, straight.files)
    assert resumed.evaluations == straight.evaluations
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if '"kind":"step"' in line]
    assert steps == [*range(1, 10), *range(7, 13)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 64}, "was begun with --width 32, and 64 was given"),
        ({"layers": 2}, "--layers 1, and 2"),
        ({"spheres": 2}, "--spheres 4, and 2"),
        ({"batch_size": 8}, "--batch-size 4, and 8"),
        ({"seed": 1}, "--seed 1337, and 1"),
        ({"steps": 19}, "--steps 19 is before step 20"),
        ({"workers": 5}, "--workers 5 are more than the run's 4 spheres. Give 4 or fewer"),
    ],
)
def test_a_resume_with_another_configuration_is_refused(ended, given, message):
    with pytest.raises(InputError, match=message):
        session.resumed_run(ended.run, given, data=None)


def test_the_same_options_given_again_are_no_other_configuration(ended, corpus):
    plan, _ = session.resumed_run(ended.run, dict(TINY, steps=30, clip=1.0), data=corpus)
    assert plan.config.steps == 30


def test_a_resume_with_other_data_is_refused(ended, char_corpus):
    with pytest.raises(InputError, match="was begun with other data"):
        session.resumed_run(ended.run, {"steps": 30}, data=char_corpus)


@pytest.mark.parametrize("tokenizer", ["byte", "char", "word", "bpe"])
def test_the_raw_text_that_a_run_was_begun_with_may_be_named_again(tmp_path, tokenizer):
    (tmp_path / "text.txt").write_text(text(60))
    options = dict(TINY, tokenizer=tokenizer, clip=0)
    plan = session.new_run(tmp_path / "text.txt", options, run=tmp_path / "run", file=None)
    again, finished = session.resumed_run(plan.run, options, data=tmp_path / "text.txt")
    assert again.prepared.fingerprint == plan.prepared.fingerprint and finished is None
    (tmp_path / "text.txt").write_text(text(61))
    with pytest.raises(InputError):
        session.resumed_run(plan.run, {}, data=tmp_path / "text.txt")


def test_a_run_that_goes_on_is_locked(ended):
    from cllm_spheres.checkpoint.lock import Lock

    with Lock(ended.run):
        outcome = resume(ended.run, steps=30)
    assert outcome.code == 2 and "A run is going on in" in outcome.message
    assert ended.config.steps == 20


def test_other_numerics_are_said_and_the_run_goes_on(corpus, tmp_path):
    run = train_whole(corpus, tmp_path / "run", steps=4, stop_at=2).run
    store = Store(run)
    saved = store.load(2)
    state = saved.state | {"fingerprint": saved.state["fingerprint"] | {"numba": "0.1"}}
    store.save(2, saved.model, saved.optimizer, state, saved.config, saved.tokenizer_path)
    refused = resume(run, exact=True)
    assert refused.code == 2 and "numba 0.1 -> " in refused.message
    assert Store(run).steps()[-1] == 2 and refused.of("step")[-1]["step"] == 2
    resumed = resume(run)
    assert resumed.code == 0
    (difference,) = resumed.event("fingerprint")["differences"]
    assert difference.startswith("numba 0.1 -> ")

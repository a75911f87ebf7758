"""Another number of workers while a run goes on; runs that begin or go on by themselves; runs that hurt themselves."""

from __future__ import annotations

import os
import re
import signal

import pytest

from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import InputError
from cllm_spheres.events import read
from cllm_spheres.training import session
from cllm_spheres.training.control import ask
from cllm_spheres.training.launch import Launch
from tests.runs import (
    TINY,
    WAIT_S,
    Family,
    Outcome,
    begin,
    command,
    command_here,
    finished,
    resume,
    start,
    train_whole,
    wait_for_step,
    words,
)

STEPS = dict(spheres=7, batch_size=7, steps=12_000, eval_every=3000, save_every=3000, eval_tokens=200)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    return train_whole(corpus, tmp_path_factory.mktemp("undisturbed") / "run", **STEPS, workers=1)


def test_workers_come_and_go_while_a_run_goes_on_and_its_bits_stay(undisturbed, corpus, tmp_path):
    run = tmp_path / "run"
    launch = start(corpus, run, **STEPS, workers=2)
    for step, before, workers in ((100, 2, 7), (1500, 7, 1), (3500, 1, 3)):
        wait_for_step(run, step)
        told = ask(run, {"workers": workers})
        assert re.match(rf"{workers} workers? from step [\d,]+ on, {before} before\. The bits stay the same\.", told)
        Family.of(os.getpid(), workers)
    assert ask(run, {"workers": 3}) == "It has 3 workers already."
    said = command_here("scale", run, "--workers", 4, cwd=tmp_path)
    assert said.returncode == 0 and said.stdout.startswith("4 workers from step")
    for workers, message in ((8, "this run has 7 spheres, and takes 1 to 7"), (0, "")):
        refused = command_here("scale", run, "--workers", workers, cwd=tmp_path)
        assert refused.returncode == 2 and message in refused.stderr and "Traceback" not in refused.stderr
    outcome = finished(launch)
    assert outcome.code == 0, outcome.message
    assert [r["workers"] for r in outcome.of("event") if r["event"] == "scaled"] == [7, 1, 3, 4]
    assert outcome.config.workers == 4  # for a later resume
    assert outcome.bits == undisturbed.bits


def test_a_wish_that_was_given_up_is_not_fulfilled(corpus, tmp_path):
    run = tmp_path / "run"
    launch = start(corpus, run, **STEPS | {"steps": 60_000}, workers=2)
    wait_for_step(run, 10)
    os.kill(launch.process.pid, signal.SIGSTOP)  # as with Ctrl+Z
    try:
        asking = begin("scale", run, "--workers", 5)
        assert "Waiting until the step" in asking.stderr.readline()
        asking.send_signal(signal.SIGINT)
        _, error = asking.communicate(timeout=WAIT_S)
        assert asking.returncode == 130 and "stays as it is" in error
    finally:
        os.kill(launch.process.pid, signal.SIGCONT)
    step = read(run / "metrics.jsonl")[-1]["step"]
    wait_for_step(run, step + 200)
    launch.pass_on(signal.SIGTERM)
    assert "scaled" not in [r["event"] for r in finished(launch).of("event")]


def test_where_no_run_goes_on_that_is_said(undisturbed):
    with pytest.raises(InputError, match=r"No run is going on in .* Go on with it: cllm-spheres train --resume"):
        ask(undisturbed.run, {"workers": 2})


def test_the_same_command_begins_goes_on_and_says_that_it_has_ended(corpus, tmp_path):
    straight = train_whole(corpus, tmp_path / "straight", **STEPS | {"steps": 300})
    options = [*words(TINY | STEPS | {"steps": 300, "warmup": 30}), "--clip", "1.0", "--plain"]
    call = ["train", corpus, *options, "--run", tmp_path / "run", "--resume"]
    first = command(*call, "auto", "--stop-at", 120)
    assert first.returncode == 0, first.stderr
    assert Store(tmp_path / "run").steps() == [120]
    second = command(*call, "auto")
    assert second.returncode == 0 and "Resumed at step 120 from step-00000120." in second.stdout, second.stderr
    assert Outcome(tmp_path / "run", 0, "").files == straight.files
    third = command_here(*call, "auto", cwd=tmp_path)
    assert third.returncode == 0 and "is finished: step 300 of 300" in third.stdout
    other = command_here(*call, "auto", "--layers", 2, cwd=tmp_path)
    assert other.returncode == 2 and "was begun with --layers 1, and 2 was given" in other.stderr
    alone = command_here("train", "--resume", "auto", cwd=tmp_path)
    assert alone.returncode == 2 and "--resume auto needs --run" in alone.stderr
    equals = command_here(*call[:-1], "--resume=auto", cwd=tmp_path)
    assert equals.returncode == 0 and "is finished" in equals.stdout


def test_auto_takes_what_is_left_of_a_run_that_died_while_it_was_made(corpus, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".config.toml.new").write_text("steps = ")
    plan, done = session.make_plan(corpus, TINY | {"steps": 3}, run=run, resume="auto")
    assert not plan.resume and done is None
    outcome = finished(Launch().obey(plan))
    assert outcome.code == 0, outcome.message


def test_a_file_of_options_begins_and_continues_too(corpus, tmp_path):
    (tmp_path / "options.toml").write_text('preset = "minimal"\nepochs = 1\ndtype = "auto"\nlr = 0.02\n')
    first, _ = session.make_plan(None, {}, run=tmp_path / "run", resume="auto", file=tmp_path / "options.toml")
    again, _ = session.make_plan(None, {}, run=tmp_path / "run", resume="auto", file=tmp_path / "options.toml")
    assert again.resume and again.config == first.config.model_copy(update={"epochs": None})  # as steps now


def test_a_run_that_hurts_itself_ends_in_the_same_bits_and_says_what_did_not_happen(undisturbed, corpus, tmp_path):
    faults = ["forward:10:1:kill", "barrier:500:6:segv", "save:3000:0:slow", "save:2999:0:kill"]
    launch = Launch().obey(session.new_run(corpus, TINY | STEPS, run=tmp_path / "run", file=None, faults=faults))
    outcome = finished(launch)
    assert outcome.code == 0, outcome.message
    assert outcome.event("unfired")["faults"] == ["save:2999:0:kill"]
    assert len([r for r in outcome.of("event") if r["event"] == "recovered"]) == 2
    assert outcome.bits == undisturbed.bits


def test_a_fault_while_saving_ends_node_zero_and_the_resume_is_exact(undisturbed, corpus, tmp_path):
    options = TINY | STEPS
    plan = session.new_run(corpus, options, run=tmp_path / "run", file=None, faults=["save:6000:2:kill"])
    outcome = finished(Launch().obey(plan))
    assert outcome.code == 1 and "was ended by signal 9. Go on from the last checkpoint" in outcome.message
    assert Store(tmp_path / "run").steps() == [3000]
    resumed = resume(tmp_path / "run")
    assert resumed.event("resume")["from_step"] == 3000
    assert resumed.bits == undisturbed.bits


def test_a_run_that_fails_saves_its_last_whole_step(corpus, tmp_path):
    plan = session.new_run(corpus, TINY | STEPS, run=tmp_path / "run", file=None, faults=["backward:1234:5:kill"] * 3)
    outcome = finished(Launch().obey(plan))
    assert outcome.code == 1 and "Sphere 5 ended 3 workers in step 1234" in outcome.message
    assert Store(tmp_path / "run").steps()[-1] == 1233
    assert f"The last checkpoint is {Store(tmp_path / 'run').path(1233)}" in outcome.message


def test_a_fault_that_cannot_be_leaves_no_run_behind(corpus, tmp_path):
    asked = ["train", corpus, *words(TINY), "--steps", 5, "--run", tmp_path / "run", "--fault", "forward:9:0:kill"]
    refused = command_here(*asked, cwd=tmp_path)
    assert refused.returncode == 2 and "step 9 is not among those of this run, 1 to 5" in refused.stderr
    assert not (tmp_path / "run").exists()


def test_a_number_that_is_none_stops_the_run_and_names_the_sphere(corpus, tmp_path):
    plan = session.new_run(corpus, TINY | STEPS, run=tmp_path / "run", file=None, faults=["backward:50:3:nan"])
    outcome = finished(Launch().obey(plan))
    assert outcome.code == 1 and "Step 50: the gradient of sphere 3 is not finite" in outcome.message

"""A run folder that is not what this program wrote: what is said, and that nothing is left."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cllm_spheres.checkpoint.checkpoint import MODEL, OPTIMIZER, STATE, TOKENIZER
from cllm_spheres.checkpoint.lock import Lock
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import InputError
from cllm_spheres.inference.model import load
from cllm_spheres.training import folder, new_run, session
from tests.faults.malformed import MODEL as OPTIONS
from tests.faults.malformed import make_run, reseal_checkpoint


@pytest.fixture(scope="module")
def good(char_corpus, tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("good") / "run", char_corpus)


@pytest.fixture
def run(good, tmp_path):
    """A copy of a good run, with checkpoints of the steps 1 and 2."""
    return shutil.copytree(good, tmp_path / "run", symlinks=True)


def change(run, old, new):
    """Replaces a line of config.toml."""
    path = run / "config.toml"
    lines = path.read_text().splitlines()
    assert sum(line.startswith(old) for line in lines) == 1
    path.write_text("\n".join(new if line.startswith(old) else line for line in lines))


def newest(run, **changes):
    """What a resume would begin with, where these values of config.toml were others."""
    config, where = folder.read_config(run)
    return folder.newest_checkpoint(run, config.model_copy(update=changes), where["data_fingerprint"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("workers =", "", "workers missing"),
        ("eval_tokens =", "", "eval_tokens missing"),
        ("heads =", "heads = 3", "--heads 3 does not divide"),
        ("batch_size =", "batch_size = 1", "do not grow"),
        ("data =", "data = 5", "data is 5"),
        ("data_fingerprint =", "data_fingerprint = [1]", "data_fingerprint is"),
        ("vocab_size =", "vocab_size = 4", "says vocab_size 4"),
    ],
)
def test_a_configuration_that_cannot_be_a_runs_is_refused(run, old, new, message):
    change(run, old, new)
    with pytest.raises(InputError, match=message):
        session.make_plan(None, {"steps": 9}, run=run, resume=True)


def test_data_of_another_kind_in_a_file_of_options_is_refused(tmp_path):
    (tmp_path / "options.toml").write_text("data = 5\n")
    with pytest.raises(InputError, match="data = 5: it must be the path"):
        session.make_plan(None, {}, run=tmp_path / "run", file=tmp_path / "options.toml")


def test_options_as_texts_are_the_numbers_they_say(run):
    plan, _ = session.make_plan(None, {"steps": "9", "workers": "1"}, run=run, resume=True)
    assert plan.config.steps == 9 and plan.config.workers == 1


def test_a_name_that_is_too_long_is_refused(run, char_corpus, tmp_path):
    name = tmp_path / ("x" * 300)
    for act in (
        lambda: session.make_plan(char_corpus, OPTIONS | {"steps": 3}, run=name),
        lambda: session.make_plan(None, {}, run=name, resume=True),
        lambda: load(name),
    ):
        with pytest.raises(InputError, match="File name too long"):
            act()


def test_runs_without_a_name_that_begin_in_the_same_second_have_different_names(char_corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folder.time, "strftime", lambda form: "now")
    plan = session.new_run(char_corpus, OPTIONS | {"steps": 3}, run=None, file=None)
    assert plan.run == Path("runs/now")
    assert session.new_run(char_corpus, OPTIONS | {"steps": 3}, run=None, file=None).run == Path("runs/now-2")
    names = iter([Path("runs/now-3"), plan.run, Path("runs/now-3")])  # "now" seemed free
    monkeypatch.setattr(new_run, "new_names", lambda preset: names)
    with new_run.NewRun(None, None) as new:
        assert new.fill(plan.config, plan.prepared, {}) == Path("runs/now-3")
    assert folder.read_config(plan.run)[0] == plan.config


def test_two_runs_of_one_name_are_not_made_at_once(char_corpus, tmp_path):
    (tmp_path / "run").mkdir()
    with Lock(tmp_path / "run"), pytest.raises(InputError, match="A run is going on in"):  # the other is being made
        session.new_run(char_corpus, OPTIONS | {"steps": 3}, run=tmp_path / "run", file=None)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
    session.new_run(char_corpus, OPTIONS | {"steps": 3}, run=tmp_path / "run", file=None)  # it was given up


@pytest.mark.parametrize(("name", "content"), [("metrics.jsonl", '{"loss": 1.0}\n'), ("lock", "words of mine\n" * 3)])
def test_a_folder_with_somebody_elses_file_of_a_runs_name_is_refused_and_left_alone(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match="exists already"), new_run.NewRun(tmp_path, None) as run:
        run.progress("read", 1, 2)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, content)]


@pytest.mark.parametrize("name", ["\U0001f600", "\x7f", 'a"b'])
def test_text_under_any_name_is_found_again_by_a_resume(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / name).mkdir()
    (tmp_path / name / "a.txt").write_text("some words\n" * 30)
    session.make_plan(tmp_path / name, OPTIONS | {"steps": 3, "tokenizer": "byte"}, run=tmp_path / "run")
    shutil.rmtree(tmp_path / "cache")
    assert session.make_plan(None, {}, run=tmp_path / "run", resume=True)[1] is None


def test_text_whose_name_is_not_utf8_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / os.fsdecode(b"a\xff.txt")
    path.write_text("some words\n" * 30)
    with pytest.raises(InputError, match="is not UTF-8"):
        session.make_plan(path, OPTIONS | {"steps": 3, "tokenizer": "byte"}, run=tmp_path / "run")
    assert list(tmp_path.iterdir()) == [path]


def test_a_resume_compares_all_that_shapes_the_weights(run):
    """A changed learning rate went on silently."""
    config = folder.read_config(run)[0]
    free = {"preset", "workers", "steps", "epochs", "stop_at", "early_stop", "eval_every", "eval_tokens", "save_every",
            "keep", "tokenizer", "recompute"}  # fmt: skip
    for name, value in config:
        other = 2 if value is None else not value if type(value) is bool else value * 2 or 0.5
        if name in free:
            assert newest(run, **{name: other})[0].step == 2
        else:
            with pytest.raises(InputError, match=r"config\.toml says .* was made with"):
                newest(run, **{name: other})
    with pytest.raises(InputError, match=r"config\.toml says lr 0\.5, but .*step-00000002 was made with 0\.001"):
        newest(run, lr=0.5)
    with pytest.raises(InputError, match="says data other"):
        folder.newest_checkpoint(run, config, "other")
    assert newest(run, steps=9, warmup=3)[0].step == 2  # new --steps may cut the warm-up


def test_a_checkpoint_of_an_older_version_is_compared_in_what_it_has(run):
    path = Store(run).path(2)
    state = json.loads((path / STATE).read_text())
    for key in ("lr", "schedule", "steps"):
        del state[key]
    (path / STATE).write_text(json.dumps(state))
    reseal_checkpoint(path, 2)
    assert newest(run, lr=0.5, schedule="wsd")[0].step == 2
    with pytest.raises(InputError, match="says seed 5"):
        newest(run, seed=5)


@pytest.mark.parametrize("what", ["empty", "cut", "changed"])
def test_a_checkpoint_that_is_not_whole_is_not_reached(run, what):
    if what == "empty":
        Store(run).path(99_999).mkdir()
    else:
        shutil.copytree(Store(run).path(2), Store(run).path(99_999))
        (Store(run).path(99_999) / MODEL).write_bytes(b"")
    if what == "changed":  # its size is right
        Store(run).prune(1)
        shutil.rmtree(Store(run).path(99_999))
        content = Store(run).load(2)
        Store(run).save(
            99_999, content.model, content.optimizer, content.state | {"step": 99_999, "evaluated": 99_999},
            content.config, content.tokenizer_path,
        )  # fmt: skip
        path = Store(run).path(99_999) / MODEL
        path.write_bytes(path.read_bytes()[:-1] + b"\x77")
    plan, finished = session.make_plan(None, {"steps": 30}, run=run, resume=True)
    assert finished is None and plan.config.steps == 30
    assert session.make_plan(None, {"stop_at": 3}, run=run, resume=True)[1] is None
    assert "has reached step 2" in session.make_plan(None, {"stop_at": 2}, run=run, resume=True)[1]
    assert newest(run)[0].step == 2


# --- checkpoints whose hashes are true


@pytest.mark.parametrize("key", ["applied", "total_tokens", "evaluated", "best_loss", "fingerprint", "worse", "step"])
def test_a_state_without_what_a_resume_needs_is_refused(run, key):
    path = Store(run).path(2)
    state = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps(state | {key: "x"}))
    reseal_checkpoint(path, 2)
    with pytest.raises(InputError, match=key):
        newest(run)


@pytest.mark.parametrize("file", [MODEL, OPTIMIZER])
def test_tensors_of_another_model_are_refused(run, file):
    store = Store(run)
    saved = store.load(2)
    arrays = {MODEL: saved.model, OPTIMIZER: saved.optimizer}
    arrays[file]["other"] = np.zeros(3, np.float32)
    store.save(2, arrays[MODEL], arrays[OPTIMIZER], saved.state, saved.config, saved.tokenizer_path)
    with pytest.raises(InputError, match="other"):
        newest(run)


@pytest.mark.parametrize(
    "sizes",
    [{"layers": 10**12}, {"heads": 3}, {"heads": 0}, {"ff_width": 10**12}, {"width": 8.0}, {"width": -8}, {"bias": 1},
     {"vocab_size": 2**62}, {"more": 1}],
)  # fmt: skip
def test_a_shape_that_is_not_that_of_the_tensors_is_refused_before_memory_is_taken(run, sizes):
    path = Store(run).path(2)
    state = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps(state | {"layout": state["layout"] | sizes}))
    reseal_checkpoint(path, 2)
    with pytest.raises(InputError, match="does not hold a model of this kind"):
        load(run)


def test_a_tokenizer_of_another_vocabulary_is_refused(run):
    path = Store(run).path(2)
    (path / TOKENIZER).write_text(json.dumps({"kind": "byte"}))
    reseal_checkpoint(path, 2)
    with pytest.raises(InputError, match="its tokenizer has 257 tokens, the model 6"):
        load(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml"])
def test_a_pipe_in_the_place_of_a_runs_file_makes_nobody_wait(run, name):
    (run / name).unlink()
    os.mkfifo(run / name)
    shutil.rmtree(run / "checkpoints")
    if name == "metrics.jsonl":
        assert newest(run) == (None, [])
    else:
        with pytest.raises(InputError, match=r"no config\.toml"):
            folder.read_config(run)


def test_records_that_are_nested_too_deeply_are_left_out(run):
    from cllm_spheres.events import read

    (run / "metrics.jsonl").write_text('{"kind":"step","step":1}\n' + "[" * 100_000 + "\n")
    assert read(run / "metrics.jsonl") == [{"kind": "step", "step": 1}]

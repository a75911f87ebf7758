"""Runs that begin from another model: its weights, shape and tokenizer, and the same bits as ever."""

from __future__ import annotations

import json
import shutil
import tomllib

import numpy as np
import pytest

from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import InputError
from cllm_spheres.exchange.importing import import_model
from cllm_spheres.exchange.source import open_source
from cllm_spheres.inference.model import load
from cllm_spheres.text.prepare import prepare
from cllm_spheres.text.tokenizer import load_tokenizer
from cllm_spheres.training import session
from cllm_spheres.training.launch import Launch
from tests.exchange.models import GOLDEN, make_run, tokenizers
from tests.runs import Outcome, finished, resume, text, train_whole

OPTIONS = dict(batch_size=4, spheres=4, workers=2, lr=1e-2, dtype="fp32", steps=12, eval_every=4, save_every=4, seed=5)


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text(text(60))
    return path


def begin(data, run, model, **options) -> Launch:
    return Launch().obey(session.new_run(data, OPTIONS | options, run=run, file=None, start_from=model))


def begun(data, run, model, **options) -> Outcome:
    outcome = finished(begin(data, run, model, **options))
    assert outcome.code == 0, outcome.message
    return outcome


@pytest.fixture(scope="module")
def further(book, tmp_path_factory):
    """A model of transformers, trained further."""
    return begun(book, tmp_path_factory.mktemp("further") / "run", GOLDEN / "plain", keep=10)


def test_the_first_weights_are_the_models_and_training_lowers_the_loss(further):
    first = further.weights(0)
    assert all(np.array_equal(first[name], values) for name, values in open_source(GOLDEN / "plain").tensors())
    moments = Store(further.run).load(0).optimizer
    assert not any(array.any() for array in moments.values())
    assert further.evaluations[-1][1] < further.evaluations[0][1] - 0.1
    assert further.evaluations[0][0] == 0


def test_shape_and_tokenizer_are_the_models_and_config_toml_says_where_it_lay(further):
    values = tomllib.loads((further.run / "config.toml").read_text())
    shape = [values[name] for name in ("vocab_size", "block_size", "layers", "heads", "width", "ff_width", "bias")]
    assert shape == [280, 16, 2, 2, 16, 64, True] and values["tokenizer"] == "bpe"
    assert values["from"] == str(GOLDEN / "plain")
    assert values["from_fingerprint"] == open_source(GOLDEN / "plain").fingerprint
    texts, ids = json.loads((GOLDEN / "plain/texts.json").read_text())
    tokenizer = load_tokenizer(Store(further.run).load("last").tokenizer_path)
    assert [tokenizer.encode(one) for one in texts] == ids


def test_a_resume_gives_the_same_bits_without_the_model(further, book, tmp_path):
    model = shutil.copytree(GOLDEN / "plain", tmp_path / "model")
    begun(book, tmp_path / "run", model, keep=10, stop_at=4)
    shutil.rmtree(model)
    for step in Store(tmp_path / "run").steps():
        if step:
            shutil.rmtree(Store(tmp_path / "run").path(step))
    assert resume(tmp_path / "run").bits == further.bits  # from step 0


def test_a_resume_before_anything_was_saved_reads_the_model_again(further, book, tmp_path):
    model = shutil.copytree(GOLDEN / "plain", tmp_path / "model")
    session.new_run(book, OPTIONS | dict(keep=10), run=tmp_path / "run", file=None, start_from=model)
    assert resume(tmp_path / "run").bits == further.bits


def test_a_model_that_has_changed_meanwhile_is_refused(book, tmp_path):
    model = shutil.copytree(GOLDEN / "plain", tmp_path / "model")
    session.new_run(book, OPTIONS, run=tmp_path / "run", file=None, start_from=model)
    shutil.copy(GOLDEN / "old/model.safetensors", model / "model.safetensors")
    plan, _ = session.resumed_run(tmp_path / "run", {}, data=None)
    code, message = Launch().obey(plan).finish()
    assert code == 2 and "is not the model that" in message


def test_its_config_toml_does_the_run_once_more_with_the_same_bits_from_another_number_of_workers(further, tmp_path):
    plan = session.new_run(None, {"workers": 1}, run=tmp_path / "run", file=further.run / "config.toml")
    assert finished(Launch().obey(plan)).bits == further.bits


def test_text_that_is_gone_from_the_cache_is_prepared_again_with_the_models_tokenizer(book, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    plan = session.new_run(book, OPTIONS, run=tmp_path / "run", file=None, start_from=GOLDEN / "plain")
    shutil.rmtree(plan.prepared.folder.parent)
    again, finished_already = session.resumed_run(tmp_path / "run", {}, data=None)
    assert finished_already is None and again.prepared.fingerprint == plan.prepared.fingerprint


def test_an_imported_run_and_our_own_runs_can_be_begun_from(further, book, tmp_path):
    import_model(GOLDEN / "plain", tmp_path / "imported")
    assert begun(book, tmp_path / "one", tmp_path / "imported", keep=10).bits == further.bits
    more = begun(book, tmp_path / "two", further.run, steps=2)
    best = Store(further.run).best_step()
    assert all(np.array_equal(more.weights(0)[name], values) for name, values in further.weights(best).items())
    again = begun(book, tmp_path / "three", Store(further.run).path(4), steps=1)
    assert all(np.array_equal(again.weights(0)[name], values) for name, values in further.weights(4).items())


def test_a_shorter_block_takes_the_first_positions(book, tmp_path):
    outcome = begun(book, tmp_path / "run", GOLDEN / "plain", block_size=8, steps=1)
    whole = dict(open_source(GOLDEN / "plain").tensors())
    assert np.array_equal(outcome.weights(0)["wpe.weight"], whole["wpe.weight"][:8])
    assert load(tmp_path / "run").shape.block_size == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(width=32), "--width 32 contradicts --from: .* has width 16"),
        (dict(layers=3), "--layers 3 contradicts --from: .* has layers 2"),
        (dict(heads=4), "--heads 4 .* has heads 2"),
        (dict(ff_width=32), "--ff-width 32 .* has ff_width 64"),
        (dict(bias=False), "--bias False .* has bias True"),
        (dict(vocab_size=300), "--vocab-size 300 .* has vocab_size 280"),
        (dict(tokenizer="char"), "--tokenizer 'char' .* has tokenizer 'bpe'"),
        (dict(block_size=17), "--block-size 17: .* has 16 positions"),
    ],
)
def test_options_that_contradict_the_model_are_refused_with_both_numbers(options, said, book, tmp_path):
    with pytest.raises(InputError, match=said):
        session.new_run(book, OPTIONS | options, run=tmp_path / "run", file=None, start_from=GOLDEN / "plain")
    assert not (tmp_path / "run").exists()


def test_a_model_that_holds_nan_is_refused_and_leaves_nothing(book, tmp_path):
    model = make_run(tmp_path / "model", tokenizers()["byte"])
    model["h.1.mlp.c_fc.weight"][2, 3] = np.nan
    saved = Store(tmp_path / "model").load(3)
    Store(tmp_path / "model").save(3, model, saved.optimizer, saved.state, saved.config, saved.tokenizer_path)
    with pytest.raises(InputError, match=r"h\.1\.mlp\.c_fc\.weight in .*step-00000003 holds NaN or infinity"):
        session.new_run(book, OPTIONS, run=tmp_path / "runs" / "run", file=None, start_from=tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_options_that_say_the_same_are_taken(book, tmp_path):
    same = dict(width=16, layers=2, heads=2, ff_width=64, bias=True, vocab_size=280, tokenizer="bpe", block_size=16)
    plan = session.new_run(book, OPTIONS | same, run=tmp_path / "run", file=None, start_from=GOLDEN / "plain")
    assert plan.config.width == 16


def test_a_preset_gives_way_to_the_models_shape(book, tmp_path):
    plan = session.new_run(
        book, OPTIONS | {"preset": "tiny"}, run=tmp_path / "run", file=None, start_from=GOLDEN / "plain"
    )
    assert (plan.config.layers, plan.config.width, plan.config.ff_width) == (2, 16, 64)


def test_prepared_text_needs_the_models_tokenizer(further, book, tmp_path):
    prepare([book], tmp_path / "bytes", tokenizer="byte")
    with pytest.raises(InputError, match=r"another tokenizer \(byte, 257 tokens\) than the model's \(bpe, 280\)"):
        session.new_run(tmp_path / "bytes", OPTIONS, run=tmp_path / "run", file=None, start_from=GOLDEN / "plain")
    source = open_source(GOLDEN / "plain")
    prepare([book], tmp_path / "same", tokenizer="bpe", vocab_size=280, given=source.tokenizer_json)
    outcome = begun(tmp_path / "same", tmp_path / "run", GOLDEN / "plain", keep=10)
    assert outcome.curve == further.curve


@pytest.mark.parametrize("processes", [0, 2])
def test_a_character_that_the_models_vocabulary_lacks_is_named(processes, tmp_path, monkeypatch):
    from cllm_spheres.text import prepare as module

    make_run(tmp_path / "model", tokenizers()["char"])
    (tmp_path / "text.txt").write_text("The spheres \u0416 turn. " * 200)
    if processes:
        monkeypatch.setattr(module, "INLINE_BYTES", 0)
        monkeypatch.setattr(module, "BYTES_PER_PROCESS", 100)
    with pytest.raises(InputError, match="has no '\u0416'"):
        session.new_run(tmp_path / "text.txt", OPTIONS, run=tmp_path / "run", file=None, start_from=tmp_path / "model")
    assert not (tmp_path / "run").exists()


def test_resume_auto_with_from_begins_and_goes_on_and_refuses_another_model(book, tmp_path):
    ask = dict(run=tmp_path / "run", resume="auto", start_from=GOLDEN / "plain")
    plan, _ = session.make_plan(book, OPTIONS, **ask)
    assert not plan.resume
    again, _ = session.make_plan(book, OPTIONS, **ask)
    assert again.resume
    with pytest.raises(InputError, match=r"began from .*plain, and --from .*old was given"):
        session.make_plan(book, OPTIONS, **(ask | {"start_from": GOLDEN / "old"}))
    with pytest.raises(InputError, match="--from is for a new run"):
        session.make_plan(None, {}, run=tmp_path / "run", resume=True, start_from=GOLDEN / "plain")


def test_an_imported_run_that_was_never_trained_cannot_be_resumed(tmp_path):
    import_model(GOLDEN / "plain", tmp_path / "imported")
    with pytest.raises(InputError, match=r"was imported and has no text of its own.*--from"):
        session.resumed_run(tmp_path / "imported", {}, data=None)


def test_a_training_that_makes_the_model_worse_keeps_what_it_began_with(further, book, tmp_path):
    worse = begun(book, tmp_path / "run", further.run, lr=3.0, keep=1)
    losses = [evaluation[1] for evaluation in worse.evaluations]
    assert min(losses[1:]) > losses[0]
    assert Store(worse.run).best_step() == 0 and Store(worse.run).steps() == [0, 12]
    assert np.array_equal(load(worse.run).logits([1, 2]), load(further.run).logits([1, 2]))


def test_a_run_that_begins_anew_has_no_step_0(corpus, tmp_path):
    assert 0 not in Store(train_whole(corpus, tmp_path / "run", steps=2, keep=9).run).steps()

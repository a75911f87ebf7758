"""The library as a caller uses it: from a script, from one line, from a thread, and beside anything else."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import cllm_spheres as cs
from cllm_spheres import api
from cllm_spheres.errors import InputError, RunFailed
from cllm_spheres.events import read
from cllm_spheres.text.handed import as_paths
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.text.tokenizer import ByteTokenizer
from cllm_spheres.training.folder import Plan, read_config
from cllm_spheres.training.hooks import Hooks
from cllm_spheres.training.session import prepare_data
from tests.exchange.models import GOLDEN, SHAPE, weights
from tests.naive import naive_hidden_states, naive_logits, naive_loss_and_gradients
from tests.runs import TINY, corpus, text, wait_until  # noqa: F401

SCRIPT = """
import cllm_spheres as cs

run = cs.train("folder", preset="small", workers=2, layers=1, width=32, steps=5, tokenizer="byte")
model = cs.load(run.path)
print(model.generate("import ", tokens=8, seed=7, temperature=0))
print("records", len(run.metrics()), run.metrics("eval")[-1]["step"])
"""


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):  # noqa: F811
    path = tmp_path_factory.mktemp("api") / "run"
    return cs.train(corpus, run=path, quiet=True, **TINY, steps=40)


@pytest.fixture
def model(run):
    return run.load()


def python(*arguments, cwd):
    result = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text(text(60))
    return tmp_path


def test_the_example_works_from_a_script_without_a_main_guard(folder):
    (folder / "script.py").write_text("print('imported')\n" + SCRIPT)
    # names that a careless import would take for the real ones
    for name in ("numpy.py", "socket.py", "select.py", "numba.py"):
        (folder / "elsewhere").mkdir(exist_ok=True)
        (folder / "elsewhere" / name).write_text("raise SystemExit('the wrong module')")
    (folder / "elsewhere" / "folder").symlink_to(folder / "folder")
    out = python(folder / "script.py", cwd=folder / "elsewhere")
    assert out.count("imported") == 1  # the caller's script is never run again
    assert "\nimport " in out and out.splitlines()[-1] == "records 5 5"


def test_the_example_works_as_one_line_beside_threads_numpy_and_a_fork_server(folder):
    before = """
import multiprocessing, threading, time
import numpy as np
multiprocessing.set_start_method("forkserver")
busy = threading.Thread(target=lambda: [np.ones((200, 200)) @ np.ones((200, 200)) for _ in range(2000)])
busy.start()
"""
    out = python("-c", before + SCRIPT + "busy.join()", cwd=folder)
    assert out.splitlines()[-1] == "records 5 5"


def test_training_works_in_a_thread(corpus, tmp_path):  # noqa: F811
    results = []
    thread = threading.Thread(
        target=lambda: results.append(cs.train(corpus, run=tmp_path / "run", quiet=True, **TINY, steps=3))
    )
    thread.start()
    thread.join()
    assert [len(result.metrics()) for result in results] == [3]


def test_importing_is_light(tmp_path):
    code = "import sys, cllm_spheres as cs; cs.InputError; print(sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = python("-c", code, cwd=tmp_path)
    assert not any(f"'{name}'" in loaded for name in ("numpy", "numba", "pydantic", "rich", "typer", "tokenizers"))
    assert set(cs.__all__) <= set(dir(cs))


def test_a_run_tells_its_metrics_and_is_resumed(run, tmp_path):
    assert [record["step"] for record in run.metrics()] == list(range(1, 41))
    assert run.metrics()[-1]["loss"] < run.metrics()[0]["loss"]
    assert cs.train(run=run.path, resume=True, quiet=True).path == run.path  # it is finished
    with pytest.raises(InputError, match="begun with --width 32"):
        cs.train(run=run.path, resume=True, width=64)
    with pytest.raises(InputError, match="which run shall go on"):
        cs.train(resume=True)


def test_a_run_is_found_by_its_name_and_refuses_what_is_not_there(run, tmp_path):
    assert cs.Run(str(run.path)) == run and cs.Run(run) == run
    with pytest.raises(InputError, match=r"ru does not exist\. Did you mean .*run\?"):
        cs.Run(run.path.with_name("ru"))
    with pytest.raises(InputError, match="not the folder of a run"):
        cs.Run(tmp_path)
    with pytest.raises(InputError, match="no records of kind 'evals': did you mean 'eval'"):
        run.metrics("evals")
    for kind in ("step", "eval"):  # what pandas.DataFrame takes as a table without gaps
        records = run.metrics(kind)
        assert {tuple(record) for record in records} == {tuple(records[0])}
        assert all(isinstance(value, str | int | float) for record in records for value in record.values())


def test_texts_are_documents(tmp_path, capfd):
    lines = text(60).splitlines()
    run = cs.train(iter(lines), run=str(tmp_path / "run"), quiet=True, **TINY, steps=2, tokenizer="bpe", vocab_size=300)
    manifest = Prepared.open(read_config(run.path)[1]["data"]).manifest
    assert manifest["documents"] == len(lines)
    assert not os.path.exists(manifest["sources"][0])  # the texts are kept once, as tokens
    assert cs.train(lines, run=run.path, resume=True, steps=3, quiet=True).metrics()[-1]["step"] == 3
    with pytest.raises(InputError, match="begun with other data"):
        cs.train([*lines, "more"], run=run.path, resume=True, steps=4, quiet=True)
    assert capfd.readouterr() == ("", "")


def test_paths_are_files_or_prepared_folders(corpus, tmp_path):  # noqa: F811
    for name in "ab":
        (tmp_path / name).write_text(text(60, seed=ord(name)))
    with as_paths(tmp_path / name for name in "ab") as paths:
        assert prepare_data(paths, "byte", None, set(), None).manifest["documents"] == 2
    with as_paths([corpus]) as paths:
        assert prepare_data(paths, "byte", None, set(), None).folder == corpus
    with as_paths(str(corpus)) as path:
        assert path == corpus


def test_callbacks_see_every_record_and_may_save_and_stop(corpus, tmp_path):  # noqa: F811
    options = dict(TINY, steps=10**6, eval_every=10**6, save_every=10**6, keep=9, quiet=True)
    seen, threads = [], set()

    def on_step(record):
        seen.append(record)
        threads.add(threading.current_thread())
        return {300: "save", 3000: "stop"}.get(record["step"])

    run = cs.train(corpus, run=tmp_path / "run", on_step=on_step, on_eval=seen.append, **options)
    last = run.metrics()[-1]["step"]
    assert 3000 < last < 10**6 and threads == {threading.main_thread()}
    assert seen == [record for record in read(run.path / "metrics.jsonl") if record["kind"] in ("step", "eval")]
    saved = [record["step"] for record in run.metrics("event") if record["event"] in ("saved", "best")]
    assert 300 <= saved[0] < saved[-1] == last == run.metrics("eval")[-1]["step"]
    assert run.metrics("event")[-1]["reason"] == "asked"

    def fails(record):
        raise ZeroDivisionError(record["step"])

    with pytest.raises(ZeroDivisionError, match=str(last + 1)):  # what was before the resume is left out
        cs.train(run=run.path, resume=True, on_step=fails, quiet=True)
    assert cs.load(run.path, run.metrics()[-1]["step"])


def test_callbacks_of_another_kind_are_refused_in_words(tmp_path):
    with pytest.raises(InputError, match="on_eval is 5: give a function of one record"):
        cs.train(on_eval=5)
    (tmp_path / "metrics.jsonl").write_text('{"kind":"step","step":1}\n{"kind":"step","st')
    threads = threading.active_count()
    hooks = Hooks(lambda record: "halt", None)
    hooks.begin(SimpleNamespace(alive=False), tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind":"step","step":1}\n{"kind":"step","step":2}\n')
    assert not hooks.poll()
    with pytest.raises(InputError, match='on_step has returned \'halt\': return None, "save" or "stop"'):
        hooks.finish()
    wait_until(lambda: threading.active_count() == threads, "the thread that asks")


def test_quiet_is_quiet_after_ctrl_c(monkeypatch, capfd):
    class NoLaunch(contextlib.nullcontext):
        obey = __enter__ = lambda self, plan=None: self
        run = Path("run")

    monkeypatch.setattr(api, "Launch", NoLaunch)
    monkeypatch.setattr(api, "attend", lambda *_, **__: (130, "saved"))
    monkeypatch.setattr(api.session, "make_plan", lambda *_, **__: (Plan(Path("run"), None, None), None))
    with pytest.raises(KeyboardInterrupt, match="saved"):
        cs.train(quiet=True)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (5, "data is 5, of type int: give a path"),
        (b"text", "of type bytes"),
        ({"text": "a"}, "of type dict"),
        ([], r"data is \[\], which holds nothing"),
        ([1], r"data\[0\] is 1, of type int: give a path"),
        (["a", Path("b")], r"data\[1\] is .*, of type PosixPath, where data\[0\] is a str"),
        ([Path("b"), "a"], r"data\[1\] is 'a', of type str, where data\[0\] is a Path"),
        (["ok", "\ud800"], r"data\[1\] is .* half a surrogate pair"),
        ([__file__], r"a str in a list is the text itself\. Give Path\("),
    ],
)
def test_what_is_no_text_is_refused_in_words(data, message):
    with pytest.raises(InputError, match=message), as_paths(data):
        pass


def test_a_path_of_another_type_is_refused_in_words(tmp_path):
    for call, name in (
        (lambda: cs.load(5), "run is 5"), (lambda: cs.Run(None), "run is None"), (lambda: cs.evaluate(5), "run is 5"),
        (lambda: cs.train(run=5), "run is 5"), (lambda: cs.train(config=["a"]), r"config is \['a'\]"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=name):
            call()


def test_bad_input_and_failures_are_exceptions(corpus, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="no option 'step': did you mean 'steps'"):
        cs.train(corpus, step=3)
    with pytest.raises(ValueError, match="exists already"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "file").touch()
        cs.train(corpus, run=tmp_path / "run")
    with pytest.raises(RunFailed, match="NonFinite: The evaluation after step 1"):
        cs.train(corpus, run=tmp_path / "new", quiet=True, **TINY | {"lr": 1e30}, warmup=0, steps=4)


def test_what_is_printed_is_one_line_a_step_or_nothing(corpus, tmp_path, capfd):  # noqa: F811
    cs.train(corpus, run=tmp_path / "quiet", quiet=True, **TINY, steps=2)
    assert capfd.readouterr() == ("", "")
    cs.train(corpus, run=tmp_path / "loud", **TINY, steps=2)
    out, error = capfd.readouterr()
    assert "2/2" in out and error == ""


def test_logits_are_those_of_the_naive_model(model):
    ids = [3, 1, 4, 1, 5]
    logits = model.logits(ids)
    assert logits.dtype == np.float32 and logits.shape == (5, 257)
    expected = naive_logits(model.shape, model.parameters, np.array([ids]))[0]
    # one layer in float32 after the training: as tests/check.py says
    assert np.abs(logits - expected).max() <= 1e-5 * np.abs(expected).max()
    assert (model.logits(np.array(ids, np.uint16)) == logits).all()


def test_a_batch_has_the_logits_of_each_sequence_alone(model, rng):
    ids = rng.integers(0, 257, (70, 7))
    logits = model.logits(ids)
    assert logits.shape == (70, 7, 257)
    assert all((logits[n] == model.logits(ids[n])).all() for n in (0, 41, 69))


@pytest.mark.parametrize("bias", [True, False])
def test_hidden_states_are_those_of_the_naive_model_by_layer(bias, rng):
    shape = replace(SHAPE, vocab_size=257, layers=3, bias=bias)
    model = cs.Model(shape, ByteTokenizer(), weights(shape))
    ids = rng.integers(0, model.shape.vocab_size, (3, model.shape.block_size))
    states = model.hidden_states(ids)
    expected = naive_hidden_states(model.shape, model.parameters, ids)
    assert states.shape == expected.shape == (model.shape.layers + 1, 3, model.shape.block_size, model.shape.width)
    for state, naive in zip(states, expected, strict=True):  # float32, a few layers: as tests/check.py says
        assert np.abs(state - naive).max() <= 1e-5 * np.abs(naive).max()
    assert (model.hidden_states(ids[1]) == states[:, 1]).all()


def test_ids_become_the_text_that_they_were(model):
    text = "Ein Ball, 3 Bälle – ein Kern.\n" * 9  # longer than the block
    assert model.decode(model.encode(text)) == text and model.decode(np.array(model.encode("a"))) == "a"
    assert model.decode([]) == "" and model.decode([97, model.tokenizer.eot, 0xE4]) == "a\ufffd"


@pytest.mark.parametrize("length", [8, 3])
def test_loss_and_gradients_are_those_of_the_naive_model(model, rng, length):
    inputs, targets = rng.integers(0, 257, (2, 70, length))
    loss, gradients = model.loss_and_gradients(inputs, targets)
    expected, naive = naive_loss_and_gradients(model.shape, model.parameters, inputs, targets)
    assert abs(loss - expected) <= 1e-5 * expected
    assert gradients.keys() == naive.keys() == model.parameters.keys()
    largest = max(np.abs(gradient).max() for gradient in naive.values())
    for name, gradient in naive.items():
        # keys' biases have no gradient but rounding: 1e-5 of the tensor's or a hundredth of the model's largest
        assert np.abs(gradients[name] - gradient).max() <= 1e-5 * max(np.abs(gradient).max(), 1e-2 * largest), name
    assert np.isclose(model.loss_and_gradients(inputs[:1], targets[:1])[0], naive_loss_and_gradients(
        model.shape, model.parameters, inputs[:1], targets[:1])[0], rtol=1e-5)  # fmt: skip


def test_parameters_are_changed_in_place(model):
    before = model.logits([1, 2])
    model.parameters["ln_f.bias"][:] += 1
    changed = model.logits([1, 2])
    assert (before != changed).any()
    model.parameters["wte.weight"][:] = 0
    assert (model.logits([1, 2]) == 0).all()
    with pytest.raises(TypeError):
        model.parameters["wte.weight"] = 0


def test_a_step_down_the_gradient_lowers_the_loss(model, rng):
    inputs, targets = rng.integers(0, 257, (2, 4, 8))
    loss, gradients = model.loss_and_gradients(inputs, targets)
    for name, gradient in gradients.items():
        model.parameters[name][...] -= 0.1 * gradient
    assert model.loss_and_gradients(inputs, targets)[0] < loss


def test_text_is_a_function_of_the_seed(model):
    one = model.generate("abc", tokens=30, seed=7)
    assert one.startswith("abc") and one == model.generate("abc", tokens=30, seed=7)
    assert len({model.generate("abc", tokens=30, seed=seed) for seed in (0, 1, 2, 3, 2**63 - 1)}) == 5
    assert "".join(model.stream("abc", tokens=30, seed=7)) == one[3:]
    greedy = {model.generate("abc", tokens=9, seed=seed, temperature=0) for seed in range(3)}
    assert len(greedy) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.logits([]), r"nothing to compute: the ids have shape \(0,\)"),
        (lambda m: m.logits([0.5]), "Expected whole numbers with 1 or 2 dimension.* got float64"),
        (lambda m: m.logits([[[1]]]), r"shape \(1, 1, 1\)"),
        (lambda m: m.logits([[1, 2], [1]]), "rows of different lengths"),
        (lambda m: m.hidden_states([257]), "Ids go from 257"),
        (lambda m: m.decode("abc"), "Expected whole numbers with 1 dimension"),
        (lambda m: m.decode([1, 257]), "Ids go from 1 to 257"),
        (lambda m: m.logits(range(9)), "9 tokens are more than the model's block of 8"),
        (lambda m: m.logits([257]), "Ids go from 257 to 257; the vocabulary is 0 to 256"),
        (lambda m: m.logits([-1]), "Ids go from -1"),
        (lambda m: m.loss_and_gradients([[1, 2]], [[1]]), r"inputs have shape \(1, 2\), targets \(1, 1\)"),
        (lambda m: m.generate(seed=-1), "The seed is -1"),
        (lambda m: m.generate(tokens=0), "--tokens 0"),
    ],
)
def test_a_model_refuses_what_its_kernels_could_not_bear(model, call, message):
    with pytest.raises(InputError, match=message):
        call(model)


def test_loading_says_what_there_is(run, tmp_path):
    assert (cs.load(run.path, 40).logits([1]) == cs.load(run.path, "last").logits([1])).all()
    with pytest.raises(InputError, match="no checkpoint of step 41"):
        cs.load(run.path, 41)
    with pytest.raises(InputError, match=r"There is no run .*ru\. In .*: did you mean 'run'"):
        cs.load(run.path.with_name("ru"))


def test_nothing_is_left_running(run):
    import psutil

    names = [" ".join(child.cmdline()) for child in psutil.Process(os.getpid()).children(recursive=True)]
    assert not any("cllm" in name for name in names)


def test_records_without_a_step_are_left_out_of_the_metrics(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind":"step"}\n{"kind":"step","step":[]}\n{"kind":"step","step":1}\n')
    assert cs.Run(tmp_path).metrics() == [{"kind": "step", "step": 1}]


def test_a_model_from_elsewhere_is_trained_further_and_exported(tmp_path):
    (tmp_path / "book.txt").write_text(text(60))
    options = dict(steps=2, spheres=2, batch_size=2, workers=1, quiet=True)
    run = cs.train(tmp_path / "book.txt", run=tmp_path / "run", start_from=GOLDEN / "plain", **options)
    assert run.load(0).shape.width == 16 and run.metrics()[-1]["step"] == 2
    assert run.export("hf", tmp_path / "hf", checkpoint="last") == tmp_path / "hf"
    with pytest.raises(cs.InputError, match="--force"):
        run.export("hf", tmp_path / "hf")
    run.export("hf", tmp_path / "hf", dtype="bf16", force=True)
    again = cs.train(tmp_path / "book.txt", run=tmp_path / "again", start_from=str(tmp_path / "hf"), **options)
    assert again.load(0).tokenizer.encode("The") == run.load().tokenizer.encode("The")

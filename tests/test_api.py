"""The library as a caller uses it: from a script, from one line, from a thread, and beside anything else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import cllm_spheres as cs
from cllm_spheres.errors import InputError, RunFailed
from tests.exchange.models import GOLDEN
from tests.naive import naive_logits, naive_loss_and_gradients
from tests.runs import TINY, corpus, text  # noqa: F401

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


def test_bad_input_and_failures_are_exceptions(corpus, tmp_path):  # noqa: F811
    with pytest.raises(InputError, match="no option 'step': did you mean 'steps'"):
        cs.train(corpus, step=3)
    with pytest.raises(ValueError, match="exists already"):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "file").touch()
        cs.train(corpus, run=tmp_path / "run")
    with pytest.raises(RunFailed, match="NonFinite: Step 2"):
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
        (lambda m: m.logits([]), "Expected whole numbers with 1 dimension"),
        (lambda m: m.logits([0.5]), "got float64"),
        (lambda m: m.logits([[1]]), r"shape \(1, 1\)"),
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
    assert not any("cllm_spheres" in name for name in names)


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

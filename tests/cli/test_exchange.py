"""`export`, `import` and `train --from` as they are typed: what they print, and what bad input brings."""

from __future__ import annotations

import os
import re
import shutil

import pytest

from tests.exchange.models import GOLDEN, contents
from tests.runs import command, command_here, text

OPTIONS = {
    "export": "--to --dtype --checkpoint --force",
    "import": "",
    "train": "--from",
    "prepare": "--from",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_help_names_every_option_and_fits_80_columns(name, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = command_here(name, "--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert set(OPTIONS[name].split()) <= set(re.findall(r"--[a-z][a-z0-9-]*", result.stdout))
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_a_model_comes_in_is_trained_further_and_goes_out(tmp_path):
    (tmp_path / "book.txt").write_text(text(60))
    done = command("import", GOLDEN / "plain", "imported", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "imported: 11,328 parameters, 2 layers, width 16, 2 heads, block 16, vocabulary 280." in done.stdout
    assert "cllm-spheres train DATA --from imported" in done.stdout
    written = command("generate", "imported", "--prompt", "The ", "--tokens", 5, "--temperature", 0, cwd=tmp_path)
    assert written.returncode == 0 and written.stdout.startswith("The ")

    options = "--from imported --run run --steps 4 --spheres 2 --batch-size 2 --workers 1 --plain"
    trained = command("train", "book.txt", *options.split(), cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert f"The weights are those of {tmp_path / 'imported'}" in trained.stdout and "Saved step 0" in trained.stdout

    out = command("export", "run", "--to", "hf", "model", "--checkpoint", "last", cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith("model: step 4 of run as f32, 6 files, ") and "from_pretrained('model')" in out.stdout
    assert len(out.stdout.split("Next, in Python:\n")[1].splitlines()) == 3
    out = command_here("export", "run", "model.gguf", "--to", "gguf", "--dtype", "f16", cwd=tmp_path)
    assert (
        out.returncode == 0
        and "of run as f16, 1 file, " in out.stdout
        and "llama-completion -m model.gguf" in out.stdout
    )
    assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"


def test_prepare_takes_a_models_tokenizer(tmp_path):
    (tmp_path / "book.txt").write_text(text(60))
    done = command_here("prepare", "book.txt", "--from", GOLDEN / "plain", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0 and "bpe with a vocabulary of 280" in done.stdout, done.stderr
    refused = command_here(
        "prepare", "book.txt", "--from", GOLDEN / "plain", "--tokenizer", "byte", "--out", "x", cwd=tmp_path
    )
    assert refused.returncode == 2 and "leave --tokenizer and --vocab-size out" in refused.stderr


CASES = {
    "unknown target": ("export {run} --to ggfu out", ["no export target 'ggfu'", "did you mean 'gguf'"]),
    "unknown dtype": ("export {run} --to hf out --dtype fp16", ["--dtype cannot be 'fp16'", "'f16'"]),
    "no run": ("export nowhere --to hf out", ["no run and no model folder nowhere"]),
    "no checkpoint": ("export begun --to hf out", ["begun has no checkpoints yet"]),
    "no such checkpoint": ("export {run} --to hf out --checkpoint 77", ["no checkpoint of step 77"]),
    "a model folder": ("export model --to hf out", ["is a model folder already", "cllm-spheres import model RUN"]),
    "target with other files": ("export {run} --to hf model --force", ["'expected.npz', which no export has written"]),
    "target is a folder": ("export {run} --to gguf model", ["model is not a file"]),
    "no model": ("import begun run", ["begun has no checkpoints yet"]),
    "nothing there": ("import nowhere run", ["no run and no model folder nowhere"]),
    "empty": ("import empty run", ["neither a run", "nor a model folder"]),
    "run exists": ("import model begun", ["begun exists already"]),
    "damaged": ("import damaged run", ["model.safetensors is damaged"]),
    "train from nothing": ("train text.txt --from nowhere", ["no run and no model folder nowhere"]),
    "train from damaged": ("train text.txt --from damaged", ["model.safetensors is damaged"]),
    "contradiction": ("train text.txt --from model --width 128", ["--width 128 contradicts --from", "width 16"]),
    "longer block": ("train text.txt --from model --block-size 64", ["--block-size 64", "16 positions"]),
    "resume from": ("train --resume --run {run} --from model", ["--from is for a new run"]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with a model of transformers', a damaged one, and a run that has saved nothing."""
    place = tmp_path_factory.mktemp("place")
    (place / "text.txt").write_text(text(60))
    (place / "empty").mkdir()
    (place / "begun").mkdir()
    (place / "begun/config.toml").write_text("steps = 3\n")
    shutil.copytree(GOLDEN / "plain", place / "model")
    shutil.copytree(GOLDEN / "plain", place / "damaged")
    data = (place / "model/model.safetensors").read_bytes()
    (place / "damaged/model.safetensors").write_bytes(data[: len(data) // 2])
    return place


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_with_2_and_says_what_to_do_and_leaves_nothing(place, trained, name):
    line, expected = CASES[name]
    before = contents(place), contents(trained)
    result = command_here(*line.format(run=trained).split(), cwd=place, env={"COLUMNS": "200"})
    assert result.returncode == 2, result
    for words in expected:
        assert words in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    after = contents(trained)
    after.pop("lock", None)
    assert (contents(place), after) == (before[0], {name: data for name, data in before[1].items() if name != "lock"})


def test_ctrl_c_leaves_nothing(trained, tmp_path):
    """A signal while the file is written: the temporary file goes too."""
    import signal

    from tests.runs import begin, wait_until

    process = begin("export", trained, "--to", "gguf", "x.gguf", cwd=tmp_path)
    wait_until(lambda: process.stderr.readline(), "the first line")
    process.send_signal(signal.SIGINT)
    process.wait(timeout=60)
    assert process.returncode in (0, 130)  # it may have ended before
    assert os.listdir(tmp_path) == ([] if process.returncode else ["x.gguf"])

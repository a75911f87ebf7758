"""Bad input on the command line: exit code 2, words instead of a traceback, nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.runs import command, command_here, text

CASES = {
    # words of the command line, what is said (of it all must appear)
    "missing folder": ("train nowhere", ["nowhere", "No such file"]),
    "empty folder": ("train empty", ["No text found in empty: no files"]),
    "no text": ("train binary", ["No text found in binary", "1 binary"]),
    "short text": ("train short.txt --tokenizer byte", ["--block-size 64 needs 65", "Give more text or a smaller"]),
    "block": ("train {corpus} --block-size 100000", ["shorter than one block: --block-size 100000 needs 100,001"]),
    "option": ("train {corpus} --stpes 3", ["No such option: --stpes", "--steps"]),
    "command": ("trian", ["No such command 'trian'. Did you mean 'train'?"]),
    "preset": ("train {corpus} --preset smal", ["There is no preset 'smal': did you mean 'small'?"]),
    "choice": ("train {corpus} --optimizer adam", ["--optimizer cannot be 'adam': did you mean 'adamw'?"]),
    "dtype": ("train {corpus} --dtype fp8", ["--dtype cannot be 'fp8'", "fp32"]),
    "number": ("train {corpus} --lr fast", ["Invalid value for '--lr'"]),
    "share": ("train {corpus} --loss crystalline --alpha 2", ["--alpha 2", "less than or equal to 1"]),
    "share of nothing": ("train {corpus} --alpha 0.2", ["--alpha 0.2 means nothing to --loss cross-entropy"]),
    "neighbours": ("train {corpus} --loss random --neighbours 300", ["--neighbours 300", "vocabulary of 257", "256"]),
    "neighbour temperature": (
        "train {corpus} --loss crystalline --neighbour-temperature 0",
        ["--neighbour-temperature 0", "greater than 0"],
    ),
    "loss": ("train {corpus} --loss cristal", ["--loss cannot be 'cristal'", "crystalline"]),
    "key": ("train {corpus} --config key.toml", ["There is no option 'lrate' in key.toml: did you mean", "lr"]),
    "toml": ("train {corpus} --config broken.toml", ["broken.toml is not valid TOML"]),
    "no toml": ("train {corpus} --config nowhere.toml", ["Cannot read nowhere.toml: No such file"]),
    "no workers": ("train {corpus} --workers 0", ["--workers 0", "greater than or equal to 1"]),
    "workers": ("train {corpus} --workers 157", ["--workers 157", "less than or equal to 156"]),
    "no spheres": ("train {corpus} --spheres 0", ["--spheres 0", "greater than or equal to 1"]),
    "spheres": ("train {corpus} --spheres 157", ["--spheres 157", "less than or equal to 156"]),
    "workers above spheres": (
        "train {corpus} --workers 5 --spheres 4",
        ["5 workers are more than --spheres 4", "Try --spheres 5 or --workers 4"],
    ),
    "spheres above batch": (
        "train {corpus} --spheres 5 --batch-size 4",
        ["5 spheres are more than --batch-size 4", "Try --batch-size 5"],
    ),
    "heads": ("train {corpus} --heads 5", ["--heads 5 does not divide --width 128", "Try --heads 4"]),
    "vocabulary": (
        "train text.txt --tokenizer bpe --vocab-size 60000",
        ["--vocab-size 60000 is more than the text gives", "or less, or more text"],
    ),
    "vocabulary of the data": ("train {corpus} --vocab-size 300", ["257, and 300 was given"]),
    "tokenizer of the data": ("train {corpus} --tokenizer char", ["tokenizer byte, and char was given"]),
    "memory": (
        "train {corpus} --width 20000 --layers 40 --heads 4",
        ["Not enough memory", "parameters with 6 spheres", "are available", "try a smaller --preset"],
    ),
    "existing run": ("train {corpus} --run {run}", ["exists already", "cllm-spheres train --resume --run {run}"]),
    "existing folder": ("train {corpus} --run binary", ["binary exists already", "Please give another --run"]),
    "existing file": ("train {corpus} --run text.txt/run", ["text.txt is not a folder", "Give another --run"]),
    "no permission": ("train {corpus} --run locked/run", ["No permission to write in", "locked"]),
    "resume of nothing": ("train --resume", ["There is no run in runs/"]),
    "resume of no run": ("train --resume --run nowhere", ["nowhere is not a run: it has no config.toml"]),
    "another model": ("train --resume --run {run} --width 64", ["begun with --width 32, and 64 was given"]),
    "other data": ("train other --resume --run {run} --steps 9", ["was begun with other data"]),
    "damaged checkpoint": ("generate damaged-run", ["is damaged: model.safetensors", "--checkpoint"]),
    "resume of damage": (
        "train --resume --run damaged-run --steps 9",
        ["None of the checkpoints in damaged-run/checkpoints can be used", "model.safetensors"],
    ),
    "damaged configuration": ("train --resume --run damaged-config", ["config.toml is damaged", "--layers"]),
    "damaged data": ("train damaged", ["The prepared folder damaged is damaged: train.bin has", "instead of"]),
    "crystal of no token": ("crystal {corpus} --token abc", ["'abc' is no token of this vocabulary of 257"]),
    "crystal of too many": ("crystal {corpus} --count 300", ["--count 300 is not possible", "give 1 to 257"]),
    "generate nothing": ("generate nowhere", ["There is no run nowhere"]),
    "generate no step": ("generate {run} --checkpoint 99", ["no checkpoint of step 99"]),
    "generate with what cannot be": (
        "generate {run} --temperature -1 --top-k 0 --top-p 2 --tokens 0",
        ["--temperature -1.0", "--top-k 0", "--top-p 2.0", "--tokens 0"],
    ),
    "generate from a long prompt": (
        "generate {run} --prompt abcdefghi",
        ["The prompt has 9 tokens, and the model's block 8: shorten it"],
    ),
    "generate from two prompts": ("generate {run} --prompt a --prompts b", ["Both --prompt and --prompts were given"]),
    "generate from no file": ("generate {run} --prompts nowhere.txt", ["Cannot read nowhere.txt"]),
    "generate from a device": ("generate {run} --prompts /dev/zero", ["Cannot read /dev/zero: it is not a file"]),
    "generate from no prompts": ("generate {run} --prompts empty.txt", ["empty.txt holds no prompts"]),
    "generate from no records": ("generate {run} --prompts bad.jsonl", ["bad.jsonl, line 2, is not of the form"]),
    "generate with what cannot be either": (
        "generate {run} --min-p 2 --repetition-penalty 0 --stop=",
        ["--min-p 2.0", "--repetition-penalty 0.0 must be 0.01 to 100", "--stop takes up to 16 texts"],
    ),
    "generate in no dtype": ("generate {run} --dtype f32", ["--dtype 'f32' is not possible", "did you mean 'fp32'"]),
    "generate with no threads": ("generate {run} --threads 0", ["--threads 0 must be 1 to 256"]),
    "generate no samples": ("generate {run} --samples 0", ["--samples 0 must be 1 or above"]),
    "search and draw": (
        "generate {run} --beams 2 --temperature 1 --samples 2",
        ["--beams searches the likeliest texts", "leave --temperature, --samples out"],
    ),
    "best of no search": ("generate {run} --best 2", ["--length-penalty and --best are for a search: give --beams"]),
    "search too far": ("generate {run} --beams 2 --prompt abc --tokens 7", ["--tokens 7 must be 1 to 6"]),
    "generate from a text": ("generate {corpus}", ["is not a run: it has neither a config.toml nor checkpoints"]),
    "serve a name": ("serve {run} --allow-host http://a", ["--allow-host 'http://a': give a name alone"]),
    "serve a page": ("serve {run} --allow-origin a", ["--allow-origin 'a': give scheme and host"]),
    "search too wide": ("generate {run} --beams 65", ["--beams 65 must be 1 to 64"]),
    "more than the beams": ("generate {run} --beams 4 --best 5", ["--best 5 must be 1 to --beams, which is 4"]),
    "long name of a run": ("generate " + "x" * 300, ["File name too long"]),
    "long name of a new run": ("train {corpus} --run " + "x" * 300, ["File name too long", "Give another --run"]),
    "long name to watch": ("watch " + "x" * 300, ["File name too long"]),
    "long name of data": ("data " + "x" * 300, ["File name too long"]),
    "never-ending configuration": ("train {corpus} --config /dev/zero", ["/dev/zero is not a configuration"]),
    "evaluate nothing": ("eval {run}x", ["There is no run {run}x", "did you mean 'run'?"]),
    "evaluate no checkpoint": ("eval no-checkpoint", ["The run no-checkpoint has no checkpoints yet"]),
    "evaluate no step": ("eval {run} --checkpoint 99", ["no checkpoint of step 99"]),
    "evaluate damage": ("eval damaged-run", ["is damaged: model.safetensors"]),
    "evaluate no text": ("eval {run} nothing.txt", ["No text found in nothing.txt: 1 empty"]),
    "evaluate one token": ("eval {run} one.txt", ["one.txt has 1 token, and 2 are needed to predict one"]),
    "evaluate a missing text": ("eval {run} shrot.txt", ["There is no shrot.txt. In .: did you mean 'short.txt'?"]),
    "evaluate no folder": ("eval {run} nowhere/at/all", ["Cannot read nowhere/at/all: No such file"]),
    "evaluate damaged data": ("eval {run} damaged", ["The prepared folder damaged is damaged: train.bin has"]),
    "evaluate other tokens": ("eval {run} characters", ["characters was prepared with another tokenizer: char with"]),
    "evaluate with no stride": ("eval {run} text.txt --stride 0", ["--stride 0: give 1 to 8, the window"]),
    "evaluate with a long stride": (
        "eval {run} text.txt --block-size 5 --stride 6", ["--stride 6: give 1 to 5, the window"],
    ),
    "evaluate long windows": ("eval {run} text.txt --block-size 9", ["--block-size 9: give 1 to 8, the model's block"]),
    "evaluate with nobody": ("eval {run} text.txt --workers 0", ["--workers 0: give 1 to 156"]),
    "evaluate with too many": ("eval {run} text.txt --workers 157", ["--workers 157: give 1 to 156"]),
    "evaluate no tokens": ("eval {run} text.txt --max-tokens 0", ["--max-tokens 0: give 1 or more"]),
    "evaluate in no dtype": ("eval {run} text.txt --dtype fp8", ["--dtype cannot be 'fp8'", "fp32"]),
    "evaluate a long name": ("eval {run} " + "x" * 300, ["File name too long"]),
    "evaluate a run of a long name": ("eval " + "x" * 300, ["File name too long"]),
    "watch nothing": ("watch nowhere", ["nowhere does not exist"]),
    "doctor of no preset": ("doctor --preset smal", ["There is no preset 'smal': did you mean 'small'?"]),
    "doctor of too many": ("doctor --workers 5 --spheres 4", ["5 workers are more than --spheres 4"]),
    "doctor of no dtype": ("doctor --dtype fp8", ["--dtype cannot be 'fp8'"]),
    "data of nothing": ("data nowhere", ["There is no prepared folder nowhere"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(corpus, trained, tmp_path_factory):
    """A folder in which everything lies that the cases name."""
    place = tmp_path_factory.mktemp("place")
    for name in ("empty", "binary", "locked"):
        (place / name).mkdir()
    (place / "binary" / "x.bin").write_bytes(b"\0\1\2\3" * 50)
    (place / "text.txt").write_text(text(40))
    (place / "short.txt").write_text("short")
    (place / "empty.txt").write_text("\n \n")
    (place / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": 1}\n')
    (place / "one.txt").write_text("1")
    (place / "nothing.txt").write_text("")
    (place / "key.toml").write_text("lrate = 1\n")
    (place / "broken.toml").write_text("lr = \n")
    for name in ("other", "damaged"):
        shutil.copytree(corpus, place / name)
    shutil.rmtree(place / "other")
    assert command("prepare", place / "text.txt", "--tokenizer", "byte", "--out", place / "other").returncode == 0
    prepared = command("prepare", place / "text.txt", "--tokenizer", "char", "--out", place / "characters")
    assert prepared.returncode == 0
    with (place / "damaged" / "train.bin").open("r+b") as file:
        file.truncate(1000)
    shutil.copytree(trained, place / "damaged-run", symlinks=True)
    for path in (place / "damaged-run" / "checkpoints").glob("step-*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    shutil.copytree(trained, place / "damaged-config", symlinks=True)
    shutil.copytree(trained, place / "no-checkpoint", ignore=shutil.ignore_patterns("checkpoints"))
    config = place / "damaged-config" / "config.toml"
    config.write_text(config.read_text().replace("layers = 1", "layers = 0"))
    # a folder that nobody may write to; root may write everywhere but to a file system that is mounted read-only
    mounted = False
    if os.getuid() == 0:
        mount = ["mount", "-t", "tmpfs", "-o", "ro", "none", place / "locked"]
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    else:
        (place / "locked").chmod(0o555)
    yield place
    if mounted:
        subprocess.run(["umount", place / "locked"], check=True)
    (place / "locked").chmod(0o755)


def contents(folder):
    """Every file below a folder, with its bytes; a run's lock is no part of it."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_with_2_and_says_what_to_do_and_leaves_nothing(place, corpus, trained, name):
    if name == "no permission" and os.access(place / "locked", os.W_OK):
        pytest.skip("this user may write everywhere")
    line, expected = CASES[name]
    names = {"corpus": corpus, "run": trained}
    before = contents(place), contents(trained), contents(corpus)
    result = command_here(*line.format(**names).split(), cwd=place, env={"COLUMNS": "200"})
    assert result.returncode == 2, result
    for words in expected:
        assert words.format(**names) in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not line.startswith("generate") or result.stdout == ""
    assert (contents(place), contents(trained), contents(corpus)) == before
    assert not (place / "runs").exists()


def test_a_run_that_is_bad_input_only_for_node_zero_ends_with_2_too(trained, tmp_path):
    from cllm_spheres.checkpoint.lock import Lock

    with Lock(trained):
        result = command("train", "--resume", "--run", trained, "--steps", 9, "--plain", cwd=tmp_path)
    assert result.returncode == 2 and "A run is going on in" in result.stderr

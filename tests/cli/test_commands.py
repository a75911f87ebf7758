"""The commands as a newcomer types them, through the console script."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from cllm_spheres.events import read
from tests.runs import command, command_here, text

# The words of the contract: scripts and people rely on them.
TRAIN = (
    "--preset --workers --spheres --steps --batch-size --block-size --layers --heads --width --ff-width --vocab-size"
    " --tokenizer --bias --no-bias --optimizer --epochs --lr --min-lr --warmup --schedule --beta1 --beta2"
    " --weight-decay --clip --dtype --dropout --seed --eval-every --eval-tokens --save-every --keep --stop-at"
    " --on-nonfinite --run --resume --plain --config"
)
OPTIONS = {
    "train": TRAIN,
    "prepare": "--tokenizer --vocab-size --out --val-fraction",
    "data": "",
    "eval": "--checkpoint --stride --block-size --max-tokens --all --dtype --workers --json",
    "generate": "--prompt --prompts --tokens --temperature --top-k --top-p --min-p --repetition-penalty --stop --seed"
    " --samples --beams --length-penalty --best --dtype --threads --json --checkpoint",
    "watch": "--plain --once --svg",
    "serve": (
        "--host --port --checkpoint --dtype --slots --threads --queue --max-tokens --timeout --api-key-file"
        " --allow-host --allow-origin"
    ),
    "crystal": "--show --token --count --gcd-weight --ulam-weight --out --preset --tokenizer --vocab-size",
    "model": "--dtype --recompute --spheres --workers",
    "doctor": "--preset --spheres --workers --dtype --run --json",
}


@pytest.mark.parametrize("name", OPTIONS)
def test_help_names_every_option_of_the_contract_and_fits_80_columns(name, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = command_here(name, "--help", cwd=tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    shown = set(re.findall(r"--[a-z][a-z0-9-]*", result.stdout))
    assert set(OPTIONS[name].split()) <= shown
    assert max(map(len, result.stdout.splitlines())) <= 80 and "…" not in result.stdout
    assert list(tmp_path.iterdir()) == []
    if name == "train":
        order = re.findall(r"^│ (--[a-z0-9-]+)", result.stdout, re.M)
        assert order[:6] == ["--preset", "--run", "--steps", "--epochs", "--resume", "--workers"]
        assert order[-1] == "--fault"


@pytest.mark.parametrize(
    "name", ["serve", "crystal", "bench peers", "bench scaling", "bench kernels", "bench load", "bench crystal"]
)
def test_help_names_the_extra_that_a_command_needs(name, tmp_path):
    assert re.search(
        r"pip\s+install\s+'cllm-spheres\[[a-z]+\]'", command_here(*name.split(), "--help", cwd=tmp_path).stdout
    )


def test_help_names_every_command_and_nothing_is_an_error_that_shows_it(tmp_path):
    result = command_here("--help", cwd=tmp_path)
    assert result.returncode == 0 and all(name in result.stdout for name in OPTIONS)
    assert all(name in command_here(cwd=tmp_path).stdout for name in OPTIONS)


def test_python_m_does_what_the_command_does(tmp_path):
    module = subprocess.run(
        [sys.executable, "-P", "-m", "cllm_spheres", "data", "nothing"], cwd=tmp_path, capture_output=True, text=True
    )
    assert module.returncode == 2 and module.stderr == command("data", "nothing", cwd=tmp_path).stderr
    assert module.stderr.startswith("InputError: ")


def test_the_smallest_run_learns_and_writes_and_is_resumed(tmp_path):
    result = command("train", "--preset", "minimal", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "runs").iterdir()
    # its name stands at the start and at the end
    lines = result.stdout.splitlines()
    assert f"runs/{run.name}" in lines[0] and f"cllm-spheres generate runs/{run.name}" in lines[-1]
    assert "2 workers, 2 spheres, batch 2 x 8 tokens" in lines[0]
    losses = [record["loss"] for record in read(run / "metrics.jsonl") if record["kind"] == "step"]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    written = command("generate", "--prompt", "a", "--tokens", 5, cwd=tmp_path)  # the newest run in runs/
    assert written.returncode == 0 and written.stdout.startswith("a") and written.stdout.endswith("\n")
    again = command("train", "--resume", "--run", run, cwd=tmp_path)
    assert again.returncode == 0 and "is finished: step" in again.stdout


@pytest.mark.slow
def test_prepare_data_train_generate_and_watch(tmp_path):
    (tmp_path / "texts").mkdir()
    for i in range(25):
        (tmp_path / "texts" / f"{i}.txt").write_text(text(30, seed=i))
    prepared = command("prepare", "texts", "--tokenizer", "bpe", "--vocab-size", 300, "--out", "out", cwd=tmp_path)
    assert prepared.returncode == 0 and "cllm-spheres train out" in prepared.stdout, prepared.stderr
    shown = command_here("data", "out", cwd=tmp_path)
    assert shown.returncode == 0 and "bpe, vocabulary 300" in shown.stdout

    options = "--preset tiny --steps 200 --workers 2 --run run --eval-every 100 --seed 3 --warmup 5 --lr 3e-3"
    trained = command("train", "out", *options.split(), cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    records = read(tmp_path / "run" / "metrics.jsonl")
    evaluations = [record["val_loss"] for record in records if record["kind"] == "eval"]
    assert len(evaluations) == 3 and max(evaluations[1:]) < evaluations[0] - 0.5

    words = ["generate", "run", "--prompt", "abc", "--tokens", 20, "--seed", 7]
    first, same = command(*words, cwd=tmp_path), command_here(*words, cwd=tmp_path)
    assert first.returncode == 0 and first.stdout.startswith("abc") and first.stdout == same.stdout
    assert command_here(*words[:-1], 8, cwd=tmp_path).stdout != first.stdout
    greedy = command_here(*words, "--temperature", 0, cwd=tmp_path)
    assert command_here(*words[:-2], "--top-k", 1, cwd=tmp_path).stdout == greedy.stdout
    assert command_here(*words, "--checkpoint", "last", cwd=tmp_path).returncode == 0
    check_many_texts(tmp_path, first.stdout)

    watched = command_here("watch", "run", "--plain", "--once", cwd=tmp_path)
    assert watched.returncode == 0
    assert "200/200" in watched.stdout and f"val {evaluations[-1]:.4f}" in watched.stdout
    assert command_here("watch", "run", "--svg", "picture.svg", cwd=tmp_path).returncode == 0
    assert "<svg" in (tmp_path / "picture.svg").read_text()[:200]


def check_many_texts(place, alone):
    """Several prompts, samples and beams of a run; `alone` is what one prompt gave on its own."""
    (place / "prompts.txt").write_text("abc\r\n\nthe\n")
    (place / "prompts.jsonl").write_text('{"prompt": "abc"}\n{"prompt": "the"}\n')
    words = ["generate", "run", "--tokens", 20, "--seed", 7]
    shown = command_here(*words, "--prompts", "prompts.txt", cwd=place)
    assert shown.returncode == 0, shown.stderr
    texts = dict(re.findall(r"^--- prompt (\d), text 1 ---\n(.*?)(?=^---|\Z)", shown.stdout, re.M | re.S))
    assert texts["1"] == alone and texts["2"].startswith("the")
    lines = command_here(*words, "--prompts", "prompts.jsonl", "--samples", 3, "--json", "--threads", 2, cwd=place)
    records = {(r["prompt"], r["sample"]): r for r in map(json.loads, lines.stdout.splitlines())}
    assert len(records) == 6 and "abc" + records["abc", 0]["text"] + "\n" == alone
    assert len({r["text"] for r in records.values()}) == 6 and {r["number"] for r in records.values()} == {0, 1}
    assert all(r["tokens"] == 20 and r["ended"] == "length" for r in records.values())

    stopped = command_here(*words, "--prompt", "abc", "--stop", records["abc", 0]["text"][3:6], cwd=place)
    assert alone.startswith(stopped.stdout[:-1]) and len(stopped.stdout) < len(alone)
    assert command_here(*words, "--prompt", "abc", "--dtype", "bf16", cwd=place).stdout.startswith("abc")
    other = command_here(*words, "--prompt", "abc", "--repetition-penalty", 3, "--min-p", 0.01, cwd=place)
    assert other.returncode == 0 and other.stdout != alone

    words = ["generate", "run", "--prompt", "abc", "--tokens", 5, "--beams", 3]
    best = command_here(*words, "--json", "--best", 2, "--length-penalty", 0, cwd=place)
    one, two = map(json.loads, best.stdout.splitlines())
    assert one["score"] >= two["score"] and one["score"] == one["logprob"] and one["text"] != two["text"]
    assert command_here(*words, "--length-penalty", 0, cwd=place).stdout == "abc" + one["text"] + "\n"


def test_options_from_a_file_give_way_to_the_command_line(tmp_path):
    (tmp_path / "options.toml").write_text('preset = "minimal"\nsteps = 3\nlr = 0.5\nclip = 0\n')
    result = command("train", "--config", "options.toml", "--lr", "0.01", "--run", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    config = (tmp_path / "run" / "config.toml").read_text()
    assert "\nsteps = 3\n" in config and "\nlr = 0.01\n" in config and "\nclip = 0\n" in config
    steps = [record for record in read(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "step"]
    assert len(steps) == 3 and all(record["clipped_norm"] == record["grad_norm"] for record in steps)
    again = command("train", "--resume", "--run", "run", "--clip", "0", "--steps", "4", cwd=tmp_path)
    assert again.returncode == 0, again.stderr


def test_names_that_are_not_utf8_are_shown_in_escapes(tmp_path):
    (tmp_path / "a.txt").write_text(text(20))
    name = os.fsdecode(b"out-\xff")
    result = command("prepare", "a.txt", "--tokenizer", "byte", "--out", name, cwd=tmp_path)
    assert result.returncode == 0 and "out-\\udcff: 1 document, " in result.stdout, result.stderr
    assert command("data", name, cwd=tmp_path).returncode == 0

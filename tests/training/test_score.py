"""What a model says of a text, against one call of it per token; and the same bits whoever computes it and dies."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from dataclasses import asdict

import numpy as np
import psutil
import pytest

import cllm_spheres as cs
from cllm_spheres.crystal.jit import CACHE_FOLDER
from cllm_spheres.errors import InputError
from cllm_spheres.model import dtypes
from cllm_spheres.text import prepare as prepare_module
from cllm_spheres.text.prepare import prepare
from cllm_spheres.text.tokenizer import load_tokenizer
from cllm_spheres.training import score as scoring
from tests.faults.amounts import amount
from tests.runs import begin, command_here, lives, text, train_whole, wait_until

DTYPES = [
    "fp32",
    pytest.param("bf16", marks=pytest.mark.skipif(dtypes.usable("bf16") != "bf16", reason="no AVX512-BF16 here")),
]
TWIN_FP32 = 1e-5  # nats: two paths of float32 through one layer
TWIN_BF16 = 5e-3  # nats a token in the mean: operands have 8 bits; up to 6e-4 was measured
UNSURE = 0.1  # logits that lie closer may change places in bfloat16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Texts are prepared into a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "prepared-texts"))
    kernels = tmp_path / "prepared-texts" / "cllm-spheres"
    kernels.mkdir(parents=True)
    (kernels / "kernels").symlink_to(CACHE_FOLDER.parent)


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory):
    """A run that knows something, evaluated on its whole validation part."""
    return train_whole(corpus, tmp_path_factory.mktemp("scored") / "run", steps=60, eval_tokens=10**6).run


@pytest.fixture(scope="module")
def bf16_run(corpus, tmp_path_factory):
    place = tmp_path_factory.mktemp("scored")
    return train_whole(corpus, place / "run", steps=20, eval_tokens=10**6, dtype="bf16", block_size=40).run


def twin(model, ids, block_size, stride):
    """Loss and whether it was right for each token but the first, from the float32 logits before it, one by one."""
    losses, right, unsure = [], [], []
    for place in range(1, len(ids)):
        window = max(0, math.ceil((place - block_size) / stride))
        logits = model.logits(ids[window * stride : place])[-1].astype(np.float64)
        largest = logits.max()
        losses.append(largest + np.log(np.exp(logits - largest).sum()) - logits[ids[place]])
        right.append(int(logits.argmax()) == ids[place])
        order = np.sort(logits)
        unsure.append(order[-1] - order[-2] < UNSURE)
    return np.array(losses), np.array(right), np.array(unsure)


LENGTHS = (2, 5, 8, 9, 10, 121)  # one token to predict, less than a block, one, one more
WINDOWS = [(8, 8), (8, 3), (8, 1), (5, 5), (5, 2), (1, 1)]
# In the short form every length once, every window twice, and three cases in bfloat16.
SOME = [(n, *WINDOWS[(i + j) % 6]) for i, n in enumerate(LENGTHS) for j in (0, 1)]
CASES = [
    pytest.param(dtype, *case, marks=DTYPES[1].marks if dtype == "bf16" else ())
    for dtype, short in (("fp32", SOME), ("bf16", SOME[1::4]))
    for case in amount(short, [(n, *window) for n in LENGTHS for window in WINDOWS])
]


@pytest.mark.parametrize(("dtype", "length", "block_size", "stride"), CASES)
def test_loss_and_accuracy_are_those_of_one_call_per_token(run, tmp_path, dtype, length, block_size, stride):
    words = text(20, seed=length)[100 : 100 + length]
    (tmp_path / "text.txt").write_text(words)
    one = scoring.score(run, tmp_path / "text.txt", block_size=block_size, stride=stride, dtype=dtype, workers=2)
    losses, right, unsure = twin(cs.load(run), list(words.encode()), block_size, stride)
    assert (one.tokens, one.part, one.dtype) == (length - 1, "text", dtype)
    assert one.loss == pytest.approx(losses.mean(), abs=TWIN_FP32 if dtype == "fp32" else TWIN_BF16)
    assert one.perplexity == pytest.approx(math.exp(one.loss))
    assert one.bits_per_byte == pytest.approx(one.loss / math.log(2))  # a byte a token
    if dtype == "fp32":
        assert one.accuracy == right.mean()
    assert (right & ~unsure).mean() <= one.accuracy <= (right | unsure).mean()


@pytest.mark.parametrize("which", ["run", pytest.param("bf16_run", marks=DTYPES[1].marks)])
def test_the_whole_validation_part_by_blocks_has_the_numbers_of_training(which, request):
    run = request.getfixturevalue(which)
    block_size = {"run": 8, "bf16_run": 40}[which]
    expected = cs.Run(run).metrics("eval")[-1]
    one = cs.Run(run).evaluate(checkpoint="last", stride=block_size)
    assert (one.step, one.part, one.dtype) == (expected["step"], "val", {"run": "fp32", "bf16_run": "bf16"}[which])
    for mine, theirs in (
        ("loss", "val_loss"), ("perplexity", "perplexity"), ("bits_per_byte", "bits_per_byte"), ("tokens", "tokens"),
        ("unigram_loss", "unigram_loss"), ("bigram_loss", "bigram_loss"),
    ):  # fmt: skip
        assert getattr(one, mine) == expected[theirs], mine
    assert 0 < one.accuracy < 1
    half = cs.evaluate(run, checkpoint="last")
    assert half.stride == block_size // 2 and half.tokens == one.tokens and half.loss != one.loss


def test_the_default_is_bounded_as_an_evaluation_of_the_training_and_says_how_to_score_all(corpus, tmp_path):
    run = train_whole(corpus, tmp_path / "run", steps=20, eval_tokens=800).run
    expected = cs.Run(run).metrics("eval")[-1]
    one = scoring.score(run, checkpoint="last", stride=8)
    assert (one.loss, one.tokens, one.unigram_loss, one.bits_per_byte) == tuple(
        expected[name] for name in ("val_loss", "tokens", "unigram_loss", "bits_per_byte")
    )
    assert one.tokens == 800 < one.text_tokens
    whole = scoring.score(run, checkpoint="last", stride=8, whole=True)
    assert whole.tokens == whole.text_tokens == one.text_tokens and whole.loss != one.loss
    (tmp_path / "text.txt").write_text(text(200))
    shown = command_here("eval", run, "text.txt", cwd=tmp_path)
    assert "These are 804 of" in shown.stdout and "All of them: --all, about" in shown.stdout
    with pytest.raises(InputError, match="--max-tokens 5 contradicts --all"):
        scoring.score(run, max_tokens=5, whole=True)


def test_the_runs_own_data_are_prepared_again_from_their_text_or_must_be_the_same(tmp_path):
    (tmp_path / "text.txt").write_text(text(300))
    run = train_whole(tmp_path / "text.txt", tmp_path / "run", steps=2, tokenizer="char").run
    one = scoring.score(run)
    shutil.rmtree(one.data)
    assert bits(scoring.score(run)) | {"data": one.data} == bits(one)
    (tmp_path / "text.txt").write_text(text(301))
    with pytest.raises(InputError, match=r"is not what .*run was trained on.*Name a text to evaluate"):
        shutil.rmtree(tmp_path / "prepared-texts" / "cllm-spheres" / "prepared")
        scoring.score(run)


def bits(one):
    """All that must not depend on who computed it."""
    return {name: value for name, value in asdict(one).items() if name not in ("workers", "seconds", "tokens_per_s")}


@pytest.mark.parametrize("which", ["run", pytest.param("bf16_run", marks=DTYPES[1].marks)])
def test_no_bit_depends_on_the_number_of_workers(which, request):
    run = request.getfixturevalue(which)
    scores = [scoring.score(run, stride=3, workers=workers) for workers in (1, 2, 5)]
    assert [one.workers for one in scores] == [1, 2, 5]
    assert bits(scores[0]) == bits(scores[1]) == bits(scores[2])


@pytest.mark.parametrize("victim", ["worker", "server"])
def test_no_bit_depends_on_who_dies(run, victim, monkeypatch):
    said, killed, others = [], [], set(psutil.Process().children(recursive=True))
    monkeypatch.setattr(scoring, "MOST_WINDOWS", 64)  # many commands, so that each death is met by the next ones

    def kill(stage, done, total):
        if stage == "score" and total / 4 < done < total / 2 and len(killed) < 2:
            new = [child for child in psutil.Process().children() if child not in others and lives(child)]
            servers = [child for child in new if "server" in child.name()]  # not a helper of multiprocessing's
            victims = [worker for server in servers for worker in server.children()] if victim == "worker" else servers
            if victims and (process := victims[-1]).pid not in killed:  # else they are being replaced
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)

    one = scoring.score(run, stride=1, workers=3, progress=kill, tell=said.append)
    assert killed and any("Replaced" in words for words in said), said
    assert bits(one) == bits(scoring.score(run, stride=1, workers=2))
    assert set(psutil.Process().children(recursive=True)) <= others


def test_documents_are_joined_as_in_preparing(run, tmp_path):
    documents = ["one text", "another, which is longer", "a third"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": words}) + "\n" for words in documents))
    one = scoring.score(run, tmp_path / "texts.jsonl", stride=8)
    ids = list(b"\0".join(words.encode() for words in documents))
    losses, right, _ = twin(cs.load(run), [256 if i == 0 else i for i in ids], 8, 8)
    assert one.loss == pytest.approx(losses.mean(), abs=TWIN_FP32) and one.accuracy == right.mean()
    num_bytes = sum(map(len, documents)) - 1  # of the predicted tokens; ends of text have none
    assert one.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / num_bytes, abs=TWIN_FP32)
    prepare([tmp_path / "texts.jsonl"], tmp_path / "prepared", tokenizer="byte", val_fraction=0.5)
    part = scoring.score(run, tmp_path / "prepared", stride=8)
    assert (part.part, part.unigram_loss) == ("val", None) and 0 < part.tokens < one.tokens


def test_at_most_so_many_tokens_are_scored(run, tmp_path):
    words = text(20)[100:200]
    (tmp_path / "text.txt").write_text(words)
    one = scoring.score(run, tmp_path / "text.txt", max_tokens=30, stride=2)
    losses, right, _ = twin(cs.load(run), list(words.encode())[:31], 8, 2)
    assert (one.tokens, one.accuracy) == (30, right.mean())
    assert one.loss == pytest.approx(losses.mean(), abs=TWIN_FP32)
    assert scoring.score(run, tmp_path / "text.txt", max_tokens=10**9).tokens == 99


def test_a_long_text_is_scored_in_several_commands(run, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text(text(200))
    one = scoring.score(run, tmp_path / "text.txt", stride=4)
    monkeypatch.setattr(scoring, "MOST_WINDOWS", 7)
    seen = []
    other = scoring.score(run, tmp_path / "text.txt", stride=4, progress=lambda *words: seen.append(words))
    assert bits(other) == bits(one)
    done = [done for stage, done, total in seen if stage == "score"]
    assert len(done) > 100 and done == sorted(done) and done[-1] == one.tokens


def test_words_have_no_bits_per_byte_and_char_refuses_what_it_does_not_know(tmp_path, char_corpus, monkeypatch):
    (tmp_path / "text.txt").write_text(text(300))
    prepare([tmp_path / "text.txt"], tmp_path / "words", tokenizer="word")
    train_whole(tmp_path / "words", tmp_path / "word", steps=2)
    assert scoring.score(tmp_path / "word").bits_per_byte is None
    (tmp_path / "unknown.txt").write_text("words that nobody knows")
    assert scoring.score(tmp_path / "word", tmp_path / "unknown.txt").tokens == 3
    train_whole(char_corpus, tmp_path / "char", steps=2)
    (tmp_path / "unknown.txt").write_text("ein Märchen")
    for inline_bytes in (prepare_module.INLINE_BYTES, 1):  # read here, and by other processes
        monkeypatch.setattr(prepare_module, "INLINE_BYTES", inline_bytes)
        with pytest.raises(InputError, match="The char vocabulary of 64 has no 'ä'"):
            scoring.score(tmp_path / "char", tmp_path / "unknown.txt")


def test_data_of_another_tokenizer_are_refused_with_the_name_of_their_text(run, char_corpus, tmp_path):
    with pytest.raises(
        InputError, match=r"another tokenizer: char with 64 tokens, the run's is byte with 257.*text\.txt"
    ):
        scoring.score(run, char_corpus)
    other = tmp_path / "text.txt"
    other.write_text(text(400).replace("a", "ä"))  # as many characters, and others
    prepare([other], tmp_path / "prepared", tokenizer="char")
    train_whole(char_corpus, tmp_path / "char", steps=2)
    assert load_tokenizer(tmp_path / "prepared" / "tokenizer.json").vocab_size == 64
    with pytest.raises(InputError, match="the run's is another one of that size"):
        scoring.score(tmp_path / "char", tmp_path / "prepared")


def test_a_loss_that_is_not_finite_is_said(run, monkeypatch):
    monkeypatch.setattr(scoring, "_run_windows", lambda *given: (math.nan, 0, 1.0))
    with pytest.raises(cs.NonFinite, match=r"The loss of .*step-.* is nan: take another --checkpoint"):
        scoring.score(run)


def test_for_an_evaluation_nothing_is_kept_but_the_weights(run, monkeypatch):
    jobs = []
    whole = scoring._scored
    monkeypatch.setattr(scoring, "_scored", lambda job, *given: jobs.append(job) or whole(job, *given))
    scoring.score(run, workers=4)
    (job,) = jobs
    from cllm_spheres.spheres.memory import Regions

    # No moments, squares, segments of four spheres, and their sum, of six blocks each.
    kept, trained = (
        Regions(job.sizes),
        Regions(type(job.sizes)(**job.sizes.to_dict() | dict(trains=True, has_squares=True))),
    )
    assert trained.total - kept.total == 7 * kept.stride


# ---- the command


def test_the_command_prints_a_table_or_nothing_but_json(run, tmp_path):
    (tmp_path / "text.txt").write_text(text(30))
    shown = command_here("eval", run, "text.txt", "--stride", 4, cwd=tmp_path, env={"COLUMNS": "120"})
    assert shown.returncode == 0, shown.stderr
    written = command_here("eval", run, "text.txt", "--stride", 4, "--workers", 1, "--json", cwd=tmp_path)
    values = json.loads(written.stdout)
    assert values["block_size"] == 8 and values["stride"] == 4 and values["data"] == "text.txt"
    for name in ("tokens", "windows", "loss", "perplexity", "bits/byte", "accuracy", "tokens/s"):
        assert name in shown.stdout
    for cell in (f"{values['loss']:.4f}", f"{values['tokens']:,}", f"{100 * values['accuracy']:.2f} %", "4 apart"):
        assert cell in shown.stdout
    assert "Evaluating" in shown.stderr and "Evaluating" not in shown.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prepared-texts", "text.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_evaluation_at_once_and_leaves_nothing(run, tmp_path, number):
    (tmp_path / "text.txt").write_text(text(20_000))
    process = begin("eval", run, tmp_path / "text.txt", "--stride", 1, "--workers", 2)
    try:
        one = psutil.Process(process.pid)
        wait_until(lambda: len(one.children(recursive=True)) == 3, "two workers and their server")
        family = one.children(recursive=True)
        time.sleep(0.5)
        os.killpg(process.pid, number)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, out) == (128 + number, ""), err
    assert f"Stopped by {signal.Signals(number).name}" in err and "Traceback" not in err
    assert psutil.wait_procs(family, timeout=5)[1] == []

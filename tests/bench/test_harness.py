"""The tasks for lm-evaluation-harness: questions that a model can be asked, the same for the same seed."""

from __future__ import annotations

import json
import sys

import pytest
from cllm_spheres_bench import harness
from cllm_spheres_bench.harness_task import TASKS, Lengths, write_tasks

from cllm_spheres.errors import InputError
from cllm_spheres.text.prepare import prepare
from cllm_spheres.text.prepared import Prepared
from tests.runs import corpus, text, train_whole  # noqa: F401


@pytest.fixture(scope="module", params=["byte", "bpe"])
def prepared(request, tmp_path_factory) -> Prepared:
    place = tmp_path_factory.mktemp("harness")
    (place / "text.txt").write_text(text(400))
    return prepare([place / "text.txt"], place / "prepared", tokenizer=request.param, val_fraction=0.5)


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_every_question_fits_into_the_block_and_its_answer_is_what_followed(prepared, tmp_path):
    write_tasks(tmp_path, prepared, 64, items=30, pieces=5)
    whole, encode = prepared.tokenizer.decode(prepared.val.tolist()), prepared.tokenizer.encode
    questions = rows(tmp_path, TASKS[0])
    assert len(questions) == 30 and {question["label"] for question in questions} == {0, 1, 2, 3}
    lengths = Lengths.of(64)
    for question in questions:
        right = question["context"] + question["choices"][question["label"]]
        assert right in whole and len(question["choices"]) == 4
        assert len(encode(question["context"])) == lengths.context == 32
        assert len(encode(right)) == lengths.context + lengths.continuation == 62
    assert [len(encode(row["text"])) for row in rows(tmp_path, TASKS[1])] == [62] * 5
    assert TASKS == ("cllm_continuations", "cllm_pieces")
    for name, metric in zip(TASKS, ("acc_norm", "bits_per_byte"), strict=True):
        settings = (tmp_path / f"{name}.yaml").read_text()
        assert (
            f"task: {name}\n" in settings
            and f"metric: {metric}\n" in settings
            and str(tmp_path / f"{name}.jsonl") in settings
        )


def test_the_same_seed_asks_the_same_questions(prepared, tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        (tmp_path / name).mkdir()
        write_tasks(tmp_path / name, prepared, 32, items=5, pieces=5, seed=seed)
    one, same, other = ([rows(tmp_path / name, task) for task in TASKS] for name in ("one", "same", "other"))
    assert one == same != other


def test_what_cannot_be_asked_is_refused(prepared, tmp_path):
    with pytest.raises(InputError, match="block has 7 tokens"):
        write_tasks(tmp_path, prepared, 7, items=1, pieces=1)
    with pytest.raises(InputError, match=r"no 19998 in a row|no 10\d* in a row"):
        write_tasks(tmp_path, prepared, 20_000, items=1, pieces=1)


def test_the_command_says_what_is_missing(corpus, tmp_path, capsys):  # noqa: F811
    run = train_whole(corpus, tmp_path / "run", steps=2).run
    assert harness.main([str(run), "--python", str(tmp_path / "nowhere")]) == 2
    assert "nowhere cannot be run: No such file or directory. Make it with: make harness" in capsys.readouterr().err
    assert harness.main([str(run), "--python", sys.executable]) == 2
    assert "has no lm-eval with transformers. Make it with: make harness" in capsys.readouterr().err
    assert harness.main([str(tmp_path / "run2"), "--python", sys.executable]) == 2
    assert "is not a run" in capsys.readouterr().err

"""Preparing with bad input: what is said, and that nothing is lost or left half-written."""

import os

import pytest

from cllm_spheres.errors import InputError
from cllm_spheres.text.prepare import prepare


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": "bytes"}, "no tokenizer 'bytes': did you mean 'byte'"),
        ({"tokenizer": "byte", "vocab_size": 256}, "256: the byte tokenizer always has 257"),
        ({"tokenizer": "char", "vocab_size": 99}, "99: this text has 9 different characters.* of 10"),
        (
            {"tokenizer": "word", "vocab_size": 99},
            "99 is more than the text gives.* 2 different words. Give --vocab-size 4",
        ),
        ({"tokenizer": "word", "vocab_size": 2}, "word can have 3"),
        ({"tokenizer": "bpe", "vocab_size": 256}, "bpe can have 257"),
        (
            {"tokenizer": "bpe", "vocab_size": 5000},
            r"5000 is more than the text gives: bpe finds 2\d\d tokens",
        ),
        ({"val_fraction": 1.0}, "0 or more and less than 1"),
        ({"val_fraction": float("nan")}, "0 or more and less than 1"),
        ({"processes": 0}, "--processes 0"),
    ],
)
def test_options_that_cannot_work_are_refused_and_leave_nothing(tmp_path, options, message):
    (tmp_path / "a.txt").write_text("hello world\n" * 40)
    with pytest.raises(InputError, match=message):
        prepare([tmp_path / "a.txt"], tmp_path / "new" / "out", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_vocabulary_sizes_that_are_what_results_are_accepted(tmp_path):
    (tmp_path / "a.txt").write_text("hello world\n" * 40)
    for kind, size in (("byte", 257), ("char", 10), ("word", 4), ("bpe", 262)):
        assert prepare([tmp_path / "a.txt"], tmp_path / kind, tokenizer=kind, vocab_size=size).vocab_size == size


def test_no_text_says_what_was_there_instead(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(InputError, match=r"No text found in .*in: no files"):
        prepare([folder], tmp_path / "out")
    for i in range(3):
        (folder / f"{i}.bin").write_bytes(b"\0\1\2")
    (folder / ".hidden").write_text("text")
    with pytest.raises(InputError, match=r"No text found in .*in: 3 binary, 1 hidden\."):
        prepare([folder], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(InputError, match=r"Cannot read .*nowhere: No such file"):
        prepare([tmp_path / "nowhere"], tmp_path / "out")


def test_only_a_prepared_folder_is_replaced(tmp_path):
    (tmp_path / "a.txt").write_text("hello world\n" * 40)
    out = tmp_path / "out"
    first = prepare([tmp_path / "a.txt"], out, tokenizer="byte")
    ids = first.train
    second = prepare([tmp_path / "a.txt"], out, tokenizer="char")
    assert second.tokenizer.kind == "char"
    assert first.fingerprint != second.fingerprint
    assert ids[:5].tolist() == list(b"hello"), "who had the old one open still reads it"
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="is not a prepared folder"):
        prepare([tmp_path / "a.txt"], precious)
    with pytest.raises(InputError, match="is not a folder"):
        prepare([tmp_path / "a.txt"], tmp_path / "a.txt")
    assert contents(precious) == {"thesis.tex": b"mine"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out", "precious"]


def test_a_failure_leaves_the_old_folder_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("hello world\n" * 40)
    out = tmp_path / "out"
    prepare([tmp_path / "a.txt"], out, tokenizer="byte")
    before = contents(out)
    with pytest.raises(InputError):
        prepare([tmp_path / "a.txt"], out, vocab_size=5000)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([tmp_path / "a.txt"], out, progress=stop)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "file").touch()
    for out in (tmp_path / "file" / "out", "/proc/out"):
        with pytest.raises(InputError, match=r"Cannot write|Name another --out"):
            prepare([tmp_path / "a.txt"], out)


def test_prepared_folders_are_not_read_as_text(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("hello world\n" * 40)
    prepare([tmp_path / "in"], tmp_path / "in" / "out", tokenizer="byte")
    again = prepare([tmp_path / "in"], tmp_path / "again", tokenizer="byte")
    assert again.manifest["skipped"] == {"prepared folder": 1} and again.manifest["documents"] == 1
    with pytest.raises(InputError, match="1 prepared folders"):
        prepare([again.folder], tmp_path / "third")


def test_what_a_killed_process_left_behind_is_removed_later(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    old, young = tmp_path / ".out.preparing-0badcafe", tmp_path / ".out.preparing-1badcafe"
    for folder in (old, young):
        (folder / "work").mkdir(parents=True)
    os.utime(old, (0, 0))
    prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer="byte")
    assert not old.exists() and young.exists()

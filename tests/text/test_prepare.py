"""Preparing a corpus: what is written, for any number of processes, and what is refused."""

import gzip
import hashlib
import json
import os

import numpy as np
import pytest

from cllm_spheres.text import prepare as prepare_module
from cllm_spheres.text import spool, vocabulary
from cllm_spheres.text.files import describe_skipped
from cllm_spheres.text.prepare import prepare
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.text.tokenizer import EOT, load_tokenizer

KINDS = ("byte", "char", "word", "bpe")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def numbered_text(i, size=600):
    rng = np.random.default_rng(i)
    words = ["sphere", "Kugel", "球", "naïve", "kiss", "twelve", "around", "the"]
    return " ".join(words[k] for k in rng.integers(0, 8, size // 6)) + f"\nend of {i}\n"


@pytest.fixture
def corpus(tmp_path):
    """30 documents in folders, of several kinds, with things to skip between them."""
    folder = tmp_path / "corpus"
    (folder / "b" / "deep").mkdir(parents=True)
    for i in range(20):
        (folder / "b" / f"{i:02}.txt").write_text(numbered_text(i))
    (folder / "a.md").write_bytes(numbered_text(20).encode("utf-16"))
    lines = [json.dumps({"text": numbered_text(i)}) for i in range(21, 29)]
    (folder / "c.jsonl").write_text("\n".join([*lines, json.dumps({"text": numbered_text(3)})]))
    (folder / "b" / "deep" / "z.gz").write_bytes(gzip.compress(numbered_text(29).encode()))
    (folder / "b" / "copy").write_text(numbered_text(7))
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("hidden")
    (folder / ".env").write_text("hidden")
    (folder / "empty").touch()
    (folder / "image").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "russian").write_bytes("Привет, мир".encode("cp1251"))
    os.mkfifo(folder / "fifo")
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "dangling").symlink_to("nowhere")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_are_the_documents_with_end_of_text_between(corpus, tmp_path, kind):
    prepared = prepare([corpus], tmp_path / "out", tokenizer=kind)
    found = []
    for ids in (prepared.train, prepared.val):
        borders = np.flatnonzero(ids == prepared.eot)
        found += [prepared.tokenizer.decode(piece) for piece in np.split(ids, borders)]
    wanted = [numbered_text(i) for i in range(30)]
    if kind == "word":
        wanted = [" ".join(text.split()) for text in wanted]
        # Words that occur only in the validation part are unknown.
        found = [text.replace("<unk>", wanted_number(text, wanted)) for text in found]
    assert sorted(found) == sorted(wanted)
    assert len(prepared.val) > 0


def wanted_number(text, wanted):
    (whole,) = (
        [w for w in wanted if w[: text.find("<unk>")] == text[: text.find("<unk>")]] if "<unk>" in text else ["x"]
    )
    return whole.split()[-1]


def test_what_was_left_out_is_counted_by_reason(corpus, tmp_path):
    manifest = prepare([corpus], tmp_path / "out", tokenizer="byte").manifest
    assert manifest["skipped"] == {
        "hidden": 2,
        "empty": 1,
        "binary": 1,
        "undecodable": 1,
        "duplicate": 2,
        "special": 1,
        "linked folder": 1,
        "unreadable": 1,
    }
    assert manifest["documents"] == manifest["train"]["documents"] + manifest["val"]["documents"] == 30


def test_missing_document_libraries_are_named_with_their_cure():
    assert describe_skipped({"pdf": 214, "binary": 0}) == [
        "214 PDF files skipped: pip install 'cllm-spheres[documents]'"
    ]


def test_the_manifest_says_what_the_files_hold(corpus, tmp_path):
    out = tmp_path / "out"
    prepared = prepare([corpus], out, tokenizer="bpe", vocab_size=300)
    manifest = json.loads((out / "manifest.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == [
        "files.jsonl",
        "manifest.json",
        "tokenizer.json",
        "train.bin",
        "val.bin",
    ]
    for name, entry in manifest["files"].items():
        data = (out / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for part, ids in (("train", prepared.train), ("val", prepared.val)):
        assert (out / f"{part}.bin").stat().st_size == 2 * manifest[part]["tokens"] == 2 * len(ids)
        assert manifest[part]["bytes"] == prepared.token_bytes[ids].sum()
        assert ids.dtype == np.uint16 and not ids.flags.writeable
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["eot"]) == ("bpe", 300, 299)
    assert manifest["bytes_per_token"] == manifest["bytes"] / manifest["tokens"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_do_not_depend_on_the_number_of_processes(corpus, tmp_path, kind, monkeypatch):
    inline = prepare([corpus], tmp_path / "0", tokenizer=kind)
    monkeypatch.setattr(prepare_module, "INLINE_BYTES", 0)
    monkeypatch.setattr(prepare_module, "BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(prepare_module, "READ_BYTES", 2000)
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 3000)
    for processes in (1, 3):
        prepare([corpus], tmp_path / str(processes), tokenizer=kind, processes=processes)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")
    assert Prepared.open(tmp_path / "3").tokenizer.decode(inline.train[:50]) != ""


@pytest.mark.parametrize("kind", ["byte", "char", "word"])
def test_a_corpus_larger_than_every_buffer_is_streamed(tmp_path, monkeypatch, kind):
    text = "".join(numbered_text(i) for i in range(40))
    (tmp_path / "big.txt").write_text(text)
    whole = prepare([tmp_path / "big.txt"], tmp_path / "whole", tokenizer=kind)
    monkeypatch.setattr(prepare_module, "UNIT_BYTES", 1000)
    monkeypatch.setattr(spool, "PIECE_BYTES", 300)
    monkeypatch.setattr(spool, "CUT_WINDOW", 100)
    small = prepare([tmp_path / "big.txt"], tmp_path / "small", tokenizer=kind)
    if kind != "word":
        joined = np.concatenate([small.train, small.val])
        assert small.tokenizer.decode(joined) == text
    assert whole.manifest["files"]["train.bin"] == small.manifest["files"]["train.bin"]


def test_a_large_jsonl_is_read_in_ranges_with_the_same_result(tmp_path, monkeypatch):
    lines = [json.dumps({"text": numbered_text(i)}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    whole = prepare([tmp_path / "a.jsonl"], tmp_path / "whole", tokenizer="byte")
    monkeypatch.setattr(prepare_module, "JSONL_BYTES", 1500)
    monkeypatch.setattr(prepare_module, "READ_BYTES", 3000)
    assert prepare([tmp_path / "a.jsonl"], tmp_path / "ranges", tokenizer="byte").fingerprint == whole.fingerprint
    assert whole.manifest["documents"] == 60


def test_bpe_of_a_large_corpus_is_trained_on_a_sample_and_says_so(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(numbered_text(i) for i in range(50)))
    monkeypatch.setattr(vocabulary, "SAMPLE_BYTES", 4000)
    monkeypatch.setattr(vocabulary, "SAMPLE_RANGE_BYTES", 1000)
    prepared = prepare([tmp_path / "a.txt"], tmp_path / "out", vocab_size=270)
    assert prepared.vocab_size == 270
    assert "sample: 4 pieces" in prepared.manifest["notes"][0]
    again = prepare([tmp_path / "a.txt"], tmp_path / "again", vocab_size=270)
    assert again.fingerprint == prepared.fingerprint


def test_words_are_forgotten_when_there_are_too_many_and_it_says_so(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("common common " + " ".join(f"w{i}" for i in range(100)) + " common" * 50)
    monkeypatch.setattr(vocabulary, "MAX_WORDS", 50)
    prepared = prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer="word")
    assert prepared.vocab_size == 3 and prepared.manifest["notes"]


@pytest.mark.parametrize("text", ["a", "é", "ab", "球球", "a b"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_shortest_texts_still_give_training_tokens(tmp_path, text, kind):
    (tmp_path / "a.txt").write_text(text)
    prepared = prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer=kind)
    assert len(prepared.train) >= 1
    assert prepared.val.dtype == np.uint16


def test_a_text_with_the_literal_end_of_text_has_no_such_token(tmp_path):
    (tmp_path / "a.txt").write_text(f"before {EOT} after\n" * 50)
    for kind in KINDS:
        prepared = prepare([tmp_path / "a.txt"], tmp_path / kind, tokenizer=kind)
        assert not (prepared.train == prepared.eot).any()


def test_a_vocabulary_above_16_bits_is_written_with_32(tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(f"w{i}" for i in range(70_000)) + "\n")
    prepared = prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer="word", vocab_size=62_000)
    assert prepared.train.dtype == np.uint16
    wide = prepare([tmp_path / "a.txt"], tmp_path / "wide", tokenizer="word", vocab_size=66_000, val_fraction=0)
    assert wide.train.dtype == np.uint32 and len(wide.val) == 0
    assert (tmp_path / "wide" / "train.bin").stat().st_size == 4 * 70_000


def test_progress_names_the_stages_and_ends_at_their_totals(corpus, tmp_path):
    seen = {}
    prepare([corpus], tmp_path / "out", progress=lambda stage, done, total: seen.update({stage: (done, total)}))
    assert list(seen) == list(prepare_module.STAGES)
    assert all(done == total for done, total in seen.values())


def test_progress_goes_on_within_one_long_file(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(f"{i}\n" for i in range(250_000)))
    monkeypatch.setattr(spool, "REPORT_BYTES", 1 << 18)
    seen = []

    def progress(stage, done, total):
        seen.append((stage, done / total))

    prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer="byte", progress=progress)
    read = [share for stage, share in seen if stage == "read"]
    assert read == sorted(read) and any(0 < share < 1 for share in read)


def test_the_files_follow_each_other_in_sorted_order(tmp_path):
    for name in ("b.txt", "a/z.txt", "c/a.txt", "B.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text(f"{name}\n")
    prepared = prepare([tmp_path / "in"], tmp_path / "out", tokenizer="byte", val_fraction=0)
    assert prepared.tokenizer.decode(prepared.train) == "B.txt\nb.txt\na/z.txt\nc/a.txt\n"


def test_the_tokenizer_file_of_bpe_is_the_one_that_was_used(corpus, tmp_path):
    prepared = prepare([corpus], tmp_path / "out", vocab_size=300)
    loaded = load_tokenizer(tmp_path / "out" / "tokenizer.json")
    assert loaded.encode("sphere 球") == prepared.tokenizer.encode("sphere 球")

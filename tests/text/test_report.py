"""What became of each file: the report in a prepared folder, and what preparing says of it."""

import gzip
import json

import pytest

from cllm_spheres.errors import InputError
from cllm_spheres.text import prepare as prepare_module
from cllm_spheres.text.folder import REPORT
from cllm_spheres.text.prepare import prepare
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.text.report import left_out_lines

LINES = "".join(json.dumps({"text": f"document {i} of many, all of them short\n"}) + "\n" for i in range(200))


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(40):
        (folder / f"note{i:02}.txt").write_text(f"note {i}: twelve spheres around one\n" * 9)
    (folder / "a.txt").write_text("the longest of all, cut for validation\n" * 1000)
    (folder / "copy.txt").write_text("note 7: twelve spheres around one\n" * 9)
    (folder / "copy of a copy.txt").write_text("note 7: twelve spheres around one\n" * 9)
    (folder / "bad.md").write_bytes("Grüße\n".encode() * 500 + b"\xff")
    (folder / "dialogue.jsonl").write_text(json.dumps({"prompt": "Why?", "completion": "So."}) + "\n{broken\n")
    (folder / "lines.jsonl.gz").write_bytes(gzip.compress((LINES + "".join(LINES.splitlines(True)[:4])).encode()))
    (folder / "tickets.jsonl").write_text(json.dumps({"id": 1, "body": "text"}) + "\n")
    (folder / "nothing.jsonl").write_text(json.dumps({"text": " "}) + "\n")
    (folder / "x.png").write_bytes(b"\x89PNG\0\0" + bytes(2000))
    (folder / "russian.txt").write_bytes("Привет, мир. ".encode("cp1251") * 90)
    (folder / ".git").mkdir()
    return folder


def records_of(prepared):
    return {record["path"].rsplit("/", 1)[1]: record for record in prepared.report()}


def test_the_report_says_of_every_file_what_became_of_it(corpus, tmp_path):
    prepared = prepare([corpus], tmp_path / "out", tokenizer="byte")
    found = records_of(prepared)
    assert len(found) == 51 == len((tmp_path / "out" / REPORT).read_text().splitlines())
    assert found["a.txt"] | {"tokens": 0, "path": ""} == {
        "path": "", "bytes": 39_000, "kind": "text", "encoding": "utf-8", "documents": 1, "part": "both", "tokens": 0,
    }  # fmt: skip
    wanted = {
        "bad.md": ("text", "utf-8", 1, {}), "dialogue.jsonl": ("dialogue", "utf-8", 1, {"broken jsonl line": 1}),
        "lines.jsonl.gz": ("jsonl in gz", "utf-8", 204, {"duplicate": 4}), "tickets.jsonl": ("text", "utf-8", 1, {}),
    }  # fmt: skip
    for name, (kind, encoding, documents, skipped) in wanted.items():
        record = found[name]
        assert (record["kind"], record["encoding"], record["documents"]) == (kind, encoding, documents)
        assert record.get("skipped", {}) == skipped and "reason" not in record
    assert found["bad.md"]["lost"] == 1 and found["tickets.jsonl"]["fields"] == ["id", "body"]
    assert found["copy of a copy.txt"]["part"] in ("train", "val"), "the first in sorted order is kept"
    assert {found[name]["of"] for name in ("copy.txt", "note07.txt")} == {str(corpus / "copy of a copy.txt")}
    reasons = {name: record["reason"] for name, record in found.items() if "reason" in record}
    assert reasons == {
        ".git": "hidden", "x.png": "binary", "russian.txt": "undecodable", "nothing.jsonl": "empty",
        "copy.txt": "duplicate", "note07.txt": "duplicate",
    }  # fmt: skip
    for part, ids in (("train", prepared.train), ("val", prepared.val)):
        whole = sum(record.get("tokens", 0) for record in found.values() if record.get("part") == part)
        both = sum(record["tokens"] for record in found.values() if record.get("part") == "both")
        assert whole <= len(ids) <= whole + both
    assert sum(record.get("tokens", 0) for record in found.values()) == prepared.manifest["tokens"]


def test_the_same_report_comes_from_a_file_read_in_ranges(corpus, tmp_path, monkeypatch):
    (corpus / "lines.jsonl").write_text(LINES + '{"id": 3}\n' + LINES[:200].replace("many", "others"))
    whole = prepare([corpus, corpus / "lines.jsonl"], tmp_path / "whole", tokenizer="byte")
    monkeypatch.setattr(prepare_module, "JSONL_BYTES", 700)
    monkeypatch.setattr(prepare_module, "READ_BYTES", 1500)
    ranges = prepare([corpus, corpus / "lines.jsonl"], tmp_path / "ranges", tokenizer="byte")
    assert list(ranges.report()) == list(whole.report())
    assert ranges.manifest["left_out"] == whole.manifest["left_out"]
    assert [record["path"] for record in whole.report()].count(str(corpus / "lines.jsonl")) == 2, "it was given twice"


def test_preparing_names_the_worst_reasons_first_and_says_what_it_guessed(corpus, tmp_path):
    manifest = prepare([corpus], tmp_path / "out", tokenizer="byte").manifest
    lines = left_out_lines(manifest["left_out"])
    reason = "in an encoding that was not recognised (convert them to UTF-8)"
    assert lines[0] == f"1 {reason}, 1 kB: {corpus / 'russian.txt'}"
    assert lines[1] == f"1 broken jsonl lines: {corpus / 'dialogue.jsonl'}"
    assert f"6 duplicates of an earlier document: {corpus / 'copy.txt'}" in lines[3]
    assert {entry["reason"]: entry["count"] for entry in manifest["left_out"]} == manifest["skipped"]
    notes = " ".join(manifest["notes"])
    for words in (
        f"1 byte in 1 file could not be decoded and became U+FFFD: {corpus / 'bad.md'} (1).",
        "1 file read as dialogues, written as chat and serve do (User: ..., Assistant: ...)",
        "because the lines have none of the fields text, content, messages or prompt and completion: "
        f"{corpus / 'tickets.jsonl'} (id, body).",
    ):
        assert words in notes


def test_a_report_that_was_changed_is_refused_and_is_no_part_of_the_data(corpus, tmp_path):
    first = prepare([corpus], tmp_path / "out", tokenizer="byte")
    corpus.rename(tmp_path / "elsewhere")
    assert prepare([tmp_path / "elsewhere"], tmp_path / "other", tokenizer="byte").fingerprint == first.fingerprint
    (tmp_path / "out" / REPORT).write_text("{}\n")
    prepared = Prepared.open(tmp_path / "out")
    prepared.verify()
    with pytest.raises(InputError, match=r"files\.jsonl is not what was written"):
        list(prepared.report())

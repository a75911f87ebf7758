"""Opening prepared folders, damaged ones among them, and the cache of `train PATH`."""

import json
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from cllm_spheres.errors import InputError
from cllm_spheres.text import folder as folders
from cllm_spheres.text import prepare as prepare_module
from cllm_spheres.text.cache import cache_folder, prepare_cached
from cllm_spheres.text.embedded import embedded_files, minimal_text
from cllm_spheres.text.prepare import prepare
from cllm_spheres.text.prepared import Prepared

TEXT = "one two three four\n" * 50


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def folder(source, tmp_path):
    return prepare([source], tmp_path / "out", vocab_size=270).folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cllm-spheres" / "prepared"


def test_an_opened_folder_gives_its_tokens_and_tokenizer(folder):
    prepared = Prepared.open(str(folder))
    prepared.verify()
    assert prepared.tokenizer.decode(np.concatenate([prepared.train, prepared.val])) == TEXT
    assert (prepared.vocab_size, prepared.eot) == (270, 269)
    assert prepared.token_bytes.shape == (270,)
    with pytest.raises(ValueError):
        prepared.train[0] = 1


def test_counting_the_bytes_of_tokens_keeps_no_tokenizer_in_memory(folder):
    prepared = Prepared.open(folder)
    assert prepared.token_bytes.tolist() == Prepared.open(folder).tokenizer.token_bytes().tolist()
    assert "tokenizer" not in vars(prepared)


def test_the_fingerprint_is_that_of_the_data(folder, source, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    fingerprint = Prepared.open(folder).fingerprint
    assert Prepared.open(moved).fingerprint == fingerprint
    assert prepare([source], moved, vocab_size=269).fingerprint != fingerprint
    assert prepare([source], moved, vocab_size=270, val_fraction=0.2).fingerprint != fingerprint


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json", "manifest.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=name):
        Prepared.open(folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json"])
def test_a_file_cut_short_is_named_with_both_sizes(folder, name):
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-2])
    with pytest.raises(InputError, match=f"{name} has {len(data) - 2:,} bytes instead of {len(data):,}.*anew"):
        Prepared.open(folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "tokenizer.json"])
def test_verify_finds_a_single_changed_byte(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name} has sha256"):
        Prepared.open(folder).verify()


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"', b"{}", b"\xff\0"])
def test_a_damaged_manifest_is_bad_input(folder, data):
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(InputError, match=str(folder)):
        Prepared.open(folder)


def test_a_changed_manifest_is_noticed(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for change in ({"vocab_size": 271}, {"train": {"tokens": 1}}, {"manifest_sha256": "0"}):
        (folder / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(InputError, match="was changed"):
            Prepared.open(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest | {"version": 99}))
    with pytest.raises(InputError, match=r"version 99 .* reads 1 and 2"):
        Prepared.open(folder)


def test_a_path_that_is_no_prepared_folder_says_how_to_make_one(tmp_path, source):
    for path, message in (
        (tmp_path / "none", "There is no prepared folder"),
        (source, "is not a folder"),
        (tmp_path, "no manifest.json"),
    ):
        with pytest.raises(InputError, match=f"{message}.*\n?.*cllm-spheres prepare"):
            Prepared.open(path)


def test_raw_text_is_prepared_once_and_found_again_by_content(source, cache, monkeypatch, tmp_path):
    first = prepare_cached([source], "byte")
    assert first.folder.parent == cache == cache_folder()
    monkeypatch.setattr(prepare_module, "prepare_files", None)
    assert prepare_cached([source], "byte").folder == first.folder
    copy = tmp_path / "copy.txt"
    copy.write_text(TEXT)
    assert prepare_cached(str(copy), "byte").folder == first.folder


def test_other_text_and_other_settings_are_other_data(source, cache):
    folders = {prepare_cached([source], *options).folder for options in (
        ("byte",), ("char",), ("bpe", 270), ("bpe", 269), ("byte", None, 0.2))}  # fmt: skip
    source.write_text(TEXT[:-2] + "!\n")
    folders.add(prepare_cached([source], "byte").folder)
    assert len(folders) == 6


def test_a_prepared_folder_is_opened_as_it_is(folder, cache):
    assert prepare_cached([folder], "byte").folder == folder
    assert prepare_cached(folder).folder == folder
    assert not cache.exists()


def test_a_damaged_prepared_folder_is_not_taken_for_text(folder):
    (folder / "val.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"val\.bin has 0 bytes"):
        prepare_cached([folder])


@pytest.mark.parametrize("name", ["manifest.json", "train.bin"])
def test_a_damaged_cache_entry_is_made_anew(source, name):
    first = prepare_cached([source], "byte")
    (first.folder / name).write_bytes(b"x")
    again = prepare_cached([source], "byte")
    again.verify()
    assert again.folder == first.folder


def test_many_at_once_do_each_other_no_harm(source, cache):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: prepare_cached([source], "char"), range(16)))
    assert len({str(result.folder) for result in results}) == 1
    for result in results:
        result.verify()
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_a_cache_that_cannot_be_written_points_to_prepare(source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"Prepared text cannot be kept: .*Not a directory.*prepare PATH --out DIR"):
        prepare_cached([source], "byte")
    (tmp_path / "closed" / "cllm-spheres").mkdir(parents=True)
    (tmp_path / "closed" / "cllm-spheres" / "prepared").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "closed"))
    with pytest.raises(InputError, match=r"Prepared text cannot be kept: .*File exists.*prepare PATH --out DIR"):
        prepare_cached([source], "byte")


def test_bad_text_is_still_bad_text_with_a_cache(source, tmp_path):
    with pytest.raises(InputError, match="is more than the text gives"):
        prepare_cached([source], "bpe", 5000)
    with pytest.raises(InputError, match="No such file"):
        prepare_cached([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="No text found"):
        prepare_cached([tmp_path / "empty"])


def test_the_embedded_corpus_is_the_standard_library_without_tests():
    files = embedded_files()
    names = [path.replace(os.sep, "/") for path in files.paths]
    assert any(name.endswith("/argparse.py") for name in names)
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert not any(part in name.split("/") for name in names for part in ("test", "tests", "site-packages"))
    assert all(name.endswith(".py") for name in names)
    assert files.total_bytes > 5_000_000


def test_the_minimal_text_is_there_and_small():
    text = minimal_text().read_text(encoding="utf-8")
    assert 0 < len(text.encode()) < 200
    prepared = prepare_cached([minimal_text()], "byte", 257)
    assert prepared.tokenizer.decode(np.concatenate([prepared.train, prepared.val])) == text
    assert len(prepared.val) > 8, "an evaluation needs one block of the preset minimal and its target"


@pytest.mark.slow
def test_the_embedded_corpus_is_prepared_and_cached():
    first = prepare_cached(None, "bpe", 512)
    assert first.manifest["tokens"] > 1_000_000 and "standard library" in first.manifest["sources"][0]
    assert prepare_cached(None, "bpe", 512).folder == first.folder


@pytest.mark.parametrize("name", ["train.bin", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("what", ["pipe", "device"])
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_refused_without_waiting(folder, name, what):
    (folder / name).unlink()
    os.mkfifo(folder / name) if what == "pipe" else (folder / name).symlink_to("/dev/zero")
    with pytest.raises(InputError, match="not a file"):
        Prepared.open(folder)


def reseal(folder, **entries):
    """A manifest with other entries and a true hash, as one who means harm would write it."""
    manifest = json.loads((folder / "manifest.json").read_text()) | entries
    for name, entry in manifest["files"].items() if isinstance(manifest["files"], dict) else ():
        if (folder / name).is_file():
            entry |= {"bytes": (folder / name).stat().st_size, "sha256": folders.hash_file(folder / name)}
    del manifest["manifest_sha256"]
    folders.write_manifest(folder, manifest)


def test_a_folder_of_the_first_version_still_opens_and_says_what_its_share_is(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("cut", "report", "left_out", "manifest_sha256"):
        del manifest[name]
    manifest |= {"version": 1, "split": "document", "val_fraction": 0.01, "tokens": 5000}
    folders.write_manifest(folder, manifest)
    prepared = Prepared.open(folder)
    prepared.verify()
    with pytest.raises(InputError, match="kept no report on its files"):
        list(prepared.report())
    assert "older version" in prepared.share_warning() and "1 %" in prepared.share_text()


@pytest.mark.parametrize(
    "entries",
    [
        {"files": []}, {"files": {"train.bin": {}}}, {"files": {"../x": {"bytes": 1, "sha256": ""}}}, {"dtype": "O"},
        {"dtype": ["uint16"]}, {"train": 3}, {"train": {"documents": 1, "bytes": 1, "tokens": "1"}},
        {"vocab_size": True},
        {"vocab_size": 2**31 + 1}, {"eot": 270}, {"skipped": {"binary": "3"}}, {"sources": None}, {"notes": [1]},
        {"tokenizer": {}}, {"val_fraction": "0.1"}, {"documents": -1}, {"cut": None}, {"report": 3}, {"left_out": [{}]},
    ],
)  # fmt: skip
def test_entries_of_another_kind_under_a_true_hash_are_named(folder, entries):
    reseal(folder, **entries)
    with pytest.raises(InputError, match=f"manifest.json has {next(iter(entries))} "):
        Prepared.open(folder)


def test_tokens_above_the_vocabulary_under_a_true_hash_are_refused(folder):
    ids = np.fromfile(folder / "train.bin", "<u2")
    ids[3] = 270
    ids.tofile(folder / "train.bin")
    reseal(folder)
    with pytest.raises(InputError, match=r"train\.bin holds token 270, the vocabulary is 270"):
        Prepared.open(folder).verify()


def test_half_a_token_at_the_end_is_refused(folder):
    with (folder / "val.bin").open("ab") as file:
        file.write(b"x")
    reseal(folder)
    with pytest.raises(InputError, match="not a multiple of the 2 of a token"):
        Prepared.open(folder)


def test_a_manifest_that_is_nested_too_deeply_is_bad_input(folder):
    (folder / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="no JSON"):
        Prepared.open(folder)
    assert not folders.is_prepared(folder)


def test_a_name_that_is_too_long_is_bad_input(source, tmp_path):
    with pytest.raises(InputError, match="File name too long"):
        Prepared.open(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match="File name too long"):
        prepare([source], tmp_path / ("x" * 300) / "out")


def test_a_zero_byte_in_a_name_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="null byte"):
        prepare([tmp_path / "a\0b"], tmp_path / "out")


def test_a_damaged_key_of_the_cache_is_made_anew(source, cache):
    first = prepare_cached([source], "byte")
    for key in (cache / "keys").iterdir():
        key.write_bytes(b"\xff\xfe")
    assert prepare_cached([source], "byte").fingerprint == first.fingerprint

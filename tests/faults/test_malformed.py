"""Whatever is given as options, files or folders: it works, or one paragraph says why not, and nothing is left.

`CLLM_FAULTS=whole pytest tests/faults/test_malformed.py` tries more than 10,000 random inputs and prints how many;
without it a fixed few hundred are tried.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm_spheres import events
from cllm_spheres.checkpoint.checkpoint import FILES
from cllm_spheres.checkpoint.files import seal
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.config import PRESETS, Config, build, flag, merge
from cllm_spheres.errors import InputError
from cllm_spheres.inference import model as inference
from cllm_spheres.model.layout import Layout
from cllm_spheres.text import folder as folders
from cllm_spheres.text.prepare import prepare
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.text.tokenizer import KINDS, load_tokenizer
from cllm_spheres.training import folder, session
from cllm_spheres.training.plan import shape_of
from cllm_spheres.watch import dashboard
from cllm_spheres.watch.overview import overview
from tests.faults.malformed import (
    MODEL,
    PLACES,
    WHOLE,
    broken_bytes,
    harmless,
    json_texts,
    json_values,
    make_run,
    many,
    mutated,
    numbers,
    odd_floats,
    odd_texts,
    put,
    reseal_checkpoint,
    scalars,
    texts,
    time_limit,
    to_text,
    tried,
)

TEXT = "the cat sat on the mat, and the dog sat on the cat.\nwords and more words for all of them to read.\n" * 12
MEMORY_BYTES = 12 << 30  # of address space: what wants more than any of these inputs needs, fails
prepared_files = st.sampled_from([*folders.FILES, "manifest.json"])


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory, request):
    """A folder for everything, the cache and temporary files too; the figures at the end."""
    top = tmp_path_factory.mktemp("malformed")
    (top / "tmp").mkdir()
    (top / "text").mkdir()
    (top / "text" / "a.txt").write_text(TEXT)
    before, here = resource.getrlimit(resource.RLIMIT_AS), os.getcwd()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(top / "cache"))
        patch.setenv("TMPDIR", str(top / "tmp"))
        patch.setattr(tempfile, "tempdir", str(top / "tmp"))
        # the text that stands in where none is named, small
        for module in ("embedded", "prepare"):
            patch.setattr(f"cllm_spheres.text.{module}.embedded_files", lambda: list_of(top / "text"))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, before[1]))
        yield top
        os.chdir(here)
        resource.setrlimit(resource.RLIMIT_AS, before)
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        shown = ", ".join(f"{count:,} {kind}" for kind, count in sorted(tried.items()))
        print(f"\n{sum(tried.values()):,} malformed inputs: {shown}")


def list_of(path):
    from cllm_spheres.text.files import list_files

    return list_files([path])


@pytest.fixture(scope="module")
def good(place):
    """A good prepared folder of each kind of tokenizer."""
    return {kind: prepare([place / "text"], place / "good" / kind, tokenizer=kind).folder for kind in KINDS}


@pytest.fixture(scope="module")
def good_run(place, good):
    """A good run with checkpoints of the steps 1 and 2, made without a training."""
    return make_run(place / "runs" / "good", good["char"])


@contextlib.contextmanager
def copy_of(source, place):
    """A copy of a folder that may be changed, in a working folder of its own."""
    work = Path(tempfile.mkdtemp(dir=place))
    try:
        shutil.copytree(source, work / "it", symlinks=True)
        yield work / "it"
    finally:
        shutil.rmtree(work)


# --- configurations

fields = st.sampled_from(list(Config.model_fields))
sane = st.fixed_dictionaries({}, optional=dict(
    preset=st.sampled_from([*PRESETS, "smal"]), steps=st.integers(0, 9), epochs=odd_floats | st.floats(0, 3),
    batch_size=st.integers(0, 9) | numbers, spheres=st.integers(0, 9), workers=st.integers(0, 9),
    layers=st.integers(0, 3) | numbers, heads=st.integers(1, 9) | numbers, width=st.integers(0, 33) | numbers,
    ff_width=st.integers(0, 33) | numbers, block_size=st.integers(0, 33) | numbers, eval_tokens=numbers,
    lr=odd_floats | st.floats(0, 1), min_lr=odd_floats, clip=odd_floats, weight_decay=odd_floats, warmup=numbers,
    dropout=odd_floats, beta1=odd_floats, seed=numbers, tokenizer=st.sampled_from([*KINDS, "byt"]), vocab_size=numbers,
    eval_every=numbers, save_every=numbers, keep=numbers, stop_at=numbers,
))  # fmt: skip
options = (
    sane
    | st.dictionaries(fields | texts, json_values, max_size=5)
    | st.builds(lambda a, b: a | b, sane, st.dictionaries(fields, scalars, max_size=2))
)


@many(2000, 150)
@given(given_options=options)
def test_options_of_any_kind_are_taken_or_refused(given_options):
    with harmless():
        merge(given_options)
    with harmless():
        build(given_options)
    tried["options"] += 1


@many(1000, 60)
@given(given_options=options, kind=st.sampled_from(KINDS), raw=st.booleans(), resume=st.booleans())
def test_a_plan_of_any_options_is_made_or_refused(place, good, good_run, given_options, kind, raw, resume):
    with copy_of(good_run, place) as run:
        data = place / "text" if raw else good[kind]
        with harmless(run.parent, place / "good", place / "text"):
            if resume:
                session.make_plan(None, given_options, run=run, resume=True)
            else:
                session.make_plan(data, given_options, run=run.parent / "new")
        assert not list(place.glob("cache/**/.*preparing*"))
    tried["options of runs"] += 1


toml_values = st.one_of(
    st.sampled_from(
        ["9" * 5000, "nan", "inf", "-inf", "1979-05-27", "07:32:00", "0x7fffffffffffffffffff", "1e400", '"""', "[",
        "{}",
         "[" * 5000, "{a=" * 2000, '"\\ud800"', "true", "''", "[[1]]", "{a={b=1}}", "1_000", '"\\u0000"', "+0", "0b1"]
    ),
    scalars.map(lambda value: to_text(value)),
    json_values.map(lambda value: to_text(value)),
)  # fmt: skip
toml_keys = fields | st.sampled_from(["data", "text", "data_fingerprint", "a.b", '""', '"ü"', "lr.x", "lrate"])
toml_texts = st.lists(
    st.builds("{} = {}\n".format, toml_keys, toml_values)
    | st.sampled_from(["[lr]\n", "[[lr]]\n", "\n", "# x\n", "\r"]),
    max_size=5,
).map("".join)
tomls = toml_texts.map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=80)


@many(1000, 40)
@given(data=tomls)
def test_a_toml_of_any_content_is_taken_or_refused(place, good, data):
    path = place / "options.toml"
    path.write_bytes(data)
    with harmless(place / "good"):
        merge({}, path)
    with copy_of(place / "text", place) as work, harmless(work.parent, place / "good", place / "text"):
        session.make_plan(None, MODEL | {"steps": 3}, run=work.parent / "run", file=path)
    tried["toml files"] += 1


@st.composite
def own_configs(draw, lines):
    """The lines of a run's config.toml, some of them changed, gone or doubled."""
    lines = list(lines)
    for _ in range(draw(st.integers(1, 4))):
        i = draw(st.integers(0, len(lines) - 1))
        key = lines[i].partition(" = ")[0]
        match draw(st.sampled_from(["value", "value", "remove", "double", "key", "raw"])):
            case "value":
                lines[i] = f"{key} = {draw(toml_values)}"
            case "remove":
                lines[i] = ""
            case "double":
                lines.append(lines[i])
            case "key":
                lines[i] = draw(toml_texts)
            case "raw":
                lines[i] = draw(texts)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@many(600, 50)
@given(data=st.data())
def test_a_changed_config_of_a_run_is_taken_or_refused(place, good_run, data):
    with copy_of(good_run, place) as run:
        if data.draw(st.booleans(), label="without checkpoints"):
            shutil.rmtree(run / "checkpoints")
            (run / "metrics.jsonl").unlink()
        lines = [line for line in (run / "config.toml").read_text().splitlines() if " = " in line and line[0] != "#"]
        (run / "config.toml").write_bytes(data.draw(own_configs(lines) | tomls))
        with harmless(run.parent, place / "good"):
            folder.read_config(run)
        with harmless(run.parent, place / "good"):
            plan, _ = session.resumed_run(run, {}, data=None)
            folder.newest_checkpoint(run, plan.config, plan.prepared.fingerprint)
    tried["configurations of runs"] += 1


# --- prepared folders


def reseal_prepared(path, content, agree=True):
    """A manifest over any content with a true hash; with `agree` its sizes and hashes are those of the files."""
    if agree and isinstance(content, dict) and isinstance(content.get("files"), dict):
        for name, entry in content["files"].items():
            with contextlib.suppress(OSError, ValueError):
                if isinstance(entry, dict) and (path / name).is_file() and not (path / name).is_symlink():
                    entry["bytes"] = (path / name).stat().st_size
                    entry["sha256"] = folders.hash_file(path / name)
    text = to_text(content)
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(content, dict):
            content["manifest_sha256"] = folders.manifest_hash(json.loads(text))
            text = to_text(content)
    (path / "manifest.json").write_bytes(text.encode())


def open_prepared(path, work, good_place):
    """All that reads a prepared folder."""
    with harmless(work):
        prepared = Prepared.open(path)
        prepared.verify()
        assert prepared.vocab_size == prepared.tokenizer.vocab_size
        assert isinstance(prepared.fingerprint, str)
        prepared.tokenizer.decode(prepared.train[:20].tolist())
        assert max(prepared.train.max(initial=0), prepared.val.max(initial=0)) < prepared.vocab_size
    with harmless(work, good_place):
        session.make_plan(path, MODEL | {"steps": 3}, run=work / "new")


@many(800, 60)
@given(data=st.data())
def test_a_changed_file_of_a_prepared_folder_is_taken_or_refused(place, good, data):
    with copy_of(good[data.draw(st.sampled_from(KINDS))], place) as path:
        for _ in range(data.draw(st.integers(1, 2))):
            name = data.draw(prepared_files)
            if not (path / name).is_file():
                continue
            if data.draw(st.booleans(), label="bytes"):
                (path / name).write_bytes(data.draw(broken_bytes((path / name).read_bytes())))
            else:
                put(path / name, data.draw(st.sampled_from(PLACES)))
        open_prepared(path, path.parent, place / "good")
    tried["prepared folders"] += 1


@many(1000, 70)
@given(data=st.data())
def test_a_manifest_of_any_content_under_a_true_hash_is_taken_or_refused(place, good, data):
    with copy_of(good[data.draw(st.sampled_from(KINDS))], place) as path:
        content = json.loads((path / "manifest.json").read_text())
        del content["manifest_sha256"]
        if data.draw(st.integers(0, 3)) == 0:
            name = data.draw(st.sampled_from(folders.FILES))
            (path / name).write_bytes(data.draw(broken_bytes((path / name).read_bytes())))
        if data.draw(st.integers(0, 3)) == 0:
            name = data.draw(st.sampled_from(["train.bin", "val.bin"]))
            ids = np.fromfile(path / name, "<u2")
            if len(ids):
                ids[data.draw(st.integers(0, len(ids) - 1))] = data.draw(st.integers(0, 65535))
                ids.tofile(path / name)
        if data.draw(st.integers(0, 9)) > 0:
            content = data.draw(mutated(content))
        reseal_prepared(path, content, agree=data.draw(st.booleans()))
        open_prepared(path, path.parent, place / "good")
    tried["manifests of prepared folders"] += 1


# --- tokenizers


# Parts of the files that the library `tokenizers` reads: it takes them, and some end the process as a text comes.
_VOCAB = {"a": 0, "b": 1, "ab": 2}
LIBRARY_PARTS = {
    "model": [
        {"type": "WordPiece", "vocab": _VOCAB, "unk_token": "?", "continuing_subword_prefix": "##",
         "max_input_chars_per_word": 9},
        {"type": "WordLevel", "vocab": _VOCAB, "unk_token": "?"},
        {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None, "byte_fallback": False},
        {"type": "BPE", "vocab": _VOCAB, "merges": [["a", "b"]], "unk_token": "?"},
        {"type": "BPE", "vocab": _VOCAB, "merges": [["a", "b"]], "dropout": 0.5},
        {"type": "BPE", "vocab": {"a": 2**32 - 1, "b": 10**9}, "merges": []},
        {"vocab": {}, "merges": []},
    ],
    "truncation": [{"direction": "Right", "max_length": n, "strategy": "LongestFirst", "stride": 7} for n in (0, 2)],
    "padding": [
        {"strategy": {"Fixed": n}, "direction": "Right", "pad_to_multiple_of": m, "pad_id": 10**6, "pad_type_id": 0,
         "pad_token": "x"} for n, m in ((10, None), (10**12, None), (10, 0))
    ],
    "normalizer": [
        {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}, {"type": "Prepend", "prepend": "x"},
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    ],
    "pre_tokenizer": [
        None, {"type": "FixedLength", "length": 0},
        {"type": "Split", "pattern": {"Regex": "(a*)*b"}, "behavior": "Isolated", "invert": False},
    ],
    "post_processor": [{"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}],
    "added_tokens": [[], [{"id": 10**9, "content": "<|endoftext|>", "single_word": False, "lstrip": True,
                           "rstrip": True, "normalized": True, "special": True}]],
}  # fmt: skip
library_parts = st.sampled_from(list(LIBRARY_PARTS)).flatmap(
    lambda name: st.fixed_dictionaries({name: st.sampled_from(LIBRARY_PARTS[name])})
)


@many(1000, 70)
@given(data=st.data())
def test_a_tokenizer_of_any_content_is_taken_or_refused(place, good, data):
    kind, prompt = data.draw(st.sampled_from(KINDS)), data.draw(texts)
    with copy_of(good[kind], place) as path:
        file = path / "tokenizer.json"
        record = json.loads(file.read_text())
        raw = file.read_bytes()
        if kind == "bpe" and data.draw(st.booleans(), label="other parts"):
            new = to_text(record | data.draw(library_parts)).encode()
        else:
            new = data.draw(mutated(record).map(lambda value: to_text(value).encode()) | broken_bytes(raw) | json_texts)
        file.write_bytes(new)
        with harmless(path):
            tokenizer = load_tokenizer(file)
            assert tokenizer.vocab_size > tokenizer.eot >= 0
            with contextlib.suppress(InputError):
                ids = tokenizer.encode(prompt + TEXT[:50])
                assert max(ids, default=0) < tokenizer.vocab_size
                assert isinstance(tokenizer.decode([*ids, -1, 10**6]), str)
            tokenizer.token_bytes()
        content = json.loads((path / "manifest.json").read_text())
        reseal_prepared(path, content)
        open_prepared(path, path.parent, place / "good")
    tried["tokenizers"] += 1


# --- checkpoints

sizes = st.sampled_from([0, 1, 2, 4, 8, 33, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 2**64, -1, -4])


@st.composite
def tensor_files(draw, good: bytes):
    """A safetensors file with a header that is nearly right, or random."""
    length = int.from_bytes(good[:8], "little")
    header, body = json.loads(good[8 : 8 + length]), good[8 + length :]
    match draw(
        st.sampled_from(["tensor", "tensor", "offsets", "mutated", "length", "body", "bytes", "value", "rename"])
    ):
        case "tensor":
            name = draw(st.sampled_from([name for name in header if name != "__metadata__"]))
            header[name] = {
                "dtype": draw(st.sampled_from(["F32", "F64", "F16", "BF16", "F8_E4M3", "U8", "I64", "X", "BOOL"])),
                "shape": draw(st.lists(sizes, max_size=4)),
                "data_offsets": draw(st.just(header[name]["data_offsets"]) | st.lists(sizes, min_size=2, max_size=2)),
            }
        case "offsets":
            one, other = (draw(st.sampled_from([n for n in header if n != "__metadata__"])) for _ in range(2))
            header[one]["data_offsets"] = header[other]["data_offsets"]
        case "mutated":
            header = draw(mutated(header))
        case "length":
            word = draw(st.sampled_from([0, 1, length + 1, length - 1, 2**31, 2**63, 2**64 - 1]))
            return word.to_bytes(8, "little") + good[8:]
        case "body":
            # weights of any bits, NaN and infinity among them
            place = draw(st.integers(0, max(0, len(body) // 4 - 1))) * 4
            word = draw(
                st.sampled_from([b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f"])
                | st.binary(min_size=4, max_size=4)
            )
            body = body[:place] + word + body[place + 4 :]
        case "bytes":
            return draw(broken_bytes(good))
        case "value":
            header = draw(json_values)
        case "rename":
            name = draw(st.sampled_from(list(header)))
            header[draw(texts)] = header.pop(name)
    text = to_text(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def read_checkpoints(run):
    """All that reads the checkpoints of a run."""
    store = Store(run)
    with harmless(run.parent):
        saved = store.load(2)
        saved.optimizer, saved.model, saved.state, saved.config  # noqa: B018
    with harmless(run.parent):
        store.newest_good()
    with harmless(run.parent):
        config, where = folder.read_config(run)
        checkpoint, _ = folder.newest_checkpoint(run, config, where["data_fingerprint"])
        fits(checkpoint, config)
    with harmless(run.parent):
        session.make_plan(None, {"steps": 9}, run=run, resume=True)
    with harmless(run.parent):
        model = inference.load(run)
        model.generate("the ", tokens=3)
    with harmless(run.parent):
        inference.load(run, 2).generate("", tokens=2, temperature=0, top_k=3)


def fits(checkpoint, config):
    """What a resume takes out of a checkpoint without a second look."""
    state, layout = checkpoint.state, Layout(shape_of(config))
    assert all(isinstance(state[key], int) for key in ("total_tokens", "step", "applied", "evaluated", "worse"))
    assert isinstance(state["fingerprint"], dict)
    assert state["step"] == checkpoint.step
    shapes = {tensor.name: tensor.shape for tensor in layout.tensors}
    assert {name: array.shape for name, array in checkpoint.model.items()} == shapes
    kinds = {name.partition(".")[0] for name in checkpoint.optimizer}
    assert kinds == {"moments", "squares"}
    for kind in kinds:
        part = {n.partition(".")[2]: a.shape for n, a in checkpoint.optimizer.items() if n.startswith(f"{kind}.")}
        assert part == shapes


@many(500, 25)
@given(data=st.data())
def test_tensors_of_any_content_under_a_true_manifest_are_taken_or_refused(place, good_run, data):
    with copy_of(good_run, place) as run:
        path = Store(run).path(2)
        for name in data.draw(st.sampled_from([["model"], ["optimizer"], ["model", "optimizer"]])):
            file = path / f"{name}.safetensors"
            file.write_bytes(data.draw(tensor_files(file.read_bytes())))
        reseal_checkpoint(path, 2)
        read_checkpoints(run)
    tried["tensors of checkpoints"] += 1


@many(500, 25)
@given(data=st.data())
def test_states_of_any_content_under_a_true_manifest_are_taken_or_refused(place, good_run, data):
    with copy_of(good_run, place) as run:
        path = Store(run).path(2)
        for name in data.draw(st.sampled_from([["state.json"], ["config.json"], ["state.json", "config.json"]])):
            content = mutated(json.loads((path / name).read_text())).map(lambda value: to_text(value).encode())
            (path / name).write_bytes(data.draw(content | json_texts))
        reseal_checkpoint(path, 2)
        read_checkpoints(run)
    tried["states of checkpoints"] += 1


@many(300, 15)
@given(data=st.data())
def test_a_tokenizer_of_any_content_in_a_checkpoint_is_taken_or_refused(place, good, good_run, data):
    with copy_of(good_run, place) as run:
        path = Store(run).path(2)
        other = json.loads((good[data.draw(st.sampled_from(KINDS))] / "tokenizer.json").read_text())
        content = mutated(other).map(lambda value: to_text(value).encode())
        (path / "tokenizer.json").write_bytes(data.draw(content | json_texts))
        reseal_checkpoint(path, 2)
        read_checkpoints(run)
    tried["tokenizers of checkpoints"] += 1


@many(300, 15)
@given(data=st.data())
def test_a_changed_checkpoint_is_refused(place, good_run, data):
    with copy_of(good_run, place) as run:
        path = Store(run).path(2)
        name = data.draw(st.sampled_from([*FILES, "manifest.json"]))
        match data.draw(st.sampled_from(["bytes", "place", "manifest", "best", "name"])):
            case "bytes":
                (path / name).write_bytes(data.draw(broken_bytes((path / name).read_bytes())))
            case "place":
                put(path / name, data.draw(st.sampled_from(PLACES)))
            case "manifest":
                content = json.loads((path / "manifest.json").read_text())
                del content["sha256"]
                content = data.draw(mutated(content))
                with contextlib.suppress(ValueError, TypeError, RecursionError):
                    (path / "manifest.json").write_bytes(seal(content))
            case "best":
                put(run / "checkpoints" / "best", data.draw(st.sampled_from(PLACES)))
            case "name":
                target = data.draw(st.sampled_from(["step-00000009", "step-000000002", "step-999999999999999999", "x"]))
                (run / "checkpoints" / "best").unlink()
                path.rename(path.with_name(target))
        read_checkpoints(run)
    tried["changed checkpoints"] += 1


# --- corpora

HEADS = [
    b"", b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff", b"\xff\xfe\0\0", b"\0\0\xfe\xff", b"\x1f\x8b",
    b"\x1f\x8b\x08\0", b"PK\x03\x04",
    b"PK\x03\x04word/document.xml", b"%PDF-1.4\n", b"%PDF-", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PAR1",
    b"<html>",
    b"<!DOCTYPE html><![", b"<html><!", b"<html><![foo[", b"<html><![CDATA[", b"<html>&#", b"<html><?",
    b'<html><a href="',
    b'{"text": "', b'{"text": "a"}\n{"text": ', b'{"text": 5}\n', b'{"content": "\\ud800"}\n', b"a,b\n1,2\n", b"\0",
]  # fmt: skip
PIECES = [
    b"hello world\n", b"\xc3\xa9", b"\xc3", b"\xe2\x82", b"\xff", b"\xa0", b"\0", b"\r\n", b"   \n\t", b"\x1c\x1d",
    b"\xe2\x80\xa8", b"<p>", b"&#",
    b"9" * 5000, b"</p>", b"<!--", b"-->", b"<script>", b"<![if x]>", b"&amp", b"{", b'"text":', b'"}\n', b"]" * 300,
    b"[" * 5000, b"<a " * 30_000, b"<!--" * 30_000, b"%%EOF",
    b"1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj ", b"trailer<</Root 1 0 R>>", b"startxref\n9\n",
    b"<|endoftext|>", b"a" * 5000, b"\xd8\0", b"\0\xd8", b"a\0", b"\0a", b"\xf0\x9f\x98\x80",
]  # fmt: skip
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be", "latin-1", "cp1252",
             "koi8-r", "shift-jis", "utf-7"]  # fmt: skip


def packed(data: bytes, how: str) -> bytes:
    import bz2
    import gzip
    import lzma
    import zipfile

    match how:
        case "gz":
            return gzip.compress(data)
        case "gz gz":
            return gzip.compress(gzip.compress(data))
        case "bz2":
            return bz2.compress(data)
        case "xz":
            return lzma.compress(data)
        case "docx" | "zip":
            file = io.BytesIO()
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("word/document.xml" if how == "docx" else "a.txt", data)
            return file.getvalue()
    return data


encoded = st.builds(
    lambda text, encoding: text.encode(encoding, "ignore"), st.text(max_size=60) | odd_texts, st.sampled_from(ENCODINGS)
)
contents = st.builds(
    lambda head, parts, how: packed(head + b"".join(parts), how),
    st.sampled_from(HEADS),
    st.lists(st.sampled_from(PIECES) | encoded | st.binary(max_size=30), max_size=6),
    st.sampled_from(["", "", "", "", "gz", "gz gz", "bz2", "xz", "docx", "zip"]),
)
contents = contents | contents.flatmap(broken_bytes)
names = st.sampled_from(["a.txt", "b", "c.gz", "d.pdf", "e.docx", "f.jsonl", "-x", "a b", "ü", "\U0001f600", "\n",
    "\x7f", "\\", "'\"", "x" * 250, ".h"]).map(os.fsencode)  # fmt: skip
names |= st.binary(min_size=1, max_size=12).filter(lambda name: name.strip(b".") and not {0, 47} & set(name))


def write_corpus(top: bytes, entries, kinds):
    os.mkdir(top)
    for (name, data), kind in zip(entries, kinds, strict=False):
        path = os.path.join(top, name)
        with contextlib.suppress(OSError):
            if os.path.lexists(path):
                continue
            match kind:
                case "loop":
                    os.symlink(b".", path)
                case "self":
                    os.symlink(name, path)
                case "fifo":
                    os.mkfifo(path)
                case "folder":
                    os.mkdir(path)
                    with open(os.path.join(path, b"in"), "wb") as file:
                        file.write(data)
                case _:
                    with open(path, "wb") as file:
                        file.write(data)
                    if kind == "locked":
                        os.chmod(path, 0)


corpora = st.lists(st.tuples(names, contents), min_size=0, max_size=4)
kinds_of_entries = st.lists(
    st.sampled_from(["file", "file", "file", "folder", "loop", "self", "fifo", "locked"]), min_size=4, max_size=4
)


@many(1000, 70)
@given(
    entries=corpora, kinds=kinds_of_entries, tokenizer=st.sampled_from(KINDS),
    vocab_size=st.none() | st.sampled_from([0, 1, 3, 257, 258, 300, 2**31, 2**31 + 1, 10**30]),
    val_fraction=st.sampled_from([0.0, 0.1, 0.5, 0.999, 1.0, -1.0, float("nan"), 1e-320]), top=names,
)  # fmt: skip
def test_a_corpus_of_any_content_is_prepared_or_refused(
    place, entries, kinds, tokenizer, vocab_size, val_fraction, top
):
    with copy_of(place / "text", place) as work:
        source = os.path.join(os.fsencode(work), b"in" + top[:240])
        write_corpus(source, entries, kinds)
        with harmless(work):
            prepared = prepare(
                [Path(os.fsdecode(source))], work / "new" / "out", tokenizer=tokenizer, vocab_size=vocab_size,
                val_fraction=val_fraction,
            )  # fmt: skip
            prepared.verify()
            assert len(prepared.train) + len(prepared.val) == prepared.manifest["tokens"] > 0
            assert prepared.train.max(initial=0) < prepared.vocab_size
    tried["corpora"] += 1


@many(300, 15)
@given(entries=corpora, kinds=kinds_of_entries, tokenizer=st.sampled_from(KINDS), top=names)
def test_a_run_on_a_corpus_of_any_content_is_planned_and_resumed_or_refused(place, entries, kinds, tokenizer, top):
    with copy_of(place / "text", place) as work:
        source = os.path.join(os.fsencode(work), b"in" + top[:240])
        write_corpus(source, [*entries, (b"zz", TEXT.encode())], [*kinds[: len(entries)], "file"])
        given_options = MODEL | dict(steps=3, tokenizer=tokenizer)
        with harmless(work):
            plan, _ = session.make_plan(Path(os.fsdecode(source)), given_options, run=work / "run")
            again, finished = session.make_plan(None, {}, run=work / "run", resume=True)
            assert again.config == plan.config and finished is None
        assert not list(place.glob("cache/**/.*preparing*"))
    tried["corpora of runs"] += 1


# --- metrics.jsonl

record_values = scalars | st.lists(scalars, max_size=3) | st.dictionaries(texts, scalars, max_size=2)
keys = st.sampled_from(
    ["kind", "event", "step", "time", "message", "loss", "val_loss", "lr", "grad_norm", "clipped_norm", "tokens",
     "total_tokens", "seconds", "tokens_per_s", "compute_s", "waiting_s", "worker", "throughput", "waiting", "state",
     "memory_bytes", "cpu_percent", "config", "steps", "from_step", "stop_at", "perplexity", "bits_per_byte", "spheres",
     "workers", "eval_every", "unigram_loss", "best_step", "best_loss", "num_parameters", "run", "dtype"]
)  # fmt: skip
records = st.builds(
    lambda kind, fields: {"kind": kind} | fields,
    st.sampled_from(["step", "eval", "spheres", "event", "x"]),
    st.dictionaries(keys, record_values, max_size=8)
    | st.builds(lambda f, e: f | {"event": e}, st.dictionaries(keys, record_values), st.sampled_from(events.EVENTS)),
)
lines_of_metrics = st.one_of(
    records.map(lambda record: to_text(record).encode()),
    json_texts,
    st.sampled_from([b"[" * 100_000, b'{"kind":"step","step":' + b"9" * 5000 + b"}", b'{"kind":"step"', b"\0", b"\r"]),
)


@many(1000, 40)
@given(data=st.data())
def test_metrics_of_any_content_are_shown(place, good_run, data):
    with copy_of(good_run, place) as run:
        lines = (run / "metrics.jsonl").read_bytes().splitlines()
        for _ in range(data.draw(st.integers(0, 6))):
            i = data.draw(st.integers(0, len(lines)))
            if i < len(lines) and data.draw(st.booleans()):
                is_record = lines[i].startswith(b'{"kind') and _is_json(lines[i])
                lines[i] = to_text(data.draw(mutated(json.loads(lines[i])))).encode() if is_record else b""
            else:
                lines.insert(i, data.draw(lines_of_metrics))
        (run / "metrics.jsonl").write_bytes(b"\n".join(lines) + data.draw(st.sampled_from([b"\n", b"", b"\0"])))
        with harmless(run.parent):
            events.read(run / "metrics.jsonl")
        with harmless(run.parent):
            config, where = folder.read_config(run)
            folder.newest_checkpoint(run, config, where["data_fingerprint"])
        width, height = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 60))
        with harmless(run.parent):
            view = dashboard.read(run)
            dashboard.render(view, width, height, now=data.draw(st.sampled_from([0.0, 1e9, 1e300])))
        how = data.draw(
            st.sampled_from([["--once"], ["--once", "--plain"], ["--svg", str(run.parent / "picture.svg")]])
        )
        code, said = command_line(["watch", str(run), *how])
        assert code in (0, 2), said
        with harmless(run.parent):
            overview(run)
    tried["metrics"] += 1


def _is_json(line):
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


@many(100, 16)
@given(what=st.sampled_from(PLACES), name=st.sampled_from(["metrics.jsonl", "config.toml"]))
def test_metrics_and_configurations_that_are_no_files_are_refused(place, good_run, what, name):
    with copy_of(good_run, place) as run:
        put(run / name, what)
        with harmless(run.parent):
            events.read(run / "metrics.jsonl")
        with harmless(run.parent):
            session.make_plan(None, {"steps": 9}, run=run, resume=True)
        with harmless(run.parent):
            config, where = folder.read_config(run)
            folder.newest_checkpoint(run, config, where["data_fingerprint"])
        for words in (["watch", str(run), "--once"], ["runs", str(run.parent), "--json"]):
            code, said = command_line(words)
            assert code in (0, 2), said
    tried["places of metrics"] += 1


# --- the command line


class NoLaunch:
    """In the place of Launch: nothing is started."""

    alive, status, began = False, "", 0.0

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def obey(self, plan):
        self.plan, self.run = plan, plan.run
        return self

    def finish(self):
        return 0, "done"


def command_line(words):
    """The command in this process, with what it wrote: (exit code, stdout and stderr). Nothing is launched."""
    from cllm_spheres_cli.app import run

    out, error = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cllm_spheres.training.launch.Launch", NoLaunch)
        patch.setattr("cllm_spheres.api.attend", lambda *_, **__: (0, "done"))
        for name in ("peers", "scaling", "kernels", "crystal"):
            patch.setattr(f"cllm_spheres_bench.{name}.run", lambda _: 0)
        patch.setattr("sys.argv", ["cllm-spheres", *words])
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", error)
        patch.setenv("COLUMNS", "100")
        code = 0
        try:
            with time_limit():
                run()
        except SystemExit as left:
            code = left.code or 0
    said = b"".join(stream.buffer.getvalue() for stream in (out, error)).decode()
    assert "Traceback" not in said
    return code, said


WORDS = ["", "-", "--", "0", "1", "2", "3", "-1", "nan", "inf", "1e400", "9" * 400, "x", "ü", "\udcff",
         "\U0001f600", "a b", "nowhere",
         "../x", "best", "last", "2147483648", "0.5", "--help", "y" * 300, "byte", "char", "word", "bpe", "S1",
         "fp32", "\x1b[0m", "text",
         "good", "run", "empty", "file.toml", "a/" * 3000]  # fmt: skip
FLAGS = {
    "train": [
        *map(flag, Config.model_fields),
        "--no-bias",
        "--run",
        "--resume",
        "--exact",
        "--profile",
        "--plain",
        "--config",
    ],
    "prepare": ["--tokenizer", "--vocab-size", "--val-fraction", "--processes", "--out"],
    "generate": [
        "--prompt",
        "--prompts",
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--repetition-penalty",
        "--stop",
        "--samples",
        "--beams",
        "--length-penalty",
        "--best",
        "--dtype",
        "--threads",
        "--json",
        "--seed",
        "--checkpoint",
    ],
    "watch": ["--plain", "--width", "--height", "--svg"],
    "data": [],
    "crystal": ["--show", "--token", "--count", "--gcd-weight", "--ulam-weight", "--out", "--tokenizer"],
    "bench peers": [
        "--sizes",
        "--dtypes",
        "--repeats",
        "--seconds",
        "--screen-seconds",
        "--workers",
        "--spheres",
        "--modes",
    ],
    "bench scaling": [
        "--workers",
        "--preset",
        "--spheres",
        "--batch-size",
        "--seconds",
        "--repeats",
        "--dtype",
        "--weak",
    ],
    "runs": ["--json"],
    "prune": ["--weights-only"],
    "model": ["--dtype", "--recompute", "--spheres", "--workers"],
    "cache": ["--json"],
    "bench kernels": ["--sizes", "--repeats", "--seconds"],
    "bench crystal": ["--text", "--only", "--preset", "--alphas", "--inits", "--seeds", "--steps", "--dtype"],
    "trian": ["--x"],
    "--version": [],
}
# What a command is given before anything random, so that more than its parser is reached.
FIRST = {
    "train": [[], ["text"], ["good"], ["good", "--run", "new"], ["--resume", "--run", "run"], ["--preset", "minimal"]],
    "prepare": [[], ["text", "--out", "new"], ["--out", "new"], ["text", "--out", "file.toml"]],
    "generate": [[], ["run", "--tokens", "2"], ["--tokens", "3"], ["run", "--tokens", "0"]],
    "runs": [[], ["."]],
    "prune": [[], ["run"]],
    "model": [[], ["run"], ["tiny"], ["good"]],
    "watch": [["--once"], ["run", "--once"], ["run", "--svg", "picture.svg"]],
    "data": [[], ["good"], ["text"]],
    "crystal": [["good"], ["good", "--token", "1"], ["text", "--show", "matrix"], ["good", "--out", "picture.svg"]],
}  # fmt: skip


@st.composite
def lines_of_words(draw):
    command = draw(st.sampled_from([*FLAGS, "train", "train", "train", "prepare", "generate"]))
    words = [*command.split(), *draw(st.sampled_from(FIRST.get(command, [[]])))]
    for _ in range(draw(st.integers(0, 4))):
        option = draw(st.sampled_from([*FLAGS[command], "--wrong"]))
        value = draw(st.sampled_from(WORDS) | st.integers(-3, 400).map(str) | st.floats(width=16).map(str))
        words += draw(st.sampled_from([[option, value], [option, value], [f"{option}={value}"], [option], [value]]))
    return words


@many(1000, 100)
@given(words=lines_of_words())
def test_a_command_line_of_any_words_ends_with_0_or_2(place, good, good_run, words):
    with copy_of(place / "text", place) as text:
        work = text.parent
        text.rename(work / "text")
        shutil.copytree(good["char"], work / "good")
        shutil.copytree(good_run, work / "run", symlinks=True)
        (work / "empty").mkdir()
        (work / "file.toml").write_text("lr = 1\n")
        os.chdir(work)
        before = sorted(os.listdir(work))
        try:
            code, said = command_line(words)
        finally:
            os.chdir(place)
        assert code in (0, 2), said
        if code == 2:
            assert sorted(os.listdir(work)) == before and said.strip()
        assert not os.listdir(place / "tmp")
    tried["command lines"] += 1


# --- the figure

NUM_KINDS = 16


def test_the_whole_form_tries_ten_thousand_inputs():
    """Last in this file: it counts what the others tried."""
    if WHOLE and len(tried) == NUM_KINDS:  # not where some of the tests were chosen
        assert sum(tried.values()) >= 10_000

"""Models that transformers saved: the same logits and ids here, and words for those that cannot be imported."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import InputError
from cllm_spheres.exchange.export import export
from cllm_spheres.exchange.importing import import_model
from cllm_spheres.exchange.source import open_source
from cllm_spheres.inference.model import load
from tests.exchange.models import CASES, GOLDEN, change_json, contents, golden_copy, make_run, tokenizers

# float32 sums of 16 to 40 terms in another order: 1e-6 was measured. A wrong weight gives 0.1.
LOGITS = 1e-5


def expected(name):
    arrays = np.load(GOLDEN / name / "expected.npz")
    return arrays["ids_T"], arrays["logits_TV"]


@pytest.mark.parametrize("name", CASES)
def test_logits_and_ids_are_those_of_transformers(name, tmp_path):
    import_model(GOLDEN / name, tmp_path / "run")
    model = load(tmp_path / "run")
    ids_T, logits_TV = expected(name)
    assert model.shape.vocab_size == model.tokenizer.vocab_size == 280
    assert np.abs(model.logits(ids_T) - logits_TV[:, :280]).max() < LOGITS
    texts, ids = json.loads((GOLDEN / name / "texts.json").read_text())
    assert [model.tokenizer.encode(text) for text in texts] == ids
    assert model.tokenizer.eot == (0 if name == "eot-first" else 279)
    assert all(model.tokenizer.eot not in one for one in ids)


@pytest.mark.parametrize("name", CASES)
def test_an_imported_model_is_exported_with_the_same_weights(name, tmp_path):
    import_model(GOLDEN / name, tmp_path / "run")
    export(tmp_path / "run", "hf", tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    source = {f"transformer.{key}": value for key, value in open_source(GOLDEN / name).tensors()}
    assert again.keys() == source.keys()
    assert all(np.array_equal(again[key], source[key]) for key in again)
    assert import_model(tmp_path / "again", tmp_path / "third").fingerprint  # and comes back


def test_ids_without_a_token_are_left_out_and_told(tmp_path):
    source = import_model(GOLDEN / "padded-bfloat", tmp_path / "run")
    assert source.notes == ("24 of the model's 304 ids have no token and are left out.",)
    assert load(tmp_path / "run").parameters["wte.weight"].shape == (280, 16)


def test_the_run_has_one_checkpoint_with_moments_of_zero(tmp_path):
    import_model(GOLDEN / "plain", tmp_path / "run")
    checkpoint = Store(tmp_path / "run").load()
    assert checkpoint.step == 0 and Store(tmp_path / "run").steps() == [0]
    assert len(checkpoint.optimizer) == 2 * len(checkpoint.model)
    assert not any(array.any() for array in checkpoint.optimizer.values())


# ---- what is refused


def weights_of(folder):
    return load_file(folder / "model.safetensors")


def rename(old, new):
    def change(folder):
        tensors = weights_of(folder)
        tensors[new] = tensors.pop(old)
        save_file(tensors, folder / "model.safetensors")

    return change


def put(name, array):
    def change(folder):
        save_file(weights_of(folder) | {name: np.asarray(array)}, folder / "model.safetensors")

    return change


def config(**values):
    return lambda folder: change_json(folder / "config.json", **values)


def tokenizer(**values):
    return lambda folder: change_json(folder / "tokenizer.json", **values)


def tokenizer_model(**values):
    def change(folder):
        record = json.loads((folder / "tokenizer.json").read_text())
        record["model"] |= values
        (folder / "tokenizer.json").write_text(json.dumps(record))

    return change


def without_byte(folder):
    record = json.loads((folder / "tokenizer.json").read_text())
    record["model"]["vocab"]["zz"] = record["model"]["vocab"].pop("!")
    record["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(record))


def write(name, text):
    return lambda folder: (folder / name).write_text(text)


def remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-1000])


def huge_header(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + data[8:])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


WTE = "transformer.wte.weight"
BROKEN = {
    "another kind": (config(model_type="llama"), ["config.json", "'llama'", "only 'gpt2'"]),
    "no kind": (config(model_type=None), ["model_type None"]),
    "a kind that is no word": (config(model_type=["gpt2"]), ["model_type ['gpt2']"]),
    "another gelu": (config(activation_function="gelu"), ["activation_function", "'gelu'", "gelu_new"]),
    "no config": (remove("config.json"), ["neither a run", "no config.json"]),
    "config no JSON": (write("config.json", "{"), ["config.json is no JSON"]),
    "config a list": (write("config.json", "[]"), ["config.json is no JSON object"]),
    "missing": (rename("transformer.h.1.ln_1.bias", "x"), ["'h.1.ln_1.bias'", "1 of 28", "'x'"]),
    "extra": (put("transformer.h.0.attn.rotary", [1.0]), ["'h.0.attn.rotary'", "not of a GPT-2 with 2 layers"]),
    "too few layers": (config(n_layer=1), ["12 are not of a GPT-2 with 1 layers", "'h.1."]),
    "too many layers": (config(n_layer=3), ["12 of 40 tensors are missing", "'h.2."]),
    "other shape": (put(WTE, np.zeros((280, 15), np.float32)), ["wte.weight has shape [280, 15] and not [280, 16]"]),
    "other width": (config(n_embd=32), ["wte.weight has shape [280, 16] and not [280, 32]"]),
    "whole numbers": (put("transformer.ln_f.bias", np.zeros(16, np.int32)), ["ln_f.bias is I32"]),
    "NaN": (put("transformer.ln_f.bias", np.full(16, np.nan, np.float32)), ["ln_f.bias", "NaN"]),
    "untied": (put("lm_head.weight", np.ones((280, 16), np.float32)), ["lm_head.weight", "is not wte.weight"]),
    "twice": (put("wte.weight", np.ones((280, 16), np.float32)), ["two tensors 'wte.weight'"]),
    "cut": (cut, ["model.safetensors is damaged", "data_offsets"]),
    "huge header": (huge_header, ["model.safetensors is damaged", "4,611,686,018,427,387,904"]),
    "pickled": (pickled, ["pytorch_model.bin", "save_pretrained"]),
    "no weights": (remove("model.safetensors"), ["neither model.safetensors nor"]),
    "no tokenizer": (remove("tokenizer.json"), ["has no tokenizer", "vocab.json"]),
    "tokenizer no JSON": (write("tokenizer.json", "x"), ["tokenizer.json is no JSON"]),
    "tokenizer too large": (config(vocab_size=270), ["wte.weight has shape [280, 16] and not [270, 16]"]),
    "normalizer": (tokenizer(normalizer={"type": "NFC"}), ["normalizer", "NFC"]),
    "splitter": (tokenizer(pre_tokenizer={"type": "Whitespace"}), ["splits texts", "Whitespace"]),
    "prefix space": (
        tokenizer(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}),
        ["add_prefix_space"],
    ),
    "post processor": (tokenizer(post_processor={"type": "BertProcessing"}), ["post_processor", "BertProcessing"]),
    "no special": (tokenizer(added_tokens=[]), ["no special token <|endoftext|>", "none"]),
    "added": (
        tokenizer(added_tokens=[{"id": 279, "content": "<|endoftext|>", "special": False}]),
        ["1 added tokens", "'<|endoftext|>'"],
    ),
    "added no list": (tokenizer(added_tokens=5), ["added_tokens 5"]),
    "unigram": (tokenizer(model={"type": "Unigram", "vocab": []}), ["'Unigram'", "byte-level BPE"]),
    "dropout": (tokenizer_model(dropout=0.1), ["dropout 0.1"]),
    "byte without token": (without_byte, ["no token for 1 of the 256 bytes (the first is 33)"]),
    "ids with a hole": (tokenizer_model(vocab={"a": 5}, merges=[]), ["no token for 255"]),
    "vocabulary no object": (tokenizer_model(vocab=[1]), ["no vocabulary"]),
    "merges of nothing": (tokenizer_model(merges=[["qq", "zz"]]), ["tokenizer.json is no tokenizer"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_imported_is_named_and_nothing_is_left(name, tmp_path):
    folder = golden_copy("plain", tmp_path)
    change, said = BROKEN[name]
    change(folder)
    with pytest.raises(InputError) as caught:
        import_model(folder, tmp_path / "deep/run")
    for words in said:
        assert words in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert not (tmp_path / "deep").exists()


def test_a_tokenizer_larger_than_the_model_does_not_belong_to_it(tmp_path):
    folder = golden_copy("plain", tmp_path)
    put(WTE, np.zeros((270, 16), np.float32))(folder)
    change_json(folder / "config.json", vocab_size=270)
    with pytest.raises(InputError, match="280 tokens, the model only 270"):
        open_source(folder)


@pytest.mark.parametrize("content", ['{"weight_map": {"a": "../x.safetensors"}}', "{}", '{"weight_map": 5}', "x", "[]"])
def test_an_index_names_files_beside_it_and_nothing_else(content, tmp_path):
    folder = golden_copy("sharded", tmp_path)
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(InputError, match=r"index.json is damaged"):
        open_source(folder)


def test_a_missing_part_is_named(tmp_path):
    folder = golden_copy("sharded", tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00003.safetensors: No such file"):
        open_source(folder)


def test_a_run_that_exists_is_left_alone(tmp_path):
    make_run(tmp_path / "run", tokenizers()["byte"])
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match="exists already"):
        import_model(GOLDEN / "plain", tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        import_model(GOLDEN / "plain", tmp_path / "file")
    assert contents(tmp_path / "run") == before and (tmp_path / "file").read_text() == "mine"


def test_a_run_cannot_be_imported_nor_a_place_that_is_not_there(tmp_path):
    make_run(tmp_path / "run", tokenizers()["byte"])
    with pytest.raises(InputError, match=r"is a run already.*--from"):
        import_model(tmp_path / "run", tmp_path / "new")
    with pytest.raises(InputError, match=r"no run and no model folder .*did you mean 'run'"):
        import_model(tmp_path / "rum", tmp_path / "new")


def test_what_the_system_refuses_is_told_and_nothing_is_left(tmp_path, monkeypatch):
    from cllm_spheres.checkpoint.disk import Disk

    def full(self, descriptor, path, data):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Disk, "write", full)
    with pytest.raises(InputError, match="No space left"):
        import_model(GOLDEN / "plain", tmp_path / "deep/run")
    assert not (tmp_path / "deep").exists()

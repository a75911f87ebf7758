"""GGUF files: the tensors as llama.cpp wants them, and a vocabulary with which its way of merging gives our ids."""

from __future__ import annotations

import builtins
import itertools

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from cllm_spheres.errors import InputError
from cllm_spheres.exchange.export import export
from cllm_spheres.exchange.gguf_vocabulary import vocabulary
from tests.exchange.models import TEXTS, contents, make_run, tokenizers

LIKE_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)


def naive_ids(words, text):
    """llama.cpp's way, written out: split, write bytes as characters, merge the earliest merge first, look up."""
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(words.merges)}
    ids = {token: i for i, token in enumerate(words.tokens)}
    found = []
    for piece, _ in LIKE_GPT2.pre_tokenize_str(text):
        symbols = list(piece)
        while pairs := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(symbols)) if pair in ranks]:
            _, i = min(pairs)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        found += [ids[symbol] for symbol in symbols if symbol in ids]
    return found


@pytest.mark.parametrize("kind", ["byte", "char", "bpe"])
def test_merging_gives_our_ids(kind):
    tokenizer = tokenizers()[kind]
    words = vocabulary(tokenizer)
    assert len(words.tokens) == len(set(words.tokens)) == tokenizer.vocab_size
    assert [i for i, control in enumerate(words.is_control) if control] == [tokenizer.eot]
    assert words.merges  # llama.cpp does not load a file without
    num_compared = 0
    for text in TEXTS:
        try:
            ids = tokenizer.encode(text)
        except InputError:
            continue
        assert naive_ids(words, text) == ids, repr(text)
        num_compared += 1
    assert num_compared > 20


def test_white_space_is_never_dropped_so_words_cannot_be_exported(tmp_path):
    make_run(tmp_path / "run", tokenizers()["word"])
    with pytest.raises(InputError, match=r"no tokenizer like word.*--to hf"):
        export(tmp_path / "run", "gguf", tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_file_holds_every_weight_transposed_and_the_output_matrix(tmp_path, dtype, bias):
    model = make_run(tmp_path / "run", tokenizers()["bpe"], bias=bias)
    done = export(tmp_path / "run", "gguf", tmp_path / "x.gguf", dtype=dtype)
    assert done.files == {"x.gguf": (tmp_path / "x.gguf").stat().st_size}
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 * 12 + 4 + 1
    kinds = {"f32": gguf.GGMLQuantizationType.F32, "f16": gguf.GGMLQuantizationType.F16,
             "bf16": gguf.GGMLQuantizationType.BF16}  # fmt: skip
    # half an ulp of 10 and of 7 bits of mantissa, and the subnormals of f16
    close = {"f32": dict(rtol=0, atol=0), "f16": dict(rtol=2**-11, atol=2**-25), "bf16": dict(rtol=2**-8, atol=0)}[
        dtype
    ]

    def same(theirs, ours, narrowed=True):
        tensor = tensors[theirs]
        assert tensor.tensor_type == (kinds[dtype] if narrowed else gguf.GGMLQuantizationType.F32), theirs
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(ours.shape)
        np.testing.assert_allclose(values, ours, **(close if narrowed else dict(rtol=0, atol=0)))

    same("token_embd.weight", model["wte.weight"])
    same("output.weight", model["wte.weight"])
    same("position_embd.weight", model["wpe.weight"], narrowed=False)
    same("blk.1.attn_qkv.weight", model["h.1.attn.c_attn.weight"].T)
    same("blk.0.attn_output.weight", model["h.0.attn.c_proj.weight"].T)
    same("blk.0.ffn_up.weight", model["h.0.mlp.c_fc.weight"].T)
    same("blk.1.ffn_down.weight", model["h.1.mlp.c_proj.weight"].T)
    same("blk.1.ffn_norm.weight", model["h.1.ln_2.weight"], narrowed=False)
    same("blk.1.ffn_up.bias", model["h.1.mlp.c_fc.bias"] if bias else np.zeros(40, np.float32), narrowed=False)
    field = {name: reader.get_field(name).contents() for name in (
        "general.architecture", "gpt2.context_length", "gpt2.embedding_length", "gpt2.block_count",
        "gpt2.feed_forward_length", "gpt2.attention.head_count", "tokenizer.ggml.model", "tokenizer.ggml.pre",
        "tokenizer.ggml.bos_token_id", "tokenizer.ggml.add_bos_token")}  # fmt: skip
    assert list(field.values()) == ["gpt2", 12, 16, 2, 40, 2, "gpt2", "gpt-2", tokenizers()["bpe"].eot, False]


def test_without_the_package_the_extra_is_named(tmp_path, monkeypatch):
    make_run(tmp_path / "run", tokenizers()["byte"])
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"pip install 'cllm-spheres\[export\]'"):
        export(tmp_path / "run", "gguf", tmp_path / "x.gguf")


def test_only_a_gguf_file_is_replaced_and_only_with_force(tmp_path):
    make_run(tmp_path / "run", tokenizers()["byte"])
    target = tmp_path / "models/x.gguf"
    export(tmp_path / "run", "gguf", target)
    first = target.read_bytes()
    with pytest.raises(InputError, match=r"exists already.*--force"):
        export(tmp_path / "run", "gguf", target, dtype="bf16")
    assert target.read_bytes() == first
    export(tmp_path / "run", "gguf", target, dtype="bf16", force=True)
    assert len(target.read_bytes()) < len(first)
    target.write_text("my notes")
    for place, said in ((target, "is not a GGUF file"), (tmp_path, "is not a file")):
        with pytest.raises(InputError, match=said):
            export(tmp_path / "run", "gguf", place, force=True)
    assert contents(target.parent) == {"x.gguf": b"my notes"}


def test_the_same_model_gives_the_same_file(tmp_path):
    make_run(tmp_path / "run", tokenizers()["char"])
    for name in ("a.gguf", "b/a.gguf"):
        export(tmp_path / "run", "gguf", tmp_path / name)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b/a.gguf").read_bytes()

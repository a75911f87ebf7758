"""GGUF files: the tensors as llama.cpp wants them, and a vocabulary with which its way of merging gives our ids."""

from __future__ import annotations

import builtins
import itertools
import re

import gguf
import numpy as np
import pytest
from tokenizers import pre_tokenizers

from cllm_spheres.errors import InputError
from cllm_spheres.exchange.export import export
from cllm_spheres.exchange.gguf_vocabulary import vocabulary
from cllm_spheres.exchange.quantise import quantise
from cllm_spheres.inference.model import Model, load
from cllm_spheres.model.families import tensors_of
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


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A run whose rows are whole blocks of 32: its folder, and its weights."""
    run = tmp_path_factory.mktemp("wide") / "run"
    return run, make_run(run, tokenizers()["bpe"], width=64, ff_width=128)


# How far the largest logit of all moves. Measured: 0.029 and 0.37, where the logits have a standard deviation of 0.95.
FAR = {"q8_0": 0.1, "q4_0": 0.8}


@pytest.mark.parametrize("dtype", FAR)
def test_quantised_weights_are_ggmls_blocks_and_give_nearly_the_same_logits(tmp_path, wide, dtype):
    run, weights = wide
    done = export(run, "gguf", tmp_path / "x.gguf", dtype=dtype)
    assert done.notes == ()
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    matrices = [f"blk.{i}.{name}.weight" for i in (0, 1) for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")]
    expected = dict.fromkeys(kinds, "F32") | dict.fromkeys([*matrices, "token_embd.weight"], dtype.upper())
    assert kinds == expected | {"output.weight": "Q8_0"}  # positions, biases and norms stay as they are
    assert reader.get_field("general.quantization_version").contents() == 2
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"]
    read = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    exact = load(run, "last")
    ours = {t.name: read[t.gguf].T if t.name.startswith("h.") else read[t.gguf] for t in tensors_of(exact.shape)}
    assert {name: values.shape for name, values in ours.items()} == {n: w.shape for n, w in weights.items()}
    quantised = Model(exact.shape, exact.tokenizer, ours)
    ids = np.arange(exact.shape.block_size) * 17
    logits_TV = quantised.hidden_states(ids)[-1] @ read["output.weight"].T
    difference = np.abs(logits_TV - exact.logits(ids)).max()
    assert 0 < difference < FAR[dtype] < exact.logits(ids).std()


def test_rows_that_are_no_whole_blocks_are_kept_in_f16_and_told_or_refused(tmp_path):
    for sizes, told in (
        (dict(width=64, ff_width=40), r"^ffn_down is in f16.*multiple of 32.*have 40"),
        (dict(width=48, ff_width=64, heads=2), r"^token_embd, attn_qkv, attn_output, ffn_up are in f16.*have 48"),
    ):
        run = tmp_path / f"run-{sizes['width']}"
        make_run(run, tokenizers()["byte"], **sizes)
        (note,) = export(run, "gguf", tmp_path / "x.gguf", dtype="q8_0", force=True).notes
        assert re.search(told, note)
        kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors}
        down, up = kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]
        assert (down, up) == (("F16", "Q8_0") if sizes["width"] == 64 else ("Q8_0", "F16"))
        assert kinds["output.weight"] == up
    make_run(tmp_path / "narrow", tokenizers()["byte"], width=16, ff_width=40)
    said = r"--dtype q4_0.*multiple of 32.*16 \(token_embd, attn_qkv.*\) and 40 \(ffn_down\)\. Take f16"
    with pytest.raises(InputError, match=said):
        export(tmp_path / "narrow", "gguf", tmp_path / "y.gguf", dtype="q4_0")
    with pytest.raises(InputError, match=r"'q4_0' with --to hf: known: bf16, f16, f32$"):
        export(tmp_path / "narrow", "hf", tmp_path / "y", dtype="q4_0")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name[0] in "xy") == ["x.gguf"]


def test_a_scale_that_float16_cannot_hold_is_refused_and_one_of_zero_is_not():
    values = np.zeros((2, 64), np.float32)
    values[1, :32] = 1e-40  # 1 / scale is infinite
    for dtype, most in (("q8_0", 127 * 65504.0), ("q4_0", 8 * 65504.0)):
        kind = gguf.GGMLQuantizationType[dtype.upper()]
        assert not gguf.dequantize(quantise(gguf, "w", values, dtype), kind).any()
        large = values.copy()
        large[0, 3] = most
        assert gguf.dequantize(quantise(gguf, "w", large, dtype), kind)[0, 3] == most
        large[0, 3] = -1.01 * most
        with pytest.raises(InputError, match=rf"{dtype}: w has a weight of size .*Take bf16 or f32"):
            quantise(gguf, "w", large, dtype)


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

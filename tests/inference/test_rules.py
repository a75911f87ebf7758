"""The program of a pass follows from a model's description, for families of other orders and frozen tensors too."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cllm_spheres.inference import rules
from cllm_spheres.inference.decoder import Decoder, Rows
from cllm_spheres.model.families import FAMILIES, tensors_of
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape
from cllm_spheres.model.workspace import Workspace
from tests.inference.test_decoder import assert_same

SHAPE = Shape(vocab_size=50, block_size=40, layers=3, heads=2, width=24, ff_width=40)
A_BLOCK = ["norm", "linear", "attention", "linear", "norm", "linear_gelu", "linear"]  # the members meet behind each


def describe_another(s, d):
    """A linear layer reads the residual, a norm is added to, and nothing is normed before the head."""
    x = d.embed("wte.weight", "wpe.weight", s.width, site=0)
    for layer in range(s.layers):
        with d.block(layer) as h:
            qkv = d.linear(x, f"{h}attn.c_attn", 3 * s.width, group=s.width // s.heads, label="qkv")
            attended = d.attention(qkv, s.heads, site=3 * layer + 1)
            x = d.linear(
                attended, f"{h}attn.c_proj", s.width, residual=x, site=3 * layer + 2, label="attention projection"
            )  # fmt: skip
            normed = d.norm(x, f"{h}ln_1")
            up = d.linear(normed, f"{h}mlp.c_fc", s.ff_width, activation="gelu", label="feed-forward up")
            x = d.linear(up, f"{h}mlp.c_proj", s.width, residual=normed, site=3 * layer + 3, label="feed-forward down")
    d.head(x, "wte.weight")


def tensors_of_another(s):
    """Those of GPT-2 that it reads."""
    return [t for t in FAMILIES["gpt2"].tensors(s) if not any(norm in t.name for norm in ("ln_2", "ln_f"))]


def parameters(layout):
    """Those that are trained and the frozen ones: the same numbers whichever are frozen."""
    params_P, frozen_P = np.zeros(layout.size, np.float32), np.zeros(layout.frozen_size, np.float32)
    views, rng = layout.views(params_P) | layout.frozen_views(frozen_P), np.random.default_rng(3)
    for tensor in tensors_of(layout.shape):
        views[tensor.name][...] = rng.standard_normal(tensor.shape) * 0.3 + tensor.constant
    return params_P, frozen_P


def written(layout, params_P, ids, threads=1, frozen_P=None):
    """Logits behind each token: of a prompt, of some tokens together, and of one after the other."""
    decoder = Decoder(layout, params_P, slots=2, dtype="fp32", threads=threads, frozen_P=frozen_P)
    decoder.run([Rows(1, 0, ids[::-1][:17], 1)])
    parts = [17, 3, *[1] * (len(ids) - 20)]
    firsts = np.cumsum([0, *parts[:-1]])
    logits = [decoder.run([Rows(0, a, ids[a : a + n], n)]).copy() for a, n in zip(firsts, parts, strict=True)]
    decoder.close()
    return np.concatenate(logits)


def ids_of(shape):
    return np.random.default_rng(4).integers(0, shape.vocab_size, shape.block_size, dtype=np.int32)


def test_a_pass_is_these_ops():
    program = rules.program(Layout(SHAPE), False, 2)
    assert [call.op for call in program.calls] == ["embed", *A_BLOCK * SHAPE.layers, "gather", "norm", "linear"]


def test_strips_are_of_the_matrices_that_enter_products():
    strips, size_bytes = rules.strips_of(SHAPE, False)
    matrices = {t.name: t for t in tensors_of(SHAPE) if len(t.shape) == 2 and not t.looked_up}
    assert strips.keys() == matrices.keys()
    for name, tensor in matrices.items():
        assert strips[name].transposed == tensor.transposed
        assert (strips[name].inputs, strips[name].outputs) == tensor.shape[:: -1 if tensor.transposed else 1]
    assert 2 * rules.strips_of(SHAPE, True)[1] == size_bytes


@pytest.mark.parametrize("threads", [1, 3])
def test_a_family_of_another_order_is_written_with(threads, monkeypatch):
    another = replace(FAMILIES["gpt2"], name="another", describe=describe_another, tensors=tensors_of_another)
    monkeypatch.setitem(FAMILIES, "another", another)
    shape = replace(SHAPE, family="another")
    layout, ids = Layout(shape), ids_of(shape)
    params_P, _ = parameters(layout)
    ops = [call.op for call in rules.program(layout, False, threads).calls]
    assert ops[1] == "bundle" and ops[-3:] == ["gather", "bundle", "linear"]
    assert_same(written(layout, params_P, ids, threads), Workspace(layout, params_P, purpose="logits").logits(ids))


def test_frozen_tensors_are_read_where_they_lie():
    ids, whole = ids_of(SHAPE), Layout(SHAPE)
    half = Layout(SHAPE, frozenset(tensor.name for tensor in tensors_of(SHAPE)[::2]))
    params_P, frozen_P = parameters(half)
    expected = written(whole, parameters(whole)[0], ids)
    assert np.array_equal(written(half, params_P, ids, frozen_P=frozen_P), expected)

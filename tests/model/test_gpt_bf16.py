"""What is bfloat16's alone: its gradient as a direction, dropout against the twin's, and the tile registers."""

from __future__ import annotations

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
import pytest
from numba import types
from numba.extending import intrinsic

from cllm_spheres.crystal.cpu import bf16_backend
from cllm_spheres.crystal.jit import kernel
from cllm_spheres.model.shape import Shape
from tests.kernels import masks
from tests.kernels.soft import KINDS, Soft
from tests.model.conftest import DTYPES
from tests.model.test_gpt import BF16_GRADIENT, BF16_LOSS, SHAPES, SIZES, assert_gradients, dropout_key
from tests.naive import naive_loss_and_gradients

pytestmark = list(DTYPES[1].marks)
SIZE = SIZES["bf16"]


def flat(tensors):
    return np.concatenate([np.asarray(tensor, float).reshape(-1) for tensor in tensors.values()])


@pytest.mark.parametrize("name", SHAPES)
def test_the_gradient_points_where_the_float64_gradient_points(whole, name):
    model = whole(SHAPES[name], dtype="bf16", size=SIZE)
    inputs_BT, targets_BT = model.batch(3)
    _, segment_P = model.shard(inputs_BT, targets_BT, 1 / inputs_BT.size)
    _, gradients = naive_loss_and_gradients(model.shape, model.parameters, inputs_BT, targets_BT)
    found, exact = flat(model.layout.views(segment_P)), flat(gradients)
    # An error of 1 % at a right angle is a cosine of 0.99995; measured: 0.99997 and more.
    assert found @ exact > 0.9999 * np.linalg.norm(found) * np.linalg.norm(exact)
    assert abs(np.linalg.norm(found) / np.linalg.norm(exact) - 1) < 0.01  # measured: 0.26 % and less


@pytest.mark.parametrize(("name", "kind"), [(name, None) for name in SHAPES] + [("odd", kind) for kind in KINDS])
def test_the_loss_falls_along_the_gradient_as_the_gradient_says(whole, name, kind, rng):
    """A central difference over a step so long that the loss moves by far more than rounding moves it."""
    model = whole(SHAPES[name], dtype="bf16", size=SIZE)
    inputs_BT, targets_BT = model.batch(3)
    start_P = model.params_P.copy()
    targets = Soft(kind, model.shape.vocab_size, rng) if kind else None
    soft = targets.address if targets else 0
    _, segment_P = model.shard(inputs_BT, targets_BT, 1 / inputs_BT.size, soft=soft)
    slope = np.linalg.norm(segment_P.astype(float))
    step = 0.05 / slope  # along the gradient the loss moves by 5 % of a nat, to either side
    losses = []
    for sign in (1, -1):
        model.params_P[:] = start_P + sign * step * segment_P / slope
        losses.append(model.shard(inputs_BT, targets_BT, 1.0, soft=soft)[0] / inputs_BT.size)
    # Measured: up to 2.3 % where the loss curves (float64's own difference is off by as much), of which the rounding
    # of both losses is 0.7 %. Over a fifth of this step rounding alone makes 1.6 %.
    assert abs((losses[0] - losses[1]) / (2 * step) / slope - 1) < 0.04


@pytest.mark.parametrize("shape", [SHAPES["round"], SHAPES["odd"]])
def test_dropout_is_that_of_the_twin_at_every_place(whole, shape):
    rate, first_sequence, count = 0.25, 5, 3
    model = whole(shape, dropout=rate, dtype="bf16", size=SIZE)
    inputs_BT, targets_BT = model.batch(count)
    key, threshold = int(dropout_key(1337, 5)) % 2**64, round(rate * 2**32)

    def mask(site, sizes):
        of = masks.mask_of_attention if site % 3 == 1 else masks.mask_of_sequences
        return of(masks.combine(key, site), first_sequence, sizes, threshold)

    loss, segment_P = model.shard(
        inputs_BT, targets_BT, 1 / inputs_BT.size, int(np.uint64(key).view(np.int64)), first_sequence
    )
    expected, gradients = naive_loss_and_gradients(shape, model.parameters, inputs_BT, targets_BT, mask)
    assert abs(loss / inputs_BT.size - expected) <= BF16_LOSS * expected
    assert_gradients("bf16", model.layout.views(segment_P), gradients)


def test_a_vocabulary_of_several_chunks_and_heads_of_any_width(whole):
    for shape in (
        Shape(vocab_size=1024, block_size=33, layers=1, heads=2, width=64, ff_width=70),
        Shape(vocab_size=2100, block_size=40, layers=1, heads=1, width=45, ff_width=300),
    ):
        model = whole(shape, dtype="bf16", size=SIZE)
        inputs_BT, targets_BT = model.batch(2)
        loss, segment_P = model.shard(inputs_BT, targets_BT, 1 / inputs_BT.size)
        expected, gradients = naive_loss_and_gradients(shape, model.parameters, inputs_BT, targets_BT)
        assert abs(loss / inputs_BT.size - expected) <= BF16_LOSS * expected
        assert_gradients("bf16", model.layout.views(segment_P), gradients)


def test_a_weight_that_is_not_finite_makes_the_loss_and_the_gradient_nan(whole):
    for tensor in ("wte.weight", "h.1.mlp.c_fc.weight", "h.0.attn.c_attn.weight", "h.1.mlp.c_proj.bias"):
        for bad in (np.nan, np.inf):
            model = whole(SHAPES["round"], dtype="bf16", size=SIZE)
            inputs_BT, targets_BT = model.batch(2)
            model.parameters[tensor].reshape(-1)[inputs_BT[0, 0] if tensor == "wte.weight" else 3] = bad
            if tensor == "wte.weight":
                model.parameters[tensor][inputs_BT[0, 0]] = bad
            loss, segment_P = model.shard(inputs_BT, targets_BT, 1.0)
            assert not np.isfinite(loss) and np.isnan(segment_P).any(), (tensor, bad)


@intrinsic
def _in_use(typing_context):
    """The parts of the processor's state that are not as they began: XGETBV with ECX = 1."""

    def generate(context, b, signature, arguments):
        kind = ir.FunctionType(ir.IntType(32), [ir.IntType(32)])
        low = b.asm(kind, "xgetbv", "={eax},{ecx},~{edx}", [ir.Constant(ir.IntType(32), 1)], True)
        return b.zext(low, ir.IntType(64))

    return types.int64(), generate


TILE_DATA = 1 << 18


@pytest.mark.skipif(bf16_backend() != "amx", reason="no AMX here, so no tile registers to give back")
def test_the_tile_registers_are_given_back(whole):
    llvm.initialize_native_asmparser()  # inline assembly needs it
    from cllm_spheres.kernels.bf16.multiply import block
    from tests.kernels.bf16.twins import tiles

    @kernel
    def in_use():
        return _in_use()

    @kernel
    def use(a, b, out):
        block(1, a, 1024, b, 1024, out, 128, 0)
        return _in_use()

    a, out = np.zeros(2048, np.uint16), np.zeros((32, 32), np.float32)
    with tiles():
        assert use(a.ctypes.data, a.ctypes.data, out.ctypes.data) & TILE_DATA  # the instruction tells of them
    model = whole(SHAPES["odd"], dtype="bf16")
    inputs_BT, targets_BT = model.batch(2)
    for call in (lambda: model.shard(inputs_BT, targets_BT, 1.0), lambda: model.window(inputs_BT[0], targets_BT[0])):
        call()
        assert not in_use() & TILE_DATA


def test_the_tolerances_are_those_of_the_twins_and_not_slack(whole):
    """A tenth of one matrix's gradient missing, or the next weights' gradient, would be seen."""
    model = whole(SHAPES["round"], dtype="bf16", size=SIZE)
    inputs_BT, targets_BT = model.batch(3)
    _, gradients = naive_loss_and_gradients(model.shape, model.parameters, inputs_BT, targets_BT)
    for tensor in gradients:
        if "c_attn.bias" in tensor:
            continue  # its keys' third is nothing but rounding
        wrong = gradients | {tensor: gradients[tensor] * (1 + 2 * BF16_GRADIENT)}
        with pytest.raises(AssertionError, match=tensor):
            assert_gradients("bf16", wrong, gradients)

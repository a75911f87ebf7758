"""The whole model against its slow twin: losses, logits, and the gradient tensor by tensor."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.crystal.random import PURPOSE_DROPOUT, key_of
from cllm_spheres.model import dtypes
from cllm_spheres.model.program import RECOMPUTE
from cllm_spheres.model.shape import Shape
from tests.check import assert_close
from tests.kernels.soft import KINDS, Soft
from tests.naive import naive_logits, naive_loss_and_gradients

SHAPES = {
    "round": Shape(vocab_size=64, block_size=16, layers=2, heads=4, width=32, ff_width=128),
    "round without biases": Shape(vocab_size=64, block_size=16, layers=2, heads=4, width=32, ff_width=128, bias=False),
    "odd": Shape(vocab_size=37, block_size=11, layers=3, heads=3, width=15, ff_width=29),
    "odd without biases": Shape(vocab_size=37, block_size=11, layers=1, heads=5, width=35, ff_width=3, bias=False),
    "least": Shape(
        vocab_size=2, block_size=1, layers=1, heads=1, width=4, ff_width=1
    ),  # of two channels a norm keeps the sign alone
    "longer than a group": Shape(vocab_size=50, block_size=300, layers=1, heads=2, width=8, ff_width=8),
}
# Three layers of float32 with weights far larger than a trained model's: sums of up to some hundred terms that
# partly cancel, one after the other. The single kernels keep 1e-5; a wrong term is off by 1e-2 and more.
TOLERANCE = 1e-4
# bfloat16 keeps 8 bits of every operand: 0.4 % each, adding up in the root mean square over a few layers. On the
# large weights above, rounding the weights alone, in float64 arithmetic, moves a tensor's gradient by up to 4.9 %
# (measured; the kernels: 4.2 %): the problem and not the arithmetic is at fault. On weights of a third of that size
# it is 1.0 %, and the kernels were measured at up to 1.3 % of a tensor's norm and at 0.04 % of a loss.
BF16_GRADIENT, BF16_LOSS = 0.02, 2e-3
SIZES = {"fp32": 0.3, "bf16": 0.1}


@kernel
def dropout_key(seed, step):
    return np.int64(key_of(seed, PURPOSE_DROPOUT, step))


def assert_gradients(dtype, found, gradients, where=""):
    """Tensor by tensor: in float32 element by element, in bfloat16 by the norm of the difference."""
    assert found.keys() == gradients.keys()
    measure = np.linalg.norm if dtype == "bf16" else lambda tensor: np.abs(tensor).max()
    tolerance = BF16_GRADIENT if dtype == "bf16" else TOLERANCE
    largest = max(measure(gradient) for gradient in gradients.values())
    for tensor, gradient in gradients.items():
        # Keys' biases have no gradient but what rounding leaves: a tensor is compared on the scale of the whole too.
        scale = max(measure(gradient), (1e-2 if dtype == "bf16" else 1e-3) * largest)
        assert measure(found[tensor] - gradient) <= tolerance * scale, f"{tensor} {where}"


def assert_loss(dtype, loss, expected):
    assert_close(loss, np.array(expected), BF16_LOSS if dtype == "bf16" else TOLERANCE, "loss")


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("count", [1, 3])
def test_the_gradient_of_every_tensor_equals_its_twins(whole, dtype, name, count):
    model = whole(SHAPES[name], dtype=dtype, size=SIZES[dtype])
    inputs_BT, targets_BT = model.batch(count)
    loss, segment_P = model.shard(inputs_BT, targets_BT, 1 / inputs_BT.size)
    expected, gradients = naive_loss_and_gradients(model.shape, model.parameters, inputs_BT, targets_BT)
    assert_loss(dtype, loss / inputs_BT.size, expected)
    assert_gradients(dtype, model.layout.views(segment_P), gradients)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_with_soft_targets_too(whole, dtype, name, kind, rng):
    model = whole(SHAPES[name], dtype=dtype, size=SIZES[dtype])
    inputs_BT, targets_BT = model.batch(3)
    soft = Soft(kind, model.shape.vocab_size, rng)
    cross_entropy, excess, segment_P = model.losses(inputs_BT, targets_BT, 1 / inputs_BT.size, soft=soft.address)
    loss = cross_entropy + excess
    expected, gradients = naive_loss_and_gradients(model.shape, model.parameters, inputs_BT, targets_BT, soft=soft.twin)
    assert_loss(dtype, loss / inputs_BT.size, expected)
    assert_gradients(dtype, model.layout.views(segment_P), gradients)
    assert cross_entropy == model.shard(inputs_BT, targets_BT, 1 / inputs_BT.size)[0]  # to the bit


def test_a_shard_is_computed_in_groups_that_add_up(whole, dtype):
    shape = SHAPES["odd"]
    model = whole(shape, dtype=dtype, size=SIZES[dtype])
    inputs_BT, targets_BT = model.batch(2 * dtypes.rules(dtype).sequences_at_a_time(shape) + 3)
    loss, segment_P = model.shard(inputs_BT, targets_BT, 1 / inputs_BT.size)
    expected, gradients = naive_loss_and_gradients(shape, model.parameters, inputs_BT, targets_BT)
    assert_loss(dtype, loss / inputs_BT.size, expected)
    assert_gradients(dtype, model.layout.views(segment_P), gradients)


def test_shards_add_up_to_the_batch(whole, dtype):
    model = whole(SHAPES["round"], dtype=dtype)
    inputs_BT, targets_BT = model.batch(7)
    parts = [
        model.shard(np.ascontiguousarray(inputs_BT[a:b]), np.ascontiguousarray(targets_BT[a:b]), 1 / inputs_BT.size)
        for a, b in ((0, 3), (3, 5), (5, 7))
    ]
    loss, segment_P = model.shard(inputs_BT, targets_BT, 1 / inputs_BT.size)
    assert_close(sum(part[0] for part in parts), np.array(loss), 1e-6)  # float32 logarithms, summed in float64
    # In bfloat16 too: a sequence's operands are rounded in the same way in whatever shard it lies.
    assert_close(sum(part[1] for part in parts), segment_P)


def test_a_shards_gradient_is_a_function_of_weights_and_tokens_to_the_bit(whole, dtype):
    one, other = whole(SHAPES["odd"], dtype=dtype), whole(SHAPES["odd"], dtype=dtype)
    other.arena[:] = 7
    inputs_BT, targets_BT = one.batch(5)
    loss, segment_P = one.shard(inputs_BT, targets_BT, 0.1)
    for model in (one, other):
        again, same_P = model.shard(inputs_BT, targets_BT, 0.1)
        assert again == loss and same_P.tobytes() == segment_P.tobytes()
        # what another shard, of other sequences and of another number of them, leaves in the arena
        model.shard(*(np.ascontiguousarray(ids[::-1][:2]) for ids in (inputs_BT, targets_BT)), 0.1)
        model.window(targets_BT[0][:3].copy(), inputs_BT[0][:3].copy())
        again, same_P = model.shard(inputs_BT, targets_BT, 0.1)
        assert again == loss and same_P.tobytes() == segment_P.tobytes()


@pytest.mark.parametrize("name", SHAPES)
def test_a_window_has_the_loss_of_its_twin_whole_or_short(whole, dtype, name):
    model = whole(SHAPES[name], dtype=dtype, size=SIZES[dtype])
    for length in {1, (model.shape.block_size + 1) // 2, model.shape.block_size}:
        inputs_BT, targets_BT = model.batch(1, length)
        loss = model.window(inputs_BT[0], targets_BT[0])
        expected, _ = naive_loss_and_gradients(model.shape, model.parameters, inputs_BT, targets_BT)
        assert_loss(dtype, loss / length, expected)


@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_those_of_the_twin_and_rows_may_be_left_out(whole, name):
    model = whole(SHAPES[name])
    inputs_BT, _ = model.batch(1)
    expected = naive_logits(model.shape, model.parameters, inputs_BT)[0]
    logits = model.logits(inputs_BT[0])
    assert_close(logits, expected, TOLERANCE)
    last = model.logits(inputs_BT[0], first_row=len(inputs_BT[0]) - 1)
    assert_close(last, logits[-1:])


def test_logits_do_not_look_ahead(whole):
    model = whole(SHAPES["odd"])
    inputs_T = model.batch(1)[0][0]
    logits = model.logits(inputs_T)
    changed = inputs_T.copy()
    changed[6:] = (changed[6:] + 1) % 37
    other = model.logits(changed)
    assert (logits[:6] == other[:6]).all() and (logits[6:] != other[6:]).any(1).all()


def test_dropout_drops_its_share_in_training_alone_and_depends_on_the_number_of_the_sequence(whole, dtype):
    model = whole(SHAPES["round"], dropout=0.25, dtype=dtype)
    inputs_BT, targets_BT = model.batch(4)
    plain, _ = model.shard(inputs_BT, targets_BT, 1.0)
    assert plain == whole(SHAPES["round"], dtype=dtype).shard(inputs_BT, targets_BT, 1.0)[0]  # key 0: none is dropped
    key = dropout_key(1337, 5)
    dropped, dropped_P = model.shard(inputs_BT, targets_BT, 1.0, key)
    again, again_P = model.shard(inputs_BT, targets_BT, 1.0, key)
    assert (again, again_P.tobytes()) == (dropped, dropped_P.tobytes())
    assert dropped != plain
    assert model.shard(inputs_BT, targets_BT, 1.0, dropout_key(1337, 6))[0] != dropped
    # sequence 2 of the batch is dropped in the same way in whatever shard it lies
    alone = [np.ascontiguousarray(ids[2:3]) for ids in (inputs_BT, targets_BT)]
    here = model.shard(*alone, 1.0, key, first_sequence=2)[0]
    parts = [
        model.shard(*(np.ascontiguousarray(ids[i : i + 1]) for ids in (inputs_BT, targets_BT)), 1.0, key, i)[0]
        for i in range(4)
    ]
    assert parts[2] == here != model.shard(*alone, 1.0, key, first_sequence=0)[0]
    assert_close(sum(parts), np.array(dropped), 1e-6)  # float32 logarithms, summed in float64
    assert not np.isnan(dropped_P).any()


def test_progress_is_raised_at_every_layer(whole, dtype):
    model = whole(SHAPES["odd"], dtype=dtype)
    model.shard(*model.batch(1), 1.0)
    assert model.workspaces["train"].progress[0] == 2 * model.shape.layers


@pytest.mark.parametrize("entry", ["shard", "window", "pack", "logits"])
def test_the_callers_arithmetic_stays_as_it_was(whole, dtype, entry):
    model = whole(SHAPES["odd"], dtype=dtype)
    if entry == "logits":
        model = whole(SHAPES["odd"])  # in float32 whatever the weights were trained in
    inputs_BT, targets_BT = model.batch(1)
    arguments = {
        "shard": (inputs_BT, targets_BT, 1.0),
        "window": (inputs_BT[0], targets_BT[0]),
        "pack": (),
        "logits": (inputs_BT[0],),
    }
    getattr(model, entry)(*arguments[entry])
    assert (np.full(33, 1e-38, np.float32) * np.float32(0.5) > 0).all()  # subnormal numbers are not flushed here


@pytest.mark.parametrize("name", SHAPES)
def test_rows_may_be_left_unscored_and_right_predictions_are_counted(whole, dtype, name):
    model = whole(SHAPES[name], dtype=dtype, size=SIZES[dtype])
    length = model.shape.block_size
    inputs_BT, _ = model.batch(1)
    logits_TV = naive_logits(model.shape, model.parameters, inputs_BT)[0]
    # Every second target is the likeliest token, every other one the least likely: no rounding makes up for that.
    targets_T = np.where(np.arange(length) % 2, logits_TV.argmin(1), logits_TV.argmax(1)).astype(np.int32)
    order_TV = np.sort(logits_TV, 1)
    sure_T = order_TV[:, -1] - order_TV[:, -2] > 0.02 * (order_TV[:, -1] - order_TV[:, 0])
    right_T = logits_TV.argmax(1) == targets_T
    losses_T = np.log(np.exp(logits_TV - order_TV[:, -1:]).sum(1)) + order_TV[:, -1]
    losses_T -= logits_TV[np.arange(length), targets_T]
    for first in {0, 1, length // 2, length - 1} & set(range(length)):
        loss, correct = model.scored(inputs_BT[0], targets_T, first)
        assert_loss(dtype, loss / (length - first), losses_T[first:].mean())
        assert (right_T & sure_T)[first:].sum() <= correct <= (right_T | ~sure_T)[first:].sum()


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_computed_again_takes_less_room_and_has_the_same_bits(whole, dtype, name):
    shape, sizes, found = SHAPES[name], [], set()
    for recompute in RECOMPUTE:
        model = whole(shape, dtype=dtype, dropout=0.25, recompute=recompute)
        loss, segment_P = model.shard(*model.batch(5), 0.1, dropout_key(7, 1), first_sequence=3)
        assert model.workspaces["train"].progress[0] % (2 * shape.layers) == 0  # what is done again is not counted
        sizes.append(model.workspaces["train"].program.arena_bytes)
        found.add((loss, segment_P.tobytes()))
    assert len(found) == 1
    assert max(sizes) == sizes[0] and (shape.layers == 1 or sizes[2] < sizes[0])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("frozen", ["first layers", "embeddings", "matrices", "vectors"])
def test_frozen_tensors_get_no_gradient_and_the_others_theirs(whole, dtype, name, frozen):
    shape = SHAPES[name]
    full = whole(shape, dtype=dtype, dropout=0.25)
    names = {
        "first layers": [n for n in full.parameters if n.startswith(("wpe", *(f"h.{i}." for i in range(1))))],
        "embeddings": ["wte.weight", "wpe.weight"],
        "matrices": [n for n in full.parameters if full.parameters[n].ndim == 2],
        "vectors": [n for n in full.parameters if full.parameters[n].ndim == 1],
    }[frozen]
    model = whole(shape, dtype=dtype, dropout=0.25, frozen=frozenset(names))
    assert {n for n in model.parameters if (model.parameters[n] == full.parameters[n]).all()} == set(full.parameters)
    loss, segment_P = model.shard(*model.batch(3), 0.1, dropout_key(7, 1))
    expected, expected_P = full.shard(*full.batch(3), 0.1, dropout_key(7, 1))
    assert loss == expected
    found, gradients = model.layout.views(segment_P), full.layout.views(expected_P)
    assert found.keys() == full.parameters.keys() - set(names)
    for tensor, gradient in found.items():
        assert gradient.tobytes() == gradients[tensor].tobytes(), tensor


def test_nothing_below_what_is_trained_is_computed(whole, dtype):
    full = whole(SHAPES["odd"], dtype=dtype)
    last = frozenset(n for n in full.parameters if not n.startswith("h.2.mlp"))
    model = whole(SHAPES["odd"], dtype=dtype, frozen=last)
    calls = [call for call in model.workspaces["train"].program.calls if not call.forward]
    assert {call.block for call in calls} == {2, None}  # the last norm has no block
    assert len(calls) < len([call for call in full.workspaces["train"].program.calls if not call.forward]) / 3

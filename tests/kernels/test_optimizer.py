"""AdamW and SGD on one block, through the redo slot."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.crystal.jit import kernel
from cllm_spheres.kernels import optimizer
from cllm_spheres.kernels.optimizer import ADAMW, SGD, commit_block, power, update_block
from cllm_spheres.kernels.sizes import BLOCK, SLOT_FLOATS
from tests import naive
from tests.check import assert_close

LR, BETA1, BETA2, DECAY = 1e-2, 0.9, 0.95, 0.1


@kernel
def power_of(base, exponent):
    return power(base, exponent)


class Blocks:
    """Three blocks of everything; the middle one is the one that is updated."""

    def __init__(self, rng, buffer):
        self.gradient, self.params, self.moments, self.squares = (buffer(3 * BLOCK) for _ in range(4))
        for array in (self.gradient, self.params, self.moments):
            array[:] = rng.standard_normal(array.size)
        self.squares[:] = rng.random(self.squares.size)
        self.slot = buffer(SLOT_FLOATS)
        self.decision = np.zeros(optimizer.DECISION_WORDS)

    def decide(self, step, factor=1.0, decay=DECAY):
        d = self.decision
        d[optimizer.D_FACTOR], d[optimizer.D_LR], d[optimizer.D_DECAY] = factor, LR, decay
        d[optimizer.D_BETA1], d[optimizer.D_BETA2] = BETA1, BETA2
        d[optimizer.D_CORRECTION_1], d[optimizer.D_CORRECTION_2] = 1 - BETA1**step, 1 - BETA2**step

    def update(self, kind, decays=True):
        gradient = self.gradient[BLOCK:]
        addresses = (a.ctypes.data for a in (self.decision, gradient, self.params, self.moments, self.squares))
        update_block.call(kind, *addresses, self.slot.ctypes.data, 1, decays)

    def commit(self, kind):
        addresses = (a.ctypes.data for a in (self.params, self.moments, self.squares, self.slot))
        commit_block.call(kind, *addresses, 1)

    def state(self):
        return [a.astype(float).reshape(3, BLOCK) for a in (self.params, self.gradient, self.moments, self.squares)]


@pytest.mark.parametrize("decays", [False, True])
@pytest.mark.parametrize("step", [1, 7, 100_000])
def test_adamw_equals_its_twin(step, decays, rng, buffer):
    blocks = Blocks(rng, buffer)
    p, g, m, v = blocks.state()
    blocks.decide(step, factor=0.25)
    blocks.update(ADAMW, decays)
    blocks.commit(ADAMW)
    expected = naive.adamw(p[1], 0.25 * g[1], m[1], v[1], step, LR, BETA1, BETA2, decay=DECAY * decays)
    new_p, _, new_m, new_v = blocks.state()
    # A few float32 roundings each. Of the step itself they must be small too: it is what is added to p.
    for new, old, wanted in zip((new_p, new_m, new_v), (p, m, v), expected, strict=True):
        assert_close(new[1], wanted, 1e-6)
        assert (new[[0, 2]] == old[[0, 2]]).all()
    assert_close(new_p[1] - p[1], expected[0] - p[1], 1e-4)


@pytest.mark.parametrize("decays", [False, True])
def test_sgd_equals_its_twin(decays, rng, buffer):
    blocks = Blocks(rng, buffer)
    p, g, m, v = blocks.state()
    blocks.decide(1, factor=0.25)
    blocks.update(SGD, decays)
    blocks.commit(SGD)
    # the twin's decay is added to the momentum's step: p - lr (m + decay p), the same as the kernel's
    expected = naive.sgd(p[1], 0.25 * g[1], m[1], LR, BETA1, DECAY * decays)
    new_p, _, new_m, new_v = blocks.state()
    assert_close(new_p[1], expected[0], 1e-6)
    assert_close(new_m[1], expected[1], 1e-6)
    assert (new_p[[0, 2]] == p[[0, 2]]).all() and (new_v == v).all()


@pytest.mark.parametrize("kind", [ADAMW, SGD])
def test_updating_writes_the_slot_only_and_both_halves_can_be_repeated(kind, rng, buffer):
    blocks = Blocks(rng, buffer)
    blocks.decide(3)
    before = [array.tobytes() for array in blocks.state()]
    blocks.update(kind)
    slot = blocks.slot.tobytes()
    assert [array.tobytes() for array in blocks.state()] == before
    blocks.slot[:] = np.nan
    blocks.update(kind)
    assert blocks.slot.tobytes() == slot
    blocks.commit(kind)
    after = [array.tobytes() for array in blocks.state()]
    blocks.params[BLOCK : BLOCK + 1000] = np.nan  # as if the writer had died inside its copy
    blocks.commit(kind)
    assert [array.tobytes() for array in blocks.state()] == after != before


def test_padding_stays_zero(rng, buffer):
    blocks = Blocks(rng, buffer)
    for array in (blocks.gradient, blocks.params, blocks.moments, blocks.squares):
        array[BLOCK + 100 : BLOCK + 116] = 0
    blocks.decide(1)
    for kind in (ADAMW, SGD):
        blocks.update(kind)
        blocks.commit(kind)
        assert (blocks.params[BLOCK + 100 : BLOCK + 116] == 0).all()


def test_subnormal_moments_become_zero_and_the_callers_arithmetic_stays_as_it_was(rng, buffer):
    blocks = Blocks(rng, buffer)
    blocks.gradient[:], blocks.moments[:], blocks.squares[:] = 0, 1e-38, 1e-38
    blocks.decide(1)
    blocks.update(ADAMW)
    assert (blocks.slot[BLOCK : 2 * BLOCK] == 0).all()  # 0.9e-38 is subnormal
    assert (np.full(33, 1e-38, np.float32) * np.float32(0.5) > 0).all()


def test_power_is_the_power():
    for base, exponent in ((0.9, 0), (0.9, 1), (0.95, 7), (0.999, 100_000)):
        # about 2 log2(n) products, whose errors add up to at most n roundings
        assert np.isclose(power_of(base, exponent), base**exponent, rtol=max(exponent, 1) * 2**-53, atol=0)

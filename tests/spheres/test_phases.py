"""Every phase of a step can be done again, and the update goes on wherever it was interrupted."""

from __future__ import annotations

import ctypes
import faulthandler
import math
import mmap
import os
import random
import signal
from dataclasses import replace

import numpy as np
import pytest

from cllm_spheres.kernels.gather import global_norm
from cllm_spheres.kernels.optimizer import D_CORRECTION_1, D_FACTOR, D_LR, DECISION_WORDS
from cllm_spheres.kernels.sizes import BLOCK, SLOT_FLOATS
from cllm_spheres.model import record as R
from cllm_spheres.model.families import tensors_of
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres import phases
from cllm_spheres.spheres.context import Context
from cllm_spheres.spheres.fault_table import FaultTable
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.memory import SharedMemory
from cllm_spheres.spheres.worker import Worker

STEP = 3  # the step that these tests do; any would serve
SMALL = Shape(vocab_size=300, block_size=8, layers=1, heads=2, width=32, ff_width=64)
# Two million parameters: an update takes some milliseconds, long enough to be killed in the middle.
LARGE = Shape(vocab_size=8_000, block_size=8, layers=1, heads=2, width=256, ff_width=64)


class Spheres:
    """The shared memory of a run and its workers, in this process: phases are called, nothing is started."""

    def __init__(self, corpus, shape=SMALL, workers=1, **options):
        options = {"batch_size": 10, "spheres": 7, "clip": 0.5, "seed": 11, **options}
        self.job = Job(
            shape=shape, workers=workers, train=str(corpus), val=str(corpus), item_bytes=2, num_windows=0,
            train_tokens=corpus.stat().st_size // 2, val_tokens=corpus.stat().st_size // 2, **options,
        )  # fmt: skip
        self.memory = SharedMemory(self.job.sizes)
        self.workers = [Worker(self.job, self.memory, worker) for worker in range(workers)]
        self.contexts = [worker.context for worker in self.workers]
        rng = np.random.default_rng(2)
        self.memory.params[:] = 0.1 * rng.standard_normal(self.memory.params.size, np.float32)
        self.memory.moments[:] = rng.standard_normal(self.memory.moments.size, np.float32)
        self.memory.squares[:] = rng.random(self.memory.squares.size, np.float32)
        for word, value in ((M.DONE, STEP - 1), (M.GATE, STEP - 1), (M.APPLIED, STEP - 1)):
            self.word(word)[0] = value
        self.memory.doubles(self.regions.rates, 1)[0] = 1e-2

    @property
    def regions(self):
        return self.memory.regions

    def word(self, word):
        return self.memory.words(self.regions.control + word * M.LINE, 1)

    def compute(self):
        """As if no sphere were complete."""
        self.memory.sphere_words()[:, M.P_COMPLETE] = 0
        for x in self.contexts:
            assert phases.compute(x, STEP, 0)

    def gather(self):
        for x in self.contexts:
            phases.gather(x, STEP)

    def decide(self):
        """The verdict."""
        phases.decide(self.contexts[0], STEP, 0)
        return self.memory.doubles(self.regions.decision, DECISION_WORDS)[phases.D_VERDICT]

    def update(self):
        for x in self.contexts:
            phases.update(x, STEP)

    def region(self, name):
        """A copy of what lies in a region: bytes, but words that tell times are left out."""
        r, sizes = self.regions, self.memory.sizes
        blocks = sizes.num_parameters // BLOCK
        if name == "losses":
            return self.memory.sphere_words()[:, [M.P_COMPLETE, M.P_LOSS]].tobytes()
        start, count = {
            "decision": (r.decision, DECISION_WORDS * 8),
            "norms": (r.norms, blocks * 8),
            "params": (r.params, r.stride),
            "moments": (r.moments, r.stride),
            "squares": (r.squares, r.stride if sizes.has_squares else 0),
            "gradient": (r.gradient, r.stride if sizes.num_spheres > 2 else 0),
            "segments": (r.segments, r.stride * sizes.num_spheres),
        }[name]
        return self.memory._bytes[start : start + count].tobytes()

    def state(self):
        names = "losses", "decision", "norms", "params", "moments", "squares", "gradient", "segments"
        return {name: self.region(name) for name in names}

    def weights(self):
        return [self.region(name) for name in ("params", "moments", "squares")]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A corpus of 4,000 ids below 300."""
    path = tmp_path_factory.mktemp("tokens") / "train.bin"
    np.random.default_rng(0).integers(0, 300, 4000).astype("<u2").tofile(path)
    return path


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(("dropout", "num_spheres"), [(0.0, 7), (0.3, 7), (0.0, 2), (0.0, 1)])
def test_every_phase_can_be_done_again_and_writes_nothing_but_its_outputs(tokens, optimizer, dropout, num_spheres):
    spheres = Spheres(tokens, optimizer=optimizer, dropout=dropout, spheres=num_spheres)
    squares = {"squares"} if optimizer == "adamw" else set()
    gradient = {"gradient"} if num_spheres > 2 else set()
    for phase, outputs in (
        (spheres.compute, {"segments", "losses"}),
        (spheres.gather, gradient | {"norms"}),
        (spheres.decide, {"decision"}),
        (spheres.update, {"params", "moments"} | squares),
    ):
        before = spheres.state()
        phase()
        once = spheres.state()
        assert {name for name in before if once[name] != before[name]} == outputs, phase.__name__
        if phase == spheres.decide:
            spheres.word(M.GATE)[0] = STEP - 1  # a decision is made once
        phase()
        assert spheres.state() == once, phase.__name__


def test_a_phase_overwrites_whatever_an_interrupted_one_left(tokens):
    spheres = Spheres(tokens)
    spheres.compute()
    spheres.gather()
    once = spheres.state()
    layout = Layout(spheres.job.shape)
    for segment in map(spheres.memory.segment, range(spheres.job.spheres)):
        for view in layout.views(segment).values():  # the padding between them is written by nobody
            view[...] = np.nan
    spheres.memory.floats(spheres.regions.gradient, layout.size)[:] = np.nan
    spheres.memory.doubles(spheres.regions.norms, layout.num_blocks)[:] = np.nan
    for x in spheres.contexts:
        at = (ctypes.c_int64 * R.REGISTERS).from_address(int(x[Context.SHARD]))[R.ARENA]
        np.ctypeslib.as_array((ctypes.c_byte * spheres.job.arena_bytes).from_address(at))[:] = -1  # NaN
    spheres.compute()
    spheres.gather()
    assert spheres.state() == once


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_rest_of_a_model_half_of_which_is_frozen_trains_as_if_only_those_gradients_were_dropped(tokens, optimizer):
    names = [tensor.name for tensor in tensors_of(SMALL)]
    frozen = [name for name in names if name.startswith(("wpe", "h.0.attn", "h.0.ln_2"))]
    full = Spheres(tokens, optimizer=optimizer, clip=0.0, dropout=0.2)
    half = Spheres(tokens, optimizer=optimizer, clip=0.0, dropout=0.2, frozen=frozen, workers=2)
    kinds = ("params", "moments", "squares") if optimizer == "adamw" else ("params", "moments")
    whole, trained = ({k: s.job.layout.views(getattr(s.memory, k)) for k in kinds} for s in (full, half))
    stays = half.job.layout.frozen_views(half.memory.frozen)
    assert sorted(stays) == sorted(frozen) and trained["params"].keys() == set(names) - set(frozen)
    for name, tensor in stays.items():
        tensor[...] = whole["params"][name]
    for kind, tensors in trained.items():
        for name, tensor in tensors.items():
            tensor[...] = whole[kind][name]
    for spheres in (full, half):
        spheres.compute()
        spheres.gather()
        spheres.decide()
        spheres.update()
    assert full.region("losses") == half.region("losses")
    for kind, tensors in trained.items():
        for name, tensor in tensors.items():
            assert tensor.tobytes() == whole[kind][name].tobytes(), (kind, name)
    norms = [float(s.memory.ring_doubles()[0, M.R_NORM]) for s in (full, half)]
    assert 0 < norms[1] < norms[0]
    assert half.memory.sizes.num_parameters < full.memory.sizes.num_parameters


@pytest.mark.parametrize("trained", ["h.3.", "ln_f"])
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_a_fault_strikes_in_its_pass_however_many_lower_layers_are_frozen(tokens, phase, trained):
    shape = replace(SMALL, layers=4)
    frozen = [tensor.name for tensor in tensors_of(shape) if not tensor.name.startswith(trained)]
    spheres = Spheres(tokens, shape, frozen=frozen, faults=[(phase, STEP, 2, "kill")])
    FaultTable(spheres.memory, spheres.job.faults).lay_down()
    child = os.fork()
    if child == 0:
        spheres.compute()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert list(spheres.memory.sphere_words()[:3, M.P_COMPLETE]) == [STEP, STEP, 0]


@pytest.mark.parametrize(("workers", "num_spheres"), [(2, 7), (3, 7), (7, 7), (2, 2)])
def test_the_memory_does_not_depend_on_who_does_the_work(tokens, workers, num_spheres):
    states = []
    for number in (1, workers):
        spheres = Spheres(tokens, workers=number, spheres=num_spheres)
        for phase in (spheres.compute, spheres.gather, spheres.decide, spheres.update):
            phase()
        states.append(spheres.state())
    assert states[0] == states[1]


# --- gather ---


@pytest.mark.parametrize("num_spheres", [1, 2, 3, 4, 5, 6, 9, 12, 63])
def test_segments_are_added_in_the_order_of_the_spheres(tokens, rng, num_spheres):
    spheres = Spheres(tokens, spheres=num_spheres, batch_size=num_spheres)
    segments = [spheres.memory.segment(s) for s in range(num_spheres)]
    for segment in segments:
        # of very different sizes, so that any other order gives other bits
        segment[:] = rng.standard_normal(segment.size) * 10.0 ** rng.integers(-6, 6, segment.size)
    spheres.gather()
    expected = segments[0].copy()
    for segment in segments[1:]:
        expected += segment
    if num_spheres > 2:  # with fewer the sum is not kept
        gradient = spheres.memory.floats(spheres.regions.gradient, expected.size)
        assert gradient.tobytes() == expected.tobytes()
        assert gradient.tobytes() != sum(segments[::-1][1:], segments[-1].copy()).tobytes()
    norms = spheres.memory.doubles(spheres.regions.norms, expected.size // BLOCK)
    exact = (expected.astype(np.float64).reshape(-1, BLOCK) ** 2).sum(1)
    # 4,096 additions in float64, in any order
    assert np.allclose(norms, exact, rtol=4096 * 2.0**-53, atol=0)
    total = 0.0
    for square in norms.tolist():
        total += square
    assert global_norm.call(norms.ctypes.data, len(norms)) == math.sqrt(total)


@pytest.mark.parametrize("num_spheres", [1, 2])
def test_an_update_that_adds_again_has_the_bits_of_one_that_reads_a_kept_sum(tokens, rng, num_spheres):
    weights = []
    values = rng.standard_normal((num_spheres, Layout(SMALL).size), np.float32)
    for number in (num_spheres, 3):
        spheres = Spheres(tokens, spheres=number, workers=number)
        for s in range(number):
            spheres.memory.segment(s)[:] = values[s] if s < num_spheres else 0
        spheres.gather()
        assert spheres.decide() == 0
        before = spheres.weights()
        spheres.update()
        weights.append((spheres.weights(), spheres.region("norms")))
        assert spheres.weights() != before
    assert weights[0] == weights[1]


# --- decide ---


def decision(spheres):
    return spheres.memory.doubles(spheres.regions.decision, DECISION_WORDS)


def test_a_decision_clips_and_corrects_by_the_updates_that_were_applied(tokens):
    spheres = Spheres(tokens, beta1=0.5, clip=0.05)
    spheres.word(M.APPLIED)[0] = 1  # of two steps one was skipped: this is Adam's second update
    spheres.compute()
    spheres.gather()
    assert spheres.decide() == 0
    record = spheres.memory.ring_doubles()[0]
    norm = record[M.R_NORM]
    assert norm > 0.05 and abs(record[M.R_CLIPPED] - 0.05) < 1e-16  # two roundings of 0.05 / norm * norm
    assert decision(spheres)[D_FACTOR] == 0.05 / norm
    assert decision(spheres)[D_LR] == record[M.R_LR] == 1e-2
    assert decision(spheres)[D_CORRECTION_1] == 1 - 0.5**2
    losses = spheres.memory.sphere_words().view(np.float64)[:, M.P_LOSS].tolist()
    total = 0.0
    for loss in losses:
        total += loss
    assert record[M.R_LOSS] == total / 80 and np.isfinite(total)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("skip", "verdict", "halt"), [(False, 2, M.HALT_NONFINITE), (True, 1, 0)])
def test_what_is_not_finite_halts_or_skips(tokens, value, skip, verdict, halt):
    spheres = Spheres(tokens, skip_nonfinite=skip)
    spheres.compute()
    spheres.memory.segment(4)[17] = value
    spheres.gather()
    assert spheres.decide() == verdict
    assert spheres.word(M.HALT)[0] == halt
    assert spheres.memory.ring_words()[0, M.R_SKIPPED] == 1


def test_a_closed_gate_keeps_the_update_from_beginning(tokens):
    spheres = Spheres(tokens)
    spheres.compute()
    spheres.gather()
    spheres.word(M.GATE)[0] = -1 - (STEP - 1)
    assert spheres.decide() == 2
    spheres.word(M.GATE)[0] = STEP - 1
    assert spheres.decide() == 0
    assert spheres.word(M.GATE)[0] == STEP  # too late to close it


# --- update ---


def ready(spheres):
    """Everything before the update of STEP; returns what the undisturbed update makes of it."""
    spheres.compute()
    spheres.gather()
    assert spheres.decide() == 0
    before = spheres.weights()
    spheres.update()
    undisturbed = spheres.weights()
    assert undisturbed != before
    return before, undisturbed


def put_back(spheres, before):
    """The weights as they were, and the words of workers that have not begun."""
    for name, data in zip(("params", "moments", "squares"), before, strict=True):
        start = getattr(spheres.regions, name)
        spheres.memory._bytes[start : start + len(data)] = np.frombuffer(data, np.uint8)
    spheres.memory.worker_words()[:, M.W_SLOT] = 0
    spheres.memory.updated_words()[:] = 0


def go_on(spheres):
    """What every worker does with an update that was interrupted."""
    for phase in (phases.repair, phases.update):
        for x in spheres.contexts:
            phase(x, STEP)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_update_goes_on_between_any_two_blocks_and_inside_any_copy(tokens, optimizer):
    spheres = Spheres(tokens, optimizer=optimizer)
    before, undisturbed = ready(spheres)
    x = spheres.contexts[0]
    num_blocks = int(x[Context.NUM_BLOCKS])
    assert num_blocks >= 5
    for stop in range(num_blocks):
        for copied in (None, 0, 1000, BLOCK, BLOCK + 1, 2 * BLOCK + 7, 3 * BLOCK):
            put_back(spheres, before)
            x[Context.LAST_BLOCK] = stop
            phases.update(x, STEP)
            if copied is not None:
                interrupt_in_copy(spheres, x, stop, copied)
            x[Context.LAST_BLOCK] = num_blocks
            go_on(spheres)
            assert spheres.weights() == undisturbed, (stop, copied)


def interrupt_in_copy(spheres, x, block, copied):
    """As if a worker had died with `copied` floats of a published block in place."""
    saved = spheres.weights()
    x[Context.LAST_BLOCK] = block + 1
    phases.update(x, STEP)  # leaves the new block in the slot
    x[Context.LAST_BLOCK] = int(x[Context.NUM_BLOCKS])
    slot = spheres.memory.floats(spheres.regions.slots, SLOT_FLOATS).copy()
    put_back(spheres, saved)
    spheres.memory.worker_words()[0, M.W_SLOT] = STEP * int(x[Context.NUM_BLOCKS]) + block
    spheres.memory.updated_words()[:block] = STEP
    places = spheres.memory.params, spheres.memory.moments, spheres.memory.squares
    for part, place in enumerate(places):
        count = min(max(copied - part * BLOCK, 0), BLOCK)
        if place.size:
            place[block * BLOCK : block * BLOCK + count] = slot[part * BLOCK : part * BLOCK + count]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_an_update_that_is_killed_again_and_again_ends_in_the_same_bits(tokens, optimizer):
    spheres = Spheres(tokens, LARGE, spheres=1, batch_size=1, optimizer=optimizer)
    before, undisturbed = ready(spheres)
    x = spheres.contexts[0]
    updated = spheres.memory.updated_words()
    num_blocks = int(x[Context.NUM_BLOCKS])
    dice = random.Random(7)
    in_the_middle = 0
    for _ in range(25):
        put_back(spheres, before)
        done = 0
        for _ in range(4):
            target = done + dice.randrange(1, num_blocks // 5)
            child = os.fork()
            if child == 0:
                go_on(spheres)
                os._exit(0)
            while updated[target - 1] != STEP:
                os.sched_yield()
            for _ in range(dice.randrange(1000)):  # some microseconds: the time of a few blocks
                pass
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            done = int((updated == STEP).sum())
            in_the_middle += done < num_blocks
            if done >= num_blocks * 4 // 5:
                break
        go_on(spheres)
        assert spheres.weights() == undisturbed
    assert in_the_middle > 0  # nearly all of them, where there are two cores


@pytest.mark.parametrize("place", ["params", "moments", "squares"])
@pytest.mark.parametrize("page", [0, 1, 3])
def test_an_update_whose_process_dies_inside_a_copy_ends_in_the_same_bits(tokens, place, page):
    spheres = Spheres(tokens)
    before, undisturbed = ready(spheres)
    x = spheres.contexts[0]
    words = spheres.memory.worker_words()[0]
    libc = ctypes.CDLL(None)
    for block in (0, 2, int(x[Context.NUM_BLOCKS]) - 1):
        put_back(spheres, before)
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            # In this process alone a page of the block cannot be written: the copy dies when it comes there.
            start = spheres.memory.address + getattr(spheres.regions, place) + 4 * BLOCK * block + M.PAGE * page
            libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(M.PAGE), mmap.PROT_READ)
            phases.update(x, STEP)
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGSEGV
        assert words[M.W_SLOT] == STEP * int(x[Context.NUM_BLOCKS]) + block  # published, and not done
        assert spheres.memory.updated_words()[block] != STEP
        assert spheres.weights() != undisturbed
        go_on(spheres)
        assert spheres.weights() == undisturbed


def test_an_update_done_already_is_left_alone_and_the_next_step_begins_anew(tokens):
    spheres = Spheres(tokens)
    _, undisturbed = ready(spheres)
    spheres.memory.floats(spheres.regions.slots, SLOT_FLOATS)[:] = np.nan
    spheres.update()
    assert spheres.weights() == undisturbed
    for x in spheres.contexts:
        phases.update(x, STEP + 1)
    assert spheres.weights() != undisturbed
    assert np.isfinite(spheres.memory.params).all()


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_an_interrupted_update_is_ended_by_any_number_of_workers(tokens, workers):
    spheres = Spheres(tokens, workers=3)
    before, undisturbed = ready(spheres)
    num_blocks = int(spheres.contexts[0][Context.NUM_BLOCKS])
    put_back(spheres, before)
    phases.update(spheres.contexts[0], STEP)  # one has ended its span, one is dead in the middle of a copy
    block = num_blocks // 3 + 1
    interrupted = spheres.contexts[1]
    interrupted[Context.FIRST_BLOCK], interrupted[Context.LAST_BLOCK] = block, block + 1
    phases.update(interrupted, STEP)
    spheres.memory.updated_words()[block] = 0
    spheres.memory.params[block * BLOCK : block * BLOCK + 100] = np.nan
    others = Spheres(tokens, workers=workers)
    others.memory._bytes[:] = spheres.memory._bytes
    go_on(others)
    assert others.weights() == undisturbed

"""The sizes of a run -> one shared memory file, and where everything lies in it.

The file is a memfd: it never appears in a folder, is passed on as a descriptor, and vanishes with its last holder.
Each worker allocates its own ranges of it, so that exhaustion is an error and not a bus error.

The control words are the only thing that more than one process writes; each has a cache line of its own.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import asdict, dataclass
from enum import IntEnum

import numpy as np

from cllm_spheres.faults import MOST_FAULTS
from cllm_spheres.kernels.sizes import BLOCK, HEADER_WORDS, PROGRESS_WORDS, SLOT_FLOATS, keeps_sum

LINE = 64  # bytes of a cache line
PAGE = 4096

# Control words, by line.
(
    COMMAND,  # futex: number of the current command
    KIND,  # what to do
    FIRST,  # steps: the first to do (they count from 1); evaluation: the first window
    LAST,  # one past the last
    ARRIVED,  # workers that have arrived at the current barrier
    RELEASE,  # futex: number of barriers passed
    ABORT,  # not 0: leave the command
    STOP,  # not 0: no further step begins
    GATE,  # the last step whose update was begun; -1 - step where Node Zero has closed it
    DONE,  # the last whole step
    APPLIED,  # updates applied: Adam's t, which skipped steps do not raise
    HALT,  # why a command of steps ended early
    BELL,  # futex: something happened that Node Zero wants to see
    FINISHED,  # number of the last finished command
    STEP_START,  # when the current step began, monotonic ns
    LONG_TIMEOUT,  # seconds, ns: what a worker waits before it looks at ABORT again
    SHORT_TIMEOUT,  # seconds, ns: how often Node Zero looks around
    CLOCK,  # scratch of Node Zero's clock calls
    TRACED_STEP,  # the step of which traces are kept, where there is room for them
    BASE,  # the step whose record stands first in the ring
) = range(20)
CONTROL_LINES = 32

# Commands.
INITIALISE, STEPS, EVALUATE, REHEARSE, EXIT, MEET, PACK_FROZEN = range(1, 8)
# Reasons of HALT.
HALT_STOP, HALT_NONFINITE = 1, 2

# Words of a worker, three lines each; those of its progress come last.
(
    W_ARRIVED, W_STATE, W_COMPUTE_NS, W_WAIT_NS, W_GATHER_NS, W_UPDATE_NS, W_CLOCK, W_CLOCK_2,
    W_SLOT, W_READY, W_REHEARSAL_NS, W_PACK_NS, W_LEFT, W_SPHERE, W_PROGRESS,
) = range(15)  # fmt: skip
WORKER_WORDS = 24
assert W_PROGRESS + PROGRESS_WORDS <= WORKER_WORDS
# States of a worker.
State = IntEnum("State", "STARTING IDLE PACKING COMPUTING WAITING GATHERING UPDATING EVALUATING ENDED", start=0)

# Words of a sphere, one line each.
P_COMPLETE, P_LOSS, P_CROSS_ENTROPY, P_BUSY_NS, P_TOKENS = range(5)
SPHERE_WORDS = 8

# Words of a fault, one line each.
F_PHASE, F_STEP, F_SPHERE, F_ACTION, F_FIRED = range(5)
FAULT_WORDS = 8

# Words of a step's record in the ring.
(
    R_STEP, R_LOSS, R_CROSS_ENTROPY, R_NORM, R_CLIPPED, R_LR, R_SKIPPED, R_START_NS, R_COMPUTED_NS, R_GATHERED_NS,
    R_END_NS, R_REAL_NS, R_COMPUTE_SUM, R_GATHER_SUM, R_UPDATE_SUM, R_PACK_SUM, R_APPLIED,
    RECORD_WORDS,
) = range(18)  # fmt: skip
RING = 4096  # steps that a command has at most
ERROR_BYTES = 1024  # what a worker can say of an exception


@dataclass(frozen=True)
class Sizes:
    """What decides how much memory a run shares; it travels to the workers as JSON."""

    num_parameters: int  # padded, a multiple of BLOCK
    num_spheres: int  # and places for workers: their number may change, and never exceeds that of the spheres
    num_windows: int  # of an evaluation
    has_squares: bool  # adamw keeps second moments, sgd does not
    num_frozen: int = 0  # parameters that are not trained, padded
    packed_bytes: int = 0  # of the weights as the kernels of the dtype read them; 0 where they read float32
    pack_units: int = 0  # units of work that fill them at every step
    frozen_units: int = 0  # and once a run, of frozen matrices
    trace_marks: int = 0  # of a worker in a traced step (kernels/trace.py); 0: no step is traced
    soft_targets: int = 0  # entries of their table, neighbours of all tokens
    trains: bool = True  # else weights are evaluated: no moments, no gradients

    @property
    def keeps_sum(self) -> bool:
        """Whether the sum of all segments has a place."""
        return self.trains and bool(keeps_sum(self.num_spheres))

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


class Regions:
    """Byte offsets of all regions in the shared file. Big ones begin at a page."""

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        blocks = sizes.num_parameters // BLOCK
        flat = sizes.num_parameters * 4
        end = 0

        def place(size_bytes: int, unit: int = LINE) -> int:
            nonlocal end
            start = -(-end // unit) * unit
            end = start + size_bytes
            return start

        self.control = place(CONTROL_LINES * LINE)
        self.decision = place(LINE)
        self.workers = place(sizes.num_spheres * WORKER_WORDS * 8)
        self.spheres = place(sizes.num_spheres * SPHERE_WORDS * 8)
        self.faults = place(MOST_FAULTS * FAULT_WORDS * 8)
        self.ring = place(RING * RECORD_WORDS * 8)
        self.rates = place(RING * 8)
        self.window_starts = place(sizes.num_windows * 8)
        self.window_lengths = place(sizes.num_windows * 8)
        self.window_firsts = place(sizes.num_windows * 8)
        self.window_losses = place(sizes.num_windows * 8)
        self.window_hits = place(sizes.num_windows * 8)
        self.norms = place(blocks * 8)
        self.updated = place(blocks * 8)
        self.errors = place(sizes.num_spheres * ERROR_BYTES)
        self.slots = place(sizes.num_spheres * SLOT_FLOATS * 4, PAGE)
        self.trace_stride = 8 * (HEADER_WORDS + 2 * sizes.trace_marks)
        self.traces = place(sizes.num_spheres * self.trace_stride if sizes.trace_marks else 0, PAGE)
        self.soft_targets = place(8 * sizes.soft_targets, PAGE)
        self.params = place(flat, PAGE)
        self.frozen = place(sizes.num_frozen * 4, PAGE)
        self.moments = place(flat if sizes.trains else 0, PAGE)
        self.squares = place(flat if sizes.has_squares else 0, PAGE)
        self.gradient = place(flat if sizes.keeps_sum else 0, PAGE)
        self.packed = place(sizes.packed_bytes, PAGE)
        self.segments = place(flat * sizes.num_spheres if sizes.trains else 0, PAGE)
        self.stride = flat
        self.total = place(0, PAGE)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by what they are for; they add up to `total`."""
        return {
            "control words, norms, redo slots": self.params, "weights": self.moments - self.params,
            "moments": self.gradient - self.moments, "sum of the segments": self.packed - self.gradient,
            "packed weights": self.segments - self.packed, "segments": self.total - self.segments,
        }  # fmt: skip


class SharedMemory:
    """The mapped file. `words`, `floats`, `doubles` give numpy views, `address` what the kernels take."""

    def __init__(self, sizes: Sizes, descriptor: int | None = None) -> None:
        """Create the file, or map one that was inherited as a descriptor."""
        self.regions = Regions(sizes)
        self.sizes = sizes
        if descriptor is None:
            descriptor = os.memfd_create("cllm-spheres", os.MFD_CLOEXEC)
            os.ftruncate(descriptor, self.regions.total)
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, self.regions.total, mmap.MAP_SHARED)
        self._bytes = np.frombuffer(self._map, np.uint8)
        self.address = int(self._bytes.ctypes.data)

    def allocate(self, offset: int, size_bytes: int) -> None:
        """Have the kernel provide a range now. OSError (ENOSPC, ENOMEM) where it cannot."""
        if size_bytes > 0:
            os.posix_fallocate(self.descriptor, offset, size_bytes)

    def words(self, offset: int, count: int) -> np.ndarray:
        return self._bytes[offset : offset + 8 * count].view(np.int64)

    def doubles(self, offset: int, count: int) -> np.ndarray:
        return self._bytes[offset : offset + 8 * count].view(np.float64)

    def floats(self, offset: int, count: int) -> np.ndarray:
        return self._bytes[offset : offset + 4 * count].view(np.float32)

    def set_error(self, worker: int, text: str) -> None:
        """What a worker has to say before it ends; Node Zero reads it."""
        data = text.encode()[-ERROR_BYTES:].ljust(ERROR_BYTES, b"\0")
        start = self.regions.errors + worker * ERROR_BYTES
        self._bytes[start : start + ERROR_BYTES] = np.frombuffer(data, np.uint8)

    def error(self, worker: int) -> str:
        start = self.regions.errors + worker * ERROR_BYTES
        return bytes(self._bytes[start : start + ERROR_BYTES]).rstrip(b"\0").decode(errors="replace")

    def control(self, word: int) -> int:
        """The address of a control word."""
        return self.address + self.regions.control + word * LINE

    @property
    def params(self) -> np.ndarray:
        return self.floats(self.regions.params, self.sizes.num_parameters)

    @property
    def frozen(self) -> np.ndarray:
        return self.floats(self.regions.frozen, self.sizes.num_frozen)

    @property
    def moments(self) -> np.ndarray:
        return self.floats(self.regions.moments, self.sizes.num_parameters if self.sizes.trains else 0)

    @property
    def squares(self) -> np.ndarray:
        return self.floats(self.regions.squares, self.sizes.num_parameters if self.sizes.has_squares else 0)

    def lay_soft_targets(self, table: bytes) -> None:
        """int32 neighbours, then float32 weights, as training/soft_targets.py makes them."""
        start = self.regions.soft_targets
        self._bytes[start : start + 8 * self.sizes.soft_targets] = np.frombuffer(table, np.uint8)

    def segment(self, sphere: int) -> np.ndarray:
        return self.floats(self.regions.segments + sphere * self.regions.stride, self.sizes.num_parameters)

    def worker_words(self) -> np.ndarray:
        """int64 [places, WORKER_WORDS]"""
        count = self.sizes.num_spheres
        return self.words(self.regions.workers, count * WORKER_WORDS).reshape(count, WORKER_WORDS)

    def updated_words(self) -> np.ndarray:
        """int64 [blocks]: the last step that has updated each."""
        return self.words(self.regions.updated, self.sizes.num_parameters // BLOCK)

    def fault_words(self) -> np.ndarray:
        """int64 [MOST_FAULTS, FAULT_WORDS]"""
        return self.words(self.regions.faults, MOST_FAULTS * FAULT_WORDS).reshape(MOST_FAULTS, FAULT_WORDS)

    def sphere_words(self) -> np.ndarray:
        """int64 [spheres, SPHERE_WORDS]"""
        count = self.sizes.num_spheres
        return self.words(self.regions.spheres, count * SPHERE_WORDS).reshape(count, SPHERE_WORDS)

    def trace_words(self, worker: int) -> np.ndarray:
        """A worker's trace, as kernels/trace.py describes it."""
        regions = self.regions
        return self.words(regions.traces + worker * regions.trace_stride, regions.trace_stride // 8)

    def ring_words(self) -> np.ndarray:
        """int64 [RING, RECORD_WORDS]; losses, norms and rates are float64 bits: see `ring_doubles`."""
        return self.words(self.regions.ring, RING * RECORD_WORDS).reshape(RING, RECORD_WORDS)

    def ring_doubles(self) -> np.ndarray:
        return self.ring_words().view(np.float64)

"""A model's weights -> a decoder: rows of tokens at positions of texts in, logits out, with a cache of keys and values.

M rows, V vocabulary, P parameters, W wanted rows.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cllm_spheres.errors import InputError, nearest, shown
from cllm_spheres.inference import registers as W
from cllm_spheres.inference import rules, team
from cllm_spheres.kernels.sizes import ALIGN, TILE_COLUMNS
from cllm_spheres.kernels.strips import pack_strips
from cllm_spheres.machine import available_memory, usable_cores
from cllm_spheres.model import record as R
from cllm_spheres.model.arena import new_arena
from cllm_spheres.model.layout import Layout
from cllm_spheres.units import plural, size

DTYPES = ("fp32", "bf16")
MOST_THREADS = 256
# Bytes of weights that make another thread worth its barriers.
BYTES_A_THREAD = 8 << 20
PACKED_AT_ONCE = 64  # strips that a thread packs in one call


@dataclass(frozen=True)
class Rows:
    """Consecutive tokens of the text in one slot. wanted: how many of the last of them need logits."""

    slot: int
    position: int  # of the first, in the text
    ids: Sequence[int]
    wanted: int = 1


class Decoder:
    """Weights for writing, and room for the keys and values of `slots` texts. For one thread at a time."""

    def __init__(
        self, layout: Layout, params_P: np.ndarray, *, slots: int, dtype: str, threads: int | None,
        frozen_P: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """threads: None takes as many as the size is worth. frozen_P: where the layout has frozen tensors.

        InputError for what is not possible here.
        """
        _check(dtype, threads)
        self.shape, self.slots, halves = layout.shape, slots, dtype == "bf16"
        matrices, strip_bytes = rules.strips_of(self.shape, halves)
        self.threads = threads or min(len(usable_cores()), max(1, round(strip_bytes / BYTES_A_THREAD)))
        self.most_rows, self.most_wanted = rules.MOST_ROWS, rules.most_wanted(self.shape)
        passes = rules.program(layout, halves, self.threads)
        _, slot_floats = rules.cache_places(self.shape)
        logits = self.most_wanted * self.shape.vocab_size
        _check_memory(slots, 4 * slot_floats, strip_bytes + passes.arena_bytes + 4 * logits)

        self._params_P, self._frozen_P = params_P, frozen_P
        self._strips = new_arena(-(-strip_bytes // 4))
        self._pack(layout, matrices.values(), halves)
        self._cache, self._arena = new_arena(slots * slot_floats), new_arena(passes.arena_floats)
        self.logits = new_arena(logits).reshape(self.most_wanted, self.shape.vocab_size)
        self._ids = np.zeros(self.most_rows, np.int32)
        self._pieces = np.zeros((self.most_rows, W.PIECE_WORDS), np.int64)
        self._wanted = np.zeros(self.most_rows, np.int64)
        self._records, self._team = passes.records(), team.new_words()
        self._registers = np.zeros((self.threads, R.REGISTERS), np.int64)  # a row for each member
        values: dict[int, int | np.ndarray] = {
            R.PARAMS: _at(params_P), R.FROZEN: 0 if frozen_P is None else _at(frozen_P), R.PACKED: _at(self._strips),
            R.ARENA: _at(self._arena), R.PROGRAM: _at(self._records), R.CALLS: len(self._records),
            W.IDS: _at(self._ids), W.PIECES: _at(self._pieces), W.WANTED: _at(self._wanted),
            W.LOGITS: _at(self.logits), W.CACHE: _at(self._cache), W.TEAM: _at(self._team), W.MEMBERS: self.threads,
            W.MEMBER: np.arange(self.threads),
        }  # fmt: skip
        for register, value in values.items():
            self._registers[:, register] = value
        self._address = _at(self._registers)
        self._num_rows, self._num_pieces, self._num_wanted = (
            self._registers[:, register] for register in (W.ROWS, W.NUM_PIECES, W.NUM_WANTED)
        )
        self._helpers = [
            threading.Thread(target=team.help_passes.call, args=(_at(registers),), daemon=True)
            for registers in self._registers[1:]
        ]
        for helper in self._helpers:
            helper.start()
        kept = self._registers, self._records, self._team
        self.close = weakref.finalize(self, _end, self._helpers, self._team, kept)

    def _pack(self, layout: Layout, matrices: Iterable[rules.Strips], halves: bool) -> None:
        """The matrices in strips, by all threads."""
        views, jobs = layout.views(self._params_P), []
        if self._frozen_P is not None:
            views |= layout.frozen_views(self._frozen_P)
        for m in matrices:
            strips = -(-m.outputs // TILE_COLUMNS)
            for first in range(0, strips, PACKED_AT_ONCE):
                jobs.append(
                    (_at(views[m.name]), m.inputs, m.outputs, int(m.transposed), int(halves),
                     _at(self._strips) + m.place, first, min(first + PACKED_AT_ONCE, strips))
                )  # fmt: skip

        def pack(job: tuple[int, ...]) -> None:
            scratch = np.empty(TILE_COLUMNS * (job[1] + ALIGN) if halves else 0, np.float32)
            pack_strips.call(*job, _at(scratch))

        if self.threads == 1:
            for job in jobs:
                pack(job)
        else:
            with ThreadPoolExecutor(self.threads) as pool:
                list(pool.map(pack, jobs))

    def run(self, pieces: Sequence[Rows]) -> np.ndarray:
        """Logits of all wanted rows, float32 [W, V], in the order of the pieces: a view, until the next call.

        At most `most_rows` rows and `most_wanted` wanted ones; positions below the block size; one piece of a slot,
        as the members of a team compute pieces at the same time.
        """
        assert len({piece.slot for piece in pieces}) == len(pieces), "two pieces of one slot"
        row = wanted = 0
        for number, piece in enumerate(pieces):
            count = len(piece.ids)
            self._ids[row : row + count] = piece.ids
            self._pieces[number, W.P_SLOT] = piece.slot
            self._pieces[number, W.P_ROW] = row
            self._pieces[number, W.P_ROWS] = count
            self._pieces[number, W.P_POSITION] = piece.position
            row += count
            for i in range(piece.wanted):
                self._wanted[wanted + i] = row - piece.wanted + i
            wanted += piece.wanted
        assert row <= self.most_rows and wanted <= self.most_wanted, f"{row} rows, {wanted} of them wanted"
        self._num_rows.fill(row)
        self._num_pieces.fill(len(pieces))
        self._num_wanted.fill(wanted)
        team.run_pass.call(self._address)
        return self.logits[:wanted]

    def copy(self, source: int, target: int) -> None:
        """Give a slot the keys and values of another."""
        cache = self._cache.reshape(self.slots, -1)
        cache[target] = cache[source]


def _check(dtype: str, threads: int | None) -> None:
    """InputError for an unknown dtype and a number of threads that cannot be."""
    if dtype not in DTYPES:
        raise InputError(f"--dtype {shown(dtype)} is not possible for writing: {nearest(str(dtype), DTYPES)}")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise InputError(f"--threads {threads} must be 1 to {MOST_THREADS}; leave it out for what is worth it.")


def _check_memory(slots: int, slot_bytes: int, other_bytes: int) -> None:
    """InputError for more memory than there is: a slot for each text at once, and what is there once."""
    needed, available = slots * slot_bytes + other_bytes, available_memory()
    if needed > available:
        raise InputError(
            f"Not enough memory: writing {plural(slots, 'text')} at once needs {size(needed)}, {size(available)} are"
            f" available (the keys and values of each take {size(slot_bytes)}). Try fewer at once, or --dtype bf16."
        )


def _end(helpers: list[threading.Thread], words: np.ndarray, kept: tuple[np.ndarray, ...]) -> None:
    """Let the helpers leave; what they read is kept until they have."""
    if helpers:
        team.stop_helpers.call(_at(words))
        for helper in helpers:
            helper.join()


def _at(array: np.ndarray) -> int:
    return int(array.ctypes.data)

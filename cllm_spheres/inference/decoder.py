"""A model's weights -> a decoder: rows of tokens at positions of texts in, logits out, with a cache of keys and values.

M rows, V vocabulary, P parameters, W wanted rows.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cllm_spheres.errors import InputError, nearest, shown
from cllm_spheres.inference import passes as P
from cllm_spheres.inference import team
from cllm_spheres.kernels.sizes import ALIGN, TILE_COLUMNS
from cllm_spheres.kernels.strips import bundle_floats, pack_strips, strip_bytes
from cllm_spheres.machine import available_memory, usable_cores
from cllm_spheres.model.layout import LAYER_TENSORS, Layout
from cllm_spheres.model.workspace import new_arena
from cllm_spheres.units import plural, size

ROWS = 256  # of a pass, at most
LOGITS_FLOATS = 1 << 23  # of a pass, at most: 32 MB
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

    def __init__(self, layout: Layout, params_P: np.ndarray, *, slots: int, dtype: str, threads: int | None) -> None:
        """threads: None takes as many as the size is worth. InputError for what is not possible here."""
        s = layout.shape
        check(layout, slots, dtype, threads)
        self.shape, self.slots = s, slots
        self._params_P, halves = params_P, dtype == "bf16"
        places, total = _places(layout, halves)
        self._strips = new_arena(-(-total // 4))
        self.threads = threads or min(len(usable_cores()), max(1, round(total / BYTES_A_THREAD)))
        self.most_rows = ROWS
        self.most_wanted = max(1, min(ROWS, LOGITS_FLOATS // s.vocab_size))
        self._pack(layout, params_P, places, halves)

        d = s.width // s.heads
        self._cache = new_arena(slots * P.slot_floats(layout))
        c, f, scores = s.width, s.ff_width, -(-s.block_size // TILE_COLUMNS) * TILE_COLUMNS + -(-d // ALIGN) * ALIGN
        buffers: dict[str, int] = dict(
            x=ROWS * c, mid=ROWS * c, normed=ROWS * c, qkv=ROWS * 3 * c, up=ROWS * f, narrow=bundle_floats(ROWS, c),
            wide=bundle_floats(ROWS, f), scores=self.threads * scores, stats=2 * ROWS,
            logits=self.most_wanted * s.vocab_size,
        )  # fmt: skip
        self._buffers = {name: new_arena(size) for name, size in buffers.items()}
        self.logits = self._buffers["logits"].reshape(self.most_wanted, s.vocab_size)
        self._ids = np.zeros(ROWS, np.int32)
        self._pieces = np.zeros((ROWS, P.PIECE_WORDS), np.int64)
        self._wanted = np.zeros(ROWS, np.int64)
        self._team = team.new_words()
        fields = dict(
            vocab_size=s.vocab_size, block_size=s.block_size, layers=s.layers, heads=s.heads, width=c, ff_width=f,
            halves=int(halves), members=self.threads, params=_at(params_P), strips=_at(self._strips),
            cache=_at(self._cache), team=_at(self._team), slot_floats=P.slot_floats(layout),
            key_floats=P.key_floats(s.block_size, d), score_floats=scores, wte=layout.offset_of("wte.weight"),
            wpe=layout.offset_of("wpe.weight"), lnf_gain=layout.offset_of("ln_f.weight"),
            lnf_bias=layout.offset_of("ln_f.bias"), head=places["wte.weight"], rows=0, ids=_at(self._ids),
            pieces=_at(self._pieces), num_pieces=0, wanted=_at(self._wanted), num_wanted=0,
        ) | {name: _at(buffer) for name, buffer in self._buffers.items()}  # fmt: skip
        names = [f"h.{i}.{name}" for i in range(s.layers) for name in LAYER_TENSORS]
        offsets = [places.get(name, layout.offset_of(name)) for name in names]
        self._card = np.array([fields[name] for name in P.FIELDS] + offsets, np.int64)
        self._address = _at(self._card)
        self._helpers = [
            threading.Thread(target=P.help_passes.call, args=(self._address, member), daemon=True)
            for member in range(1, self.threads)
        ]
        for helper in self._helpers:
            helper.start()
        self.close = weakref.finalize(self, _end, self._helpers, self._card, self._team)

    def _pack(self, layout: Layout, params_P: np.ndarray, places: dict[str, int], halves: bool) -> None:
        """The matrices in strips, by all threads."""
        views, jobs = layout.views(params_P), []
        for name, place in places.items():
            transposed = name == "wte.weight"
            inputs, outputs = views[name].shape[:: -1 if transposed else 1]
            strips = -(-outputs // TILE_COLUMNS)
            for first in range(0, strips, PACKED_AT_ONCE):
                last = min(first + PACKED_AT_ONCE, strips)
                jobs.append((_at(views[name]), inputs, outputs, int(transposed), int(halves), _at(self._strips) + place,
                             first, last))  # fmt: skip

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

        At most `most_rows` rows and `most_wanted` wanted ones; positions below the block size. Pieces of one slot
        must follow each other.
        """
        row = wanted = 0
        for number, piece in enumerate(pieces):
            count = len(piece.ids)
            self._ids[row : row + count] = piece.ids
            self._pieces[number] = piece.slot, row, count, piece.position
            row += count
            for i in range(piece.wanted):
                self._wanted[wanted + i] = row - piece.wanted + i
            wanted += piece.wanted
        self._card[P.ROWS], self._card[P.NUM_PIECES], self._card[P.NUM_WANTED] = row, len(pieces), wanted
        P.run_pass.call(self._address)
        return self.logits[:wanted]

    def copy(self, source: int, target: int) -> None:
        """Give a slot the keys and values of another."""
        cache = self._cache.reshape(self.slots, -1)
        cache[target] = cache[source]


def check(layout: Layout, slots: int, dtype: str, threads: int | None) -> None:
    """InputError for an unknown dtype, a number of threads that cannot be, and more memory than there is."""
    if dtype not in DTYPES:
        raise InputError(f"--dtype {shown(dtype)} is not possible for writing: {nearest(str(dtype), DTYPES)}")
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise InputError(f"--threads {threads} must be 1 to {MOST_THREADS}; leave it out for what is worth it.")
    needed, available = memory_bytes(layout, slots, dtype), available_memory()
    if needed > available:
        one = 4 * P.slot_floats(layout)
        raise InputError(
            f"Not enough memory: writing {plural(slots, 'text')} at once needs {size(needed)}, {size(available)} are"
            f" available (the keys and values of each take {size(one)}). Try fewer at once, or --dtype bf16."
        )


def memory_bytes(layout: Layout, slots: int, dtype: str) -> int:
    """What a decoder takes, about."""
    s = layout.shape
    rows = ROWS * (4 * s.width + 3 * s.width + 2 * s.ff_width) + min(LOGITS_FLOATS, ROWS * s.vocab_size)
    return _places(layout, dtype == "bf16")[1] + 4 * (slots * P.slot_floats(layout) + rows)


def _end(helpers: list[threading.Thread], card: np.ndarray, words: np.ndarray) -> None:
    """Let the helpers leave; card and words live until they have."""
    if helpers:
        P.stop_helpers.call(_at(card))
        for helper in helpers:
            helper.join()


def _places(layout: Layout, halves: bool) -> tuple[dict[str, int], int]:
    """Where the strips of each matrix begin, in bytes, and the bytes of all. The embedding is the output matrix too."""
    places, total = {}, 0
    for tensor in layout.tensors:
        if len(tensor.shape) == 2 and tensor.name != "wpe.weight":
            inputs, outputs = tensor.shape[:: -1 if tensor.name == "wte.weight" else 1]
            places[tensor.name] = total
            total += strip_bytes(inputs, outputs, halves)
    return places, total


def _at(array: np.ndarray) -> int:
    return array.ctypes.data

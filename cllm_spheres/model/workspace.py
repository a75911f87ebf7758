"""A program and the memory of one process -> registers that the runner takes, and a model that is run by hand.

The workers fill registers themselves, in shared memory; `Workspace` is for whoever computes alone: the library, the
doctor, benchmarks and tests.
"""

from __future__ import annotations

import numpy as np

from cllm_spheres.kernels.sizes import PROGRESS_WORDS
from cllm_spheres.model import dtypes
from cllm_spheres.model import record as R
from cllm_spheres.model.arena import new_arena
from cllm_spheres.model.families import described
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.program import Program, program, state_streams


class Registers:
    """A program's records and registers. `words` is int64[REGISTERS], `numbers` the same as float64."""

    def __init__(self, of: Program, arena: np.ndarray) -> None:
        self._records, self._arena = of.records(), arena
        self.words = np.zeros(R.REGISTERS, np.int64)
        self.numbers = self.words.view(np.float64)
        self.words[R.PROGRAM], self.words[R.CALLS] = self._records.ctypes.data, len(self._records)
        self.words[R.AT_A_TIME], self.words[R.PADDING] = of.sequences, of.rules.PADDING
        self.words[R.RATE], self.words[R.ARENA] = of.rate, arena.ctypes.data

    @property
    def address(self) -> int:
        return int(self.words.ctypes.data)


class Workspace:
    """A model on flat parameters, with an arena for `purpose`: "train", "evaluate", "logits" or "states".

    Weights are packed by `pack`, where the dtype reads packed ones. For one thread at a time.
    """

    def __init__(
        self, layout: Layout, params_P: np.ndarray, dtype: str = "fp32", *, purpose: str = "train",
        largest_shard: int = 1 << 30, dropout: float = 0.0, recompute: str = "none",
        frozen_P: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.program = program(
            layout, dtype, largest_shard=largest_shard, dropout=dropout, recompute=recompute, purpose=purpose
        )
        self.arena = new_arena(self.program.arena_floats)
        self.registers = Registers(self.program, self.arena)
        self.progress = np.zeros(PROGRESS_WORDS, np.int64)
        self.packing = dtypes.packing(layout, dtype)
        self.packed = new_arena(-(-self.packing.size_bytes // 4))
        self._keep = params_P, frozen_P
        words = self.registers.words
        words[R.PARAMS], words[R.FROZEN] = params_P.ctypes.data, 0 if frozen_P is None else frozen_P.ctypes.data
        words[R.PACKED], words[R.PROGRESS] = self.packed.ctypes.data, self.progress.ctypes.data

    def pack(self) -> None:
        """The weights as they are now, in the form in which the dtype's products read them."""
        words, packing = self.registers.words, self.packing
        if (entry := packing.entry) is not None:
            for unit in range(packing.units + packing.frozen_units):
                entry.call(packing.address, int(words[R.PARAMS]), int(words[R.FROZEN]), int(words[R.PACKED]), unit)

    def shard(
        self, inputs_BT: np.ndarray, targets_BT: np.ndarray, segment_P: np.ndarray, scale: float, *, key: int = 0,
        first_sequence: int = 0, soft: int = 0,
    ) -> tuple[float, float]:  # fmt: skip
        """The gradient of int32 [B, T] into the segment; (summed cross-entropy, what soft targets add to it)."""
        from cllm_spheres.model.run import compute_shard

        words, numbers = self.registers.words, self.registers.numbers
        words[R.INPUTS], words[R.TARGETS] = inputs_BT.ctypes.data, targets_BT.ctypes.data
        words[R.COUNT], words[R.LENGTH] = inputs_BT.shape
        words[R.SEGMENT], words[R.KEY], words[R.FIRST_SEQUENCE] = segment_P.ctypes.data, key, first_sequence
        words[R.SOFT], numbers[R.SCALE] = soft, scale
        compute_shard.call(self.registers.address)
        return float(numbers[R.LOSS]), float(numbers[R.EXCESS])

    def window(self, inputs_T: np.ndarray, targets_T: np.ndarray, first_row: int = 0) -> tuple[float, int]:
        """(summed loss, right predictions) of the rows from `first_row` on; by a workspace that evaluates."""
        self.registers.words[R.TARGETS] = targets_T.ctypes.data
        self._once(inputs_T, first_row)
        return float(self.registers.numbers[R.LOSS]), int(self.registers.words[R.CORRECT])

    def logits(self, inputs_T: np.ndarray, first_row: int = 0) -> np.ndarray:
        """float32 [T - first_row, V]; by a workspace for logits."""
        rows = len(inputs_T) - first_row
        logits = np.empty((rows, self.program.layout.shape.vocab_size), np.float32)
        self.registers.words[R.OUTPUT] = logits.ctypes.data
        self._once(inputs_T, first_row)
        return logits

    def states(self, inputs_T: np.ndarray) -> np.ndarray:
        """float32 [S, T, C] of the S streams that `state_streams` names; by a workspace for states."""
        self._once(inputs_T, 0)
        found = []
        for stream in state_streams(described(self.program.layout.shape).steps):
            place = self.program.places[self.program.streams[stream]] // 4
            found.append(self.arena[place : place + len(inputs_T) * stream.width].reshape(-1, stream.width))
        return np.stack(found)

    def _once(self, inputs_T: np.ndarray, first_row: int) -> None:
        from cllm_spheres.model.run import run_once

        words = self.registers.words
        words[R.INPUTS], words[R.LENGTH], words[R.FIRST_ROW] = inputs_T.ctypes.data, len(inputs_T), first_row
        run_once.call(self.registers.address)

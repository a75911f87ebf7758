"""The faults of a run in shared memory, as Node Zero sees them; firing.py is the workers' side."""

from __future__ import annotations

from cllm_spheres import faults
from cllm_spheres.faults import Fault
from cllm_spheres.kernels.progress import act
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.memory import SharedMemory


class FaultTable:
    """What shall happen, and what has happened already."""

    def __init__(self, memory: SharedMemory, wanted: list[tuple[str, int, int, str]]) -> None:
        """wanted: the fields of a faults.Fault each."""
        self._faults = [Fault(*fields) for fields in wanted]
        self._words = memory.fault_words()[: len(wanted)]

    def lay_down(self) -> None:
        """Write them where the workers look; before these start."""
        for words, fault in zip(self._words, self._faults, strict=True):
            words[: M.F_FIRED] = fault.words

    def fire_save(self, step: int) -> None:
        """What is due while the checkpoint of this step is saved: by Node Zero, to itself."""
        for words in self._words:
            if words[M.F_PHASE] == faults.SAVE and words[M.F_STEP] == step and not words[M.F_FIRED]:
                words[M.F_FIRED] = 1
                act(int(words[M.F_ACTION]))

    @property
    def left(self) -> list[str]:
        """Those that have not happened."""
        fired = self._words[:, M.F_FIRED]
        return [str(fault) for fault, done in zip(self._faults, fired, strict=True) if not done]

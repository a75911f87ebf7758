"""Where a dtype keeps its weights in the form that its products read, and who fills that.

It is filled in units of work, each a pure function of the parameters: who packs a unit does not matter, and packing it
again changes nothing. Units of matrices that are trained come first and are packed at every step; those of frozen ones
are packed once a run.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field

import numpy as np

from cllm_spheres.crystal.jit import Entry


@dataclass(frozen=True)
class Packing:
    """`table` tells the entry what to do; without units there is nothing to pack."""

    size_bytes: int = 0
    units: int = 0  # of matrices that are trained
    frozen_units: int = 0
    table: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    places: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of a matrix: where its forms begin, in bytes
    module: str = ""  # that has `pack_unit`

    @property
    def address(self) -> int:
        """Of the table, which is to be kept as long as it is used."""
        return int(self.table.ctypes.data)

    @property
    def entry(self) -> Entry | None:
        """pack_unit(table, params, frozen, packed, unit), all int64; compiled on a machine's first use."""
        return importlib.import_module(self.module).pack_unit if self.module else None

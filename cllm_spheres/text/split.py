"""The index of all documents -> the training and the validation part, pinned by the text itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from cllm_spheres.text.spool import Part, SpoolReader

MIN_DOCUMENTS = 20  # with fewer, the last part of the text is for validation


def split_documents(rows: npt.NDArray[np.void], val_fraction: float, work: Path) -> tuple[Part, Part, str]:
    """Training part, validation part, and "document" or "position": how the text was split.

    By document: those whose hash falls below the fraction, so that a document stays in its part when others
    come and go. By position: at white space near the wanted byte. The training part is never empty.
    """
    total = int(rows["size"].sum(dtype=np.int64))
    if len(rows) < MIN_DOCUMENTS:
        border = _border(Part(rows, 0, total), val_fraction, work)
        return Part(rows, 0, border), Part(rows, border, total), "position"
    in_val = rows["hash"] / 2.0**64 < val_fraction
    if val_fraction > 0 and not in_val.any():
        in_val[np.argmin(rows["hash"])] = True
    if in_val.all():
        in_val[np.argmax(rows["hash"])] = False
    parts = []
    for mask in (~in_val, in_val):
        chosen = rows[mask]
        parts.append(Part(chosen, 0, int(chosen["size"].sum(dtype=np.int64))))
    return parts[0], parts[1], "document"


def _border(text: Part, val_fraction: float, work: Path) -> int:
    num_val = round(text.high * val_fraction)
    nominal = text.high - num_val
    if num_val == 0:
        return text.high
    reader = SpoolReader(work, text)
    d = int(np.searchsorted(reader.starts, nominal, "right")) - 1
    start = int(reader.starts[d])
    border = start + (reader.cut(d, nominal - start, num_val // 8) if nominal > start else 0)
    reader.close()
    return border if border > 0 else text.high

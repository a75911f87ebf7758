"""The index of all documents -> the training and the validation part, decided by the text itself.

The validation part gets the share of the bytes that was asked for, as near as whole documents come to it:

- A document of more than a twentieth of the text is cut, and its last part is for validation. So one long document
  can neither be most of the validation part nor be missing from it.
- The others are dealt whole, those with the lowest hashes for validation. Where that misses the share by more than a
  twentieth of it, the document at the border is cut as well.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cllm_spheres.text.spool import CUT_WINDOW, Part, SpoolReader

LARGE = 1 / 20  # of all bytes: a longer document is cut
LEAST_BYTES = 1000  # a large document is cut only where its piece for validation has as many: some sentences
TOLERANCE = 1 / 20  # of the validation part: by so much it may differ for the sake of whole documents, lines, sentences
WORD_BYTES = 64  # so far a cut moves back to the blank before a word, where no line and no sentence ends
_SENTENCE_END = re.compile(rb"""[.!?]["')\]]*[ \t]|\xe3\x80\x82|\xef\xbc\x81|\xef\xbc\x9f""")  # also 。！？


def split_documents(rows: npt.NDArray[np.void], val_fraction: float, work: Path) -> tuple[Part, Part]:
    """The training and the validation part of the spooled documents `rows`.

    A document that is cut has a row in both. The training part is never empty.
    """
    sizes = rows["size"].astype(np.int64)
    val_sizes = np.zeros(len(rows), np.int64)  # how many bytes of each document are for validation: its last ones
    if val_fraction > 0:
        reader = SpoolReader(work, Part(rows))
        _choose(rows["hash"], sizes, val_fraction, reader, val_sizes)
        reader.close()
    if (val_sizes == sizes).all():
        val_sizes[np.argmax(rows["hash"])] = 0
    train, val = rows.copy(), rows.copy()
    train["size"] = sizes - val_sizes
    val["offset"] += (sizes - val_sizes).astype(np.uint64)
    val["size"] = val_sizes
    return Part(train[train["size"] > 0]), Part(val[val["size"] > 0])


def _choose(
    hashes: npt.NDArray[np.uint64], sizes: npt.NDArray[np.int64], val_fraction: float, reader: SpoolReader,
    val_sizes: npt.NDArray[np.int64],
) -> None:  # fmt: skip
    """val_sizes = the bytes of each document that are for validation."""
    total = int(sizes.sum())
    wanted = val_fraction * total
    slack = TOLERANCE * wanted
    is_large = (sizes > LARGE * total) & (val_fraction * sizes >= LEAST_BYTES)
    seen = 0
    for d in np.flatnonzero(is_large).tolist():
        seen += int(sizes[d])
        val_sizes[d] = _tail(reader, d, val_fraction * seen - int(val_sizes.sum()), slack)  # makes up for cuts before
    wanted -= int(val_sizes.sum())
    others = np.flatnonzero(~is_large)
    others = others[np.argsort(hashes[others], kind="stable")]
    ends = np.concatenate([[0], np.cumsum(sizes[others])])  # bytes of the first 0, 1, 2, ... of them
    # A border that the hash alone decides keeps documents in their part when others come and go.
    count = int(np.searchsorted(hashes[others] / 2.0**64, val_fraction))
    if abs(ends[count] - wanted) > slack:
        count = int(np.argmin(np.abs(ends - wanted)))
    cut = 0
    if abs(ends[count] - wanted) > slack:
        count = max(0, int(np.searchsorted(ends, wanted, "right")) - 1)
        if count < len(others):
            cut = _tail(reader, int(others[count]), wanted - ends[count], slack)
            val_sizes[others[count]] = cut
    chosen = others[:count]
    val_sizes[chosen] = sizes[chosen]


def _tail(reader: SpoolReader, d: int, wanted: float, slack: float) -> int:
    """About the `wanted` last bytes of document d (at least one character), more by at most `slack` where possible.

    The cut is at the end of a line, else of a sentence, else before a word, else between two characters.
    """
    size = int(reader.part.rows[d]["size"])
    if wanted <= 0:
        return 0
    nominal = size - max(1, round(wanted))
    if nominal <= 0:
        return size
    window = min(CUT_WINDOW, nominal, max(int(slack), WORD_BYTES))
    low = nominal - window
    text = reader.read(d, low, nominal + 1)
    before, first_line = text[:-1], max(0, window - int(slack))
    if (newline := before.rfind(b"\n", first_line)) >= 0:
        return size - (low + newline + 1)
    if sentences := list(_SENTENCE_END.finditer(before, first_line)):
        return size - (low + sentences[-1].end())
    first_word = max(0, window - WORD_BYTES)
    if (blank := max(before.rfind(b" ", first_word), before.rfind(b"\t", first_word))) >= 0:
        return size - (low + blank)
    while nominal > 0 and text[nominal - low] & 0xC0 == 0x80:
        nominal -= 1
    return size - nominal

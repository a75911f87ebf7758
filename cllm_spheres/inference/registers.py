"""The registers of those who write text, one int64 each: every member of a team has registers of its own.

Those up to CALLS are the registers of every program (model/record.py). A pass is given in pieces: consecutive tokens of
one text. A piece is PIECE_WORDS of int64: the slot of the text in the cache, the piece's first row in the pass, how
many rows it has, and the position of the first one in the text.
"""

from __future__ import annotations

from cllm_spheres.model.record import CALLS

(
    IDS,  # the address of int32 [ROWS], and how many rows the pass has
    ROWS,
    PIECES,  # the address of int64 [NUM_PIECES, PIECE_WORDS]
    NUM_PIECES,
    WANTED,  # the address of int64 [NUM_WANTED]: the rows whose logits are wanted
    NUM_WANTED,
    LOGITS,  # the address of float32 [NUM_WANTED, V]
    CACHE,  # the address of the keys and values of all slots
    TEAM,  # the address of the words of a team (team.py), how many members it has, and the number of this one
    MEMBERS,
    MEMBER,
) = range(CALLS + 1, CALLS + 12)

PIECE_WORDS = 4
P_SLOT, P_ROW, P_ROWS, P_POSITION = range(PIECE_WORDS)

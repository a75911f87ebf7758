"""Sizes that the layout of memory and the bfloat16 kernels share."""

from __future__ import annotations

from cllm_spheres.crystal.cpu import bf16_backend

SWEEP = 256  # columns of a product that are finished together: 32 rows of them, 32 KB, stay in L1
CHUNK = 1024  # columns of the vocabulary that the head looks at together
# Logits that are kept between the head's two passes, at most: 32 MB. AMX computes them again in half the time that it
# takes to write and to read them; AVX-512 takes five times as long for it.
KEPT_LOGITS = 0 if bf16_backend() == "amx" else 1 << 23
# How a packing's table (model/packed.py) tells of a matrix, behind the number of matrices: which buffer its parameters
# lie in (0 trained, 1 frozen) and where (floats), its sizes, the sizes of the groups its rows and columns come in
# (heads; otherwise all of them), where its two forms lie (bytes), and the number of its first unit.
M_FROZEN, M_PARAMS, M_ROWS, M_COLUMNS, M_ROW_GROUP, M_COLUMN_GROUP, M_PAIRS, M_FLIPPED, M_FIRST_UNIT = range(9)
MATRIX_WORDS = 9
GROUPS_A_UNIT = 16  # groups of 32 columns that a unit has at most: units of about one size


def padded(n: int) -> int:
    """n raised to a multiple of 32."""
    return -(-n // 32) * 32


def padded_groups(size: int, group: int) -> int:
    """A size that comes in groups, each padded to a multiple of 32."""
    return size // group * padded(group)


def kept_logits(rows: int, vocabulary: int) -> int:
    """Floats of room for all logits of some rows; 0 where they are rather computed again."""
    floats = rows * padded(vocabulary)
    return floats if floats <= KEPT_LOGITS else 0


def attention_bytes(t: int, e: int) -> int:
    """Bytes of scratch for the attention of sequences of t tokens and heads of e columns, both padded."""
    scores, lines, squares, strips, result = 32 * t * 4, 32 * t * 2, t * t * 2, t * e * 2, 32 * e * 4
    return 2 * (scores + lines + squares) + 5 * strips + result + 256

"""Sizes that the layout of memory and the bfloat16 kernels share."""

from __future__ import annotations

from cllm_spheres.crystal.cpu import bf16_backend

SWEEP = 256  # columns of a product that are finished together: 32 rows of them, 32 KB, stay in L1
CHUNK = 1024  # columns of the vocabulary that the head looks at together
# Logits that are kept between the head's two passes, at most: 32 MB. AMX computes them again in half the time that it
# takes to write and to read them; AVX-512 takes five times as long for it.
KEPT_LOGITS = 0 if bf16_backend() == "amx" else 1 << 23


def padded(n: int) -> int:
    """n raised to a multiple of 32."""
    return -(-n // 32) * 32


def kept_logits(rows: int, vocabulary: int) -> int:
    """Floats of room for all logits of some rows; 0 where they are rather computed again."""
    floats = rows * padded(vocabulary)
    return floats if floats <= KEPT_LOGITS else 0


def attention_bytes(t: int, e: int) -> int:
    """Bytes of scratch for the attention of sequences of t tokens and heads of e columns, both padded."""
    scores, lines, squares, strips, result = 32 * t * 4, 32 * t * 2, t * t * 2, t * e * 2, 32 * e * 4
    return 2 * (scores + lines + squares) + 5 * strips + result + 256

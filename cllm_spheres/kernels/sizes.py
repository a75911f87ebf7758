"""Sizes that the layout of memory and the kernels share."""

BLOCK = 4096  # parameters: the unit of gather, norm and update; a constant trip count without a tail
ALIGN = 16  # floats: a cache line
SLOT_FLOATS = 3 * BLOCK  # a redo slot: one block of parameters, moments and squares
QUERY_BLOCK = 64  # queries that attention looks at together


def attention_floats(length: int) -> int:
    """Floats of scratch for the attention of `length` tokens: scores and their gradients of one block of queries."""
    return 2 * QUERY_BLOCK * length

"""Sizes that the layout of memory and the kernels share."""

BLOCK = 4096  # parameters: the unit of gather, norm and update; a constant trip count without a tail
ALIGN = 16  # floats: a cache line
SLOT_FLOATS = 3 * BLOCK  # a redo slot: one block of parameters, moments and squares

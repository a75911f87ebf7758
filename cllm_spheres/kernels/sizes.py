"""Sizes that the layout of memory and the kernels share."""

BLOCK = 4096  # parameters: the unit of gather, norm and update; a constant trip count without a tail
ALIGN = 16  # floats: a cache line
SLOT_FLOATS = 3 * BLOCK  # a redo slot: one block of parameters, moments and squares
QUERY_BLOCK = 64  # queries that attention looks at together
# From this many spheres on the sum of the segments has a buffer. Milliseconds of gather and update with a buffer, and
# adding again instead, measured with 40 M parameters on one core: 1 sphere 87, 79; 2: 100, 100; 3: 107, 118.
KEPT_FROM = 3

HEADER_WORDS = 4  # of a trace, before its marks
PROGRESS_WORDS = 5  # of a shard's progress (progress.py)
STRIP = 16  # floats that a packed row of up to 14 elements takes: a cache line
TILE_ROWS, TILE_COLUMNS = 14, 32
STRETCH = 320  # of k, packed at a time: a strip of B is 40 KB
STRIPS = 48  # of A, packed at a time: 1 MB


def product_floats(largest_m: int) -> int:
    """Floats of scratch for float32 matrix products of at most `largest_m` rows."""
    return STRETCH * (STRIP * min(STRIPS, -(-largest_m // TILE_ROWS)) + TILE_COLUMNS)


def attention_floats(length: int) -> int:
    """Floats of scratch for the attention of `length` tokens: a block of queries' scores, and products."""
    return 2 * QUERY_BLOCK * length + product_floats(max(length, QUERY_BLOCK))


def keeps_sum(num_spheres: int) -> bool:
    """Whether the gathered gradient has a buffer of its own: a function of the number of spheres alone."""
    return num_spheres >= KEPT_FROM

"""Rows of float32 on their way into tiles, several operations in one pass. All sizes are groups of 32 channels.

`line` is where a row's first group goes in a rows form; the next group follows TILE bytes on.
"""

from __future__ import annotations

from numba import types

from cllm_spheres.crystal import lanes as L
from cllm_spheres.crystal.functions.exponential import exp
from cllm_spheres.crystal.lanes import each, load, spread, store, total, vectorised
from cllm_spheres.kernels.bf16.tiles import LINE, TILE, load_line, rounded, store_line
from cllm_spheres.kernels.gelu import gelu_lanes, gelu_slope_lanes

_i8, _f4 = types.int64, types.float32
_LOWEST = -1e30  # a masked score: its exponential is 0


def _halves(b, loop):
    """Byte offsets of a group's two halves in a row of float32."""
    at = b.mul(loop.index, L.constant(128))
    return at, b.add(at, L.constant(64))


def _tile(b, loop):
    return b.mul(loop.index, L.constant(TILE))


def _lines(b):
    """The 16 lines of a tile."""
    return each(b, L.constant(16))


def _row_halves(b, loop, step):
    """Byte offsets of the two halves of a tile's row in float32 rows `step` bytes apart."""
    at = b.mul(loop.index, step)
    return at, b.add(at, L.constant(64))


def _line(b, loop):
    return b.mul(loop.index, L.constant(LINE))


@vectorised(_i8, _i8, _i8)
def round_tile(b, source, step, tile):
    """A tile from 16 float32 rows of 32, `step` bytes apart.

    Tiles are written whole, line after line, rather than row after row through many of them: so the CPU sees what
    comes next and fetches it.
    """
    with _lines(b) as loop:
        store_line(b, [load(b, source, at) for at in _row_halves(b, loop, step)], tile, _line(b, loop))


@vectorised(_i8, _i8, _i8, _i8)
def gelu_tiles(b, source, step, before, after):
    """before = the rows, after = the GELU of before, both tiles: so `gelu_tile` can compute it again from before."""
    with _lines(b) as loop:
        x = [load(b, source, at) for at in _row_halves(b, loop, step)]
        store_line(b, x, before, _line(b, loop))
        store_line(b, [gelu_lanes(y) for y in rounded(b, x)], after, _line(b, loop))


@vectorised(_i8, _i8)
def gelu_tile(b, before, after):
    """after = GELU of before, both tiles."""
    with _lines(b) as loop:
        x = load_line(b, before, _line(b, loop))
        store_line(b, [gelu_lanes(y) for y in x], after, _line(b, loop))


@vectorised(_i8, _i8, _i8, _i8, _i8)
def gelu_backward_tile(b, source, step, before, tile, sums):
    """tile = the rows * gelu'(before); what is written is added to 32 float32 at `sums`."""
    totals = [L.variable(b, load(b, sums, 64 * half)) for half in range(2)]
    with _lines(b) as loop:
        x = load_line(b, before, _line(b, loop))
        gradients = [load(b, source, at) for at in _row_halves(b, loop, step)]
        results = [g * gelu_slope_lanes(y) for g, y in zip(gradients, x, strict=True)]
        store_line(b, results, tile, _line(b, loop))
        for result, place in zip(results, totals, strict=True):
            b.store((L.Lanes(b, b.load(place)) + result).value, place)
    for half, place in enumerate(totals):
        store(L.Lanes(b, b.load(place)), sums, 64 * half)


def _masked(b, x, loop, last, seen):
    """Scores of a group; in the last one those from `seen` on are as good as minus infinity."""
    is_last = b.icmp_signed("==", loop.index, last)
    count = b.select(is_last, seen, L.constant(32))
    return [y.where(L.first_lanes(b, count, 16 * half), _LOWEST) for half, y in enumerate(x)]


@vectorised(_i8, _i8, _i8, _i8, _f4, _i8)
def softmax_row(b, row, line, groups, seen, scale, stats):
    """line = exp((row - largest) * scale), undivided; 0 from `seen` on in the last group.

    stats: address of two float32: the largest score times scale, and the sum.
    """
    last, wide = b.sub(groups, L.constant(1)), spread(b, scale)
    best = L.variable(b, spread(b, _LOWEST))
    with each(b, groups) as loop:
        for x in _masked(b, [load(b, row, at) for at in _halves(b, loop)], loop, last, seen):
            b.store(x.larger(L.Lanes(b, b.load(best))).value, best)
    top = spread(b, L.largest(L.Lanes(b, b.load(best)))) * wide
    sums = L.variable(b, spread(b, 0.0))
    with each(b, groups) as loop:
        x = _masked(b, [load(b, row, at) for at in _halves(b, loop)], loop, last, seen)
        e = [exp(y * wide - top) for y in x]
        store_line(b, e, line, _tile(b, loop))
        b.store((L.Lanes(b, b.load(sums)) + e[0] + e[1]).value, sums)
    L.store_first(top, stats)
    L.store_number(b, total(L.Lanes(b, b.load(sums))), stats, 4)


@vectorised(_i8, _i8, _i8, _i8, _i8, _i8, _f4, _f4, _f4)
def score_gradient_row(b, scores, gradients, p_line, ds_line, groups, seen, scale, lse, delta):
    """p = exp(scores * scale - lse); ds = p * (gradients - delta) * scale; 0 from `seen` on in the last group."""
    last = b.sub(groups, L.constant(1))
    wide, shift, mean = spread(b, scale), spread(b, lse), spread(b, delta)
    with each(b, groups) as loop:
        at = _halves(b, loop)
        x = _masked(b, [load(b, scores, a) for a in at], loop, last, seen)
        p = [exp(y * wide - shift) for y in x]
        store_line(b, p, p_line, _tile(b, loop))
        ds = [q * ((load(b, gradients, a) - mean) * wide) for q, a in zip(p, at, strict=True)]
        store_line(b, ds, ds_line, _tile(b, loop))


@vectorised(_i8, _i8, _i8, result=_f4)
def dot_lines(b, x, y, groups):
    """The sum of the products of two rows in lines."""
    sums = L.variable(b, spread(b, 0.0))
    with each(b, groups) as loop:
        pairs = zip(load_line(b, x, _tile(b, loop)), load_line(b, y, _tile(b, loop)), strict=True)
        now = L.Lanes(b, b.load(sums))
        for p, q in pairs:
            now = p.times_plus(q, now)
        b.store(now.value, sums)
    return total(L.Lanes(b, b.load(sums)))


@vectorised(_i8, _i8, _i8, _f4)
def scale_row(b, row, line, groups, factor):
    """line = row * factor."""
    wide = spread(b, factor)
    with each(b, groups) as loop:
        store_line(b, [load(b, row, at) * wide for at in _halves(b, loop)], line, _tile(b, loop))


@vectorised(_i8, _i8, _i8, _f4, result=_f4)
def largest_in_row(b, row, groups, rest, start):
    """The largest of start, 32 * groups numbers and `rest` < 32 more."""
    best = L.variable(b, spread(b, start))
    with each(b, groups) as loop:
        now = L.Lanes(b, b.load(best))
        for at in _halves(b, loop):
            now = load(b, row, at).larger(now)
        b.store(now.value, best)
    end = b.mul(groups, L.constant(128))
    with b.if_then(b.icmp_signed(">", rest, L.constant(0))):
        now = L.Lanes(b, b.load(best))
        for half in range(2):
            x = load(b, row, b.add(end, L.constant(64 * half)))
            now = x.where(L.first_lanes(b, rest, 16 * half), _LOWEST).larger(now)
        b.store(now.value, best)
    return L.largest(L.Lanes(b, b.load(best)))


@vectorised(_i8, _i8, _i8, _f4, result=_f4)
def sum_of_exp(b, row, groups, rest, shift):
    """The sum of exp(row - shift) over 32 * groups numbers and `rest` < 32 more."""
    sums, top = L.variable(b, spread(b, 0.0)), spread(b, shift)
    with each(b, groups) as loop:
        now = L.Lanes(b, b.load(sums))
        for at in _halves(b, loop):
            now = now + exp(load(b, row, at) - top)
        b.store(now.value, sums)
    end = b.mul(groups, L.constant(128))
    with b.if_then(b.icmp_signed(">", rest, L.constant(0))):
        now = L.Lanes(b, b.load(sums))
        for half in range(2):
            x = load(b, row, b.add(end, L.constant(64 * half)))
            now = now + exp(x.where(L.first_lanes(b, rest, 16 * half), _LOWEST) - top)
        b.store(now.value, sums)
    return total(L.Lanes(b, b.load(sums)))


@vectorised(_i8, _i8, _i8, _i8, _f4, _f4, _f4)
def softmax_gradient_row(b, row, line, groups, rest, lse, scale, less):
    """line = exp(row - lse) * scale - less over 32 * groups numbers and `rest` < 32 more; zeros fill the last group."""
    top, wide, everywhere = spread(b, lse), spread(b, scale), spread(b, less)
    with each(b, groups) as loop:
        e = [exp(load(b, row, at) - top) * wide - everywhere for at in _halves(b, loop)]
        store_line(b, e, line, _tile(b, loop))
    with b.if_then(b.icmp_signed(">", rest, L.constant(0))):
        end = b.mul(groups, L.constant(128))
        e = []
        for half in range(2):
            x, mask = load(b, row, b.add(end, L.constant(64 * half))), L.first_lanes(b, rest, 16 * half)
            e.append((exp(x.where(mask, _LOWEST) - top) * wide - everywhere).where(mask, 0.0))
        store_line(b, e, line, b.mul(groups, L.constant(TILE)))

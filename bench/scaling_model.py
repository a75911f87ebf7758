"""What was measured on few cores -> what a machine with a core for each worker would do: a model, not a measurement.

step(W) = ceil(S / W) shard + gather(W) + update(W) + pack(W) + B barrier(W)

shard      seconds of one sphere's forward and backward, as measured with every core of this machine busy
gather(W)  bytes(S) / bandwidth(W), with the gather's own bandwidth; update and pack alike
bandwidth  "grows": W times that of one core; "stays": never more than all cores of this machine reached
B          barriers of a step: 3, or 4 with packing
barrier(W) a + b W, least squares over the measured latencies; where workers outnumbered cores these are too long
It leaves out that cores share caches and clock, and the memory of several sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cllm_spheres.kernels.sizes import keeps_sum


@dataclass(frozen=True)
class Parts:
    """The calibration. Seconds of one worker alone, and of all cores together, for the bytes of `spheres` segments."""

    shard_s: float
    gather_alone_s: float
    gather_together_s: float
    update_alone_s: float
    update_together_s: float
    pack_alone_s: float
    pack_together_s: float
    spheres: int
    has_squares: bool
    barrier_s: tuple[float, float]  # a, b


def gather_bytes(parameters: int, spheres: int) -> int:
    """Bytes that the gather of float32 segments reads and writes."""
    return 4 * parameters * (spheres + keeps_sum(spheres))


def update_bytes(parameters: int, spheres: int, has_squares: bool) -> int:
    """Bytes that the update reads and writes: the gradient, or the segments again; weights and moments both ways."""
    return 4 * parameters * ((1 if keeps_sum(spheres) else spheres) + (6 if has_squares else 4))


def fit_barrier(latencies: dict[int, float]) -> tuple[float, float]:
    """Workers -> seconds, as a and b of a + b W, neither below zero; workers alone need no barrier and do not count."""
    points = [(w, s) for w, s in sorted(latencies.items()) if w > 1]
    if not points:
        return 0.0, 0.0
    if len(points) == 1:
        return points[0][1], 0.0
    mean_w = sum(w for w, _ in points) / len(points)
    mean_s = sum(s for _, s in points) / len(points)
    b = sum((w - mean_w) * (s - mean_s) for w, s in points) / sum((w - mean_w) ** 2 for w, _ in points)
    b = max(0.0, b)
    return max(0.0, mean_s - b * mean_w), b


def step_s(parts: Parts, workers: int, spheres: int, *, grows: bool) -> float:
    """Seconds of a step on `workers` cores; `grows`: whether the memory bandwidth grows with them."""

    def shared(alone_s: float, together_s: float, ratio: float) -> float:
        return ratio * (alone_s / workers if grows else max(alone_s / workers, together_s))

    gathered = gather_bytes(1, spheres) / gather_bytes(1, parts.spheres)
    updated = update_bytes(1, spheres, parts.has_squares) / update_bytes(1, parts.spheres, parts.has_squares)
    barriers = 4 if parts.pack_alone_s > 0 else 3
    a, b = parts.barrier_s
    return (
        -(-spheres // workers) * parts.shard_s
        + shared(parts.gather_alone_s, parts.gather_together_s, gathered)
        + shared(parts.update_alone_s, parts.update_together_s, updated)
        + shared(parts.pack_alone_s, parts.pack_together_s, 1.0)
        + (barriers * (a + b * workers) if workers > 1 else 0.0)
    )


def efficiency(workers: Sequence[int], tokens_per_s: Sequence[float], cores: int) -> list[float]:
    """Each rate over that of the first, per core that can be used: 1.0 is perfect."""
    base = tokens_per_s[0] / min(workers[0], cores)
    return [rate / (min(w, cores) * base) for w, rate in zip(workers, tokens_per_s, strict=True)]

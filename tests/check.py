"""Two comparisons: an array with its twin, a gradient with finite differences."""

from __future__ import annotations

import numpy as np

# Of a float32 kernel: a sum of n products is off by about sqrt(n) * 2**-24 of its terms. With n up to a few
# hundred and a chain of a few such sums that is some 1e-6; anything wrong is far above 1e-5.
FLOAT32 = 1e-5


def assert_close(actual, expected, tolerance=FLOAT32, name=""):
    """The largest difference is at most `tolerance` times the largest number that is expected."""
    assert np.shape(actual) == np.shape(expected)
    largest = np.abs(expected).max()
    difference = np.abs(np.asarray(actual, np.float64) - expected).max()
    # written so that a NaN fails
    assert difference <= tolerance * largest, f"{name} is off by {difference:.3g}, its largest is {largest:.3g}"


def derivative(loss, x, direction, step=1e-4):
    """The derivative of loss(x) along a direction, by five points: exact to O(step**4)."""
    near = loss(x + step * direction) - loss(x - step * direction)
    far = loss(x + 2 * step * direction) - loss(x - 2 * step * direction)
    return (8 * near - far) / (12 * step)


def assert_gradient(loss, x, gradient, rng, name=""):
    """The gradient of loss(x) (x in float64) along two random directions and at three coordinates."""
    assert gradient.shape == x.shape, name
    directions = [direction / np.linalg.norm(direction) for direction in rng.standard_normal((2, *x.shape))]
    for coordinate in rng.integers(0, x.size, 3):
        directions.append(np.eye(1, x.size, coordinate).reshape(x.shape))
    for direction in directions:
        expected, actual = derivative(loss, x, direction), (gradient * direction).sum()
        # Rounding: losses of size ~10 are known to 1e-15 and divided by 1e-4; truncation: (1e-4)**4.
        assert abs(actual - expected) <= 1e-8 * max(1, abs(expected)), f"{name}: {actual} is not {expected}"

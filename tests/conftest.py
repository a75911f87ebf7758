"""Thread caps before numpy loads; and the buffers that catch a kernel which writes too little or too much."""

from __future__ import annotations

import os

for _name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ[_name] = "1"

import numpy as np  # noqa: E402
import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("no deadline", deadline=None)  # an example may compile, and others use the cores too
settings.load_profile("no deadline")

MARGIN = 17  # floats; odd, so that no kernel may rely on alignment beyond a float's


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


@pytest.fixture
def buffer():
    """buffer(shape, fill=NaN): float32, between margins that must be NaN when the test ends."""
    made = []

    def make(*shape: int, fill: float = np.nan) -> np.ndarray:
        size = int(np.prod(shape))
        whole = np.full(size + 2 * MARGIN, np.nan, np.float32)
        made.append(whole)
        inner = whole[MARGIN : MARGIN + size].reshape(shape)
        inner[...] = fill
        return inner

    yield make
    for whole in made:
        margins = np.concatenate([whole[:MARGIN], whole[-MARGIN:]])
        assert np.isnan(margins).all(), "a kernel wrote outside its buffer"

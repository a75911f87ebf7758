"""Numbers for people."""

from __future__ import annotations

import pytest

from cllm_spheres import units


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (None, "–"),
        (0, "0 MB"),
        (24e3, "24 kB"),
        (43.4e6, "43 MB"),
        (999.6e6, "1.0 GB"),
        (7.8e9, "7.8 GB"),
        (25e9, "25.0 GB"),
    ],
)
def test_sizes_read_well(size_bytes, text):
    assert units.size(size_bytes) == text

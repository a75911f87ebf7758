"""How much of a fault test runs: CLLM_FAULTS=whole for all of it, anything else for a short form."""

from __future__ import annotations

import os
from typing import TypeVar

T = TypeVar("T")
WHOLE = os.environ.get("CLLM_FAULTS") == "whole"


def amount(short: T, whole: T) -> T:
    """`whole` where the variable CLLM_FAULTS says so, else `short`."""
    return whole if WHOLE else short

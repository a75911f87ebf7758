"""A number -> a short text for people. None, where there is no number yet, is a dash."""

from __future__ import annotations

import time


def compact(value: float | None) -> str:
    """24312 -> '24.3k', in at most 5 characters; '–' for None."""
    if value is None:
        return "–"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit * 0.9995:
            scaled = value / limit
            return f"{scaled:.0f}{unit}" if scaled >= 99.95 else f"{scaled:.1f}{unit}"
    return f"{value:.0f}" if value >= 9.95 or value == 0 else f"{value:.1f}"


def plural(count: int, what: str) -> str:
    """1, "worker" -> '1 worker'; 2 -> '2 workers'"""
    return f"{count:,} {what}{'s' * (count != 1)}"


def duration(seconds: float | None) -> str:
    """72 -> '1m12s', in at most 6 characters for less than 100 days; '–' for None."""
    if seconds is None:
        return "–"
    total = min(round(seconds), 10**10)
    days, hours, minutes = total // 86400, total // 3600, total // 60
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m{total % 60:02d}s" if minutes else f"{total}s"


def fixed(value: float | None, digits: int = 4) -> str:
    """A loss or a norm: 2.41015 -> '2.4102', 20.1 -> '20.100', huge ones with an exponent; '–' for None."""
    if value is None:
        return "–"
    if abs(value) >= 1e4:
        return f"{value:.1e}"
    return f"{value:.{digits if abs(value) < 10 else max(0, digits - 1)}f}"


def rate(value: float | None) -> str:
    """A learning rate: '9.9e-04'."""
    return "–" if value is None else f"{value:.1e}"


def size(value: float | None) -> str:
    """Bytes: '24 kB', '512 MB', '9.1 GB'."""
    if value is None:
        return "–"
    if value >= 999.5e6:
        return f"{value / 1e9:.1f} GB"
    return f"{value / 1e3:.0f} kB" if 0 < value < 999.5e3 else f"{value / 1e6:.0f} MB"


def percent(share: float) -> str:
    """0.1 -> '10 %', 0.0983 -> '9.83 %'"""
    return f"{100 * share:.3g} %"


def time_of_day(seconds: float | None) -> str:
    """Unix time -> '14:03:22' on the clock of this machine; '--:--:--' where there is none."""
    try:
        return time.strftime("%H:%M:%S", time.localtime(seconds)) if seconds is not None else "--:--:--"
    except (OverflowError, ValueError, OSError):
        return "--:--:--"

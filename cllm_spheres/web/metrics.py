"""What the server counts -> Prometheus' text format."""

from __future__ import annotations

import bisect
from collections.abc import Callable

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


def _labels(names: tuple[str, ...], values: tuple[str, ...], more: str = "") -> str:
    pairs = [f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True)] + [more] * bool(more)
    return "{" + ",".join(pairs) + "}" if pairs else ""


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _number(value: float) -> str:
    """All its digits: a counter of millions still shows each one."""
    return str(int(value)) if value == int(value) else repr(float(value))


class Counter:
    """A number that only grows, for each combination of labels."""

    def __init__(self, name: str, help: str, *labels: str) -> None:
        self.name, self.help, self.labels = name, help, labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, *values: str, amount: float = 1) -> None:
        self._values[values] = self._values.get(values, 0) + amount

    def lines(self) -> list[str]:
        head = [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} counter"]
        return head + [
            f"{self.name}{_labels(self.labels, key)} {_number(value)}" for key, value in self._values.items()
        ]


class Gauge:
    """A number that is asked for when it is shown."""

    def __init__(self, name: str, help: str, value: Callable[[], float]) -> None:
        self.name, self.help, self.value = name, help, value

    def lines(self) -> list[str]:
        return [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} gauge", f"{self.name} {_number(self.value())}"]


class Histogram:
    """Seconds, counted in buckets."""

    def __init__(self, name: str, help: str, *labels: str) -> None:
        self.name, self.help, self.labels = name, help, labels
        self._counts: dict[tuple[str, ...], list[int]] = {}
        self._sums: dict[tuple[str, ...], float] = {}

    def observe(self, seconds: float, *values: str) -> None:
        counts = self._counts.setdefault(values, [0] * (len(SECONDS) + 1))
        counts[bisect.bisect_left(SECONDS, seconds)] += 1
        self._sums[values] = self._sums.get(values, 0.0) + seconds

    def lines(self) -> list[str]:
        lines = [f"# HELP {self.name} {self.help}", f"# TYPE {self.name} histogram"]
        for key, counts in self._counts.items():
            total = 0
            for bound, count in zip((*SECONDS, float("inf")), counts, strict=True):
                total += count
                le = 'le="+Inf"' if bound == float("inf") else f'le="{bound:g}"'
                lines.append(f"{self.name}_bucket{_labels(self.labels, key, le)} {total}")
            lines.append(f"{self.name}_sum{_labels(self.labels, key)} {self._sums[key]:.6f}")
            lines.append(f"{self.name}_count{_labels(self.labels, key)} {total}")
        return lines


class Metrics:
    """All that /metrics shows. Labels come from lists of our own, so that no client can make them grow."""

    def __init__(self) -> None:
        self.requests = Counter("cllm_requests_total", "Answered requests.", "path", "status")
        self.cancelled = Counter("cllm_cancelled_total", "Requests whose client left before the end.")
        self.prompt_tokens = Counter("cllm_prompt_tokens_total", "Tokens of prompts.", "model")
        self.generated_tokens = Counter("cllm_generated_tokens_total", "Tokens written.", "model")
        self.restarts = Counter("cllm_inference_restarts_total", "Inference processes that were replaced.")
        self.seconds = Histogram("cllm_request_seconds", "From a request to the end of its answer.", "path")
        self.first_token = Histogram("cllm_first_token_seconds", "From a request to its first token, queue included.")
        self.gauges: list[Gauge] = []

    def show(self, name: str, help: str, value: Callable[[], float]) -> None:
        """Add a gauge."""
        self.gauges.append(Gauge(name, help, value))

    def text(self) -> str:
        """The page."""
        counters = (self.requests, self.cancelled, self.prompt_tokens, self.generated_tokens, self.restarts)
        parts: list[Counter | Gauge | Histogram] = [*counters, *self.gauges, self.seconds, self.first_token]
        return "\n".join(line for part in parts for line in part.lines()) + "\n"

"""Records of metrics.jsonl, one after another -> `RunView`: everything that is shown of a run.

Bounded memory for a run of any length. No record makes it raise: a value that is missing or of the wrong
kind is left out.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

from cllm_spheres.config import MAX_SPHERES
from cllm_spheres.events import PREPARING, Record
from cllm_spheres.units import percent
from cllm_spheres.watch.records import Spheres, cross_entropy_of, number, step_of
from cllm_spheres.watch.series import Series

PHASES = ("pack", "compute", "waiting", "gather", "update", "other")  # not every run packs
_PHASE_KEYS = tuple(f"{name}_s" for name in PHASES)
WINDOW_S = 10.0  # what "now" means for tokens/s and phases
NUM_MESSAGES = 50


@dataclass
class _Slice:
    """Sums over the steps of about half a second."""

    seconds: float = 0.0
    tokens: float = 0.0
    steps: int = 0
    phases: list[float] = field(default_factory=lambda: [0.0] * len(PHASES))

    def add(self, other: _Slice) -> None:
        self.seconds += other.seconds
        self.tokens += other.tokens
        self.steps += other.steps
        self.phases = [a + b for a, b in zip(self.phases, other.phases, strict=True)]


def _difference(record: Record, before: Record, key: str, otherwise: float) -> float:
    new, old = number(record, key), number(before, key)
    return new - old if new is not None and old is not None else otherwise


class RunView:
    """What is known of a run after the records added so far."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        self.facts: dict[str, Any] = {}  # of config.toml and of the start and resume events
        self.loss, self.val = Series(), Series()
        self.lr, self.norm, self.speed = (Series(sampled=True) for _ in range(3))
        self.step: Record = {}  # the latest of its kind
        self.eval: Record = {}
        self.spheres: Spheres | None = None
        self.messages: deque[tuple[float, str, str]] = deque(maxlen=NUM_MESSAGES)  # time, event, message
        self.turned_up: Record | None = None
        self.predicted_s: float | None = None  # what the run will take, by its rehearsal
        self.started: float | None = None  # of the latest start or resume
        self.last_time: float | None = None
        self._phase = "starting"  # preparing text, starting, running, stopping, ended, failed
        self._best: list[tuple[int, float]] = []  # falling minima of the validation loss
        self._first_step = 0  # the step this start or resume began from
        self._slices: deque[_Slice] = deque()
        self._closed = _Slice()  # sums of the slices before the last one, since the start or resume

        self._before: Record | None = None  # the step before, since the start or resume

    # Records in

    def configure(self, values: dict[str, Any]) -> None:
        """Facts of config.toml; those of events win."""
        self.facts = {k: v for k, v in values.items() if v is not None} | self.facts

    def add(self, record: Record) -> None:
        time = number(record, "time")
        if time is not None:
            self.last_time = time
        match record.get("kind"):
            case "step":
                self._add_step(record)
            case "eval":
                self._add_eval(record)
            case "spheres":
                self.spheres = Spheres.of(record)
            case "event":
                self._add_event(record)

    def _add_step(self, record: Record) -> None:
        step = step_of(record)
        if step is None:
            return
        self.step = record
        if self._phase != "stopping":
            self._phase = "running"
        for series, value in ((self.loss, cross_entropy_of(record)), (self.lr, number(record, "lr")),
                              (self.norm, number(record, "grad_norm")),
                              (self.speed, number(record, "tokens_per_s"))):  # fmt: skip
            if value is not None:
                series.add(step, value)
        seconds, tokens = number(record, "seconds") or 0.0, number(record, "tokens") or 0.0
        steps = 1
        before, self._before = self._before, record
        if before is not None and step > (last := step_of(before) or 0) + 1:  # steps that were not read
            steps = step - last
            seconds = _difference(record, before, "time", seconds * steps)
            tokens = _difference(record, before, "total_tokens", tokens * steps)
        part = self._slice()
        part.seconds += max(0.0, seconds)
        part.tokens += max(0.0, tokens)
        part.steps += steps
        for i, key in enumerate(_PHASE_KEYS):
            part.phases[i] += max(0.0, number(record, key) or 0.0) * steps

    def _slice(self) -> _Slice:
        """The slice that the next step belongs to."""
        slices = self._slices
        if slices and slices[-1].seconds < WINDOW_S / 20 and slices[-1].steps < 2**16:
            return slices[-1]
        if slices:
            self._closed.add(slices[-1])
        slices.append(_Slice())
        while len(slices) > 3 and (sum(s.seconds for s in slices) > WINDOW_S or len(slices) > 64):
            slices.popleft()
        return slices[-1]

    @property
    def _total(self) -> _Slice:
        """Sums since the latest start or resume."""
        total = _Slice()
        for part in (self._closed, *list(self._slices)[-1:]):
            total.add(part)
        return total

    def _add_eval(self, record: Record) -> None:
        step, loss = step_of(record), number(record, "val_loss")
        if step is None:
            return
        self._drop_evals_after(step - 1)
        self.eval = record
        if loss is None:
            return
        self.val.add(step, loss)
        if not self._best or loss < self._best[-1][1]:
            self._best.append((step, loss))
            self.turned_up = None
            if len(self._best) > 1024:
                del self._best[:-1:2]

    def _add_event(self, record: Record) -> None:
        name, message = str(record.get("event", "")), str(record.get("message") or record.get("event", ""))
        if name == PREPARING:
            share = number(record, "share")
            self._phase = "starting" if share is None or share >= 1 else f"preparing text, {percent(round(share, 2))}"
            if self.messages and self.messages[-1][1] == PREPARING:
                self.messages.pop()  # only how far it is now
        self.messages.append((number(record, "time") or 0.0, name, message))
        if name in ("start", "resume"):
            config = record.get("config")
            if isinstance(config, dict):
                self.facts |= {k: v for k, v in config.items() if v is not None}
            outer = {"kind", "event", "step", "time", "message", "config"}
            self.facts |= {k: v for k, v in record.items() if k not in outer and v is not None}
            self._phase = "starting"
            self.started = number(record, "time")
            self.predicted_s = None
            self.spheres = None
            self._slices.clear()
            self._closed = _Slice()
            self._before = None
            if name == "resume":
                step = step_of(record, "from_step")
                if step is None:
                    step = step_of(record)
                if step is not None:
                    self._first_step = step
                    self._drop_after(step)
        elif name == "eta":
            self.predicted_s = number(record, "seconds")
        elif name == "replan" and number(record, "steps") is not None:
            self.facts["steps"] = record["steps"]
        elif name in ("scaled", "fewer") and number(record, "workers") is not None:
            self.facts["workers"] = record["workers"]
        elif name == "turned_up":
            self.turned_up = record
        elif name in ("stopping", "failed", "end"):
            self._phase = {"stopping": "stopping", "failed": "failed", "end": "ended"}[name]

    def _drop_after(self, step: int) -> None:
        """A resume at `step`: what came after it is superseded."""
        for series in (self.loss, self.lr, self.norm, self.speed):
            series.drop_after(step)
        if (step_of(self.step) or 0) > step:
            self.step = {}
        self._drop_evals_after(step)

    def _drop_evals_after(self, step: int) -> None:
        self.val.drop_after(step)
        while self._best and self._best[-1][0] > step:
            self._best.pop()
        if (step_of(self.eval) or 0) > step:
            self.eval = {}
        if self.turned_up is not None and (step_of(self.turned_up) or 0) > step:
            self.turned_up = None

    # What is shown

    @property
    def current_step(self) -> int:
        return step_of(self.step) or self._first_step

    @property
    def steps(self) -> int | None:
        """The horizon of the schedule."""
        value = number(self.facts, "steps")
        return int(value) if value is not None and 0 < value < 2**53 else None

    @property
    def target(self) -> int | None:
        """The step at which this run ends: --stop-at where it lies ahead, else the horizon."""
        stop = number(self.facts, "stop_at")
        if stop is not None and self._first_step < stop < (self.steps or float("inf")):
            return int(stop)
        return self.steps

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, validation loss) of the best evaluation."""
        return self._best[-1] if self._best else None

    @property
    def num_spheres(self) -> int:
        value = number(self.facts, "spheres")
        known = int(value) if value is not None and 0 < value <= MAX_SPHERES else 0
        return max(known, len(self.spheres) if self.spheres else 0)

    @property
    def tokens_per_s(self) -> float | None:
        """Over the last WINDOW_S seconds, at least one step."""
        seconds = sum(s.seconds for s in self._slices)
        return sum(s.tokens for s in self._slices) / seconds if seconds > 0 else None

    @property
    def mean_tokens_per_s(self) -> float | None:
        """Since the latest start or resume."""
        return self._total.tokens / self._total.seconds if self._total.seconds > 0 else None

    @property
    def finished(self) -> bool:
        """The last start or resume was followed by an end or a failure."""
        return self._phase in ("ended", "failed")

    def shares(self) -> dict[str, float]:
        """Share of time by phase over the last WINDOW_S seconds; of the whole run once it has ended. "pack" only
        where there is any.
        """
        slices = [self._total] if self.finished else list(self._slices)
        sums = [sum(s.phases[i] for s in slices) for i in range(len(PHASES))]
        total = sum(sums)
        shares = {name: value / total for name, value in zip(PHASES, sums, strict=True)} if total > 0 else {}
        if not shares.get("pack"):
            shares.pop("pack", None)
        return shares

    def eta_s(self, now: float) -> float | None:
        """Seconds to the end: remaining steps by the mean of the recent and the whole time a step took."""
        if self.finished:
            return None
        if not self._total.steps or self._total.seconds <= 0:
            if self.predicted_s is None or self.started is None:
                return self.predicted_s
            return max(0.0, self.predicted_s - (now - self.started))
        if self.target is None:
            return None
        recent = sum(s.seconds for s in self._slices) / max(1, sum(s.steps for s in self._slices))
        whole = self._total.seconds / self._total.steps
        return max(0, self.target - self.current_step) * (recent + whole) / 2

    def elapsed_s(self, now: float) -> float | None:
        """Since the latest start or resume; up to its last record once it has ended."""
        if self.started is None:
            return None
        end = self.last_time if self.finished and self.last_time is not None else now
        return max(0.0, end - self.started)

    def silent_s(self, now: float) -> float | None:
        """Seconds without a record, where that is long for a run that has not ended; else None."""
        if self.finished or self.last_time is None:
            return None
        step_s = self._total.seconds / self._total.steps if self._total.steps else 0.0
        patience_s = 60.0 if self._phase.startswith(("starting", "preparing")) else max(15.0, 5 * step_s)
        silence = now - self.last_time
        return silence if silence > patience_s else None

    def state(self, now: float) -> str:
        """preparing text, starting, running, evaluating, stopping, ended, failed, or 'silent for N s'."""
        silence = self.silent_s(now)
        if silence is not None:
            return f"silent for {silence:.0f} s"
        if self._phase == "running":
            every = number(self.facts, "eval_every")
            due = self.current_step == self.target or bool(every and self.current_step % every == 0)
            if due and (step_of(self.eval) or 0) != self.current_step:
                return "evaluating"
        return self._phase

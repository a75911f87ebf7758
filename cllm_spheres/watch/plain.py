"""Records -> one clear line a step, or about one a second, for logs, pipes and `--plain`.

Each line begins with the time of day of what it tells: 14:03:22  step  120/2000  loss 3.2145  ...
"""

from __future__ import annotations

from collections.abc import Callable

from cllm_spheres.events import PREPARING, Record
from cllm_spheres.units import compact, duration, fixed, rate, time_of_day
from cllm_spheres.watch.paint import clean
from cllm_spheres.watch.records import cross_entropy_of, number, step_of
from cllm_spheres.watch.view import RunView

FEW_STEPS = 60  # up to here every step has its line
INTERVAL_S = 1.0
SLOW_INTERVAL_S = 10.0  # in a long run, about a thousand lines or one in this time


def step_line(record: Record, view: RunView) -> str:
    """step  120/2000  loss 3.2145  lr 9.9e-04  norm 0.83  24.3k tok/s  eta 1m12s

    With soft targets the plain cross-entropy stands beside the loss: loss 3.4212 (cross-entropy 3.2145).
    """
    step, target = step_of(record), view.target
    place = f"{step:>{len(str(target))}}/{target}" if target else f"{step}"
    loss, plain = number(record, "loss"), cross_entropy_of(record)
    beside = f" (cross-entropy {fixed(plain)})" if plain != loss else ""
    parts = [f"step  {place}", f"loss {fixed(loss)}{beside}", f"lr {rate(number(record, 'lr'))}"]
    before, after = number(record, "grad_norm"), number(record, "clipped_norm")
    clipped = before is not None and after is not None and after < before * 0.9995
    parts.append(f"norm {fixed(before, 2)}" + (f" > {fixed(after, 2)}" if clipped else ""))
    speed = view.tokens_per_s
    parts.append(f"{compact(speed if speed is not None else number(record, 'tokens_per_s'))} tok/s")
    eta = view.eta_s(number(record, "time") or 0.0)
    return "  ".join([*parts, f"eta {duration(eta)}"] if eta is not None else parts)


def eval_line(record: Record) -> str:
    """eval  step 250  val 2.4100  ppl 11.1  bits/byte 1.820  (unigram 3.310, bigram 2.520)"""
    perplexity, bits = number(record, "perplexity"), number(record, "bits_per_byte")
    parts = ["eval", f"step {step_of(record)}", f"val {fixed(number(record, 'val_loss'))}"]
    if perplexity is not None:
        parts.append(f"ppl {perplexity:.1f}" if perplexity < 1e5 else f"ppl {perplexity:.1e}")
    if bits is not None:
        parts.append(f"bits/byte {bits:.3f}")
    known = [f"{n} {fixed(v, 3)}" for n in ("unigram", "bigram") if (v := number(record, f"{n}_loss")) is not None]
    return "  ".join([*parts, f"({', '.join(known)})"] if known else parts)


class Plain:
    """Give it each record after the view got it; `write` takes whole lines."""

    def __init__(self, write: Callable[[str], object], endings: bool = True) -> None:
        self._write = write
        self._endings = endings
        self._printed_time = float("-inf")
        self._printed_step = -1
        self._prepared_time = float("-inf")  # of the last line on how far the text is
        self._unprepared: Record | None = None  # the latest word on that which has no line yet
        self._pending: Record | None = None  # the latest step that has no line yet
        self._first = True  # the next step is the first since a start or resume

    def add(self, record: Record, view: RunView) -> None:
        kind = record.get("kind")
        if kind == "step" and step_of(record) is not None:
            self._pending = record
            if self._first or self._due(record, view):
                self.flush(view)
        elif kind == "eval" and step_of(record) is not None:
            self.flush(view)
            self._tell(record, eval_line(record))
        elif kind == "event":
            if record.get("event") == PREPARING:
                self._unprepared = None if self._due_while_preparing(record) else record
                if self._unprepared:
                    return
            if record.get("event") in ("end", "failed", "stopping", "resume"):
                self.flush(view)
            self._first |= record.get("event") in ("start", "resume")
            message = clean(str(record.get("message") or record.get("event", "")))
            if message and (self._endings or record.get("event") not in ("end", "failed")):
                self._tell(record, message)

    def flush(self, view: RunView) -> None:
        """The line of the latest step, or on how far the text is, if it has none yet."""
        if self._unprepared is not None:
            self._tell(self._unprepared, clean(str(self._unprepared.get("message"))))
            self._unprepared = None
        if self._pending is not None:
            self._tell(self._pending, step_line(self._pending, view))
            self._printed_time = number(self._pending, "time") or 0.0
            self._printed_step = step_of(self._pending) or 0
            self._pending, self._first = None, False

    def _tell(self, record: Record, line: str) -> None:
        self._write(f"{time_of_day(number(record, 'time'))}  {line}")

    def _due_while_preparing(self, record: Record) -> bool:
        """The first word, the last, and one in SLOW_INTERVAL_S."""
        now = number(record, "time") or 0.0
        if number(record, "share") != 1.0 and 0 <= now - self._prepared_time < SLOW_INTERVAL_S:
            return False
        self._prepared_time = now
        return True

    def _due(self, record: Record, view: RunView) -> bool:
        target = view.target
        if target is not None and target <= FEW_STEPS:
            return True
        waited = (number(record, "time") or 0.0) - self._printed_time
        progress = (step_of(record) or 0) - self._printed_step
        if waited < 0 or progress < 0:
            return True
        return waited >= (INTERVAL_S if not target or progress * 1000 >= target else SLOW_INTERVAL_S)

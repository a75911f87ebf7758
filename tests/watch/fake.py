"""Records as a training would write them, without a training."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

from cllm_spheres import events
from cllm_spheres.events import Record

START = 1_700_000_000.0


def records(
    num_spheres: int = 63,
    steps: int = 2000,
    *,
    until: int | None = None,
    step_s: float = 0.08,
    eval_every: int = 250,
    seed: int = 5,
    bpb: bool = True,
) -> Iterator[Record]:
    """A run of `num_spheres` on min(16, num_spheres) workers; without an end event where `until` is given."""
    rng = random.Random(seed)
    time, tokens_a_step = START, 64 * 64
    workers = min(16, num_spheres)
    config = {"optimizer": "adamw", "schedule": "cosine", "eval_every": eval_every, "layers": 4, "heads": 4,
              "width": 128, "batch_size": max(64, num_spheres), "block_size": 64}  # fmt: skip
    yield events.event("start", f"Training {num_spheres} spheres on {workers} workers.", step=0, time=time,
                       workers=workers, spheres=num_spheres, batch_size=config["batch_size"], block_size=64,
                       steps=steps, num_parameters=930_000, run="runs/amber-otter", cores=16, pinned=True,
                       config=config)  # fmt: skip
    yield events.event("eta", "About 2m40s.", step=0, time=time + 0.5, seconds=step_s * steps)
    yield events.event("ready", f"{workers} workers started in 0.7 s.", step=0, time=time + 0.7, seconds=0.7)
    last_spheres, best = -math.inf, math.inf
    norm = 1.0
    for step in range(1, (until or steps) + 1):
        seconds = step_s * rng.uniform(0.93, 1.1)
        time += seconds
        x = step / 2000
        loss = 2.05 + 4.4 * math.exp(-x * 22) + 1.2 * math.exp(-x * 3) + rng.gauss(0, 0.07)
        norm = 0.9 * norm + 0.1 * (0.7 + 1.5 * math.exp(-x * 6) + abs(rng.gauss(0, 0.25)))
        lr = 1e-3 * min(1.0, step / 100) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, step / steps)))
        yield {
            "kind": "step", "step": step, "loss": loss, "lr": lr, "grad_norm": norm,
            "clipped_norm": min(1.0, norm), "tokens": tokens_a_step, "total_tokens": step * tokens_a_step,
            "time": time, "seconds": seconds, "tokens_per_s": tokens_a_step / seconds,
            "compute_s": seconds * 0.83, "waiting_s": seconds * 0.07, "gather_s": seconds * 0.05,
            "update_s": seconds * 0.035, "other_s": seconds * 0.015,
        }  # fmt: skip
        if step % eval_every == 0 or step == steps:
            val = 2.12 + 1.25 * math.exp(-x * 3) + 4.4 * math.exp(-x * 22) + rng.gauss(0, 0.01)
            yield {
                "kind": "eval", "step": step, "val_loss": val, "perplexity": math.exp(val),
                "bits_per_byte": val / math.log(2) / 2.4 if bpb else None, "unigram_loss": 5.31,
                "bigram_loss": 3.42, "tokens": 50_000, "time": time, "seconds": 0.4,
            }  # fmt: skip
            if val < best:
                best = val
                yield events.event("best", f"Validation loss {val:.4f} is the best so far.", step=step,
                                   time=time, val_loss=val, path="checkpoints/best")  # fmt: skip
            yield events.event("saved", f"Saved step {step} in 0.02 s.", step=step, time=time,
                               path=f"checkpoints/step-{step:08d}", seconds=0.02)  # fmt: skip
        if time - last_spheres >= 1.0:
            last_spheres = time
            yield spheres(num_spheres, step, time, rng)
    if until is None:
        yield events.event("end", f"Done: {steps} steps.", step=steps, time=time, reason="done",
                           path=f"checkpoints/step-{steps:08d}")  # fmt: skip


def spheres(num: int, step: int, time: float, rng: random.Random) -> Record:
    slow = {i: rng.uniform(0.65, 1.0) for i in range(num)}
    workers = min(16, num)
    return {
        "kind": "spheres", "step": step, "time": time, "worker": [i * workers // num for i in range(num)],
        "throughput": [51_000 / num * slow[i] for i in range(num)],
        "waiting": [min(0.95, max(0.0, 1.12 * slow[i] - 0.62) ** 1.3) for i in range(num)],
        "state": [rng.choice(["computing"] * 5 + ["waiting"]) for _ in range(num)],
        "memory": [9_000_000] * num, "cpu_percent": 1493.0, "memory_bytes": 812_000_000,
    }  # fmt: skip


def write(run: Path, lines: Iterator[Record] | list[Record], torn: str = "") -> Path:
    """A run folder that holds these records."""
    run.mkdir(parents=True, exist_ok=True)
    text = "".join(events.dumps(record) + "\n" for record in lines)
    (run / "metrics.jsonl").write_text(text + torn, encoding="utf-8")
    return run

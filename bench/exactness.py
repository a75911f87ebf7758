"""python bench/exactness.py --steps 1000

The same run on 1, 2, 7 and 63 workers, and once stopped and resumed on another number of workers: the losses and the
sha256 of model.safetensors must be the same to the last bit. Exits 1 where they are not. Writes
bench/results/exactness.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

import cllm_spheres

RESULTS = Path(__file__).parent / "results"
SPHERES = 63


def row(name: str, run: cllm_spheres.Run) -> tuple[str, tuple[str, ...]]:
    """A line of the table, and what must be equal in all of them."""
    steps, evaluations = run.metrics("step"), run.metrics("eval")
    losses = [(s["step"], s["loss"], s["grad_norm"], s["clipped_norm"]) for s in steps]
    last = max(run.path.glob("checkpoints/step-*"))
    weights = hashlib.sha256((last / "model.safetensors").read_bytes()).hexdigest()
    curve = hashlib.sha256(json.dumps(losses).encode()).hexdigest()
    values = (repr(losses[0][1]), repr(losses[-1][1]), repr(evaluations[-1]["val_loss"]), curve[:16], weights[:16])
    return f"| {name} | {len(losses)} | " + " | ".join(values) + " |", values


def main() -> None:
    """Train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 7, 63])
    arguments = parser.parse_args()
    options = dict(
        preset="tiny", spheres=SPHERES, batch_size=SPHERES, steps=arguments.steps, lr=3e-3, quiet=True,
        eval_every=max(1, arguments.steps // 4),
    )  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for workers in arguments.workers:
            run = cllm_spheres.train(run=Path(folder) / str(workers), workers=workers, **options)
            rows.append(row(f"{workers} workers", run))
        stop = arguments.steps * 13 // 30
        stopped = cllm_spheres.train(run=Path(folder) / "stopped", workers=7, stop_at=stop, **options)
        resumed = cllm_spheres.train(run=stopped.path, resume=True, workers=2, quiet=True)
        rows.append(row(f"7 workers, stopped after step {stop}, then 2", resumed))
    equal = len({values for _, values in rows}) == 1
    lines = [
        f"# {SPHERES} spheres, {arguments.steps} steps of preset tiny", "",
        f"`python bench/exactness.py --steps {arguments.steps}`. curve: sha256 over all losses, gradient norms before"
        " and after clipping; weights: sha256 of model.safetensors.", "",
        "| | steps | first loss | last loss | validation loss | curve | weights |", "|---|---|---|---|---|---|---|",
        *(line for line, _ in rows), "", "All equal." if equal else "NOT EQUAL.",
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "exactness.md").write_text(text)
    sys.exit(not equal)


if __name__ == "__main__":
    main()

"""python bench/recipe.py TEXT [--reference]

The small character model that others are measured on: 4 layers, 4 heads, width 128, block 64, batch 12, 2,000 steps,
AdamW 1e-3 to 1e-4 with 100 steps of warm-up, beta2 0.99, decay 0.1, clip 1, no biases, no dropout, the first 90 % of
TEXT for training. Three seeds, in float32 and, where the CPU has it, in bfloat16; the loss is over the whole validation
part. Writes bench/results/recipe.md, with the curves of the training loss as a table, and as a picture too where
matplotlib is installed (pip install 'cllm-spheres[plots]').

--reference also trains the same model in PyTorch (pip install 'cllm-spheres[bench]'), with windows drawn with
replacement and the exact GELU, as nanoGPT does, and the same evaluation: eager in float32, and the fastest way that
`cllm-spheres bench peers` found at this size: torch.compile, bf16 autocast, attention as matrix products, fused AdamW.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import math
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

import cllm_spheres
from cllm_spheres.model import dtypes
from cllm_spheres.text.cache import prepare_cached
from cllm_spheres.text.prepared import Prepared

RESULTS = Path(__file__).parent / "results"
SEEDS = (1, 2, 3)
LAYERS, HEADS, WIDTH, BLOCK, BATCH, STEPS = 4, 4, 128, 64, 12, 2000


CURVE_STEPS = 50  # training losses are averaged over so many steps: of one step they are noise
Result = tuple[float, float, np.ndarray]  # final validation loss, seconds of training, curve


def ours(prepared: Prepared, seed: int, workers: int, dtype: str) -> Result:
    """The seconds are without evaluations, checkpoints and starting."""
    with tempfile.TemporaryDirectory() as folder:
        run = cllm_spheres.train(
            prepared.folder, run=Path(folder) / "run", quiet=True, preset="small", steps=STEPS, lr=1e-3, min_lr=1e-4,
            warmup=100, beta2=0.99, weight_decay=0.1, clip=1.0, bias=False, seed=seed, workers=workers,
            eval_every=STEPS, eval_tokens=len(prepared.val), dtype=dtype,
        )  # fmt: skip
        steps = run.metrics("step")
        seconds = sum(step["seconds"] - step["other_s"] for step in steps)
        return run.metrics("eval")[-1]["val_loss"], seconds, averaged([step["loss"] for step in steps])


def averaged(losses: list[float]) -> np.ndarray:
    """The mean loss of every CURVE_STEPS steps."""
    return np.array(losses).reshape(-1, CURVE_STEPS).mean(1)


def reference(prepared: Prepared, seed: int, threads: int, strongest: bool) -> Result:
    """The same in PyTorch, eager or in its fastest form; the seconds are without compiling."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    rng = np.random.default_rng(seed)
    vocab_size, train, val = prepared.vocab_size, prepared.train.astype(np.int64), prepared.val.astype(np.int64)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ParameterList([nn.Parameter(torch.ones(WIDTH)) for _ in range(2)])
            self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
            self.att_proj = nn.Linear(WIDTH, WIDTH, bias=False)
            self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
            self.down_proj = nn.Linear(4 * WIDTH, WIDTH, bias=False)
            self.register_buffer("future", torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1))

        def forward(self, x):
            b, t, _ = x.shape
            normed = F.layer_norm(x, (WIDTH,), self.norms[0])
            q, k, v = (z.view(b, t, HEADS, -1).transpose(1, 2) for z in self.qkv(normed).split(WIDTH, 2))
            if strongest:
                scores = (q @ k.transpose(2, 3)) * (WIDTH // HEADS) ** -0.5
                y = F.softmax(scores.masked_fill(self.future, -math.inf), 3) @ v
            else:
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.att_proj(y.transpose(1, 2).reshape(b, t, WIDTH))
            return x + self.down_proj(F.gelu(self.up(F.layer_norm(x, (WIDTH,), self.norms[1]))))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(vocab_size, WIDTH), nn.Embedding(BLOCK, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
            self.norm = nn.Parameter(torch.ones(WIDTH))
            for name, p in self.named_parameters():
                if p.dim() > 1:
                    nn.init.normal_(p, 0, 0.02 / math.sqrt(2 * LAYERS) if "_proj" in name else 0.02)

        def forward(self, x, y):
            h = self.wte(x) + self.wpe.weight
            for block in self.blocks:
                h = block(h)
            logits = F.layer_norm(h, (WIDTH,), self.norm) @ self.wte.weight.T
            return F.cross_entropy(logits.view(-1, vocab_size), y.reshape(-1))

    def batch(ids, starts):
        windows = np.stack([ids[i : i + BLOCK + 1] for i in starts])
        return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())

    model = GPT()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=strongest)
    forward, precision = model, contextlib.nullcontext()
    if strongest:
        forward, precision = torch.compile(model), torch.autocast("cpu", torch.bfloat16)
        with precision:
            loss = forward(*batch(train, np.arange(BATCH)))
        loss.backward()  # compiles it; the gradients are dropped before the first step
    losses = []
    began = time.perf_counter()
    for step in range(STEPS):
        decay = 1e-4 + 0.5 * (1 + math.cos(math.pi * (step - 100) / (STEPS - 100))) * 9e-4
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (step + 1) / 101 if step < 100 else decay
        optimizer.zero_grad()
        with precision:
            loss = forward(*batch(train, rng.integers(0, len(train) - BLOCK, BATCH)))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - began
    starts = np.arange(0, len(val) - BLOCK, BLOCK)
    with torch.no_grad():
        parts = [(model(*batch(val, part)).item(), len(part)) for part in np.array_split(starts, 16)]
    return sum(loss * n for loss, n in parts) / len(starts), seconds, averaged(losses)


def table_of_curves(curves: dict[str, np.ndarray]) -> list[str]:
    """Lines of Markdown: the mean over the seeds, and between which losses they lie. curves: [seeds, points]."""
    ends = [STEPS // CURVE_STEPS * k // 10 - 1 for k in range(1, 11)]
    lines = [
        f"| loss of the {CURVE_STEPS} steps until | {' | '.join(f'{CURVE_STEPS * (end + 1):,}' for end in ends)} |",
        "|---|" + "---|" * len(ends),
    ]
    for name, curve in curves.items():
        cells = (f"{c.mean():.3f} ({c.min():.3f} to {c.max():.3f})" for c in curve[:, ends].T)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def draw(curves: dict[str, np.ndarray]) -> bool:
    """bench/results/recipe.svg: means as lines, the seeds' range as bands. False without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, curve in curves.items():
        at = CURVE_STEPS * (np.arange(curve.shape[1]) + 1)
        (line,) = axes.plot(at, curve.mean(0), label=name)
        axes.fill_between(at, curve.min(0), curve.max(0), alpha=0.2, color=line.get_color())
    axes.set(xlabel="step", ylabel=f"training loss, mean of {CURVE_STEPS} steps", ylim=(1.7, 3.0))
    axes.legend()
    figure.savefig(RESULTS / "recipe.svg", metadata={"Date": None})
    return True


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    prepared = prepare_cached([arguments.text], "char")
    kinds = {
        f"cllm-spheres, {dtypes.describe(dtype)}": functools.partial(ours, dtype=dtype)
        for dtype in dtypes.DTYPES
        if dtypes.usable(dtype) == dtype
    }
    if arguments.reference:
        kinds["PyTorch, eager"] = functools.partial(reference, strongest=False)
        kinds["PyTorch, compiled, bf16"] = functools.partial(reference, strongest=True)
    measured: dict[str, list[Result]] = {name: [] for name in kinds}
    for seed in SEEDS:  # in turn, so that what else the machine does falls on both
        for name, train in kinds.items():
            measured[name].append(train(prepared, seed, arguments.workers))
            print(f"{name}, seed {seed}: loss {measured[name][-1][0]:.4f} in {measured[name][-1][1]:.1f} s", flush=True)
    curves = {name: np.array([curve for *_, curve in results]) for name, results in measured.items()}
    command = f"python bench/recipe.py {arguments.text.name}{' --reference' * arguments.reference}"
    command += f" --workers {arguments.workers}"
    lines = [
        f"# The character recipe on {arguments.text.name}", "",
        f"`{command}`, {arguments.workers} workers or threads."
        " Loss in nats a character over the whole validation part.", "",
        f"| | {' | '.join(f'seed {seed}' for seed in SEEDS)} | median loss | median seconds of training |",
        "|---|" + "---|" * (len(SEEDS) + 2),
        *(
            f"| {name} | {' | '.join(f'{loss:.4f}' for loss, *_ in results)} |"
            f" {statistics.median(loss for loss, *_ in results):.4f} |"
            f" {statistics.median(seconds for _, seconds, _ in results):.1f} |"
            for name, results in measured.items()
        ), "",
        "The curves of the training loss: mean over the seeds, and its range.", "", *table_of_curves(curves),
    ]  # fmt: skip
    if draw(curves):
        lines += ["", "![The curves as a picture](recipe.svg)"]
    text = "\n".join(lines) + "\n"
    print(text)
    (RESULTS / "recipe.md").write_text(text)


if __name__ == "__main__":
    main()

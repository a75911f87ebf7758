"""python bench/check_torch.py > bench/results/check_torch.md

Our losses, logits, gradients and AdamW steps against PyTorch's -> tables in Markdown; exits 1 when one is too far off.

The peer is the GPT-2 of peer_torch.py with the same weights. In float64 it is the reference; in float32 it shows how
far off ordinary float32 is, beside ours. A difference is max |a - b| / max |b| of a tensor.

PyTorch is not a dependency of the project. In a virtual environment of its own:
    pip install torch==2.13.0 && pip install .
"""

# B sequences, T positions, C channels, H heads of width D, F feed-forward, V vocabulary, P parameters with padding

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cllm_spheres_bench.peer_torch import build_model, set_weights, turned

from cllm_spheres.inference.model import Model
from cllm_spheres.kernels import blas
from cllm_spheres.kernels import optimizer as ours
from cllm_spheres.kernels.gather import clip_factor, gather_block, global_norm
from cllm_spheres.kernels.sizes import BLOCK, SLOT_FLOATS
from cllm_spheres.model.arena import new_arena
from cllm_spheres.model.description import Tensor
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape
from cllm_spheres.text.tokenizer import ByteTokenizer

STEPS, CLIP, BETA1, BETA2, DECAY = 20, 2.0, 0.9, 0.95, 0.1

# A sum of n float32 products is off by about sqrt(n) * 2**-24 of its terms: with n up to a few thousand and a chain
# of such sums some 1e-6. A wrong term is far above.
MODEL_BOUND = 1e-5
# Each of 20 steps rounds a weight between 1 and 2 by up to 2**-24: 1.2e-6 at worst, of a weight that moved by 0.1.
# That is 1.2e-5, and 2.4e-5 between two float32 weights; the rest is for the rounding of the steps themselves.
ADAMW_BOUND = 4e-5


class Case(NamedTuple):
    """A model and what it reads: B sequences of T tokens."""

    shape: Shape
    B: int
    T: int


# Vocabulary, block, layers, heads, width, feed-forward. In S2 and S3 the sequences are computed in groups, whose
# gradients add up; `odd` has no round number and reads less than a block; `vocab` cuts the head into chunks of rows.
CASES = {
    "S1": Case(Shape(381, 16, 2, 4, 64, 128), B=4, T=16),
    "S2": Case(Shape(65, 64, 4, 4, 128, 512), B=12, T=64),
    "S3": Case(Shape(4096, 128, 6, 8, 256, 1024), B=16, T=128),
    "odd": Case(Shape(101, 20, 3, 3, 36, 100), B=3, T=17),
    "vocab": Case(Shape(50257, 70, 2, 3, 48, 100), B=5, T=70),
}


def random_tensors(shape: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """float32 weights of a size where every part matters: activations near 1, no gain 1, no bias 0."""

    def scale(t: Tensor) -> float:
        embeds = t.transposed or t.looked_up
        return 0.2 if len(t.shape) == 1 else 0.1 if embeds else t.shape[0] ** -0.5

    tensors = [placed.tensor for placed in Layout(shape).tensors]
    return {t.name: (rng.standard_normal(t.shape) * scale(t) + t.constant).astype(np.float32) for t in tensors}


def by_torch(torch: Any, tensors: dict, inputs_BT: Any, targets_BT: Any, shape: Shape, dtype: Any) -> dict:
    """Name -> array: "loss", "logits" and the gradient of every tensor; linear weights [in, out], as ours are."""
    model = build_model(shape).to(dtype)
    set_weights(model, {name: torch.from_numpy(value) for name, value in tensors.items()})
    inputs_BT, targets_BT = torch.from_numpy(inputs_BT), torch.from_numpy(targets_BT)
    logits_BTV = model.logits(inputs_BT)
    loss = model(inputs_BT, targets_BT)
    loss.backward()
    gradients = {name: turned(name, parameter.grad).numpy() for name, parameter in model.named_parameters()}
    return {"loss": loss.detach().numpy(), "logits": logits_BTV.detach().numpy()} | gradients


def by_us(tensors: dict, inputs_BT: np.ndarray, targets_BT: np.ndarray, shape: Shape) -> dict:
    """As `by_torch`, by the kernels that train."""
    model = Model(shape, ByteTokenizer(), tensors)
    loss, gradients = model.loss_and_gradients(inputs_BT, targets_BT)
    return {"loss": np.array(loss), "logits": np.stack([model.logits(ids_T) for ids_T in inputs_BT])} | gradients


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b| / max |b|; NaN where either holds one."""
    assert a.shape == b.shape
    return float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max())


def compare_models(torch: Any, names: Iterable[str], seed: int) -> dict[tuple[str, str], list[float]]:
    """(case, name) -> the differences of ours and of PyTorch's float32 from PyTorch's float64."""
    found = {}
    for name in names:
        for bias in (True, False):
            shape, B, T = CASES[name]
            shape = replace(shape, bias=bias)
            label = f"{name}, {'biases' if bias else 'no biases'}"
            print(f"Comparing {label} ...", file=sys.stderr)
            rng = np.random.default_rng(seed)
            tensors = random_tensors(shape, rng)
            inputs_BT, targets_BT = rng.integers(0, shape.vocab_size, (2, B, T))
            exact = by_torch(torch, tensors, inputs_BT, targets_BT, shape, torch.float64)
            peer = by_torch(torch, tensors, inputs_BT, targets_BT, shape, torch.float32)
            own = by_us(tensors, inputs_BT, targets_BT, shape)
            assert own.keys() == exact.keys()
            for key, value in exact.items():
                found[label, key] = [difference(own[key], value), difference(peer[key], value)]
    return found


class OurAdamW:
    """AdamW as a run does it: gather, norm, clip, then every block through the redo slot."""

    def __init__(self, shape: Shape, tensors: dict[str, np.ndarray]) -> None:
        self.layout = Layout(shape)
        self.params_P, self.segment_P, self.moments_P, self.squares_P = (new_arena(self.layout.size) for _ in range(4))
        for buffer_P in (self.params_P, self.segment_P, self.moments_P, self.squares_P):
            buffer_P[:] = 0
        self.layout.fill(self.params_P, tensors)
        self.norms, self.slot = np.empty(self.layout.num_blocks), new_arena(SLOT_FLOATS)
        self.decision = np.zeros(ours.DECISION_WORDS)

    def update(self, gradients: dict[str, np.ndarray], step: int, rate: float) -> float:
        """One step, counted from 1; returns the norm of the gradient before clipping."""
        self.layout.fill(self.segment_P, gradients)
        segment, norms, slot = self.segment_P.ctypes.data, self.norms.ctypes.data, self.slot.ctypes.data
        state = [x.ctypes.data for x in (self.params_P, self.moments_P, self.squares_P)]
        for block in range(self.layout.num_blocks):
            gather_block.call(segment, self.segment_P.nbytes, 1, 0, norms, block)  # one segment is its own sum
        norm = global_norm.call(norms, self.layout.num_blocks)
        d = self.decision
        d[ours.D_FACTOR], d[ours.D_LR], d[ours.D_DECAY] = clip_factor(norm, CLIP), rate, DECAY
        d[ours.D_BETA1], d[ours.D_BETA2] = BETA1, BETA2
        d[ours.D_CORRECTION_1], d[ours.D_CORRECTION_2] = 1 - BETA1**step, 1 - BETA2**step
        for block in range(self.layout.num_blocks):
            decays = block < self.layout.decaying_blocks
            ours.update_block.call(ours.ADAMW, d.ctypes.data, segment + 4 * block * BLOCK, *state, slot, block, decays)
            ours.commit_block.call(ours.ADAMW, *state, slot, block)
        return norm


class TorchAdamW:
    """torch.optim.AdamW with decay on matrices only, and clip_grad_norm_."""

    def __init__(self, torch: Any, tensors: dict[str, np.ndarray], dtype: Any) -> None:
        self.torch, self.dtype = torch, dtype
        self.params = {name: torch.tensor(x, dtype=dtype, requires_grad=True) for name, x in tensors.items()}
        groups = [
            {"params": [p for p in self.params.values() if p.ndim == 2], "weight_decay": DECAY},
            {"params": [p for p in self.params.values() if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(BETA1, BETA2), eps=ours.EPSILON)

    def update(self, gradients: dict[str, np.ndarray], rate: float) -> float:
        """One step; returns the norm of the gradient before clipping."""
        for name, p in self.params.items():
            p.grad = self.torch.tensor(gradients[name], dtype=self.dtype)
        norm = self.torch.nn.utils.clip_grad_norm_(self.params.values(), CLIP)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        return float(norm)

    def state(self, key: str) -> dict[str, np.ndarray]:
        return {name: self.optimizer.state[p][key].numpy() for name, p in self.params.items()}


def compare_optimizers(torch: Any, steps: int, seed: int) -> tuple[dict[str, list[float]], int]:
    """Quantity -> differences of ours and float32 from float64, and of ours from float32; how many steps clipped.

    All three are given the same gradients, those of our model along our path.
    """
    shape, B, T = CASES["S1"]
    rng = np.random.default_rng(seed)
    start = random_tensors(shape, rng)
    model, own = Model(shape, ByteTokenizer(), start), OurAdamW(shape, start)
    peer, exact = TorchAdamW(torch, start, torch.float32), TorchAdamW(torch, start, torch.float64)
    norms = np.empty((steps, 3))
    print(f"Comparing {steps} steps of AdamW ...", file=sys.stderr)
    for step in range(1, steps + 1):
        _, gradients = model.loss_and_gradients(*rng.integers(0, shape.vocab_size, (2, B, T)))
        rate = 1e-2 * step / steps
        norms[step - 1] = own.update(gradients, step, rate), peer.update(gradients, rate), exact.update(gradients, rate)
        for name, value in own.layout.views(own.params_P).items():
            model.parameters[name][...] = value

    def change(params: dict[str, Any]) -> dict[str, np.ndarray]:
        return {name: np.asarray(p, np.float64) - start[name] for name, p in params.items()}

    def moved(peer: TorchAdamW) -> dict[str, np.ndarray]:
        return change({name: p.detach().numpy() for name, p in peer.params.items()})

    changes = change(own.layout.views(own.params_P)), moved(peer), moved(exact)
    moments = own.layout.views(own.moments_P), peer.state("exp_avg"), exact.state("exp_avg")
    squares = own.layout.views(own.squares_P), peer.state("exp_avg_sq"), exact.state("exp_avg_sq")
    matrices = [placed.name for placed in own.layout.tensors if placed.tensor.decays]
    vectors = [placed.name for placed in own.layout.tensors if not placed.tensor.decays]

    def worst(three: tuple[dict, dict, dict], names: Iterable[str]) -> list[float]:
        pairs = [
            [difference(a[n], c[n]), difference(b[n], c[n]), difference(a[n], b[n])]
            for n in names for a, b, c in [three]
        ]  # fmt: skip
        return np.max(pairs, axis=0).tolist()

    found = {
        "change of the matrices, which decay": worst(changes, matrices),
        "change of the vectors, which do not": worst(changes, vectors),
        "moments": worst(moments, start),
        "squares": worst(squares, start),
        "norms of the gradients": worst(({"": norms[:, 0]}, {"": norms[:, 1]}, {"": norms[:, 2]}), [""]),
    }
    return found, int((norms[:, 2] > CLIP).sum())


def kind_of(name: str) -> str:
    """h.3.ln_1.bias -> h.*.ln_1.bias"""
    parts = name.split(".")
    return ".".join(["h", "*", *parts[2:]]) if parts[0] == "h" else name


def table(head: list[str], rows: list[list[Any]]) -> str:
    """Markdown; numbers with three digits."""
    cells = [head, ["---"] * len(head), *([f"{x:.2e}" if isinstance(x, float) else x for x in r] for r in rows)]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells) + "\n"


def worst_of(found: dict[tuple[str, str], list[float]], row: str) -> list[Any]:
    """One row over several tensors: both largest differences, and where ours is largest."""
    differences = np.array(list(found.values()))
    label, name = list(found)[int(differences[:, 0].argmax())]  # a NaN counts as the largest
    where = label if name in ("loss", "logits") else f"{label}: {name}"
    return [row, *differences.max(0).tolist(), where]


def report_models(found: dict[tuple[str, str], list[float]]) -> str:
    kinds = dict.fromkeys(kind_of(name) for _, name in found)
    labels = dict.fromkeys(label for label, _ in found)

    def rows_of(label: str) -> list[Any]:
        mine = {name: pair for (case, name), pair in found.items() if case == label}
        gradients = [pair for name, pair in mine.items() if name not in ("loss", "logits")]
        return [label, *mine["loss"], *mine["logits"], *np.max(gradients, axis=0).tolist()]

    rows = [worst_of({at: pair for at, pair in found.items() if kind_of(at[1]) == k}, k) for k in kinds]
    gradients = {at: pair for at, pair in found.items() if at[1] not in ("loss", "logits")}
    rows.append(worst_of(gradients, "**all gradients**"))
    return (
        "## Loss, logits and gradients, by kind of tensor\n\n"
        "The largest difference over all models and layers, from PyTorch float64.\n\n"
        + table(["", "ours", "PyTorch float32", "ours is largest in"], rows)
        + "\n## By model\n\n"
        + table(
            ["", "loss: ours", "PyTorch", "logits: ours", "PyTorch", "gradients: ours", "PyTorch"],
            [rows_of(label) for label in labels],
        )
    )


def machine() -> str:
    """The name of the CPU and how many of its cores this process may use."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]  # fmt: skip
    return f"{names[0] if names else 'unknown CPU'}, {len(os.sched_getaffinity(0))} cores"


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare our losses, gradients and AdamW with PyTorch's.")
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES), help="which to compare; all")
    parser.add_argument("--seed", type=int, default=1337, help="of weights and tokens (default: %(default)s)")
    options = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("PyTorch is missing: pip install torch==2.13.0, best in an environment of its own.", file=sys.stderr)
        return 2

    models = compare_models(torch, options.models, options.seed)
    steps, clipped = compare_optimizers(torch, STEPS, options.seed)
    differences = [(f"{label}: {name}", pair[0], MODEL_BOUND) for (label, name), pair in models.items()]
    for name, (from_float64, _, from_float32) in steps.items():
        differences.append((f"AdamW: {name}, from float64", from_float64, ADAMW_BOUND))
        differences.append((f"AdamW: {name}, from float32", from_float32, ADAMW_BOUND))
    exceeded = [f"{name} is off by {x:.2e}" for name, x, bound in differences if not x <= bound]  # a NaN is, too
    print(
        "# Compared with PyTorch\n\n"
        f"Command: `{shlex.join(['python', *sys.argv])}`  \n"
        f"Machine: {machine()}  \n"
        f"Versions: PyTorch {torch.__version__}, numpy {np.__version__}, OpenBLAS {blas.description()}\n\n"
        f"Bounds: {MODEL_BOUND:.0e} for loss, logits and gradients, {ADAMW_BOUND:.0e} for AdamW. "
        f"{'**Exceeded**: ' + '; '.join(exceeded) if exceeded else 'All are kept'}.\n\n"
        f"{report_models(models)}\n"
        f"## {STEPS} steps of AdamW\n\n"
        f"S1, with the same gradients; the learning rate rises with each step, and {clipped} steps are clipped.\n"
        "PyTorch's clip_grad_norm_ adds 1e-6 to the norm, we do not.\n\n"
        + table(
            ["", "ours from float64", "PyTorch float32 from float64", "ours from PyTorch float32"],
            [[name, *row] for name, row in steps.items()],
        ),
        end="",
    )
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())

"""python -m cllm_spheres_bench.crystal_contexts [DATA] [--vocab-size V ...] [--out DIR]

Do the crystal's neighbours stand in like places? Of each token the distributions of the tokens before and after it are
counted; how alike two tokens are is the mean over both sides of sum sqrt(p q), 0 to 1 (Bhattacharyya). Compared over
the 16 neighbours of each token: those of the crystal, those of either of its terms, and controls that know of frequency
alone. Writes bench/results/crystal_contexts.json and .md.
"""

# V vocabulary, L tokens that occur, K neighbours

from __future__ import annotations

import argparse
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
from cllm_spheres_bench.machine import facts, markdown, results_folder, told, write_results

from cllm_spheres.crystal.similarity import nearest
from cllm_spheres.errors import InputError
from cllm_spheres.text.cache import prepare_cached
from cllm_spheres.text.frequency import frequency_order
from cllm_spheres.text.prepared import Prepared

NEIGHBOURS = 16
VOCABULARIES = (1024, 4096)


def alikeness(prepared: Prepared) -> np.ndarray:
    """How alike the surroundings of tokens are, float64 [L, L], by rank."""
    ids_V, counts_V = frequency_order(prepared)
    size, num_live = len(ids_V), int((counts_V > 0).sum())
    rank_V = np.empty(size, np.int64)
    rank_V[ids_V] = np.arange(size)
    ranks = rank_V[np.asarray(prepared.train)]
    pairs_LL = np.bincount(ranks[:-1] * num_live + ranks[1:], minlength=num_live**2).reshape(num_live, num_live)
    result = np.zeros((num_live, num_live))
    for counts_LL in (pairs_LL, pairs_LL.T):
        roots_LL = np.sqrt(counts_LL / np.maximum(counts_LL.sum(1, keepdims=True), 1))
        result += roots_LL @ roots_LL.T / 2
    return result


def choices(alike_LL: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Ranks of K others for each rank, int64 [L, K], by name; those of L and above do not occur in the text."""
    num_live = len(alike_LL)
    rng = np.random.default_rng(1)
    own = np.arange(num_live)[:, None]
    found: dict[str, np.ndarray] = {}
    for name, weights in (("crystal", (0.7, 0.3)), ("divisors alone", (1.0, 0.0)), ("spiral alone", (0.0, 1.0))):
        found[name] = nearest(size, NEIGHBOURS, *weights)[0][:num_live].astype(np.int64) - 1
    shifted = rng.integers(0, num_live - 1, (num_live, NEIGHBOURS))
    found["by lot"] = shifted + (shifted >= own)
    ratios = (found["crystal"] + 1) / (own + 1)  # of ranks, dealt anew: as near in frequency, without the arithmetic
    dealt = np.rint((own + 1) * rng.permuted(ratios.ravel()).reshape(ratios.shape)).astype(np.int64) - 1
    dealt = np.clip(dealt, 0, size - 1)
    found["the crystal's ratios of ranks, dealt by lot"] = np.where(dealt == own, np.where(own > 0, own - 1, 1), dealt)
    near = np.clip(own, NEIGHBOURS // 2, num_live - 1 - NEIGHBOURS // 2)
    window = near + np.arange(-(NEIGHBOURS // 2), NEIGHBOURS // 2 + 1)
    found["nearest in rank"] = window[window != own].reshape(num_live, NEIGHBOURS)
    found["most alike there are"] = np.argsort(-(alike_LL - 2 * np.eye(num_live)), axis=1)[:, :NEIGHBOURS]
    return found


def means(alike_LL: np.ndarray, ranks_LK: np.ndarray) -> dict[str, float]:
    """The mean over tokens of the mean over their neighbours that occur, and half of its 95 % interval."""
    num_live = len(alike_LL)
    occurs = ranks_LK < num_live
    values = np.take_along_axis(alike_LL, np.minimum(ranks_LK, num_live - 1), 1)
    by_token = ((values * occurs).sum(1) / np.maximum(occurs.sum(1), 1))[occurs.any(1)]
    return {"mean": float(by_token.mean()), "half_interval": float(1.96 * by_token.std() / math.sqrt(by_token.size))}


def measure(data: list[Path] | None, vocab_size: int) -> dict[str, Any]:
    """One vocabulary's lines."""
    prepared = prepare_cached(data, "bpe", vocab_size)
    alike_LL = alikeness(prepared)
    if len(alike_LL) <= NEIGHBOURS:
        raise InputError(f"{len(alike_LL)} different tokens are too few for {NEIGHBOURS} neighbours: give more text.")
    found = choices(alike_LL, prepared.vocab_size)
    return {
        "tokens": len(prepared.train), "occurring": len(alike_LL),
        "lines": {name: means(alike_LL, ranks_LK) for name, ranks_LK in found.items()},
    }  # fmt: skip


def report(result: dict[str, Any]) -> str:
    """The table."""
    sizes = result["vocabularies"]
    names = next(iter(sizes.values()))["lines"]
    rows = []
    for name in names:
        cells = (size["lines"][name] for size in sizes.values())
        rows.append([name, *(f"{cell['mean']:.3f} ± {cell['half_interval']:.3f}" for cell in cells)])
    corpora = (f"{int(v):,}: {s['tokens']:,} tokens, {s['occurring']:,} different" for v, s in sizes.items())
    return f"""# Do the crystal's neighbours stand in like places?

How alike the tokens before and after a token and its {NEIGHBOURS} neighbours are: the mean over tokens, neighbours and
both sides of sum sqrt(p q), 0 for nothing in common, 1 for the same; with the 95 % interval over tokens.

{result["data"]}. Vocabulary {"; ".join(corpora)}. Commit {result["commit"]}, {result["date"]}.

`{result["command"]}`

{markdown(["neighbours", *(f"vocabulary {int(v):,}" for v in sizes)], rows)}
The line of dealt ratios gives each token others that are as near in rank as the crystal's are on average, without its
arithmetic.
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="default: the embedded corpus")
    parser.add_argument("--vocab-size", type=int, nargs="+", default=list(VOCABULARIES))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    folder = results_folder(options.out)
    result = facts(shlex.join(["python", "-m", "cllm_spheres_bench.crystal_contexts", *sys.argv[1:]])) | {
        "data": str(options.data or "The source text of Python's standard library"),
        "vocabularies": {
            str(size): measure(None if options.data is None else [options.data], size) for size in options.vocab_size
        },
    }
    text = report(result)
    write_results(folder, "crystal_contexts", result, text)
    print(text)


if __name__ == "__main__":
    with told():
        main()

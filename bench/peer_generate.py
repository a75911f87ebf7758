"""An order (JSON file) -> text written by the same model in PyTorch as nanoGPT writes it: without a cache.

    python -m cllm_spheres_bench.peer_generate ORDER.json

Every token is drawn from the logits of a whole window, as long as the block. Prints one line of JSON a turn,
{"tokens_per_s": ...}, for each line on standard input.
"""

# B sequences, T positions, V vocabulary

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from cllm_spheres_bench.peer_torch import Order, Variant, build_model, set_weights

TEMPERATURE = 0.8
LEAST_TOKENS = 3


def write(model: Any, order: Order, seconds: float) -> float:
    """Tokens a second of one text that fills the block already."""
    import torch
    from torch.nn import functional as F

    ids_BT = torch.ones((1, order.block_size), dtype=torch.int64)
    began, count = time.perf_counter(), 0
    with torch.no_grad():
        while time.perf_counter() - began < seconds or count < LEAST_TOKENS:
            logits_BV = model.next_logits(ids_BT[:, -order.block_size :]) / TEMPERATURE
            following = torch.multinomial(F.softmax(logits_BV, -1), 1)
            ids_BT = torch.cat((ids_BT, following), 1)
            count += 1
    return count / (time.perf_counter() - began)


def main() -> None:
    """A turn for each line that comes, until there are no more."""
    import torch
    from cllm_spheres_bench.children import end_with
    from safetensors.torch import load_file

    order = Order(**json.loads(Path(sys.argv[1]).read_text()))
    end_with(order.parent)
    variant = Variant(**order.variant)
    torch.set_num_threads(variant.threads)
    torch.set_flush_denormal(True)
    model = build_model(order, variant.attention, variant.gelu).eval()
    set_weights(model, load_file(order.weights))
    write(model, order, 0.0)  # warm
    for line in sys.stdin:
        print(json.dumps({"tokens_per_s": write(model, order, float(line))}), flush=True)


if __name__ == "__main__":
    main()

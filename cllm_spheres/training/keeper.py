"""The weights in shared memory and where the run stands -> checkpoints, and back."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from cllm_spheres.checkpoint.checkpoint import Checkpoint
from cllm_spheres.checkpoint.fingerprint import differences
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.config import Config
from cllm_spheres.errors import InputError
from cllm_spheres.model.layout import Layout
from cllm_spheres.spheres.node_zero import NodeZero
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training.metrics import Metrics
from cllm_spheres.training.numerics import fingerprint


@dataclass
class Progress:
    """Where a run stands. Steps count from 1; -1 is never."""

    step: int = 0
    evaluated: int = -1  # the last step that was evaluated
    saved: int = -1  # the last step that was saved
    best_loss: float | None = None
    best_step: int = 0
    worse: int = 0  # evaluations since the best


class Keeper:
    """Saves and restores one run."""

    def __init__(
        self, store: Store, layout: Layout, config: Config, prepared: Prepared, node_zero: NodeZero, metrics: Metrics
    ) -> None:
        self.store, self.layout, self.config, self.prepared = store, layout, config, prepared
        self.node_zero, self.metrics = node_zero, metrics

    def save(self, progress: Progress, best: bool = False) -> None:
        """Save the last whole step; `best` points checkpoints/best to it. Older ones are pruned. SaveFailed."""
        began = time.monotonic()
        state = {
            **asdict(progress), "applied": self.node_zero.applied,
            "sequences": progress.step * self.node_zero.job.batch_size, "total_tokens": self.metrics.total_tokens,
            "seed": self.config.seed, "spheres": self.config.spheres, "batch_size": self.config.batch_size,
            "data": self.prepared.fingerprint, "layout": asdict(self.layout.shape),
            "fingerprint": fingerprint(self.node_zero.job.dtype),
        }  # fmt: skip
        optimizer = {f"{kind}.{name}": view for kind, views in self._moments().items() for name, view in views.items()}
        path = self.store.save(
            progress.step, self.layout.views(self.node_zero.memory.params), optimizer, state,
            huggingface_config(self.config, self.prepared.eot), self.prepared.folder / "tokenizer.json",
        )  # fmt: skip
        progress.saved = progress.step
        if best:
            self.store.mark_best(progress.step)
        self.store.prune(self.config.keep)
        seconds = time.monotonic() - began
        self.metrics.event(
            "best" if best else "saved",
            f"Saved step {progress.step:,}{', the best so far,' if best else ''} in {seconds:.2f} s.",
            progress.step, path=str(path), seconds=seconds, val_loss=progress.best_loss,
        )  # fmt: skip

    def restore(self, checkpoint: Checkpoint, exact: bool) -> tuple[Progress, int]:
        """Weights, moments and counters as they were; the padding is zero already. Also the updates applied.

        Where the numerics are not the checkpoint's, an event says so; with `exact` that is an InputError.
        """
        params, moments, state = self.layout.views(self.node_zero.memory.params), self._moments(), checkpoint.state
        for name, tensor in checkpoint.model_tensors():
            params[name][...] = tensor
        for name, tensor in checkpoint.optimizer_tensors():
            kind, _, tensor_name = name.partition(".")
            moments[kind][tensor_name][...] = tensor
        self.metrics.total_tokens, self.metrics.skipped = state["total_tokens"], state["step"] - state["applied"]
        changed = differences(state["fingerprint"], fingerprint(self.node_zero.job.dtype))
        if changed and exact:
            raise InputError(
                f"--exact: the numerics are not those of {checkpoint.path}: {'; '.join(changed)}."
                " Without --exact the run goes on, with other bits."
            )
        if changed:
            self.metrics.event(
                "fingerprint", "The numerics are not the checkpoint's, so the bits may differ: " + "; ".join(changed),
                checkpoint.step, differences=changed,
            )  # fmt: skip
        progress = Progress(
            checkpoint.step, state["evaluated"], checkpoint.step, state["best_loss"], state["best_step"], state["worse"]
        )
        return progress, state["applied"]

    def _moments(self) -> dict[str, Any]:
        memory = self.node_zero.memory
        kinds = {"moments": memory.moments} | ({"squares": memory.squares} if memory.sizes.has_squares else {})
        return {kind: self.layout.views(buffer) for kind, buffer in kinds.items()}


def huggingface_config(config: Config, eot: int) -> dict[str, Any]:
    """config.json of a checkpoint: a GPT-2 as other tools describe it."""
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_ctx": config.block_size, "n_embd": config.width,
        "n_layer": config.layers, "n_head": config.heads, "n_inner": config.ff_width,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "bias": config.bias, "bos_token_id": eot, "eos_token_id": eot, "torch_dtype": "float32",
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
    }  # fmt: skip

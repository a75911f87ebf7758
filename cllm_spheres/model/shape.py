"""The hyperparameters of a model, of whatever family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of a model. A field that older checkpoints lack has a default: what models were before it."""

    vocab_size: int
    block_size: int
    layers: int
    heads: int
    width: int
    ff_width: int
    bias: bool = True
    family: str = "gpt2"

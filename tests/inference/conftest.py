"""Models with random weights, so large that every part of them counts, and a tokenizer of characters."""

from __future__ import annotations

import numpy as np
import pytest

from cllm_spheres.inference.model import Model
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape
from cllm_spheres.text.tokenizer import CharTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def random_model(block_size=24, layers=2, heads=2, width=24, ff_width=40, bias=True, letters=LETTERS, size=0.3):
    """A model of letters; `size` is the standard deviation of its matrices."""
    tokenizer = CharTokenizer(letters)
    shape = Shape(tokenizer.vocab_size, block_size, layers, heads, width, ff_width, bias)
    rng = np.random.default_rng(3)
    tensors = {}
    for tensor in Layout(shape).tensors:
        values = rng.standard_normal(tensor.shape) * (size if len(tensor.shape) == 2 else 0.5)
        is_gain = tensor.name.endswith("weight") and len(tensor.shape) == 1
        tensors[tensor.name] = (values + is_gain).astype(np.float32)
    return Model(shape, tokenizer, tensors)


@pytest.fixture(scope="session")
def model():
    return random_model()

"""A model's tensors -> its parameters in one flat buffer, with what else writing text needs: layout and tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from cllm_spheres.model.arena import new_arena
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape
from cllm_spheres.text.tokenizer import Tokenizer


class Weights:
    """The parameters of a GPT-2, and its tokenizer."""

    def __init__(self, shape: Shape, tokenizer: Tokenizer, tensors: Mapping[str, np.ndarray]) -> None:
        self.shape, self.tokenizer = shape, tokenizer
        self.layout = Layout(shape)
        self.params_P = new_arena(self.layout.size)  # float32
        self.params_P[:] = 0
        self.layout.fill(self.params_P, tensors)

    @property
    def parameters(self) -> Mapping[str, np.ndarray]:
        """Names -> writable float32 views. Changing them in place counts in the next call."""
        return MappingProxyType(self.layout.views(self.params_P))

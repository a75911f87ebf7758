"""Cards of soft targets, and the same as arrays for the twins."""

from __future__ import annotations

import numpy as np

from cllm_spheres.kernels.soft_targets import card

KINDS = ("table", "one neighbour", "uniform")


class Soft:
    """`address` is what the kernels take, `twin` the alpha and q_VV of `naive.wanted`."""

    def __init__(self, kind: str, num_tokens: int, rng, alpha: float = 0.3) -> None:
        v, k = num_tokens, {"table": min(5, num_tokens - 1), "one neighbour": 1, "uniform": 0}[kind]
        q_VV = np.full((v, v), 1 / v)
        self.ids_VK, self.weights_VK = np.empty((v, k), np.int32), np.empty((v, k), np.float32)
        if k:
            q_VV[:] = 0
            for token in range(v):
                others = np.delete(np.arange(v), token)
                self.ids_VK[token] = rng.permutation(others)[:k]
                self.weights_VK[token] = rng.dirichlet(np.ones(k))
                q_VV[token, self.ids_VK[token]] = self.weights_VK[token]
        self._card = card(alpha, k, self.ids_VK.ctypes.data, self.weights_VK.ctypes.data)
        self.address, self.twin = self._card.ctypes.data, (alpha, q_VV)

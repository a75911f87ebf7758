"""A model's description -> the floating-point operations of a token, as they are usually counted.

A multiplication and an addition for each element of a product and each term of its sums: of matrix products, and of
the two products of attention, of which a causal mask needs half. What is computed again does not count, nor do norms,
activations and softmax. Source: Chowdhery et al., PaLM (2022), appendix B.
"""

from __future__ import annotations

from cllm_spheres.model.description import Attention, Head, Linear, Step
from cllm_spheres.model.families import described
from cllm_spheres.model.shape import Shape

TRAINING = 3  # times the forward pass: the backward has two products for each of it, one for either gradient


def step_flops(step: Step, shape: Shape) -> int:
    """Of one step forward, for a token of a full sequence."""
    if isinstance(step, Linear):
        return 2 * step.x.width * step.out.width
    if isinstance(step, Head):
        return 2 * step.x.width * shape.vocab_size
    return 2 * shape.block_size * step.out.width if isinstance(step, Attention) else 0


def flops_per_token(shape: Shape, *, training: bool = True) -> int:
    """Of a whole model."""
    forward = sum(step_flops(step, shape) for step in described(shape).steps)
    return TRAINING * forward if training else forward

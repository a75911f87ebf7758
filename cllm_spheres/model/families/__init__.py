"""The families of models: each a module with `tensors`, `describe` and `check`, and one of its files elsewhere.

docs/models.md tells how to add one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cllm_spheres.model.description import Description, Files, Tensor
from cllm_spheres.model.families import gpt2, gpt2_files
from cllm_spheres.model.shape import Shape


@dataclass(frozen=True)
class Family:
    """A kind of model. tensors: in the order of our files; check: ValueError where sizes do not fit each other."""

    name: str  # in our files
    title: str  # in sentences
    tensors: Callable[[Shape], list[Tensor]]
    describe: Callable[[Shape, Description], None]
    check: Callable[[Shape], None]
    files: Files


FAMILIES = {"gpt2": Family("gpt2", "GPT-2", gpt2.tensors, gpt2.describe, gpt2.check, gpt2_files.FILES)}


def family_of(shape: Shape) -> Family:
    """ValueError for a family that there is not."""
    if shape.family not in FAMILIES:
        raise ValueError(f"there is no family {shape.family!r}, only {', '.join(FAMILIES)}")
    return FAMILIES[shape.family]


def tensors_of(shape: Shape) -> list[Tensor]:
    """The tensors of a model, in the order of our files."""
    return family_of(shape).tensors(shape)


def described(shape: Shape) -> Description:
    """The forward pass of a model. ValueError where it does not fit the model's tensors."""
    description = Description()
    family_of(shape).describe(shape, description)
    description.check({tensor.name: tensor.shape for tensor in tensors_of(shape)})
    return description

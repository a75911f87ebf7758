"""A verified checkpoint -> the shape of its model, checked against its tensors before any memory is taken for it."""

from __future__ import annotations

from dataclasses import fields

from cllm_spheres.checkpoint.checkpoint import STATE, Checkpoint
from cllm_spheres.errors import shown
from cllm_spheres.model.layout import Layout, Shape


def shape_of(saved: Checkpoint) -> Shape:
    """The shape that the state names. ValueError where it is none, or not that of the tensors."""
    sizes = saved.state.get("layout")
    if not isinstance(sizes, dict) or sizes.keys() != {field.name for field in fields(Shape)}:
        raise ValueError(f"{STATE} has layout {shown(sizes)}")
    for name, value in sizes.items():
        if type(value) is not (bool if name == "bias" else int) or (name != "bias" and value < 1):
            raise ValueError(f"{STATE} has {name} {shown(value)}")
    shape = Shape(**sizes)
    if shape.width % shape.heads:
        raise ValueError(f"{STATE} has {shape.heads} heads for a width of {shape.width}")
    if shape.layers > len(saved.model):
        raise ValueError(f"{STATE} has {shape.layers} layers, the model {len(saved.model)} tensors")
    for tensor in Layout(shape).tensors:
        found = saved.model.get(tensor.name)
        if found is None or found.shape != tensor.shape:
            is_there = "is missing" if found is None else f"has shape {found.shape}"
            raise ValueError(f"{tensor.name} {is_there}, expected {tensor.shape}")
    return shape

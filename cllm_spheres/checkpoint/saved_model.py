"""A run -> its verified checkpoint with the shape and the tokenizer of its model, before any memory is taken for it."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from cllm_spheres.checkpoint.checkpoint import STATE, Checkpoint
from cllm_spheres.checkpoint.store import Store, Which
from cllm_spheres.errors import InputError, nearest, shown
from cllm_spheres.model.families import family_of
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape
from cllm_spheres.text.tokenizer import Tokenizer, load_tokenizer


def open_run(run: Path, which: Which = None) -> tuple[Checkpoint, Shape, Tokenizer]:
    """A checkpoint of a run: the best if there is one, "last", or a step. InputError where there is none."""
    try:
        found = run.is_dir()
    except (OSError, ValueError) as error:
        raise InputError(f"Cannot read {run}: {getattr(error, 'strerror', error)}.") from None
    if not found:
        known = [p.name for p in run.parent.iterdir() if p.is_dir()] if run.parent.is_dir() else []
        raise InputError(f"There is no run {run}." + (f" In {run.parent}: {nearest(run.name, known)}" if known else ""))
    saved = Store(run).load(which, optimizer=False)
    return saved, *model_of(saved)


def model_of(saved: Checkpoint) -> tuple[Shape, Tokenizer]:
    """The shape of a checkpoint's model, and its tokenizer. InputError where they are not of this kind."""
    try:
        shape, tokenizer = shape_of(saved), load_tokenizer(saved.tokenizer_path)
        if tokenizer.vocab_size != shape.vocab_size:
            raise ValueError(f"its tokenizer has {tokenizer.vocab_size} tokens, the model {shape.vocab_size}")
    except ValueError as error:
        raise InputError(f"{saved.path} does not hold a model of this kind: {error}") from None
    return shape, tokenizer


def shape_of(saved: Checkpoint) -> Shape:
    """The shape that the state names. ValueError where it is none, or not that of the tensors."""
    shape = shape_of_state(saved.state)
    if shape.layers > len(saved.model):
        raise ValueError(f"{STATE} has {shape.layers} layers, the model {len(saved.model)} tensors")
    for tensor in Layout(shape).tensors:
        found = saved.model.get(tensor.name)
        if found is None or found.shape != tensor.shape:
            is_there = "is missing" if found is None else f"has shape {found.shape}"
            raise ValueError(f"{tensor.name} {is_there}, expected {tensor.shape}")
    return shape


def layout_of(state: dict[str, Any]) -> Any:
    """The fields of the shape that a state.json names, whatever they are.

    Those that older checkpoints lack have the defaults of Shape: one without a family is a GPT-2.
    """
    layout = state.get("layout")
    if not isinstance(layout, dict):
        return layout
    return {field.name: field.default for field in fields(Shape) if field.default is not MISSING} | layout


def shape_of_state(state: dict[str, Any]) -> Shape:
    """The shape that a state.json names. ValueError where it is none."""
    sizes, kinds = layout_of(state), {field.name: field.type for field in fields(Shape)}
    if not isinstance(sizes, dict) or sizes.keys() != kinds.keys():
        raise ValueError(f"{STATE} has layout {shown(sizes)}")
    for name, value in sizes.items():
        if type(value).__name__ != kinds[name] or (type(value) is int and value < 1):
            raise ValueError(f"{STATE} has {name} {shown(value)}")
    shape = Shape(**sizes)
    try:
        family_of(shape).check(shape)
    except ValueError as error:
        raise ValueError(f"{STATE}: {error}") from None
    return shape

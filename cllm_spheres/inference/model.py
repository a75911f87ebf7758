"""A run or a checkpoint -> a model in this process: logits, losses and gradients, and text.

The kernels are those of training. B sequences, T tokens, V vocabulary, P parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from cllm_spheres.checkpoint.checkpoint import STATE, Checkpoint
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import InputError, nearest, shown
from cllm_spheres.inference.sampling import choose, validate
from cllm_spheres.kernels.sizes import PROGRESS_WORDS
from cllm_spheres.model.geometry import geometry, new_arena, sequences_at_a_time
from cllm_spheres.model.layout import Layout, Shape
from cllm_spheres.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

Ids = npt.ArrayLike


class Model:
    """A GPT-2 with its tokenizer. Not for use by several threads at once: it has one workspace."""

    def __init__(self, shape: Shape, tokenizer: Tokenizer, tensors: Mapping[str, np.ndarray]) -> None:
        self.shape, self.tokenizer = shape, tokenizer
        self._layout = Layout(shape)
        self._params_P = new_arena(self._layout.size)
        self._params_P[:] = 0
        self._layout.fill(self._params_P, tensors)
        self._geometry = geometry(self._layout, largest_shard=sequences_at_a_time(shape.block_size, shape.width))
        self._arena = new_arena(self._geometry.arena_floats)
        self._progress = np.zeros(PROGRESS_WORDS, np.int64)

    def __repr__(self) -> str:
        s = self.shape
        return (
            f"<Model of {self._layout.num_parameters:,} parameters: {s.layers} layers, width {s.width},"
            f" {s.heads} heads, block {s.block_size}, {self.tokenizer.kind} vocabulary of {s.vocab_size:,}>"
        )

    @property
    def parameters(self) -> Mapping[str, np.ndarray]:
        """Names -> writable float32 views. Changing them in place counts in the next call."""
        return MappingProxyType(self._layout.views(self._params_P))

    def logits(self, ids: Ids) -> np.ndarray:
        """float32 [T, V]: what each of T tokens says about the one that follows it. InputError for bad ids."""
        ids_T = self._checked(ids, 1)
        return self._logits(ids_T, 0)

    def loss_and_gradients(self, inputs: Ids, targets: Ids) -> tuple[float, dict[str, np.ndarray]]:
        """Mean loss in nats a token of [B, T] ids, and its gradient: parameter names -> float32 arrays."""
        from cllm_spheres.model.gpt import compute_shard

        inputs_BT, targets_BT = self._checked(inputs, 2), self._checked(targets, 2)
        if inputs_BT.shape != targets_BT.shape:
            raise InputError(f"inputs have shape {inputs_BT.shape}, targets {targets_BT.shape}: they must be equal.")
        count, length = inputs_BT.shape
        segment_P = np.zeros(self._layout.size, np.float32)
        loss = compute_shard.call(
            self._geometry.array.ctypes.data, self._params_P.ctypes.data, 0, segment_P.ctypes.data,
            self._arena.ctypes.data, inputs_BT.ctypes.data, targets_BT.ctypes.data, count, length,
            1.0 / (count * length), 0, 0, self._progress.ctypes.data,
        )  # fmt: skip
        return loss / (count * length), self._layout.views(segment_P)

    def generate(
        self, prompt: str = "", *, tokens: int = 200, temperature: float = 0.8, top_k: int | None = None,
        top_p: float | None = None, seed: int = 1337,
    ) -> str:  # fmt: skip
        """The prompt and up to `tokens` tokens more; temperature 0 is greedy. An end of text stops before."""
        return prompt + "".join(
            self.stream(prompt, tokens=tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        )

    def stream(
        self, prompt: str = "", *, tokens: int = 200, temperature: float = 0.8, top_k: int | None = None,
        top_p: float | None = None, seed: int = 1337,
    ) -> Iterator[str]:  # fmt: skip
        """As `generate`, without the prompt, piece by piece as it is written."""
        from cllm_spheres.crystal.random import PURPOSE_SAMPLING, key_of, uniform

        validate(temperature, top_k, top_p, tokens)
        if not 0 <= seed < 2**63:
            raise InputError(f"The seed is {seed}: give 0 to {2**63 - 1}.")
        ids = [self.tokenizer.eot, *self.tokenizer.encode(prompt)]
        decoder = StreamDecoder(self.tokenizer)
        key = np.uint64(key_of(seed, PURPOSE_SAMPLING, 0))  # as a plain int, half of all keys do not fit into 63 bits
        for n in range(tokens):
            window = np.array(ids[-self.shape.block_size :], np.int32)
            logits_V = self._logits(window, len(window) - 1)[0]
            number = uniform(key, n)
            token = choose(logits_V, temperature=temperature, top_k=top_k, top_p=top_p, uniform=number)
            if token == self.tokenizer.eot:
                break
            ids.append(token)
            if piece := decoder.feed(token):
                yield piece
        if rest := decoder.finish():
            yield rest

    def _logits(self, ids_T: np.ndarray, first_row: int) -> np.ndarray:
        from cllm_spheres.model.gpt import compute_logits

        logits = np.empty((len(ids_T) - first_row, self.shape.vocab_size), np.float32)
        compute_logits.call(
            self._geometry.array.ctypes.data, self._params_P.ctypes.data, self._arena.ctypes.data, ids_T.ctypes.data,
            len(ids_T), first_row, logits.ctypes.data, self._progress.ctypes.data,
        )  # fmt: skip
        return logits

    def _checked(self, ids: Ids, dimensions: int) -> np.ndarray:
        """int32, contiguous; InputError where the kernels would read or write outside."""
        array = np.asarray(ids)
        if array.ndim != dimensions or array.size == 0 or array.dtype.kind not in "iu":
            raise InputError(
                f"Expected whole numbers with {dimensions} dimension(s), got {array.dtype} of shape {array.shape}."
            )
        if array.shape[-1] > self.shape.block_size:
            raise InputError(f"{array.shape[-1]} tokens are more than the model's block of {self.shape.block_size}.")
        if array.min() < 0 or array.max() >= self.shape.vocab_size:
            raise InputError(
                f"Ids go from {array.min()} to {array.max()}; the vocabulary is 0 to {self.shape.vocab_size - 1}."
            )
        return np.ascontiguousarray(array, np.int32)


def load(run: str | Path, checkpoint: str | int | None = None) -> Model:
    """The model of a run: its best checkpoint, or "last", or a step. InputError where there is none."""
    run = Path(run)
    try:
        found = run.is_dir()
    except OSError as error:
        raise InputError(f"Cannot read {run}: {error.strerror}.") from None
    if not found:
        known = [p.name for p in run.parent.iterdir() if p.is_dir()] if run.parent.is_dir() else []
        raise InputError(f"There is no run {run}." + (f" In {run.parent}: {nearest(run.name, known)}" if known else ""))
    saved: Checkpoint = Store(run).load(checkpoint, optimizer=False)
    try:
        shape = _shape_of(saved)
        tokenizer = load_tokenizer(saved.tokenizer_path)
        if tokenizer.vocab_size != shape.vocab_size:
            raise ValueError(f"its tokenizer has {tokenizer.vocab_size} tokens, the model {shape.vocab_size}")
        return Model(shape, tokenizer, saved.model)
    except ValueError as error:
        raise InputError(f"{saved.path} does not hold a model of this kind: {error}") from None


def _shape_of(saved: Checkpoint) -> Shape:
    """The shape that the state names. ValueError where it is none, or not that of the tensors: before any memory is
    taken for it.
    """
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


def newest_run(folder: Path) -> Path:
    """The run in a folder that was written to last; InputError where there is none."""
    files = [path for path in folder.glob("*/metrics.jsonl") if path.is_file()]
    runs = sorted(files, key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(f"There is no run in {folder}/. Train one: cllm-spheres train")
    return runs[-1].parent

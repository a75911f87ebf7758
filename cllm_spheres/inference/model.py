"""A run or a checkpoint -> a model in this process: logits, losses and gradients, and text.

Logits, losses and gradients come from the kernels of training, text from a `Writer` with a cache of keys and values.
B sequences, T tokens, V vocabulary, P parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cllm_spheres.checkpoint.saved_model import open_run
from cllm_spheres.errors import InputError, shown
from cllm_spheres.inference.options import check_prompt, is_whole, options_of
from cllm_spheres.inference.weights import Weights
from cllm_spheres.model.shape import Shape
from cllm_spheres.text.handed import as_folder
from cllm_spheres.text.tokenizer import Tokenizer

if TYPE_CHECKING:  # they compile their kernels when they are imported: only those who write text shall wait for that
    from cllm_spheres.inference.beam import Beam
    from cllm_spheres.inference.many import Written
    from cllm_spheres.inference.writer import Writer
    from cllm_spheres.model.workspace import Workspace

Ids = npt.ArrayLike
MOST_AT_ONCE = 32  # texts: more are hardly quicker, and each takes memory for its keys and values


class Model(Weights):
    """A GPT-2 with its tokenizer. Not for use by several threads at once: a workspace is for one at a time."""

    def __init__(self, shape: Shape, tokenizer: Tokenizer, tensors: Mapping[str, np.ndarray]) -> None:
        super().__init__(shape, tokenizer, tensors)
        self._workspaces: dict[str, Workspace] = {}

    def __repr__(self) -> str:
        s = self.shape
        return (
            f"<Model of {self.layout.num_parameters:,} parameters: {s.layers} layers, width {s.width},"
            f" {s.heads} heads, block {s.block_size}, {self.tokenizer.kind} vocabulary of {s.vocab_size:,}>"
        )

    def logits(self, ids: Ids) -> np.ndarray:
        """float32 [T, V]: what each of T tokens says about the one that follows it; [B, T, V] for [B, T] ids.

        A sequence has the same bits alone and in a batch. InputError for bad ids.
        """
        ids = self._checked(ids, 1, 2)
        rows = [self._workspace("logits").logits(ids_T) for ids_T in ids.reshape(-1, ids.shape[-1])]
        return rows[0] if ids.ndim == 1 else np.stack(rows)

    def hidden_states(self, ids: Ids) -> np.ndarray:
        """float32 [layers + 1, T, C], or [layers + 1, B, T, C] for [B, T] ids: the residual stream of C channels.

        The first is the sum of token and position embeddings, number n the output of layer n, and the last the output
        of the last layer after the final norm, which the head multiplies by wte.weight: as transformers'
        `output_hidden_states`. InputError for bad ids.
        """
        ids = self._checked(ids, 1, 2)
        states = np.stack([self._workspace("states").states(ids_T) for ids_T in ids.reshape(-1, ids.shape[-1])], axis=1)
        return states.reshape(len(states), *ids.shape, self.shape.width)

    def loss_and_gradients(self, inputs: Ids, targets: Ids) -> tuple[float, dict[str, np.ndarray]]:
        """Mean loss in nats a token of [B, T] ids, and its gradient: parameter names -> float32 arrays."""
        inputs_BT, targets_BT = self._checked(inputs, 2), self._checked(targets, 2)
        if inputs_BT.shape != targets_BT.shape:
            raise InputError(f"inputs have shape {inputs_BT.shape}, targets {targets_BT.shape}: they must be equal.")
        segment_P = np.zeros(self.layout.size, np.float32)
        loss, _ = self._workspace("train").shard(inputs_BT, targets_BT, segment_P, 1.0 / inputs_BT.size)
        return loss / inputs_BT.size, self.layout.views(segment_P)

    def generate(self, prompt: str = "", *, dtype: str = "fp32", threads: int | None = None, **options: Any) -> str:
        """The prompt and up to `tokens` tokens more; temperature 0 is greedy. An end of text stops before.

        options: those of `Options`. dtype: of the weights, "fp32" or "bf16". threads: None takes what the size is
        worth.
        """
        return prompt + "".join(self.stream(prompt, dtype=dtype, threads=threads, **options))

    def stream(
        self, prompt: str = "", *, dtype: str = "fp32", threads: int | None = None, **options: Any
    ) -> Iterator[str]:
        """As `generate`, without the prompt, piece by piece as it is written."""
        chosen, ids = options_of(options), self.encode(prompt)
        with self.writer(dtype=dtype, threads=threads) as writer:
            writer.begin(ids, chosen)
            while writer.busy:
                for piece in writer.step():
                    if piece.text:
                        yield piece.text

    def generate_all(
        self,
        prompts: Sequence[str],
        *,
        samples: int = 1,
        dtype: str = "fp32",
        threads: int | None = None,
        **options: Any,
    ) -> Iterator[Written]:
        """`samples` texts for each of the prompts, written together; each as it ends."""
        if isinstance(prompts, str):
            raise InputError(f"The prompts are {shown(prompts)}: give a list of texts, such as [{shown(prompts)}].")
        if not (is_whole(samples) and samples >= 1):
            raise InputError(f"--samples {shown(samples)} must be 1 or above.")
        chosen, all_ids = options_of(options), [self._ids_of(n, prompts) for n in range(len(prompts))]
        if not all_ids:
            return
        at_once = min(MOST_AT_ONCE, len(prompts) * samples)
        with self.writer(at_once, dtype=dtype, threads=threads) as writer:
            from cllm_spheres.inference.many import write_all

            yield from write_all(writer, all_ids, chosen, samples)

    def beams(
        self,
        prompt: str = "",
        *,
        tokens: int | None = None,
        width: int = 4,
        length_penalty: float = 1.0,
        best: int = 1,
        dtype: str = "fp32",
        threads: int | None = None,
    ) -> list[Beam]:
        """The `best` likeliest texts that a beam search of a width finds, the likeliest first: see `beam_search`.

        tokens: None is 200, or what the block leaves.
        """
        from cllm_spheres.inference.beam import beam_search

        return beam_search(
            self, self.encode(prompt), tokens=tokens, width=width, length_penalty=length_penalty, best=best,
            dtype=dtype, threads=threads,
        )  # fmt: skip

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt; an empty one is an end of text, behind which a text begins.

        InputError for what is no text, or has characters that the vocabulary lacks.
        """
        if not isinstance(prompt, str):
            raise InputError(f"The prompt is {shown(prompt)}: give a text.")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise InputError(f"The prompt {shown(prompt)} is not Unicode: it holds half a surrogate pair.")
        return self.tokenizer.encode(prompt) or [self.tokenizer.eot]

    def decode(self, ids: Ids) -> str:
        """The text of ids, of any number. An end of text becomes nothing, bytes that are not UTF-8 become U+FFFD."""
        return self.tokenizer.decode(self._whole_numbers(ids, 1).tolist())

    def _ids_of(self, number: int, prompts: Sequence[str]) -> list[int]:
        """The ids of one of many prompts; an InputError says which one."""
        try:
            return check_prompt(self.encode(prompts[number]), self.shape)
        except InputError as error:
            if len(prompts) == 1:
                raise
            raise InputError(f"Prompt {number + 1} of {len(prompts):,}: {error}") from None

    def new_writer(self, slots: int = 1, *, dtype: str = "fp32", threads: int | None = None) -> Writer:
        """A `Writer` of these weights as they are now; whoever takes it closes it."""
        from cllm_spheres.inference.writer import Writer

        return Writer(self, slots, dtype=dtype, threads=threads)

    @contextlib.contextmanager
    def writer(self, slots: int = 1, *, dtype: str = "fp32", threads: int | None = None) -> Iterator[Writer]:
        """`new_writer`, closed at the end."""
        writer = self.new_writer(slots, dtype=dtype, threads=threads)
        try:
            yield writer
        finally:
            writer.close()

    def _workspace(self, purpose: str) -> Workspace:
        """The workspace for a purpose, with an arena from its first use on."""
        from cllm_spheres.model.workspace import Workspace

        if purpose not in self._workspaces:
            self._workspaces[purpose] = Workspace(self.layout, self.params_P, purpose=purpose)
        return self._workspaces[purpose]

    def _checked(self, ids: Ids, *dimensions: int) -> np.ndarray:
        """int32, contiguous; InputError where the kernels would read or write outside."""
        array = self._whole_numbers(ids, *dimensions)
        if array.size == 0:
            raise InputError(f"There is nothing to compute: the ids have shape {array.shape}.")
        if array.shape[-1] > self.shape.block_size:
            raise InputError(f"{array.shape[-1]} tokens are more than the model's block of {self.shape.block_size}.")
        return np.ascontiguousarray(array, np.int32)

    def _whole_numbers(self, ids: Ids, *dimensions: int) -> np.ndarray:
        """Ids of the vocabulary with one of these numbers of dimensions, else InputError."""
        expected = f"Expected whole numbers with {' or '.join(map(str, dimensions))} dimension(s)"
        try:
            array = np.asarray(ids)
        except ValueError:  # numpy's word for rows of different lengths
            raise InputError(f"{expected}, got rows of different lengths: give each on its own, or pad them.") from None
        if array.ndim not in dimensions or (array.size and array.dtype.kind not in "iu"):
            raise InputError(f"{expected}, got {array.dtype} of shape {array.shape}.")
        if array.size and (array.min() < 0 or array.max() >= self.shape.vocab_size):
            raise InputError(
                f"Ids go from {array.min()} to {array.max()}; the vocabulary is 0 to {self.shape.vocab_size - 1}."
            )
        return array


def load(run: str | Path, checkpoint: str | int | None = None) -> Model:
    """The model of a run: its best checkpoint, or "last", or a step. InputError where there is none."""
    saved, shape, tokenizer = open_run(as_folder(run), checkpoint)
    return Model(shape, tokenizer, saved.model)


def newest_run(folder: Path) -> Path:
    """The run in a folder that was written to last; InputError where there is none."""
    files = [path for path in folder.glob("*/metrics.jsonl") if path.is_file()]
    runs = sorted(files, key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(f"There is no run in {folder}/. Train one: cllm-spheres train")
    return runs[-1].parent

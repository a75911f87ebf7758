"""The words in which a family of models is described: its tensors, and its forward pass as coarse steps.

A stream is what flows between the steps: rows of tokens, so many channels each. The backward pass, the memory that a
training needs and the calls of kernels follow from the steps (program.py); nothing here is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from cllm_spheres.model.shape import Shape


@dataclass(frozen=True)
class Tensor:
    """A tensor of a family: its name and dimensions in our files, and all that others need to know of it."""

    name: str
    shape: tuple[int, ...]
    huggingface: str  # its name in files of Hugging Face's transformers
    gguf: str  # and in GGUF files of llama.cpp
    decays: bool = False  # whether the optimizer's weight decay applies to it
    deviation: float = 0.0  # of the normal distribution its first values are drawn from
    constant: float = 0.0  # and the mean of it
    transposed: bool = False  # a matrix that stands as [out, in], such as an embedding that is the head's too
    looked_up: bool = False  # rows of it are read; it enters no product


@dataclass(frozen=True)
class Files:
    """What other tools' files say of a family besides its tensors."""

    model_type: str  # in config.json of Hugging Face's transformers
    prefix: str  # of the names of tensors there, which some files leave out
    buffers: str  # a pattern: names without the prefix of what older files hold and is no weight
    config: Callable[[Shape, int, float], dict[str, Any]]  # shape, end-of-text token, dropout -> config.json
    shape: Callable[[dict[str, Any], str], Shape]  # config.json, its path -> the shape; InputError
    stored: Callable[[Shape], Shape]  # a shape -> that of the model in a file, which may have more tensors
    architecture: str  # in GGUF files of llama.cpp
    gguf_keys: Callable[[Shape], dict[str, int | float]]  # without the architecture before them


@dataclass(frozen=True)
class Stream:
    """What a step leaves for others. group: channels of a head, where they lie head after head; else all of them."""

    name: str
    width: int
    group: int


@dataclass(frozen=True, kw_only=True)
class Step:
    """One coarse operation. block: the number of the block of layers it belongs to, None at both ends."""

    label: str  # of its time in a profile
    block: int | None = None

    @property
    def inputs(self) -> tuple[Stream, ...]:
        return ()

    @property
    def tensors(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True, kw_only=True)
class Embed(Step):
    """out = dropout(tokens[id] + positions[position])."""

    out: Stream
    tokens: str
    positions: str
    site: int

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.tokens, self.positions


@dataclass(frozen=True, kw_only=True)
class Norm(Step):
    """out = layer normalisation of x, times gain, plus bias."""

    x: Stream
    out: Stream
    gain: str
    bias: str

    @property
    def inputs(self) -> tuple[Stream, ...]:
        return (self.x,)

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.gain, self.bias


@dataclass(frozen=True, kw_only=True)
class Linear(Step):
    """out = activation(x @ weight + bias), or residual + dropout(x @ weight + bias)."""

    x: Stream
    out: Stream
    weight: str
    bias: str
    activation: str = ""  # "gelu", or none
    residual: Stream | None = None
    site: int = 0

    @property
    def inputs(self) -> tuple[Stream, ...]:
        return (self.x,) if self.residual is None else (self.x, self.residual)

    @property
    def tensors(self) -> tuple[str, ...]:
        return self.weight, self.bias


@dataclass(frozen=True, kw_only=True)
class Attention(Step):
    """out = causal attention, with dropout of its probabilities; qkv has queries, keys and values side by side."""

    qkv: Stream
    out: Stream
    heads: int
    site: int

    @property
    def inputs(self) -> tuple[Stream, ...]:
        return (self.qkv,)


@dataclass(frozen=True, kw_only=True)
class Head(Step):
    """Logits x @ weight.T, and the loss of the targets."""

    x: Stream
    weight: str

    @property
    def inputs(self) -> tuple[Stream, ...]:
        return (self.x,)

    @property
    def tensors(self) -> tuple[str, ...]:
        return (self.weight,)


def _wanted(step: Step) -> list[tuple[str, tuple[int, ...], bool]]:
    """The tensors that a step reads: name, its last dimensions, and whether there may be none."""
    match step:
        case Embed():
            return [(name, (step.out.width,), False) for name in step.tensors]
        case Norm():
            return [(step.gain, (step.x.width,), False), (step.bias, (step.x.width,), True)]
        case Linear():
            dims = step.x.width, step.out.width
            return [(step.weight, dims, False), (step.bias, dims[1:], True)]
        case Head():
            return [(step.weight, (step.x.width,), False)]
    return []


@dataclass
class Description:
    """The forward pass of a model, written down step by step by its family.

    A site is where dropout happens: its number goes into the key of the mask, so that it must never change.
    """

    steps: list[Step] = field(default_factory=list)
    _block: int | None = None

    @property
    def embedding(self) -> Embed:
        """The step by which tokens enter."""
        return next(step for step in self.steps if isinstance(step, Embed))

    @property
    def output(self) -> Head:
        """The step that gives logits."""
        return next(step for step in self.steps if isinstance(step, Head))

    @contextmanager
    def block(self, number: int) -> Iterator[str]:
        """The steps inside belong to block `number`; the prefix of its tensors' names is given."""
        self._block = number
        yield f"h.{number}."
        self._block = None

    def embed(self, tokens: str, positions: str, width: int, *, site: int) -> Stream:
        out = self._stream("x", width)
        self._add(Embed(out=out, tokens=tokens, positions=positions, site=site, label="embedding"))
        return out

    def norm(self, x: Stream, name: str) -> Stream:
        out = self._stream("normed", x.width)
        self._add(Norm(x=x, out=out, gain=f"{name}.weight", bias=f"{name}.bias", label="layer norm"))
        return out

    def linear(
        self, x: Stream, name: str, width: int, *, label: str, group: int = 0, activation: str = "",
        residual: Stream | None = None, site: int = 0,
    ) -> Stream:  # fmt: skip
        """group: channels of a head of the result, 0 where it has no heads."""
        out = self._stream(label if residual is None else "x", width, group)
        self._add(
            Linear(
                x=x, out=out, weight=f"{name}.weight", bias=f"{name}.bias", activation=activation, residual=residual,
                site=site, label=label,
            )
        )  # fmt: skip
        return out

    def attention(self, qkv: Stream, heads: int, *, site: int) -> Stream:
        out = self._stream("attended", qkv.width // 3, qkv.group)
        self._add(Attention(qkv=qkv, out=out, heads=heads, site=site, label="attention"))
        return out

    def head(self, x: Stream, weight: str) -> None:
        self._add(Head(x=x, weight=weight, label="head"))

    def check(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """ValueError where the steps do not fit the tensors (name -> dimensions), and kernels would read elsewhere."""
        used, sites = set(), []
        for step in self.steps:
            for name, dims, may_lack in _wanted(step):
                if name not in tensors and not may_lack:
                    raise ValueError(f"{step.label} reads {name}, and there is no such tensor")
                if name in tensors and tensors[name][-len(dims) :] != dims:
                    raise ValueError(f"{step.label} reads {name} as {dims}, and it is {tensors[name]}")
                used.add(name)
            if isinstance(step, (Embed, Attention)) or (isinstance(step, Linear) and step.residual):
                sites.append(step.site)
        if len(sites) != len(set(sites)):
            raise ValueError(f"a site of dropout is used twice: {sorted(sites)}")
        if not self.steps or not isinstance(self.steps[-1], Head):
            raise ValueError("the last step must be the head")
        if unused := sorted(tensors.keys() - used):
            raise ValueError(f"no step reads {', '.join(unused[:5])}")

    def _stream(self, name: str, width: int, group: int = 0) -> Stream:
        return Stream(f"{name} {len(self.steps)}", width, group or width)

    def _add(self, step: Step) -> None:
        self.steps.append(replace(step, block=self._block))

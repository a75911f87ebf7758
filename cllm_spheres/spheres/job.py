"""What a run asks of its workers, as plain data: it travels from Node Zero to the server as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from cllm_spheres.model import dtypes
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.program import Program, program
from cllm_spheres.model.shape import Shape
from cllm_spheres.spheres.memory import Sizes

OPTIMIZERS = ("adamw", "sgd")  # their numbers are kernels.optimizer.ADAMW and SGD


@dataclass(frozen=True)
class Job:
    """Shapes, data and constants of a run. Paths are absolute; counts are tokens, sequences or processes."""

    shape: Shape
    batch_size: int
    spheres: int
    workers: int
    seed: int
    train: str
    val: str
    item_bytes: int
    train_tokens: int
    val_tokens: int
    num_windows: int
    optimizer: str = "adamw"
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1
    clip: float = 1.0  # 0 is off
    dropout: float = 0.0
    recompute: str = "none"  # in the backward pass: one of model.program.RECOMPUTE; it changes no bits
    frozen: list[str] = field(default_factory=list)  # tensors that are not trained
    skip_nonfinite: bool = False
    dtype: str = "fp32"  # of the kernels' arithmetic
    alpha: float = 0.0  # the share of each target that soft targets take
    neighbours: int = 0  # of a token in the table of soft targets; 0: they are uniform over the vocabulary
    trains: bool = True  # else it evaluates the windows of `val`, and holds nothing but weights
    trace_marks: int = 0  # room for the trace of a step, for each worker
    run: str = ""  # the run's name, for those who look at the processes
    faults: list[tuple[str, int, int, str]] = field(default_factory=list)  # those of a faults.Fault each
    cores: list[int] = field(default_factory=list)  # one for each worker, or empty: not pinned

    @cached_property
    def layout(self) -> Layout:
        return Layout(self.shape, frozenset(self.frozen))

    @cached_property
    def programs(self) -> dict[str, Program]:
        """What a worker computes: the program "train" where the job trains, and "evaluate"."""
        purposes = ["train", "evaluate"] if self.trains else ["evaluate"]
        return {
            purpose: program(
                self.layout, self.dtype, largest_shard=self.largest_shard, dropout=self.dropout,
                recompute=self.recompute, purpose=purpose,
            )
            for purpose in purposes
        }  # fmt: skip

    @property
    def arena_bytes(self) -> int:
        """Of a worker: its programs take turns in one arena."""
        return max(one.arena_bytes for one in self.programs.values())

    @cached_property
    def sizes(self) -> Sizes:
        packing = dtypes.packing(self.layout, self.dtype)
        return Sizes(
            num_parameters=self.layout.size,
            num_frozen=self.layout.frozen_size,
            num_spheres=self.spheres,
            num_windows=self.num_windows,
            has_squares=self.trains and self.optimizer == "adamw",
            trains=self.trains,
            packed_bytes=packing.size_bytes,
            pack_units=packing.units,
            frozen_units=packing.frozen_units,
            trace_marks=self.trace_marks,
            soft_targets=self.shape.vocab_size * self.neighbours,
        )

    @property
    def largest_shard(self) -> int:
        """Sequences of the first sphere, which has the most."""
        return -(-self.batch_size // self.spheres)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Job:
        return cls(**{**values, "shape": Shape(**values["shape"])})

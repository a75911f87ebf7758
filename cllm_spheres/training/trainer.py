"""A run folder -> a trained model in it: the whole training, as Node Zero sees it.

for each stretch of steps up to the next evaluation or checkpoint:
    command the spheres; write what they finish; look for signals and losses
    evaluate, save
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from cllm_spheres.checkpoint.checkpoint import Checkpoint
from cllm_spheres.checkpoint.fingerprint import differences
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.config import Config
from cllm_spheres.errors import Interrupted, NonFinite
from cllm_spheres.machine import usable_cores
from cllm_spheres.model.layout import Layout
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.node_zero import NodeZero
from cllm_spheres.spheres.serving import Server
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training.evaluation import Windows
from cllm_spheres.training.metrics import Metrics, SphereSampler
from cllm_spheres.training.numerics import fingerprint
from cllm_spheres.training.plan import make_job
from cllm_spheres.training.schedule import learning_rate
from cllm_spheres.training.signals import Wishes

STEP_ENDS_WITHIN_S = 2.0  # after a signal: what takes longer is dropped before its update
TURNED_UP_EVALUATIONS = 2  # this many evaluations in a row above the best say that validation has turned up


class Trainer:
    """One run from its first or next step to its end."""

    def __init__(
        self, run: Path, config: Config, prepared: Prepared, *, stop_at: int | None, launcher: int,
        status: Callable[[str], None], server: Server | None = None,
    ) -> None:  # fmt: skip
        self.run, self.config, self.prepared = run, config, prepared
        assert config.steps is not None and config.eval_every is not None and config.save_every is not None
        assert config.eval_tokens is not None
        self.steps, self.eval_every, self.save_every = config.steps, config.eval_every, config.save_every
        self.last = min(self.steps, stop_at or self.steps)
        self.layout = Layout(make_job(config, prepared).shape)
        self.store = Store(run)
        self.step = 0
        self.evaluated = self.saved = -1  # the last step that was evaluated, and saved
        self.best_loss: float | None = None
        self.best_step = 0
        self.worse = 0  # evaluations since the best
        self.windows = Windows(prepared, config.block_size, config.eval_tokens)
        self.metrics = Metrics(run / "metrics.jsonl")
        self.node_zero = NodeZero(make_job(config, prepared), status, self._leave_early, server)
        self._began = time.monotonic()
        self.wishes = Wishes(launcher, self._wish_to_stop)

    # ---- the run

    def train(self, checkpoint: Checkpoint | None) -> str:
        """From the checkpoint, or from the start, to the end; returns the reason it ended: done or stop_at.

        Raises Interrupted after a signal, NonFinite, SphereLost or another RunFailed.
        """
        try:
            self._start(checkpoint)
            while True:
                self._evaluate_and_save()
                if self.wishes.number and self.step < self.last:
                    self._stop()
                if self.step >= self.last:
                    return "done" if self.step >= self.steps else "stop_at"
                self._stretch(self._next_boundary())
        except BaseException:
            self.node_zero.kill()
            raise
        finally:
            self.node_zero.close()

    def _start(self, checkpoint: Checkpoint | None) -> None:
        job, config = self.node_zero.job, self.config
        self.metrics.event(
            "resume" if checkpoint else "start", self._headline(checkpoint), checkpoint.step if checkpoint else 0,
            workers=job.workers, spheres=job.spheres, batch_size=job.batch_size, block_size=config.block_size,
            steps=self.steps, stop_at=self.last, num_parameters=self.layout.num_parameters, run=str(self.run),
            cores=len(usable_cores()), pinned=bool(job.cores), config=config.model_dump(),
            **({"from_step": checkpoint.step} if checkpoint else {}),
        )  # fmt: skip
        self.node_zero.start()
        self.sampler = SphereSampler(self.node_zero)
        self.metrics.event(
            "ready", f"{job.workers} workers are ready after {time.monotonic() - self._began:.1f} s.", self.step,
            seconds=time.monotonic() - self._began,
        )  # fmt: skip
        memory = self.node_zero.memory
        starts, lengths = self.windows.starts, self.windows.lengths
        memory.words(memory.regions.window_starts, len(starts))[:] = starts
        memory.words(memory.regions.window_lengths, len(lengths))[:] = lengths
        if checkpoint:
            self._restore(checkpoint)
        else:
            self.node_zero.do(M.INITIALISE)
        self.node_zero.set_position(self.step, self.step if checkpoint is None else checkpoint.state["applied"])
        self._estimate()
        self.metrics.start_clock()

    def _headline(self, checkpoint: Checkpoint | None) -> str:
        job = self.node_zero.job
        goes_on = f"Resumed at step {checkpoint.step}. " if checkpoint else ""
        return (
            f"{goes_on}{job.workers} workers, {job.spheres} spheres, batch {job.batch_size} x {job.shape.block_size}"
            f" tokens; {self.layout.num_parameters:,} parameters, vocabulary {job.shape.vocab_size:,};"
            f" {self.steps:,} steps into {self.run}"
        )

    def _estimate(self) -> None:
        """Rehearse one sequence on as many workers as have a core, and say how long the run will take."""
        job = self.node_zero.job
        at_once = min(job.workers, len(usable_cores()))
        self.node_zero.do(M.REHEARSE, 0, at_once)
        step_s = self.node_zero.rehearsal_s(at_once) * job.batch_size / at_once
        seconds = step_s * (self.last - self.step) * 1.1
        per_step = job.batch_size * job.shape.block_size
        self.metrics.event(
            "eta", f"{self.last - self.step:,} steps of {per_step:,} tokens will take about {duration(seconds)}.",
            self.step, seconds=seconds,
        )  # fmt: skip

    def _next_boundary(self) -> int:
        """The next step at which something other than a step has to be done."""
        due = [(self.step // every + 1) * every for every in (self.eval_every, self.save_every)]
        return min(*due, self.last, self.step + M.RING)

    def _stretch(self, until: int) -> None:
        """Steps self.step + 1 .. until, with metrics, signals and losses looked at about ten times a second."""
        first = self.step + 1
        rates = [learning_rate(step, self.config) for step in range(first, until + 1)]
        memory = self.node_zero.memory
        memory.doubles(memory.regions.rates, len(rates))[:] = rates
        self.node_zero.give(M.STEPS, first, until + 1)
        while not self.node_zero.finished():
            self.node_zero.wait_for_bell()
            self._watch(first)
            if self.wishes.number and time.monotonic() - self.wishes.at > STEP_ENDS_WITHIN_S:
                self._drop_step(first)
        self._watch(first)
        if self.node_zero.halt == M.HALT_NONFINITE:
            raise NonFinite(self._explain_nonfinite())
        if self.wishes.number:
            self._stop()

    def _watch(self, first: int) -> None:
        self.step = self.metrics.steps(self.node_zero, first, self.step)
        if record := self.sampler.sample(self.step):
            self.metrics.write(record)
        self.node_zero.check()

    # ---- evaluating and saving

    def _evaluate_and_save(self) -> None:
        """What is due at this step."""
        ends = self.step >= self.last
        better = False
        if self.evaluated != self.step and (self.step % self.eval_every == 0 or ends):
            better = self._evaluate()
        if self.step and (better or ends or self.step % self.save_every == 0):
            self._save(better)

    def _evaluate(self) -> bool:
        """One evaluation; whether it is the best so far."""
        began = time.monotonic()
        memory, count = self.node_zero.memory, len(self.windows.starts)
        self.node_zero.give(M.EVALUATE, 0, count)
        while not self.node_zero.finished():
            self.node_zero.wait_for_bell()
            self.node_zero.check()
            if record := self.sampler.sample(self.step):
                self.metrics.write(record)
            if self.wishes.number:
                self._stop()
        result = self.windows.evaluation(memory.doubles(memory.regions.window_losses, count))
        self.metrics.write({
            "kind": "eval", "step": self.step, **asdict(result), "time": time.time(),
            "seconds": time.monotonic() - began,
        })  # fmt: skip
        self.evaluated = self.step
        if self.best_loss is None or result.val_loss < self.best_loss:
            self.best_loss, self.best_step, self.worse = result.val_loss, self.step, 0
            return self.step > 0
        self.worse += 1
        if self.worse == TURNED_UP_EVALUATIONS:
            self.metrics.event(
                "turned_up", f"Validation loss has turned up: {result.val_loss:.4f}, it was {self.best_loss:.4f} at"
                f" step {self.best_step}. The model learns its text by heart now; checkpoints/best keeps the best.",
                self.step, best_step=self.best_step, best_loss=self.best_loss,
            )  # fmt: skip
        return False

    def _save(self, best: bool = False) -> Path:
        began = time.monotonic()
        memory = self.node_zero.memory
        optimizer = {f"moments.{name}": view for name, view in self.layout.views(memory.moments).items()}
        if memory.sizes.has_squares:
            optimizer |= {f"squares.{name}": view for name, view in self.layout.views(memory.squares).items()}
        path = self.store.save(
            self.step, self.layout.views(memory.params), optimizer, self._state(),
            huggingface_config(self.config, self.prepared.eot), self.prepared.folder / "tokenizer.json",
        )  # fmt: skip
        self.saved = self.step
        seconds = time.monotonic() - began
        if best:
            self.store.mark_best(self.step)
        self.store.prune(self.config.keep)
        self.metrics.event(
            "best" if best else "saved",
            f"Saved step {self.step:,}{', the best so far,' if best else ''} in {seconds:.2f} s.",
            self.step, path=str(path), seconds=seconds, val_loss=self.best_loss,
        )  # fmt: skip
        return path

    def _state(self) -> dict[str, Any]:
        job = self.node_zero.job
        return {
            "step": self.step, "applied": self.node_zero.applied, "sequences": self.step * job.batch_size,
            "total_tokens": self.metrics.total_tokens, "seed": job.seed, "spheres": job.spheres,
            "batch_size": job.batch_size, "evaluated": self.evaluated, "best_loss": self.best_loss,
            "best_step": self.best_step, "worse": self.worse, "data": self.prepared.fingerprint,
            "layout": asdict(job.shape), "fingerprint": fingerprint(),
        }  # fmt: skip

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Weights, moments and counters as they were; the padding is zero already."""
        memory, state = self.node_zero.memory, checkpoint.state
        buffers = {"moments": self.layout.views(memory.moments)}
        if memory.sizes.has_squares:
            buffers["squares"] = self.layout.views(memory.squares)
        params = self.layout.views(memory.params)
        for name, tensor in checkpoint.model_tensors():
            params[name][...] = tensor
        for name, tensor in checkpoint.optimizer_tensors():
            kind, _, tensor_name = name.partition(".")
            buffers[kind][tensor_name][...] = tensor
        self.step = self.saved = checkpoint.step
        self.evaluated = state["evaluated"]
        self.best_loss, self.best_step, self.worse = state["best_loss"], state["best_step"], state["worse"]
        self.metrics.total_tokens, self.metrics.skipped = state["total_tokens"], state["step"] - state["applied"]
        changed = differences(state["fingerprint"], fingerprint())
        if changed:
            self.metrics.event(
                "fingerprint", "The numerics are not the checkpoint's, so the bits may differ: " + "; ".join(changed),
                self.step, differences=changed,
            )  # fmt: skip

    # ---- stopping

    def _wish_to_stop(self) -> None:
        self.node_zero.request_stop()
        self.node_zero.ring_bell()

    def _leave_early(self) -> None:
        """Called while the spheres start: there is nothing to save yet."""
        if self.wishes.number:
            raise Interrupted(f"Stopped by signal {self.wishes.number} while starting.", self.wishes.number)

    def _stop(self) -> None:
        """Save the last whole step and leave. The workers are idle, or ended here where they are evaluating."""
        if not self.node_zero.finished():
            self.node_zero.kill()
        if self.step and self.saved != self.step:
            self._save()
        number = self.wishes.number
        saved = f"Saved step {self.step}." if self.step else "No step was finished yet."
        raise Interrupted(f"Stopped by signal {number}. {saved}", number)

    def _drop_step(self, first: int) -> None:
        """Give up a step that does not end in time, before its update; a resume computes it again exactly."""
        if not self.node_zero.close_gate():
            return  # an update is being applied, which is quick: it is whole before we look again
        self.node_zero.kill()
        self.step = self.metrics.steps(self.node_zero, first, self.step)
        self._stop()

    def _explain_nonfinite(self) -> str:
        """Which sphere and which tensor were the first that were not finite, read from the segments."""
        memory, step = self.node_zero.memory, self.step + 1
        advice = (
            " Often the learning rate is too high: try a smaller --lr or a longer --warmup;"
            " --on-nonfinite skip leaves such steps out."
        )
        for name, view in self.layout.views(memory.params).items():
            if not np.isfinite(view).all():
                return f"Step {step}: the weights themselves are not finite, first in {name}." + advice
        losses = memory.sphere_words().view(np.float64)[:, M.P_LOSS]
        for sphere in range(memory.sizes.num_spheres):
            for name, view in self.layout.views(memory.segment(sphere)).items():
                if not np.isfinite(view).all():
                    return (
                        f"Step {step}: the gradient of sphere {sphere} is not finite, first in {name}"
                        f" (its loss is {losses[sphere]:.6g})." + advice
                    )
        return f"Step {step}: the gradient's norm is not finite, though every segment is: it is too large." + advice


def huggingface_config(config: Config, eot: int) -> dict[str, Any]:
    """config.json of a checkpoint: a GPT-2 as other tools describe it."""
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_ctx": config.block_size, "n_embd": config.width,
        "n_layer": config.layers, "n_head": config.heads, "n_inner": config.ff_width,
        "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "bias": config.bias, "bos_token_id": eot, "eos_token_id": eot, "torch_dtype": "float32",
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
    }  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds for people: 48 s, 3 min 20 s, 5 h 10 min."""
    whole = max(1, round(seconds))
    if whole < 100:
        return f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"

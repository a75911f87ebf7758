"""A run folder -> a trained model in it: the whole training, as Node Zero sees it.

for each stretch of steps up to the next evaluation or checkpoint:
    command the spheres; write what they finish; look for signals and losses
    evaluate, save
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, replace

from cllm_spheres.checkpoint.checkpoint import Checkpoint
from cllm_spheres.checkpoint.held import Held
from cllm_spheres.checkpoint.store import SaveFailed
from cllm_spheres.config import Config
from cllm_spheres.errors import FolderGone, InputError, Interrupted, NonFinite, RunFailed
from cllm_spheres.exchange.source import Source
from cllm_spheres.faults import parse
from cllm_spheres.machine import give_memory_back, usable_cores
from cllm_spheres.model import dtypes
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.node_zero import NodeZero
from cllm_spheres.spheres.serving import Server
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training.control import Control, Wish
from cllm_spheres.training.evaluation import Windows
from cllm_spheres.training.folder import CONFIG_TOML, change_config
from cllm_spheres.training.keeper import Keeper, Progress
from cllm_spheres.training.metrics import Metrics, SphereSampler
from cllm_spheres.training.nonfinite import explain_evaluation, explain_nonfinite, way_out
from cllm_spheres.training.plan import AGAIN, fit, make_job
from cllm_spheres.training.profile import WARM_UP_STEPS, intervals, marks_needed, write
from cllm_spheres.training.schedule import learning_rate
from cllm_spheres.training.signals import Launcher, Wishes
from cllm_spheres.training.soft_targets import table_bytes
from cllm_spheres.training.start import check_workers
from cllm_spheres.units import duration, percent, plural

STEP_ENDS_WITHIN_S = 2.0  # after a signal: what takes longer is dropped before its update
UPDATE_ENDS_WITHIN_S = 4.0  # after a signal: an update that takes longer hangs
TELLS_EVERY_S = 1.0  # how far the work before the first step is
SAVE_IS_NEAR = 4  # steps before it: taking 1.5 GB of pages took 5 s where others kept the machine busy
TURNED_UP_EVALUATIONS = 2  # this many evaluations in a row above the best say that validation has turned up


class Trainer:
    """One run from its first or next step to its end."""

    def __init__(
        self, run: Held, config: Config, prepared: Prepared, *, source: Source | None, stop_at: int | None,
        launcher: Launcher, profile: bool, faults: list[str], notes: list[str], status: Callable[[str], None],
        server: Server | None = None,
    ) -> None:  # fmt: skip
        """source: the model to begin from. notes: sentences on what will make the run slow here, to be told."""
        self.folder, self.run = run, run.path
        self.config, self.prepared, self.source, self.notes = config, prepared, source, notes
        self._status = status
        assert config.steps is not None and config.eval_every is not None and config.save_every is not None
        assert config.eval_tokens is not None
        self.steps, self.eval_every, self.save_every = config.steps, config.eval_every, config.save_every
        self.last = min(self.steps, stop_at or self.steps)
        job = fit(make_job(config, prepared), config.recompute)
        self.layout = job.layout
        self.progress = Progress()
        self.windows = Windows(prepared, config.block_size, config.eval_tokens)
        self.metrics = Metrics(self.run / "metrics.jsonl", status=status, said=run.said)
        job = replace(
            job, run=run.name.name, faults=[astuple(fault) for fault in parse(faults, job.spheres, self.steps)]
        )
        self.profiled: int | None = None  # the step that is traced
        if profile:
            job = replace(job, trace_marks=marks_needed(job))
        self.node_zero = NodeZero(job, status, self._look, server, self._tell)
        self.keeper = Keeper(self.run, self.layout, config, prepared, self.node_zero, self.metrics)
        self._said_stopping = self._started = self._stepping = False
        self._asked = False  # another process has asked for the end
        self._begins_trained = source is not None  # step 0 may be the best then
        self._began = time.monotonic()
        self.wishes = Wishes(launcher, self._pause, self.node_zero.signal)
        self.control = Control(self.run, self._pause)
        if not self.control.reachable:
            taken = "Other commands, such as cllm-spheres scale, cannot reach this run: its names are taken."
            self.notes = [*notes, taken]

    @property
    def step(self) -> int:
        """The last whole step."""
        return self.progress.step

    # ---- the run

    def train(self, checkpoint: Checkpoint | None, *, exact: bool = False) -> str:
        """From the checkpoint, or from the start, to the end; returns the reason it ended, as in the event "end".

        Raises Interrupted after a signal, NonFinite, SphereLost or another RunFailed.
        """
        try:
            self._start(checkpoint, exact)
            self._started = True
            while True:
                self._evaluate_and_save()
                if self.wishes.number and self.step < self.last:
                    self._stop()
                if self.step >= self.last:
                    return self._end()
                if wish := self.control.take():
                    self._fulfil(wish)
                    continue
                self._stretch(self._next_boundary())
        except BaseException as error:
            self._save_what_is_whole(error)
            raise
        finally:
            self.node_zero.close()

    def _end(self) -> str:
        """All steps are done: wait for what is still being saved."""
        self._finish_saving()
        if left := self.node_zero.faults.left:
            self.metrics.event("unfired", f"These faults did not happen: {', '.join(left)}.", self.step, faults=left)
        if self.step >= self.steps:
            return "done"
        return "early_stop" if self._stops_early() else "asked" if self._asked else "stop_at"

    def _stops_early(self) -> bool:
        """A function of the evaluations alone, which a checkpoint holds: the same after a resume."""
        return self.config.early_stop is not None and self.progress.stale >= self.config.early_stop

    def _save_what_is_whole(self, error: BaseException) -> None:
        """The run fails: end the workers, and save the last step that is whole, where that can be."""
        self.node_zero.kill()
        if isinstance(error, FolderGone):
            return
        worth_it = isinstance(error, RunFailed) and not isinstance(error, NonFinite | SaveFailed)
        if worth_it and self.node_zero.close_gate():
            self.progress.step = self.metrics.steps(self.node_zero, self.step)
            if self.step and self.progress.saved != self.step:
                self.keeper.save(self.progress, last=True)
        with contextlib.suppress(SaveFailed):  # there is a reason to tell already
            self.keeper.finish()

    def way_out(self) -> str:
        """What to do after a number that was not finite."""
        if self._begins_trained and not self.step:
            return "The run began with these weights, and no learning rate mends them: begin from another model."
        return way_out(self.folder.name, self.keeper.store, self.config)

    def _start(self, checkpoint: Checkpoint | None, exact: bool) -> None:
        job, config = self.node_zero.job, self.config
        self.metrics.event(
            "resume" if checkpoint else "start", self._headline(checkpoint), checkpoint.step if checkpoint else 0,
            workers=job.workers, spheres=job.spheres, batch_size=job.batch_size, block_size=config.block_size,
            steps=self.steps, stop_at=self.last, num_parameters=self.layout.num_parameters, run=str(self.run),
            cores=len(usable_cores()), dtype=job.dtype, pinned=bool(job.cores), config=config.model_dump(),
            **({"from_step": checkpoint.step} if checkpoint else {}),
        )  # fmt: skip
        for note in self.notes:
            self.metrics.event("note", note, self.step)
        table = self._soft_targets()
        self.node_zero.start()
        self.node_zero.memory.lay_soft_targets(table)
        self.sampler = SphereSampler(self.node_zero)
        self.metrics.event(
            "ready", f"{plural(job.workers, 'worker')} ready after {time.monotonic() - self._began:.1f} s.", self.step,
            seconds=time.monotonic() - self._began,
        )  # fmt: skip
        memory = self.node_zero.memory
        starts, lengths = self.windows.starts, self.windows.lengths
        memory.words(memory.regions.window_starts, len(starts))[:] = starts
        memory.words(memory.regions.window_lengths, len(lengths))[:] = lengths
        applied = 0
        if checkpoint:
            self.progress, applied = self.keeper.restore(checkpoint, exact)
            self._begins_trained = checkpoint.step == 0  # only such a run has saved it
        elif self.source:
            self.keeper.begin_from(self.source)
        else:
            self.node_zero.do(M.INITIALISE)
            if config.init == "lattice":
                self.keeper.begin_on_lattice()
        self.node_zero.set_position(self.step, applied)
        if self.source:
            self.keeper.save(self.progress)  # a resume does not need the source
        self._estimate()
        if job.trace_marks:
            self.profiled = min(self.step + WARM_UP_STEPS, self.last)
            memory.words(memory.regions.control + M.TRACED_STEP * M.LINE, 1)[0] = self.profiled
        give_memory_back()  # what starting took, such as the tokenizer's file
        self.metrics.start_clock()

    def _soft_targets(self) -> bytes:
        """The table of neighbours that the loss asks for, empty where it has none; says how far it is."""
        if not self.node_zero.job.neighbours:
            return b""
        told = time.monotonic()

        def progress(done: float, total: float) -> None:
            nonlocal told
            self._look()
            if time.monotonic() - told > TELLS_EVERY_S:
                told = time.monotonic()
                self._status(f"Finding the nearest of {self.prepared.vocab_size:,} tokens: {done / total:.0%}")

        table = table_bytes(self.run, self.config, self.prepared, progress)
        self._status("")
        return table

    def _headline(self, checkpoint: Checkpoint | None) -> str:
        job = self.node_zero.job
        goes_on = f"Resumed at step {checkpoint.step} from {checkpoint.path.name}. " if checkpoint else ""
        goes_on = f"The weights are those of {self.source.path}. " if self.source else goes_on
        return (
            f"{goes_on}{plural(job.workers, 'worker')}, {plural(job.spheres, 'sphere')}, batch {job.batch_size} x"
            f" {job.shape.block_size} tokens; {self.layout.num_parameters:,} parameters, vocabulary"
            f" {job.shape.vocab_size:,}; {len(self.prepared.train):,} tokens of text, {len(self.prepared.val):,} more"
            f" ({percent(self.prepared.val_share)} of all) for validation;"
            f" {dtypes.describe(self.config.dtype)}{AGAIN[job.recompute]}; {self.steps:,} steps into {self.run}"
        )

    def _estimate(self) -> None:
        """Rehearse one sequence on as many workers as have a core, and say how long the run will take."""
        job = self.node_zero.job
        at_once = min(job.workers, len(usable_cores()))
        self.node_zero.do(M.REHEARSE, 0, at_once)
        step_s = self.node_zero.rehearsal_s(at_once) * job.batch_size / at_once
        seconds = max(1.0, step_s * (self.last - self.step) * 1.1)
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
        first, saves = self.step + 1, until % self.save_every == 0 or until == self.last
        rates = [learning_rate(step, self.config) for step in range(first, until + 1)]
        memory = self.node_zero.memory
        memory.doubles(memory.regions.rates, len(rates))[:] = rates
        self.node_zero.give(M.STEPS, first, until + 1)
        self._stepping = True
        if self.wishes.number or self.control.wish:  # it came before the command, which took it back
            self._pause()
        while not self.node_zero.finished():
            self.node_zero.wait_for_bell()
            self._watch()
            self._look()
            if saves and until - self.step <= SAVE_IS_NEAR:
                self.keeper.expect()
        self._stepping = False
        self._watch()
        if self.node_zero.halt == M.HALT_NONFINITE:
            raise NonFinite(explain_nonfinite(self.node_zero.memory, self.layout, self.step + 1))
        if self.wishes.number:
            self._stop()

    def _watch(self) -> None:
        self.progress.step = self.metrics.steps(self.node_zero, self.step)
        self.metrics.check()
        self._check_folder()
        if record := self.sampler.sample(self.step):
            self.metrics.write(record)
        self.node_zero.check()
        if self.profiled is not None and self.step >= self.profiled:
            self._write_profile(self.profiled)
            self.profiled = None

    def _write_profile(self, step: int) -> None:
        """Where the time of the traced step went, into the run's folder."""
        try:
            path = write(list(intervals(self.node_zero.memory)), step, self.run)
        except OSError as error:
            self.metrics.event("profile", f"The profile could not be written: {error}", self.step)
            return
        self.metrics.event(
            "profile", f"Step {step} was profiled: {path}, and profile.json for ui.perfetto.dev.", self.step,
            path=str(path),
        )  # fmt: skip

    # ---- evaluating and saving

    def _evaluate_and_save(self) -> None:
        """What is due at this step."""
        ends = self.step >= self.last
        better = False
        if self.progress.evaluated != self.step and (self.step % self.eval_every == 0 or ends):
            better = self._evaluate()
        if self._stops_early():
            ends, self.last = True, self.step
        due = self.progress.saved != self.step and (ends or self.step % self.save_every == 0)
        if better or (self.step and due):
            self.keeper.save(self.progress, better, last=ends)

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
            self._look()
        while not self.windows.ready:  # counting a large training part takes longer than the first evaluation
            self.node_zero.wait_for_bell()
            self._look()
        losses = memory.doubles(memory.regions.window_losses, count)
        result = self.windows.evaluation(losses)
        self.metrics.write({
            "kind": "eval", "step": self.step, **asdict(result), "time": time.time(),
            "seconds": time.monotonic() - began,
        })  # fmt: skip
        finite = math.isfinite(result.val_loss)
        if not finite and self.config.on_nonfinite == "stop":
            raise NonFinite(explain_evaluation(memory, self.layout, self.step, losses))
        progress = self.progress
        progress.evaluated = self.step
        if self.step % self.eval_every == 0:
            progress.note(result.val_loss)
        if finite and (progress.best_loss is None or result.val_loss < progress.best_loss):
            progress.best_loss, progress.best_step, progress.worse = result.val_loss, self.step, 0
            return self.step > 0 or self._begins_trained
        progress.worse += 1
        if finite and progress.worse == TURNED_UP_EVALUATIONS:
            self.metrics.event(
                "turned_up",
                f"Validation loss has turned up: {result.val_loss:.4f}, it was {progress.best_loss:.4f} at step"
                f" {progress.best_step}. The model learns its text by heart now; checkpoints/best keeps the best.",
                self.step, best_step=progress.best_step, best_loss=progress.best_loss,
            )  # fmt: skip
        return False

    def _finish_saving(self) -> None:
        """Wait until all is saved. SaveFailed where the disk does not take it, FolderGone where nothing is left."""
        try:
            self.keeper.finish()
        finally:
            self._check_folder()

    def _check_folder(self) -> None:
        """FolderGone where the run was removed; a folder that was renamed is still this run's."""
        try:
            (self.run / CONFIG_TOML).stat()
        except FileNotFoundError:
            raise FolderGone(
                f"The run was removed while it went on: {self.run} has no {CONFIG_TOML} any more. It ended at step"
                f" {self.step:,}, which is not saved."
            ) from None
        except OSError:  # a disk that cannot be read is told by whoever writes to it
            pass

    # ---- what others ask for

    def _fulfil(self, wish: Wish) -> None:
        """Between two steps: save, end, or have another number of workers."""
        if wish.message.get("save"):
            if not self.step:
                wish.answer(error="There is nothing to save yet: no step is finished.")
                return
            if self.progress.saved != self.step:
                self.keeper.save(self.progress)
            if self.progress.saved != self.step:
                wish.answer(error=f"Step {self.step:,} is not saved: the disk is still busy. Try again later.")
                return
            wish.answer(message=f"Step {self.step:,} is being saved.")
        elif wish.message.get("stop"):
            self._asked, self.last = True, max(1, self.step)
            wish.answer(message=f"The run ends at step {self.last:,}.")
        else:
            self._resize(wish)

    def _resize(self, wish: Wish) -> None:
        before, workers = self.node_zero.job.workers, wish.message.get("workers")
        try:
            check_workers(workers, self.node_zero.job)
            assert isinstance(workers, int)
            if workers != before:
                self.node_zero.resize(workers)
        except InputError as error:
            wish.answer(error=str(error))
            return
        except BaseException:
            wish.answer(error="The run ended meanwhile.")
            raise
        if workers == before:
            wish.answer(message=f"It has {plural(before, 'worker')} already.")
            return
        now = f"{plural(workers, 'worker')} from step {self.step + 1:,} on"
        message = f"{now}, {before} before. The bits stay the same."
        self.metrics.event("scaled", message, self.step, workers=workers, pinned=bool(self.node_zero.job.cores))
        wish.answer(message=message)
        self.config = self.config.model_copy(update={"workers": workers})
        with contextlib.suppress(OSError):  # a full disk: a resume has the old number then
            change_config(self.run, self.config, self.prepared)

    # ---- stopping

    def _pause(self) -> None:
        """Called by other threads, when somebody wishes something: no further step begins."""
        self.node_zero.request_stop()
        self.node_zero.ring_bell()

    def _say_stopping(self) -> None:
        if not self._said_stopping:
            self._said_stopping = True
            self.metrics.event(
                "stopping", f"{self.wishes.name}: the step ends within {STEP_ENDS_WITHIN_S:.0f} s or is dropped,"
                " then the run is saved. A second signal leaves at once.", self.step, signal=self.wishes.number,
            )  # fmt: skip

    def _tell(self, event: str, message: str, **facts: object) -> None:
        """Called with each loss of a worker and each recovery."""
        self.metrics.event(event, message, self.step, **facts)

    def _look(self) -> None:
        """Called about ten times a second wherever the spheres are waited for: heed a signal that has come."""
        if not self.wishes.number:
            return
        if not self._started:  # there is nothing to save yet
            raise Interrupted(f"Stopped by {self.wishes.name} while starting.", self.wishes.number)
        if not self._stepping:
            self._stop()
        self._say_stopping()
        if time.monotonic() - self.wishes.at > STEP_ENDS_WITHIN_S:
            self._drop_step()

    def _stop(self) -> None:
        """Save the last whole step and leave. The workers are idle, or ended here where they are evaluating."""
        if not self.node_zero.finished():
            self.node_zero.kill()
        if self.step and self.progress.saved != self.step:
            self.keeper.save(self.progress, last=True)
        self._finish_saving()
        number = self.wishes.number
        saved = f"Saved step {self.step:,}." if self.step else "No step was finished yet."
        raise Interrupted(f"Stopped by {self.wishes.name}. {saved}", number)

    def _drop_step(self) -> None:
        """Give up a step that does not end in time, before its update; a resume computes it again exactly."""
        if not self.node_zero.close_gate():
            # An update is being applied, which is quick: it is whole before we look again, unless a worker is stopped.
            # Where one has died in it, another finishes it first.
            if time.monotonic() - max(self.wishes.at, self.node_zero.recovered_at) > UPDATE_ENDS_WITHIN_S:
                raise Interrupted(
                    f"Stopped by {self.wishes.name} inside the update of step {self.step + 1}, which did not end: it is"
                    " not saved, the last checkpoint is.", self.wishes.number,
                )  # fmt: skip
            return
        self.node_zero.kill()
        self.progress.step = self.metrics.steps(self.node_zero, self.step)
        self._stop()

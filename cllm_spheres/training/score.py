"""A run and a text -> loss, perplexity, bits per byte and accuracy: sliding windows on all cores, through the spheres.

As many tokens are scored as in an evaluation of the training, or a number of them, or every token but the first, once
each. The workers are those of training, with weights and windows in shared memory and nothing else; a window is a pure
function of both, so neither their number nor a death among them changes a bit.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cllm_spheres.checkpoint.checkpoint import Checkpoint
from cllm_spheres.checkpoint.saved_model import open_run
from cllm_spheres.config import MAX_SPHERES
from cllm_spheres.errors import InputError, NonFinite, nearest
from cllm_spheres.limits import raised_files
from cllm_spheres.machine import available_memory, check_platform, usable_cores
from cllm_spheres.model import dtypes
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape
from cllm_spheres.spheres import memory as M
from cllm_spheres.spheres.crew import ENDS_WITHIN_S
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.node_zero import NodeZero
from cllm_spheres.spheres.placement import place, read_cores
from cllm_spheres.spheres.serving import Server, start_server
from cllm_spheres.text.baselines import NgramLosses, ngram_losses
from cllm_spheres.text.prepare import Progress
from cllm_spheres.text.tokenizer import Tokenizer
from cllm_spheres.text.windows import Sliding
from cllm_spheres.training.folder import read_config
from cllm_spheres.training.plan import memory_bytes
from cllm_spheres.training.scored_text import Ids, ScoredText, text_to_score
from cllm_spheres.training.signals import STOP_SIGNALS
from cllm_spheres.training.start import check_address_space, check_files, check_tasks
from cllm_spheres.units import size

DTYPES = ("auto", *dtypes.DTYPES)
MOST_WINDOWS = 1 << 14  # of a command
COMMAND_S = 1.0  # that a command takes, about: how often progress is seen
EVAL_TOKENS = 1 << 16  # scored of a model that was imported, whose training is not known
BYTES_CHUNK = 1 << 22  # targets whose bytes are added together


@dataclass(frozen=True)
class Score:
    """What a model says of a text. Losses are nats a token over `tokens` predicted tokens.

    The text has `text_tokens` that can be predicted. bits_per_byte is None for word; the losses of counting alone are
    None but for the run's own validation part.
    """

    run: str
    step: int
    data: str
    part: str
    fingerprint: str
    dtype: str
    block_size: int
    stride: int
    tokens: int
    text_tokens: int
    windows: int
    loss: float
    perplexity: float
    bits_per_byte: float | None
    accuracy: float
    unigram_loss: float | None
    bigram_loss: float | None
    workers: int
    seconds: float
    tokens_per_s: float


def score(
    run: Path, data: Path | None = None, *, checkpoint: str | int | None = None, stride: int | None = None,
    block_size: int | None = None, workers: int | None = None, dtype: str = "auto", max_tokens: int | None = None,
    whole: bool = False, progress: Progress | None = None, tell: Callable[[str], None] = lambda text: None,
) -> Score:  # fmt: skip
    """data: see `text_to_score`. checkpoint: as for `load`. stride: tokens from window to window, None: half a window.

    dtype "auto": that in which the run was trained. max_tokens: predicted tokens at the beginning of the text; whole:
    all of them; neither: windows evenly spread over the text, of as many tokens as a training's evaluation.
    progress: told (stage, done, total), of the stage "score" in tokens; tell: told in sentences what else happens.
    InputError for bad input; SphereLost, NonFinite.
    """
    check_platform()
    saved, shape, tokenizer = open_run(run, checkpoint)
    length = _within("--block-size", block_size, shape.block_size, shape.block_size, "the model's block")
    stride = _within("--stride", stride, max(1, length // 2), length, "the window")
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"--max-tokens {max_tokens}: give 1 or more.")
    if max_tokens is not None and whole:
        raise InputError(f"--max-tokens {max_tokens} contradicts --all. Leave one of them out.")
    chosen = _dtype(run, dtype, shape)
    wanted = _within("--workers", workers, min(len(usable_cores()), MAX_SPHERES), MAX_SPHERES, "the places there are")
    if dtype == "bf16" and chosen != "bf16":
        tell("bf16 was asked for and this CPU has no bfloat16 arithmetic: float32 is computed instead.")
    text = text_to_score(run, data, saved, tokenizer, progress)
    for note in text.notes:
        tell(note)
    predictable = len(text.ids) - 1
    if whole or max_tokens is not None:
        sliding = Sliding(min(predictable, max_tokens or predictable), length, stride)
    else:
        sliding = Sliding.about(_tokens_of_an_evaluation(run), predictable, length, stride)
    predicted = sliding.scored
    job = _job(shape, text, min(wanted, sliding.count), min(sliding.count, MOST_WINDOWS), chosen)
    job = replace(job, run=Path(run).name)
    baselines = _Counting(text, sliding, shape.vocab_size)
    with raised_files():
        loss, correct, seconds = _scored(job, saved, sliding, progress, tell)
    if not math.isfinite(loss):
        raise NonFinite(f"The loss of {saved.path} on {text.source} is {loss}: take another --checkpoint.")
    num_bytes = _bytes(tokenizer, text.ids, sliding)
    counted = baselines.result()
    mean = loss / predicted
    return Score(
        run=str(run), step=saved.step, data=text.source, part=text.part, fingerprint=text.fingerprint, dtype=chosen,
        block_size=length, stride=stride, tokens=predicted, text_tokens=predictable, windows=sliding.count, loss=mean,
        perplexity=math.exp(mean) if mean < 700 else math.inf,
        bits_per_byte=loss / math.log(2) / num_bytes if num_bytes else None, accuracy=correct / predicted,
        unigram_loss=counted.unigram if counted else None, bigram_loss=counted.bigram if counted else None,
        workers=job.workers, seconds=seconds, tokens_per_s=predicted / max(seconds, 1e-9),
    )  # fmt: skip


def _within(option: str, value: int | None, default: int, most: int, what: str) -> int:
    if value is None:
        return default
    if not 1 <= value <= most:
        raise InputError(f"{option} {value}: give 1 to {most}, {what}.")
    return value


def _tokens_of_an_evaluation(run: Path) -> int:
    if not (run / "config.toml").is_file():
        return EVAL_TOKENS
    return read_config(run)[0].eval_tokens or EVAL_TOKENS


def _dtype(run: Path, dtype: str, shape: Shape) -> str:
    """What is computed in here: "auto" is what the run was trained in, or where that is not known the fastest."""
    if dtype not in DTYPES:
        raise InputError(f"--dtype cannot be {dtype!r}: {nearest(dtype, DTYPES)}")
    if dtype == "auto" and (run / "config.toml").is_file():
        dtype = read_config(run)[0].dtype
    return dtypes.choose(dtype, shape.width)


def _job(shape: Shape, text: ScoredText, workers: int, windows: int, dtype: str) -> Job:
    """One sphere a worker. InputError where they cannot work on this machine."""
    job = Job(
        shape=shape, batch_size=workers, spheres=workers, workers=workers, seed=0, train="", val=str(text.path),
        item_bytes=text.ids.dtype.itemsize, train_tokens=0, val_tokens=len(text.ids), num_windows=windows, dtype=dtype,
        trains=False, cores=place(workers, read_cores(usable_cores())),
    )  # fmt: skip
    needed, available = memory_bytes(job), available_memory()
    if needed > available:
        raise InputError(
            f"Not enough memory: {Layout(shape).num_parameters:,} parameters on {workers} workers need {size(needed)},"
            f" {size(available)} are available. Try fewer --workers."
        )
    check_files(job)
    check_tasks(job)
    check_address_space(job)
    return job


def _scored(
    job: Job, saved: Checkpoint, sliding: Sliding, progress: Progress | None, tell: Callable[[str], None]
) -> tuple[float, int, float]:
    """The summed loss, the right predictions, and the seconds that all windows took."""
    server = _server(job)
    node: NodeZero | None = None
    try:
        node = NodeZero(
            job, lambda text: tell(text) if text else None, server=server,
            tell=lambda event, message, **facts: tell(message),
        )  # fmt: skip
        node.start()
        views = job.layout.views(node.memory.params)
        for name, view in views.items():
            view[...] = saved.model[name]
        return _run_windows(node, sliding, progress)
    finally:
        if node is not None:
            node.close()
        server.group.signal(signal.SIGKILL)  # where it had not been handed over yet
        if server.group.wait(ENDS_WITHIN_S) is not None:
            server.close()


def _server(job: Job) -> Server:
    """The process that forks the workers; signals that ask for an end do not reach it, and it ends with this one."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return start_server(job.dtype, str(job.shape.width))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


def _run_windows(node: NodeZero, sliding: Sliding, progress: Progress | None) -> tuple[float, int, float]:
    """Commands of about a second each; losses are added in the order of the windows, as in training."""
    memory, windows, predicted = node.memory, sliding.count, sliding.scored
    starts, lengths, firsts, hits = (
        memory.words(place, memory.sizes.num_windows)
        for place in (
            memory.regions.window_starts, memory.regions.window_lengths, memory.regions.window_firsts,
            memory.regions.window_hits,
        )
    )  # fmt: skip
    losses = memory.doubles(memory.regions.window_losses, memory.sizes.num_windows)
    total, correct, done, command = 0.0, 0, 0, 0
    count = 4 * node.job.workers
    began = time.monotonic()
    if progress:
        progress("score", 0, predicted)
    while done < windows:
        count = min(count, windows - done, memory.sizes.num_windows)
        starts[:count], lengths[:count], firsts[:count] = sliding.windows(done, done + count)
        node.set_position(command, 0)  # each command is a step of its own to those who count deaths
        since = time.monotonic()
        node.do(M.EVALUATE, 0, count)
        seconds = time.monotonic() - since
        for loss in losses[:count].tolist():
            total += loss
        correct += int(hits[:count].sum())
        done, command = done + count, command + 1
        if progress:
            progress("score", min(predicted, (done - 1) * sliding.stride + sliding.block_size), predicted)
        count = max(node.job.workers, min(8 * count, int(count * COMMAND_S / max(seconds, 1e-6))))
    return total, correct, time.monotonic() - began


def _bytes(tokenizer: Tokenizer, ids: Ids, sliding: Sliding) -> int:
    """Bytes of text of the predicted tokens; 0 where the tokenizer does not know."""
    token_bytes = tokenizer.token_bytes()
    if token_bytes is None:
        return 0
    return sum(
        int(token_bytes[ids[at + 1 : min(at + BYTES_CHUNK, last) + 1]].sum(dtype=np.int64))
        for first, last in sliding.ranges()
        for at in range(first, last, BYTES_CHUNK)
    )


class _Counting:
    """What counting alone reaches on the same tokens, found by a thread beside the windows; a daemon, for Ctrl+C."""

    def __init__(self, text: ScoredText, sliding: Sliding, vocab_size: int) -> None:
        self._result: NgramLosses | None = None
        self._thread: threading.Thread | None = None
        train, ids = text.train, text.ids
        if train is not None:

            def count() -> None:
                ranges = list(sliding.ranges())
                contexts, targets = (
                    ids[ranges[0][0] + shift : ranges[0][1] + shift]  # all of the text is read where it lies
                    if len(ranges) == 1
                    else np.concatenate([ids[first + shift : last + shift] for first, last in ranges])
                    for shift in (0, 1)
                )
                self._result = ngram_losses(train, contexts, targets, vocab_size)

            self._thread = threading.Thread(target=count, daemon=True)
            self._thread.start()

    def result(self) -> NgramLosses | None:
        """Waits for the end of counting; None where nothing could be counted."""
        if self._thread is not None:
            self._thread.join()
        return self._result

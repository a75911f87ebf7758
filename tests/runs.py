"""Small trainings for the tests: a corpus, a run through the real launcher, and what it left on disk."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import psutil
import pytest

from cllm_spheres.checkpoint.store import Store
from cllm_spheres.config import Config
from cllm_spheres.events import read
from cllm_spheres.model.initialise import initial_tables, initialise_block
from cllm_spheres.model.layout import Layout
from cllm_spheres.model.shape import Shape
from cllm_spheres.text.prepare import prepare
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training import folder, session
from cllm_spheres.training.launch import Launch

COMMAND = Path(sys.executable).with_name("cllm-spheres")
# A tiny model: 6 blocks of parameters, so that most of 63 workers have no span.
TINY = dict(
    layers=1, heads=2, width=32, ff_width=64, block_size=8, batch_size=4, spheres=4, workers=2, lr=1e-2, dtype="fp32",
)  # fmt: skip
WAIT_S = 120  # for what takes a second or two on an idle machine: a test that waits longer has failed


def text(num_lines: int, seed: int = 0) -> str:
    """Lines of words that have something to learn in them; 62 different characters."""
    rng = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ012345.,;"
    words = ["".join(rng.choice(list(letters), size)) for size in rng.integers(1, 9, 200)]
    lines = (" ".join(rng.choice(words, 9)) for _ in range(num_lines))
    return letters + "\n" + "\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A prepared folder of bytes: a vocabulary of 257."""
    return _prepared(tmp_path_factory.mktemp("corpus"), "byte")


@pytest.fixture(scope="session")
def char_corpus(tmp_path_factory) -> Path:
    """A prepared folder of characters: a vocabulary of 65."""
    return _prepared(tmp_path_factory.mktemp("corpus"), "char")


def _prepared(place: Path, tokenizer: str) -> Path:
    (place / "text.txt").write_text(text(400))
    prepare([place / "text.txt"], place / "prepared", tokenizer=tokenizer)
    return place / "prepared"


@dataclass(frozen=True)
class Outcome:
    """What the launcher said, and what the run's folder holds."""

    run: Path
    code: int
    message: str

    @cached_property
    def records(self) -> list[dict]:
        return read(self.run / "metrics.jsonl")

    def of(self, kind: str) -> list[dict]:
        """The records of a kind; of steps and evaluations the last of each step."""
        records = [record for record in self.records if record["kind"] == kind]
        if kind in ("step", "eval"):
            return list({record["step"]: record for record in records}.values())
        return records

    def event(self, name: str) -> dict:
        """The only event of that name."""
        (found,) = [record for record in self.of("event") if record["event"] == name]
        return found

    @property
    def curve(self) -> list[tuple[float, ...]]:
        """Of every step what must not depend on the workers."""
        return [
            (r["step"], r["loss"], r["cross_entropy"], r["lr"], r["grad_norm"], r["clipped_norm"], r["total_tokens"])
            for r in self.of("step")
        ]

    @property
    def evaluations(self) -> list[tuple[float, ...]]:
        return [(r["step"], r["val_loss"], r["bits_per_byte"]) for r in self.of("eval")]

    @property
    def config(self) -> Config:
        return folder.read_config(self.run)[0]

    def weights(self, step: int | str = "last") -> dict[str, np.ndarray]:
        return Store(self.run).load(step).model

    def file(self, name: str, step: int | str = "last") -> str:
        """The sha256 of a file of a checkpoint."""
        return hashlib.sha256((Store(self.run).load(step).path / name).read_bytes()).hexdigest()

    @property
    def files(self) -> tuple[str, str]:
        """The hashes of the last weights and moments."""
        return self.file("model.safetensors"), self.file("optimizer.safetensors")

    @property
    def bits(self) -> tuple:
        """All that must be the same bits: the curves, weights, moments."""
        return self.curve, self.evaluations, self.files


def start(data: Path, run: Path, **options) -> Launch:
    """A new training under way: TINY with `options`."""
    return Launch().obey(session.new_run(data, TINY | options, run=run, file=None))


def train(data: Path, run: Path, **options) -> Outcome:
    """A whole training, however it ends."""
    return finished(start(data, run, **options))


def train_whole(data: Path, run: Path, **options) -> Outcome:
    """A training that ends well."""
    outcome = train(data, run, **options)
    assert outcome.code == 0, outcome.message
    return outcome


def resume(run: Path, exact: bool = False, **options) -> Outcome:
    """The rest of a training."""
    plan, done = session.resumed_run(run, options, data=None, exact=exact)
    assert not done, done
    return finished(Launch().obey(plan))


def finished(launch: Launch) -> Outcome:
    code, message = launch.finish()
    return Outcome(launch.plan.run, code, message)


def initial_weights(config: Config, prepared: Path) -> dict[str, np.ndarray]:
    """The weights with which a run begins."""
    shape = Shape(
        Prepared.open(prepared).vocab_size, config.block_size, config.layers, config.heads, config.width,
        config.ff_width, config.bias,
    )  # fmt: skip
    layout = Layout(shape)
    params_P = np.full(layout.size, np.nan, np.float32)
    places, values = initial_tables(layout)
    addresses = params_P.ctypes.data, places.ctypes.data, values.ctypes.data
    for block in range(layout.num_blocks):
        initialise_block.call(*addresses, len(places), config.seed, block)
    return layout.views(params_P)


# --- processes ---


def command(*words, **options) -> subprocess.CompletedProcess:
    """The console script, as a person runs it where there is no terminal."""
    options = {"timeout": WAIT_S * 2, **options}
    return subprocess.run([COMMAND, *map(str, words)], capture_output=True, text=True, **options)


def command_here(*words, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """The same in this process, which takes a hundredth of the time: for what ends before anything is computed.

    Standard input is empty. A traceback is the test's own failure.
    """
    from cllm_spheres_cli.app import run

    said, errors, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(cwd):
        patch.setattr(sys, "argv", [str(COMMAND), *map(str, words)])
        patch.setattr(sys, "stdin", io.StringIO())
        for name, value in (env or {}).items():
            patch.setenv(name, value)
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            try:
                run()
            except SystemExit as end:
                code = 0 if end.code is None else end.code
    return subprocess.CompletedProcess(words, code, said.getvalue(), errors.getvalue())


def begin(*words, **options) -> subprocess.Popen:
    """The console script in a process group of its own, where Ctrl+C does what it usually does."""
    return subprocess.Popen(
        [COMMAND, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, preexec_fn=_default_interrupt, **options,
    )  # fmt: skip


def _default_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs in a shell's background begins with it ignored


def words(options: dict) -> list[str]:
    """Options as they stand on a command line."""
    pairs = [("--" + name.replace("_", "-"), str(value)) for name, value in options.items()]
    return [word for pair in pairs for word in pair]


def wait_until(condition, what: str, timeout_s: float = WAIT_S):
    """The first true value of condition()."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"after {timeout_s} s still waiting: {what}"
        time.sleep(0.01)
    return value


def wait_for_step(run: Path, step: int) -> None:
    """Until metrics.jsonl holds that step."""
    path = run / "metrics.jsonl"
    wait_until(lambda: any(r["kind"] == "step" and r["step"] >= step for r in read(path)), f"step {step}")


@dataclass(frozen=True)
class Family:
    """The processes of a run: the command that was called, Node Zero, the server and the workers."""

    node_zero: psutil.Process
    server: psutil.Process
    workers: list[psutil.Process]

    @classmethod
    def of(cls, launcher: int, num_workers: int) -> Family:
        """The family below a launcher, once it is complete. Processes of other tests' runs may be there too."""

        def complete() -> Family | None:
            try:
                for node_zero in psutil.Process(launcher).children():
                    for server in node_zero.children():
                        workers = server.children()
                        if "node zero" in " ".join(node_zero.cmdline()) and len(workers) == num_workers:
                            return cls(node_zero, server, workers)
            except psutil.NoSuchProcess:
                pass
            return None

        return wait_until(complete, f"{num_workers} workers")

    @property
    def alive(self) -> list[psutil.Process]:
        """Who lives; a process that has ended and was not yet waited for by its parent does not."""
        return [process for process in (self.node_zero, self.server, *self.workers) if lives(process)]

    def end(self) -> None:
        """For the end of a test that failed."""
        for process in self.alive:
            process.send_signal(signal.SIGKILL)


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def shared_files() -> set[str]:
    """What lies in /dev/shm."""
    return set(os.listdir("/dev/shm"))

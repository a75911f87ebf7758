"""Node Zero's process: `python -m cllm_spheres.training.process LAUNCHER_PID [DTYPE WIDTH]`, launched by `launch.py`.

It reads one JSON line from standard input, and watches the launcher, whose end ends the run too. It writes JSON lines
to standard output: {"status": text} while it starts, {"outcome": {...}} at the end.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm_spheres.errors import FolderGone, InputError, Interrupted, NonFinite, RunFailed, SpheresError
from cllm_spheres.spheres.serving import Server, start_server
from cllm_spheres.title import set_title
from cllm_spheres.training.signals import Launcher
from cllm_spheres.units import plural

if TYPE_CHECKING:
    from cllm_spheres.checkpoint.checkpoint import Checkpoint
    from cllm_spheres.checkpoint.held import Held
    from cllm_spheres.training.trainer import Trainer


def say(**message: Any) -> None:
    """One line for the launcher, if it still listens."""
    try:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    except OSError:
        pass  # the launcher is gone; the run's folder holds everything


def run_training(server: Server, launcher: Launcher) -> dict[str, Any]:
    """Train as ordered; the outcome: exit code and message."""
    from cllm_spheres.checkpoint.held import Held
    from cllm_spheres.checkpoint.lock import Lock
    from cllm_spheres.machine import keep_no_large_blocks

    keep_no_large_blocks()
    # The end of the input alone would not do: whom the launcher has forked meanwhile may hold it open.
    ready, _, _ = select.select([sys.stdin, launcher.handle], [], [])
    line = sys.stdin.buffer.readline() if sys.stdin in ready else b""
    if not line:
        return {"code": 0, "message": "There was nothing to do."}
    order = json.loads(line)
    set_title("node zero", Path(order["run"]).name)
    run = Held(Path(order["run"]))  # whatever its name becomes, this run writes into this folder and no other
    try:
        if run.identity != order["folder"]:
            raise InputError(f"{run.name} is another folder now than the one that was made for this run.")
        with Lock(run.path):
            outcome = _train(run, order, server, launcher)
    except SpheresError as error:
        outcome = {"code": error.exit_code, "message": f"{type(error).__name__}: {error}"}
    return outcome | {"message": run.said(outcome["message"])}


def _train(run: Held, order: dict[str, Any], server: Server, launcher: Launcher) -> dict[str, Any]:
    """Train in the folder, which is locked."""
    from cllm_spheres.config import build
    from cllm_spheres.text.prepared import Prepared
    from cllm_spheres.training.beginning import beginning
    from cllm_spheres.training.folder import newest_checkpoint, read_config, write_config
    from cllm_spheres.training.trainer import Trainer

    config, where = read_config(run.path)
    prepared = Prepared.open(order["data"] or where["data"])
    steps_before = config.steps
    config = build(config.model_dump() | order["changes"])
    checkpoint, refused = (
        newest_checkpoint(run.path, config, where["data_fingerprint"]) if order["resume"] else (None, [])
    )
    source = None if checkpoint else beginning(run.path, config, where)
    trainer = Trainer(
        run, config, prepared, source=source, stop_at=order["stop_at"], launcher=launcher,
        profile=order["profile"], faults=order["faults"], notes=order["notes"],
        status=lambda text: say(status=run.said(text)), server=server,
    )  # fmt: skip
    at = checkpoint.step if checkpoint else 0
    for reason in refused:
        trainer.metrics.event("refused", f"A checkpoint was refused: {reason}", at)
    if order["resume"]:
        write_config(run.path, config, prepared, where)
    if config.steps != steps_before:
        trainer.metrics.event(
            "replan", f"The schedule now ends at step {config.steps:,} instead of {steps_before:,}.", at,
            steps=config.steps,
        )  # fmt: skip
    outcome = _outcome(trainer, checkpoint, order["exact"])
    try:
        trainer.metrics.finish()
    except RunFailed as error:
        outcome = {"code": outcome["code"] or 1, "message": f"{outcome['message']}\n{error} They are lost."}
    return outcome


def _outcome(trainer: Trainer, checkpoint: Checkpoint | None, exact: bool) -> dict[str, Any]:
    """Train to the end, whichever it is, and write down how it came."""
    from cllm_spheres.checkpoint.checkpoint import looks_whole

    store = trainer.keeper.store
    go_on = f"Go on with: cllm-spheres train --resume --run {trainer.run}"
    try:
        reason = trainer.train(checkpoint, exact=exact)
    except Interrupted as error:
        with contextlib.suppress(RunFailed):  # a full disk: what is saved is saved
            trainer.metrics.event("end", f"{error} {go_on}", trainer.step, reason="signal")
        return {"code": error.exit_code, "message": f"{error}\n{go_on}"}
    except FolderGone as error:
        return {"code": error.exit_code, "message": f"FolderGone: {error}"}
    except SpheresError as error:
        last = next((step for step in reversed(store.steps()) if looks_whole(store.path(step))), None)
        saved = "No checkpoint had been saved." if last is None else f"The last checkpoint is {store.path(last)}."
        if isinstance(error, NonFinite):
            go_on = trainer.way_out()
        message = f"{type(error).__name__}: {error}\n{saved}\n{go_on}"
        with contextlib.suppress(RunFailed):
            trainer.metrics.event("failed", message, trainer.step, error=type(error).__name__)
        return {"code": error.exit_code, "message": message}
    path = store.path(trainer.step)
    ended = f"Ended at step {trainer.step:,}"
    if reason == "early_stop":
        evaluations = plural(trainer.progress.stale, "evaluation")
        ended = f"Stopped early at step {trainer.step:,}: no better validation loss for {evaluations}"
    trainer.metrics.event("end", f"{ended}: {trainer.run}", trainer.step, reason=reason, path=str(path))
    return {"code": 0, "message": f"{ended}. The run is in {trainer.run}"}


def main() -> None:
    """Obey the order on standard input."""
    launcher = Launcher.watched(int(sys.argv[1]))
    if launcher is None:
        return
    set_title("node zero")
    try:
        server = start_server(*sys.argv[2:4])  # it warms up while this process still imports, and waits for its order
        outcome = run_training(server, launcher)
    except SpheresError as error:
        outcome = {"code": error.exit_code, "message": f"{type(error).__name__}: {error}"}
    except BaseException:
        traceback.print_exc()
        outcome = {"code": 1, "message": traceback.format_exc()}
    say(outcome=outcome)
    os._exit(outcome["code"])  # threads that wait for signals would hold a normal exit


if __name__ == "__main__":
    main()

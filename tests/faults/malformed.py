"""Strategies for malformed inputs, and the promise they are held to: it works, or it is refused in words.

A strategy makes plain data (bytes, JSON values, lists of changes); `harmless` watches what the code does with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import stat
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from cllm_spheres import events
from cllm_spheres.checkpoint.checkpoint import FILES
from cllm_spheres.checkpoint.files import seal
from cllm_spheres.checkpoint.store import Store
from cllm_spheres.errors import SpheresError
from cllm_spheres.inference import model as inference
from cllm_spheres.model.families import family_of
from cllm_spheres.model.layout import Layout
from cllm_spheres.training import session
from cllm_spheres.training.folder import made_with
from cllm_spheres.training.plan import shape_of

WHOLE = os.environ.get("CLLM_FAULTS") == "whole"
LIMIT_S = 40  # for one input, which takes milliseconds; a machine with other work is slow, not a hundred times
MOST_CHARACTERS = 1500  # of a message: a paragraph, and room for the paths in it
tried: Counter[str] = Counter()  # kind of input -> how many


def many(whole: int, short: int):
    """How many examples: a fixed few each time, or `whole` random ones where the environment asks for them."""
    return settings(
        max_examples=whole if WHOLE else short,
        derandomize=not WHOLE,
        database=None,
        print_blob=True,
        deadline=None,  # SIGALRM is the deadline: it also ends what would never return
        suppress_health_check=list(HealthCheck),
    )


# --- a good run

MODEL = dict(layers=1, heads=2, width=8, ff_width=16, block_size=4, batch_size=2, spheres=2, workers=1, dtype="fp32")


def make_run(path: Path, data: Path) -> Path:
    """A run on prepared data with checkpoints of the steps 1 and 2 and a few records, made without a training."""
    plan = session.new_run(data, MODEL | dict(steps=4), run=path, file=None)
    shape, rng = shape_of(plan.config), np.random.default_rng(1)
    layout, config = Layout(shape), family_of(shape).files.config(shape, plan.prepared.eot, 0.0)
    params_P = rng.standard_normal(layout.size).astype(np.float32) * 0.1
    model = layout.views(params_P)
    moments = {f"{kind}.{name}": view for kind in ("moments", "squares") for name, view in model.items()}
    for step in (1, 2):
        state = dict(
            step=step, evaluated=step, saved=step, best_loss=3.0 / step, best_step=step, worse=0, applied=step,
            sequences=2 * step, total_tokens=8 * step, **made_with(plan.config, plan.prepared.fingerprint),
            fingerprint={"numpy": np.__version__},
        )  # fmt: skip
        store = Store(path)
        store.save(step, model, moments, state, config, data / "tokenizer.json")
        store.mark_best(step)
    record = dict(step=1, loss=3.0, lr=1e-3, grad_norm=1.0, clipped_norm=1.0, tokens=8, total_tokens=8, time=1.0e9,
                  seconds=0.1, tokens_per_s=80.0, compute_s=0.1, waiting_s=0.0, gather_s=0.0, update_s=0.0,
                  other_s=0.0)  # fmt: skip
    lines = [
        events.event("start", "begins", step=0, time=1.0e9, workers=1, config=plan.config.model_dump()),
        {"kind": "step", **record},
        {"kind": "eval", "step": 1, "val_loss": 3.0, "perplexity": 20.1, "time": 1.0e9},
        {"kind": "spheres", "step": 1, "time": 1.0e9, "worker": [0, 0], "throughput": [1.0, 2.0],
         "waiting": [0.1, 0.2], "state": ["computing", "waiting"], "cpu_percent": 99.0, "memory_bytes": 1e9},
        events.event("saved", "saved", step=1, time=1.0e9),
        events.event("end", "ended", step=2, time=1.0e9, reason="done"),
    ]  # fmt: skip
    (path / "metrics.jsonl").write_text("".join(events.dumps(line) + "\n" for line in lines))
    inference.load(path).generate("the ", tokens=2)  # compiles the kernels, which may take longer than the time limit
    return path


def reseal_checkpoint(path, step):
    """A manifest that agrees with whatever the files hold."""
    entries = {}
    for name in FILES:
        data = (path / name).read_bytes()
        entries[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_bytes(seal({"format": 1, "step": step, "files": entries}))


# --- the promise


class Hung(BaseException):
    """Not an Exception: no handler of the code under test may swallow it."""


def listing(*places: Path) -> dict[str, tuple]:
    """What stands in some folders: path -> kind, permissions, size, time of the last change, target of a link."""
    found = {}
    for place in places:
        for folder, folders, files in os.walk(place):
            for name in [*folders, *files]:
                path = os.path.join(folder, name)
                status = os.lstat(path)
                target = os.readlink(path) if stat.S_ISLNK(status.st_mode) else None
                is_folder = stat.S_ISDIR(status.st_mode)
                found[path] = (
                    status.st_mode, is_folder or status.st_size, is_folder or status.st_mtime_ns, target,
                )  # fmt: skip
    return found


@contextlib.contextmanager
def time_limit():
    """Raises Hung in what takes longer than LIMIT_S."""

    def stop(*_):
        raise Hung(f"no answer after {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_message(message: str) -> None:
    """It reads as one paragraph."""
    assert message.strip() and "Traceback" not in message
    assert len(message) <= MOST_CHARACTERS, f"{len(message)} characters: {message[:200]} ... {message[-200:]}"


@contextlib.contextmanager
def harmless(*places: Path):
    """The block works, or raises SpheresError with a paragraph and leaves `places` as they were; else it fails."""
    watched = [*places, Path(tempfile.gettempdir())]
    before = listing(*watched)
    try:
        with time_limit():
            yield
    except SpheresError as error:
        check_message(str(error))
        after = listing(*watched)
        assert after == before, f"left behind or changed: {dict(after.items() ^ before.items())} by {error}"


# --- plain data

DEEP = 3000  # levels of nesting: more than Python's limit for recursion
numbers = st.sampled_from(
    [-1, 0, 1, 2, 3, 7, 255, 257, 65536, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**18, 10**30, -(2**63)]
)
odd_floats = st.sampled_from([0.0, -0.0, 0.5, 1.0, 1e-320, 1e308, -1e308, float("nan"), float("inf"), float("-inf")])
odd_texts = st.sampled_from(
    ["", " ", "x", "\0", "a\0b", "\n", "\x1b[31m", "\x7f", "ü", "日本", "\U0001f600", "\ud800", "\ufeff", "..", "../x",
     "/", "/dev/zero", "/dev/null", "train.bin", "manifest.json", "nan", "1", "-1", "true", "none", "x" * 300,
     "y" * 5000, "a/" * 3000]
)  # fmt: skip
texts = odd_texts | st.text(max_size=12)
scalars = st.none() | st.booleans() | numbers | st.integers() | odd_floats | st.floats() | texts
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


class Deep:
    """A value that is nested too deeply for json.dumps: `to_text` writes it."""


def to_text(value) -> str:
    """JSON, and what only looks like it: NaN, a Deep."""
    if isinstance(value, Deep):
        return "[" * DEEP + "]" * DEEP
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(k))}: {to_text(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_text, value)) + "]"
    return json.dumps(value)


# Lists and objects are built anew each time: they are changed afterwards.
odd_values = st.one_of(
    json_values, st.builds(Deep), st.builds(lambda: [[] for _ in range(50)]), st.builds(lambda: {"bytes": 1})
)


def paths_of(value, path=()):
    """Every place in a JSON value, the root last."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in list(inner)[:40]:
        yield from paths_of(child, (*path, key))
    yield path


@st.composite
def mutated(draw, good, most=3):
    """A good JSON value with one to `most` places replaced, removed, added or stretched."""
    value = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(list(paths_of(value))))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(odd_values)
            if isinstance(value, dict):
                value[draw(texts)] = draw(odd_values)
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        here = holder[path[-1]]
        match draw(st.sampled_from(["replace", "replace", "nudge", "remove", "add", "wrap"])):
            case "replace":
                holder[path[-1]] = draw(odd_values)
            case "nudge" if isinstance(here, int | float) and not isinstance(here, bool):
                holder[path[-1]] = draw(
                    st.sampled_from([here + 1, here - 1, -here, here * 2, here * 10**6, float(here), str(here), 0])
                )
            case "nudge" if isinstance(here, str):
                holder[path[-1]] = draw(st.sampled_from([here + "x", here[:-1], here.upper(), here * 200, ""]))
            case "remove":
                del holder[path[-1]]
            case "add" if isinstance(holder, dict):
                holder[draw(texts)] = draw(odd_values)
            case "wrap":
                holder[path[-1]] = [here]
            case _:
                holder[path[-1]] = draw(scalars)
    return value


@st.composite
def broken_bytes(draw, good: bytes):
    """Good bytes cut, lengthened, flipped, or others in their place."""
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["cut", "add", "flip", "flip", "insert", "remove", "other"])):
            case "cut":
                del data[place:]
            case "add":
                data += draw(st.binary(max_size=20))
            case "flip" if data:
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "insert":
                data[place:place] = draw(st.binary(max_size=8))
            case "remove":
                del data[place : place + draw(st.integers(1, 20))]
            case "other":
                data = bytearray(draw(st.binary(max_size=200)))
    return bytes(data)


json_texts = st.one_of(
    odd_values.map(to_text).map(lambda text: text.encode("utf-8", "replace")),
    st.binary(max_size=100),
    st.sampled_from(
        [b"", b"{", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b'"\\ud800"', b"\xff\xfe{", b"null"]
    ),
)

# What may stand in the place of a file.
PLACES = ("missing", "folder", "link to itself", "link to nothing", "fifo", "empty", "endless", "link to a folder")


def put(path: Path, what: str) -> None:
    """Replaces a file by something of another kind."""
    path.unlink(missing_ok=True)
    match what:
        case "folder":
            path.mkdir()
        case "link to itself":
            path.symlink_to(path.name)
        case "link to nothing":
            path.symlink_to("nowhere")
        case "link to a folder":
            path.symlink_to(".")
        case "fifo":
            os.mkfifo(path)
        case "empty":
            path.touch()
        case "endless":
            path.symlink_to("/dev/zero")

"""`cllm-spheres chat`: a run -> a conversation in the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from cllm_spheres_cli.options import (
    CheckpointName,
    MinP,
    NewestRun,
    RepetitionPenalty,
    Temperature,
    Threads,
    TopK,
    TopP,
    WeightsDtype,
    newest,
)

from cllm_spheres.errors import InputError, nearest

if TYPE_CHECKING:
    from cllm_spheres.inference.chat import Chat
    from cllm_spheres.inference.options import Options

HELP = """\
/again           another answer to the last turn
/undo            forget the last turn and its answer
/new             begin anew
/system TEXT     what stands before the conversation; without TEXT nothing
/set NAME VALUE  change how answers are written; without NAME show how they are
/save FILE       write the conversation into a file
/help            this
/exit            leave (or Ctrl+D)
Ctrl+C ends an answer. A line that ends with \\ goes on in the next one."""
SETTABLE = ("tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
HISTORY_LINES = 1000
ENDED = 130  # by Ctrl+C at the prompt


def chat(
    run: NewestRun = None,
    system: Annotated[str | None, typer.Option(help="A text that stands before the conversation.")] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens an answer has at most.")] = 200,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed answers the same.")] = 1337,
    dtype: WeightsDtype = "fp32",
    threads: Threads = None,
    checkpoint: CheckpointName = None,
) -> None:
    """Talk with a trained model: it goes on with a play of User and Assistant. /help tells what else there is.

    A model answers as the text did that it was trained on; from source code come no answers.
    """
    from cllm_spheres.inference.chat import Chat
    from cllm_spheres.inference.model import load
    from cllm_spheres.inference.options import Options

    options = Options(tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed=seed).validate()
    model = load(newest(run), checkpoint)
    with model.writer(dtype=dtype, threads=threads) as writer:
        talk = Chat(model, writer, options, system)
        if sys.stdin.isatty():
            print(f"{model!r}\n/help tells what else you can say; Ctrl+D leaves.")
        with _line_history():
            _talk(talk)


def _talk(talk: Chat) -> None:
    """Line by line, until the input ends."""
    asked_to_leave = False
    while True:
        try:
            line = _read_line()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return
        except KeyboardInterrupt:
            print()
            if asked_to_leave or not sys.stdin.isatty():
                raise typer.Exit(ENDED) from None
            asked_to_leave = True
            print("(Ctrl+C again leaves, as Ctrl+D does.)")
            continue
        asked_to_leave = False
        if line.strip() == "/exit":
            return
        if not line.strip():
            continue
        try:
            _obey(talk, line)
        except InputError as error:
            print(error, file=sys.stderr)


def _read_line() -> str:
    """A line; one that ends with a backslash goes on in the next."""
    prompt, lines = "> " if sys.stdin.isatty() else "", []
    while True:
        lines.append(input(prompt))
        if not lines[-1].endswith("\\"):
            return "\n".join(lines)
        lines[-1] = lines[-1][:-1]
        prompt = ". " if prompt else ""


def _obey(talk: Chat, line: str) -> None:
    """A command that begins with a slash, or a turn of the conversation."""
    if not line.startswith("/"):
        _show(talk, talk.say(line))
        return
    name, _, rest = line[1:].strip().partition(" ")
    rest = rest.strip()
    if name == "again":
        _show(talk, talk.again())
    elif name == "undo":
        talk.undo()
    elif name == "new":
        talk.forget()
    elif name == "system":
        talk.system = rest or None
    elif name == "set":
        talk.options = _changed(talk.options, rest)
    elif name == "save":
        _save(talk, rest)
    elif name == "help":
        print(HELP)
    else:
        known = ("again", "undo", "new", "system", "set", "save", "help", "exit")
        raise InputError(f"There is no /{name}: {nearest(name, known)}")


def _show(talk: Chat, pieces: Iterator[str]) -> None:
    """An answer as it is written; Ctrl+C ends it."""
    from cllm_spheres_cli.generate import harmless

    before = talk.left_out
    with contextlib.suppress(KeyboardInterrupt), contextlib.closing(pieces):  # type: ignore[type-var]
        for piece in pieces:
            sys.stdout.write(harmless(piece))
            sys.stdout.flush()
    print()
    if talk.left_out and not before:
        print("(The model's block is full: from now on it does not see the oldest turns any more.)", file=sys.stderr)


def _changed(options: Options, words: str) -> Options:
    """`/set`: the options with another value; without words they are shown."""
    if not words:
        for name in SETTABLE:
            print(f"{name} {getattr(options, name)}")
        return options
    name, _, value = words.partition(" ")
    name, value = name.replace("-", "_"), value.strip()
    if name not in SETTABLE:
        raise InputError(f"There is no option {name!r}: {nearest(name, SETTABLE)}")
    kinds = {field.name: str(field.type) for field in fields(options)}
    try:
        number: Any = int(value) if kinds[name].startswith("int") else float(value)
    except ValueError:
        if value not in ("none", "off") or "None" not in kinds[name]:
            raise InputError(f"{name} cannot be {value!r}: give a number.") from None
        number = None
    return replace(options, **{name: number}).validate()


def _save(talk: Chat, name: str) -> None:
    from cllm_spheres.inference.conversation import written
    from cllm_spheres.text.dialogue import SYSTEM, Message

    if not name:
        raise InputError("/save needs the name of a file.")
    system = [Message(SYSTEM, talk.system)] if talk.system else []
    try:
        with open(name, "x", encoding="utf-8") as file:
            file.write(written([*system, *talk.turns]).removesuffix("Assistant:"))
    except OSError as error:
        raise InputError(f"{name} cannot be written: {error.strerror}.") from None
    print(f"Written into {name}.")


@contextlib.contextmanager
def _line_history() -> Iterator[None]:
    """Lines of earlier conversations, at the arrow keys; where lines can be edited."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:  # a Python without it
        yield
        return
    base = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    path = Path(base) / "cllm-spheres" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            readline.write_history_file(path)
            path.chmod(0o600)

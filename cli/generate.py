"""`cllm-spheres generate`: a run and prompts -> texts, as they are written."""

from __future__ import annotations

import itertools
import json
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

from cllm_spheres.errors import InputError

if TYPE_CHECKING:
    from cllm_spheres.inference.model import Model

MOST_PROMPT_BYTES = 1 << 28  # of a file


def generate(
    run: NewestRun = None,
    prompt: Annotated[str | None, typer.Option(help="The text to go on from. Default: an end of text.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='A file of prompts, one a line; .jsonl: {"prompt": "..."} a line.', metavar="FILE"),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(help="How many tokens to write; an end of text stops before. Default: 200.", show_default=False),
    ] = None,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text. May be given several times.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 1337,
    samples: Annotated[int, typer.Option(help="Texts for each prompt.")] = 1,
    beams: Annotated[int | None, typer.Option(help="Search the likeliest text with so many beams instead.")] = None,
    length_penalty: Annotated[
        float | None, typer.Option(help="Of --beams: above 0 favours longer texts. Default: 1.", show_default=False)
    ] = None,
    best: Annotated[
        int | None, typer.Option(help="Of --beams: the n best texts. Default: 1.", show_default=False)
    ] = None,
    dtype: WeightsDtype = "fp32",
    threads: Threads = None,
    json_lines: Annotated[bool, typer.Option("--json", help="One JSON object a text, when it has ended.")] = False,
    checkpoint: CheckpointName = None,
) -> None:
    """Let a trained model write.

    The same seed and options write the same text, however many are written at once, on any number of threads.
    """
    from cllm_spheres.inference.model import load

    if prompt is not None and prompts is not None:
        raise InputError("Both --prompt and --prompts were given: give one.")
    if beams is None and (length_penalty is not None or best is not None):
        raise InputError("--length-penalty and --best are for a search: give --beams, such as --beams 4.")
    all_prompts = [prompt or ""] if prompts is None else _read(prompts)
    how: dict[str, Any] = {"dtype": dtype, "threads": threads}
    if tokens is not None:
        how["tokens"] = tokens
    sampling = dict(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
        stop=stop or (), seed=seed,
    )  # fmt: skip
    if beams is not None:
        _check_beams(samples, sampling)
    model = load(newest(run), checkpoint)
    many = len(all_prompts) > 1 or samples != 1 or (best or 1) > 1
    try:
        if beams is not None:
            for number, text in enumerate(all_prompts):
                found = model.beams(
                    text,
                    **how,
                    width=beams,
                    best=best or 1,
                    length_penalty=1.0 if length_penalty is None else length_penalty,
                )
                for rank, beam in enumerate(found):
                    facts = {"score": beam.score, "logprob": beam.logprob, "ended": "stop" if beam.ended else "length"}
                    _show(text, number, rank, beam.text, len(beam.tokens), facts, json_lines, many)
        elif many or json_lines:
            for one in model.generate_all(all_prompts, samples=samples, **how, **sampling):
                text = all_prompts[one.prompt]
                _show(text, one.prompt, one.sample, one.text, len(one.tokens), {"ended": one.ended}, json_lines, many)
        else:
            _stream(model, all_prompts[0], how | sampling)
    except KeyboardInterrupt:
        print()
        raise typer.Exit(130) from None


def _check_beams(samples: int, sampling: dict[str, Any]) -> None:
    """A search chooses the likeliest: what tells how to draw has no meaning for it."""
    from cllm_spheres.inference.options import Options

    neutral = Options()
    given = [name for name, value in sampling.items() if value != getattr(neutral, name)]
    if samples != 1:
        given.append("samples")
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise InputError(f"--beams searches the likeliest texts, and draws none: leave {names} out, or --beams.")


def _read(path: Path) -> list[str]:
    """The prompts of a file; InputError where it has none, or a line is none."""
    from cllm_spheres.text.folder import read_regular

    try:
        text = read_regular(path, MOST_PROMPT_BYTES).decode()
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from None
    lines = [line.removesuffix("\r") for line in text.split("\n") if line.strip()]
    if path.suffix == ".jsonl":
        lines = [_prompt_of(path, number, line) for number, line in enumerate(lines, 1)]
    if not lines:
        raise InputError(f"{path} holds no prompts: write one a line.")
    return lines


def _prompt_of(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
        if record.keys() == {"prompt"} and isinstance(record["prompt"], str):
            return record["prompt"]
    except (ValueError, AttributeError, RecursionError):
        pass
    raise InputError(f'{path}, line {number}, is not of the form {{"prompt": "..."}}.')


def _show(
    prompt: str, number: int, sample: int, text: str, tokens: int, facts: dict[str, Any], json_lines: bool, many: bool
) -> None:
    """A whole text, on its own or as one of many."""
    if json_lines:
        record = {"prompt": prompt, "number": number, "sample": sample, "text": text, "tokens": tokens, **facts}
        print(json.dumps(record, ensure_ascii=False), flush=True)
        return
    if many:
        score = f", score {facts['score']:.4f}" if "score" in facts else ""
        print(f"--- prompt {number + 1}, text {sample + 1}{score} ---")
    print(harmless(prompt + text), flush=True)


def _stream(model: Model, prompt: str, options: dict[str, Any]) -> None:
    """One text, as it is written."""
    import sys

    pieces = model.stream(prompt, **options)
    first = next(pieces, "")  # what cannot be is told before anything is shown
    sys.stdout.write(harmless(prompt))
    for piece in itertools.chain([first], pieces):
        sys.stdout.write(harmless(piece))
        sys.stdout.flush()
    print()


def harmless(text: str) -> str:
    """On a terminal without the control characters that would command it."""
    import sys

    if not sys.stdout.isatty():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)

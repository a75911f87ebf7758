"""`cllm-spheres serve RUN...`: runs behind the HTTP API that OpenAI's clients speak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from cllm_spheres_cli.options import CheckpointName, newest

INSTALL = "pip install 'cllm-spheres[web]'"
KEY_CHARACTERS = 16  # at least


def serve(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Folders of runs: each is a model, named like its folder. Default: the newest in runs/.",
            metavar="RUN",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; another than this machine's own needs an API key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes any that is free.")] = 8000,
    checkpoint: CheckpointName = None,
    dtype: Annotated[str, typer.Option(help="Precision of the weights.", metavar="fp32|bf16")] = "fp32",
    slots: Annotated[int, typer.Option(help="Texts of a model that are written at once.")] = 16,
    threads: Annotated[int | None, typer.Option(help="Threads of a model. Default: what its size is worth.")] = None,
    queue: Annotated[int, typer.Option(help="Texts that may wait; beyond, requests get 429.")] = 256,
    max_tokens: Annotated[int, typer.Option(help="The most new tokens that a request may ask for.")] = 4096,
    timeout: Annotated[float, typer.Option(help="Seconds that a request may take, its wait included.")] = 600.0,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="A file with the key that requests must bring. Or set CLLM_SPHERES_API_KEY."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A further name by which clients call this server. May be repeated.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="A web page's origin whose scripts may ask, as https://example.org. May be repeated."),
    ] = None,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Print a line for each request, without its texts and keys.")
    ] = False,
) -> None:
    """Serve trained models: completions and chat for OpenAI's clients, on this machine.

    The server is an extra: pip install 'cllm-spheres\\[web]'. Ctrl+C stops it; requests in flight may end.
    """
    from cllm_spheres.errors import InputError

    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(f"The server needs {error.name}, which is not installed: {INSTALL}") from None
    from cllm_spheres.web.link import Setup
    from cllm_spheres.web.requests import Limits
    from cllm_spheres.web.server import Settings
    from cllm_spheres.web.server import serve as serve_until_signal

    if dtype not in ("fp32", "bf16"):
        raise InputError(f"--dtype {dtype}: give fp32 or bf16.")
    if threads is not None and threads < 1:
        raise InputError(f"--threads {threads}: give 1 or more, or leave it out.")
    _check_names(allow_host or [], allow_origin or [])
    setup = Setup(_named(runs or [newest(None)]), checkpoint, slots, dtype, threads)
    settings = Settings(
        setup, host, port, queue, _key(api_key_file), tuple(allow_host or ()), tuple(allow_origin or ()),
        Limits(tokens=max_tokens, texts=min(128, max(1, queue)), seconds=timeout), log_requests,
    )  # fmt: skip
    serve_until_signal(settings, lambda line: print(line, flush=True))


def _check_names(hosts: list[str], origins: list[str]) -> None:
    """InputError for a name that no request could have."""
    import re

    from cllm_spheres.errors import InputError, shown

    for host in hosts:
        if not re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.]+\]", host):
            raise InputError(f"--allow-host {shown(host)}: give a name alone, such as models.example.org.")
    for origin in origins:
        if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[\w.:\[\]-]+/?", origin, re.IGNORECASE):
            raise InputError(f"--allow-origin {shown(origin)}: give scheme and host, such as https://example.org.")


def _named(runs: list[Path]) -> dict[str, Path]:
    """Runs by the names of their folders. InputError where two have the same."""
    import os

    from cllm_spheres.errors import InputError

    named: dict[str, Path] = {}
    for run in runs:
        name = os.fsencode(run.absolute().name).decode("utf-8", "backslashreplace") or "run"
        if name in named:
            raise InputError(f"{named[name]} and {run} are both named {name}: give folders with different names.")
        named[name] = run
    return named


def _key(path: Path | None) -> str | None:
    """The API key of a file, or of the environment; None where neither is given."""
    import os

    from cllm_spheres.errors import InputError
    from cllm_spheres.text.folder import read_regular
    from cllm_spheres.web.link import KEY_VARIABLE

    if path is None and KEY_VARIABLE not in os.environ:
        return None
    if path is None:
        where, key = KEY_VARIABLE, os.environ[KEY_VARIABLE].strip()
    else:
        try:
            where, key = str(path), read_regular(path).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise InputError(f"Cannot read the API key in {path}: {reason}.") from None
    if len(key) < KEY_CHARACTERS or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(
            f"The API key in {where} has {len(key)} characters: at least {KEY_CHARACTERS} are needed, ASCII without"
            " blanks. A good one: python3 -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    return key

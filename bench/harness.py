"""A run behind the OpenAI-compatible server -> what EleutherAI's lm-evaluation-harness says of it, in lm_eval.md.

    make harness RUN=runs/books
    python -m cllm_spheres_bench.harness runs/books --python .venv-harness/bin/python [--url http://127.0.0.1:8000]

The harness lives in an environment of its own (--python), the tokenizer it asks with is that of the run's export for
Hugging Face, and prompts travel as token ids. Without --url a server is started here and ended again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
from cllm_spheres_bench.children import end_tree
from cllm_spheres_bench.harness_task import TASKS, write_tasks
from cllm_spheres_bench.machine import facts, results_folder

from cllm_spheres.errors import InputError, RunFailed, SpheresError
from cllm_spheres.text.prepared import Prepared
from cllm_spheres.training.folder import read_config

COMMAND = Path(sys.executable).with_name("cllm-spheres")
STARTS_WITHIN_S = 180.0  # a server that may have to compile its kernels
TABLE = re.compile(r"^\|.*\|$", re.MULTILINE)


def main(arguments: list[str] | None = None) -> int:
    """The command; 2 for bad input, 1 where the harness or the server failed."""
    parser = argparse.ArgumentParser(prog="python -m cllm_spheres_bench.harness", description="Run lm-eval on a run.")
    parser.add_argument("run", type=Path, help="the folder of a run")
    parser.add_argument("--python", type=Path, required=True, help="of the environment that has lm-eval")
    parser.add_argument("--url", help="of a server that has the run already, such as http://127.0.0.1:8000")
    parser.add_argument("--tokenizer", type=Path, help="the run's export for Hugging Face; without, it is made")
    parser.add_argument("--items", type=int, default=200, help="questions")
    parser.add_argument("--pieces", type=int, default=50, help="pieces of text")
    parser.add_argument("--out", type=Path, help="where lm_eval.md goes; by default bench/results")
    options = parser.parse_args(arguments)
    try:
        print(run(options, shlex.join(["python", "-m", "cllm_spheres_bench.harness", *(arguments or sys.argv[1:])])))
    except SpheresError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def run(options: argparse.Namespace, command: str) -> str:
    """Tasks, tokenizer, server, harness; the text of lm_eval.md, which is written."""
    config, where = read_config(options.run)
    prepared = Prepared.open(where["data"])
    versions = _versions(options.python)
    folder = results_folder(options.out)
    with tempfile.TemporaryDirectory(prefix="cllm-spheres-harness-") as name, contextlib.ExitStack() as stack:
        place = Path(name)
        write_tasks(place, prepared, config.block_size, options.items, options.pieces)
        tokenizer = options.tokenizer or _export(options.run, place / "hf")
        url = options.url or stack.enter_context(_server(options.run, place / "server.log"))
        said = _lm_eval(options, place, f"{url.rstrip('/')}/v1/completions", tokenizer, config.block_size)
    about = facts(command)
    text = (
        f"# lm-evaluation-harness\n\n`{command}`, {about['cores']} cores of {about['machine']}, commit"
        f" {about['commit']}, {about['date']}; {versions}.\n\n"
        f"{options.items} questions of four continuations (25 % by chance) and {options.pieces} pieces of text, from"
        f" the validation part of a run of {config.tokenizer} tokens and a block of {config.block_size}, asked of"
        f" /v1/completions as token ids (`local-completions`). What it printed:\n\n{said}\n"
    )
    (folder / "lm_eval.md").write_text(text)
    return text


def _versions(python: Path) -> str:
    """Of lm-eval and transformers there. InputError where they are missing."""
    code = (
        "from importlib.metadata import version as v; print('lm-eval', v('lm_eval'), 'transformers', v('transformers'))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60)
    except OSError as error:
        raise InputError(f"--python {python} cannot be run: {error.strerror}. Make it with: make harness") from None
    if done.returncode:
        raise InputError(f"--python {python} has no lm-eval with transformers. Make it with: make harness")
    return done.stdout.strip()


def _export(run: Path, target: Path) -> Path:
    done = subprocess.run([COMMAND, "export", run, target, "--to", "hf"], capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RunFailed(f"The tokenizer could not be exported:\n{done.stderr.strip()}")
    return target


@contextlib.contextmanager
def _server(run: Path, log: Path) -> Iterator[str]:
    """`cllm-spheres serve` on a free port of this machine, until the end of the block; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out:
        process = psutil.Popen([COMMAND, "serve", run, "--port", str(port)], stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + STARTS_WITHIN_S
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RunFailed(f"The server did not start:\n{log.read_text(errors='replace').strip()}")
            time.sleep(0.2)
        yield url
    finally:
        end_tree(process)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _lm_eval(options: argparse.Namespace, place: Path, url: str, tokenizer: Path, block_size: int) -> str:
    """Run the harness; its tables. RunFailed with the end of what it said where it fails."""
    model = {
        "model": options.run.resolve().name, "base_url": url, "tokenizer": str(tokenizer.resolve()),
        "tokenizer_backend": "huggingface", "tokenized_requests": True, "num_concurrent": 4, "max_retries": 2,
        "max_length": block_size, "timeout": 120,
    }  # fmt: skip
    words = [
        options.python.absolute(), "-m", "lm_eval", "run", "--model", "local-completions",
        "--model_args", json.dumps(model), "--tasks", *TASKS, "--include_path", place, "--batch_size", "1",
    ]  # fmt: skip
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "cache"),
        "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, cwd=place)
    tables = TABLE.findall(done.stdout)
    if done.returncode or not tables:
        raise RunFailed(f"lm-eval ended with {done.returncode}:\n{(done.stderr + done.stdout).strip()[-3000:]}")
    return "\n".join(tables)


if __name__ == "__main__":
    sys.exit(main())

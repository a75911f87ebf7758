"""python tests/documents.py, an order in JSON on standard input -> the code of a document, run in this one process.

The order is {"commands": [[word, ...], ...], "python": code}: commands of `cllm-spheres`, or of others, in turn, then
what stands in the document's Python blocks. The first that fails ends it with a message and exit code 1.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys

from cllm_spheres_cli.app import app


def run(words: list[str]) -> None:
    """One command; SystemExit where it fails."""
    print(f"$ {shlex.join(words)}", flush=True)
    if words[0] != "cllm-spheres":
        subprocess.run(words, check=True)
        return
    sys.argv = words
    try:
        app()
    except SystemExit as ended:
        if ended.code not in (0, None):
            raise


def main() -> None:
    order = json.load(sys.stdin)
    for words in order["commands"]:
        run(words)
    exec(compile(order["python"], "the document's Python", "exec"), {"__name__": "document"})


if __name__ == "__main__":
    main()

"""Compiles the kernels that the tests import, before several processes of pytest would each compile all of them.

`python -m tests.compile` compiles the model in this process, and the workers' engine and the writer in a second one.
Where the cache has them already it takes two seconds.
"""

from __future__ import annotations

import subprocess
import sys

from cllm_spheres.model import dtypes

REST = "import cllm_spheres.spheres.engine, cllm_spheres.inference.ops, cllm_spheres.inference.writer"


def main() -> None:
    """Compile both parts; the exit code is not 0 where either fails."""
    with subprocess.Popen([sys.executable, "-c", REST]) as rest:
        for dtype in sorted({dtypes.usable(dtype) for dtype in dtypes.DTYPES}):
            dtypes.load(dtype)
    sys.exit(rest.returncode)


if __name__ == "__main__":
    main()

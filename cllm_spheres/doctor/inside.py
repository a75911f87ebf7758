"""`python -m cllm_spheres.doctor.inside DESCRIPTOR PARENT_PID`: the kernels, looked at in a process of its own.

What is wrong with kernels may end the process that runs them. In: one JSON packet with the job. Out: {"status": text}
while something is compiled, {"looking": check} before each check, {"finding": {...}} after it.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict

from cllm_spheres.crystal import jit
from cllm_spheres.doctor.finding import Answer, look
from cllm_spheres.spheres.job import Job
from cllm_spheres.spheres.server import PACKET_BYTES, Server, die_with


def look_at_blas() -> Answer:
    """The version of OpenBLAS and the kernels it chose."""
    from cllm_spheres.kernels import blas

    version, core = blas.description().split()
    return "ok", f"OpenBLAS {version}, core {core}, one thread"


def look_at_kernels(server: Server, dtype: str, family: str) -> Answer:
    """Compiled where they are not yet, and compared with numpy."""
    from cllm_spheres.doctor.twins import look_at_model

    server.warm(dtype)
    return look_at_model(dtype, family)


def checks(server: Server, job: Job) -> list[tuple[str, Callable[[], Answer]]]:
    """What is looked at in here, in order."""
    from cllm_spheres.model import dtypes

    def optimizer() -> Answer:
        from cllm_spheres.doctor.twins import look_at_optimizer

        return look_at_optimizer()

    def speed() -> Answer:
        from cllm_spheres.doctor.speed import look_at_speed

        return look_at_speed(job)

    usable = [dtype for dtype in dtypes.DTYPES if dtypes.usable(dtype) == dtype]
    return [
        ("BLAS", look_at_blas),
        *(
            (f"kernels {dtype}", lambda dtype=dtype: look_at_kernels(server, dtype, job.shape.family))
            for dtype in usable
        ),
        ("optimizer", optimizer),
        ("speed", speed),
    ]


def main() -> None:
    """The child's process."""
    die_with(int(sys.argv[2]))
    connection = socket.socket(fileno=int(sys.argv[1]))
    server = Server(connection)
    jit.announce = lambda text: server.say(status=text)
    job = Job.from_dict(json.loads(connection.recv(PACKET_BYTES)))
    for name, examine in checks(server, job):
        server.say(looking=name)
        server.say(finding=asdict(look(name, examine)))
    server.say(finished=True)


if __name__ == "__main__":
    main()

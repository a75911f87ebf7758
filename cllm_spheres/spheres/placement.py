"""The machine's cores and the tree of workers -> a core for each worker, and cores that no other run has taken.

Workers stand in the tree like spheres: 12 groups, each a worker of level 1 and its children. A group stays within one
third-level cache where it fits, else within one socket; the groups are spread over caches and sockets, since all of
them are limited by the bandwidth of memory.
"""

from __future__ import annotations

import errno
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cllm_spheres.spheres.topology import group

# A run that chooses holds every core for some microseconds: another one that begins just then looks again.
ATTEMPTS, ATTEMPT_S = 3, 0.01
_CPUS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Core:
    """A logical CPU, its socket, and the first CPU that shares its third-level cache."""

    cpu: int
    socket: int
    cache: int


def read_cores(cpus: Sequence[int], root: Path = _CPUS) -> list[Core]:
    """What the kernel says of these CPUs; where it says nothing, one socket, and the socket as the cache."""
    cores = []
    for cpu in cpus:
        package = _first_number(root / f"cpu{cpu}/topology/physical_package_id", 0)
        cores.append(Core(cpu, package, _first_number(root / f"cpu{cpu}/cache/index3/shared_cpu_list", -1 - package)))
    return cores


def _first_number(path: Path, otherwise: int) -> int:
    """The first number of a file such as "8-15,72-79"."""
    try:
        return int(path.read_text().strip().split(",")[0].split("-")[0])
    except (OSError, ValueError):
        return otherwise


def place(num_workers: int, cores: Sequence[Core]) -> list[int]:
    """The CPU of each worker, each another one; empty where workers outnumber the cores."""
    if num_workers > len(cores):
        return []
    members: dict[int, list[int]] = {}
    for worker in range(num_workers):
        members.setdefault(group(worker, num_workers), []).append(worker)
    free = list(cores)
    chosen: dict[int, int] = {}
    for workers in sorted(members.values(), key=len, reverse=True):
        for worker, core in zip(workers, _together(len(workers), free), strict=True):
            chosen[worker] = core.cpu
            free.remove(core)
    return [chosen[worker] for worker in range(num_workers)]


def _together(count: int, free: Sequence[Core]) -> list[Core]:
    """`count` of the free cores that are near each other, where most are free."""
    sockets = Counter(core.socket for core in free)
    caches = Counter((core.socket, core.cache) for core in free)
    # The emptiest cache that holds them all, in the emptiest socket.
    fitting = [place for place, room in caches.items() if room >= count]
    if fitting:
        best = max(fitting, key=lambda place: (sockets[place[0]], caches[place]))
        return [core for core in free if (core.socket, core.cache) == best][:count]
    # Else one socket, taking its emptiest caches first; else whatever is free, in the same order.
    roomy = [number for number, room in sockets.items() if room >= count]
    only = max(roomy, key=lambda number: sockets[number]) if roomy else None
    near = [core for core in free if only is None or core.socket == only]
    near.sort(key=lambda core: (-sockets[core.socket], core.socket, -caches[core.socket, core.cache], core.cache))
    return near[:count]


class Claims:
    """Cores that this process has taken; other runs pin their workers elsewhere.

    A claim is an abstract socket bound to the core's name: it ends with the process that holds it, however that dies.
    Runs in other network namespaces, such as other containers, do not see it.
    """

    def __init__(self) -> None:
        self._held: dict[int, socket.socket] = {}

    def take(self, cores: Sequence[Core]) -> list[Core]:
        """Claim these cores; returns those that no other run holds."""
        return [core for core in cores if core.cpu in self._held or self._claim(core.cpu)]

    def _claim(self, cpu: int) -> bool:
        claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            claim.bind(f"\0cllm-spheres/cpu/{cpu}")
        except OSError as error:
            claim.close()
            return error.errno != errno.EADDRINUSE  # where it cannot be asked, nobody is there
        self._held[cpu] = claim
        return True

    def keep(self, cpus: Sequence[int]) -> None:
        """Give back all but these."""
        for cpu in set(self._held) - set(cpus):
            self._held.pop(cpu).close()


def claim(num_workers: int, cores: Sequence[Core]) -> tuple[Claims, list[int]]:
    """Claim a core for each worker among those that are free; none where there are not enough."""
    claims = Claims()
    for attempt in range(ATTEMPTS):
        cpus = place(num_workers, claims.take(cores))
        claims.keep(cpus)
        if cpus or num_workers > len(cores):
            break
        if attempt + 1 < ATTEMPTS:
            time.sleep(ATTEMPT_S)
    return claims, cpus
